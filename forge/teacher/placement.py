"""Loads the teacher that a config names, and puts it where the config wants it: on the device, the host, or sharded."""

import logging
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator, cpu_offload
from torch import nn
from transformers import PreTrainedModel

from forge.config.schema import Config, ModelConfig
from forge.config.teacher_schema import TeacherConfig
from forge.errors import UsageError
from forge.model.head import LinearHead, find_head
from forge.model.load import LoadedModel, not_pooler
from forge.ranks.deepspeed import prepare_teacher, round_weights
from forge.task.task import Task
from forge.teacher.teacher import ModelTeacher, TeacherModule, TeacherSource

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedTeacher(TeacherSource):
    """A teacher in host memory, frozen and in eval mode, in float32."""

    model: PreTrainedModel

    def __init__(self, loaded: LoadedModel, config: TeacherConfig):
        """Wrap a model that load_teacher gave."""
        self.loaded, self.config = loaded, config
        self.model, self.origin, self.label_ids = loaded.model, loaded.origin, loaded.label_ids

    def facts(self) -> dict[str, Any]:
        """Return the section `teacher` of run_metadata.json."""
        return self.loaded.facts()

    def place(self, accelerator: Accelerator, task: Task, columns: list[int] | None) -> ModelTeacher:
        """Return the teacher in its dtype, on the device, in host memory, or sharded over the ranks.

        With placement offload, accelerate brings each layer's weights to the device for its forward and drops them
        afterwards, so that the device holds one layer at a time.
        """
        if self.config.placement == "zero3":
            return self._sharded(accelerator, task, columns)
        config, model = self.config, self.model
        dtype = teacher_dtype(config, accelerator)
        device = accelerator.device if config.placement == "replicated" else torch.device("cpu")
        round_weights(model, dtype)
        cast(nn.Module, model).to(device)
        head = _head(model, task)  # before the weights are offloaded: finding it runs the head
        if config.placement == "offload":
            if accelerator.device.type == "cpu":
                logger.warning("teacher.placement: offload saves nothing here: the device is the CPU itself")
            cpu_offload(model, execution_device=accelerator.device)
        logger.info(
            "teacher: %s, %s, %s, %.1f M parameters",
            *(config.path, config.placement, dtype_name(dtype), model.num_parameters() / 1e6),
        )
        return ModelTeacher(
            model, task.forward_options, head=head, columns=_on_device(columns, accelerator), loaded=self.loaded
        )

    def _sharded(self, accelerator: Accelerator, task: Task, columns: list[int] | None) -> ModelTeacher:
        """Leave each rank a part of every weight; a layer is gathered for its own forward only."""
        model, dtype = self.model, teacher_dtype(self.config, accelerator)
        round_weights(model, dtype)
        head = _head(model, task)
        millions = model.num_parameters() / 1e6
        module = prepare_teacher(accelerator, TeacherModule(model, head).eval())
        held = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())  # type: ignore[attr-defined]
        logger.info(
            "teacher: %s, zero3, %s, %.1f M parameters, of which this rank holds %.1f MiB",
            *(self.config.path, dtype_name(dtype), millions, held / 2**20),
        )
        return ModelTeacher(
            model,
            task.forward_options,
            head=head,
            columns=_on_device(columns, accelerator),
            module=module,
            loaded=self.loaded,
        )


def load_teacher(config: Config, task: Task) -> LoadedModel:
    """Load the teacher in float32 on the CPU, with its adapters merged. task is the one that the student needs.

    Raises UsageError if there is no such model, if it has weights that were never trained, or if its labels are not
    those of the data.
    """
    training = config.training.model_copy(update={"gradient_checkpointing": False})
    loaded = task.load_model(teacher_config(config), training, "teacher")
    if missing := not_pooler(loaded.new_weights):
        raise UsageError(
            f"teacher.path: {config.teacher.path} has no {missing[0]} ({len(missing)} such weights): it was not "
            "trained for this task and would only teach noise; fine-tune it first, then name that run"
        )
    loaded.model.requires_grad_(False)
    return replace(loaded, model=loaded.model.eval())


def teacher_config(config: Config) -> ModelConfig:
    """Return the section `teacher` in the form of the section `model`."""
    named = ("path", "revision", "base", "adapter", "tokenizer", "labels")
    return ModelConfig(**{name: getattr(config.teacher, name) for name in named})


def evaluates_teacher(config: Config) -> bool:
    """True if the teacher's own metrics, and the student's agreement with it, are wanted."""
    asked = config.evaluation.teacher
    return config.distillation.alpha > 0 if asked is None else asked


def label_columns(student_label_ids: list[int], teacher_label_ids: list[int]) -> list[int] | None:
    """Return, for each output of a student classifier, the teacher's output of the same label.

    None if they are the same, or if there are no labels. Both arguments give, for each label of the data, the index of
    the model's output, and have as many entries as the model has outputs.
    """
    columns = [0] * len(student_label_ids)
    for student, teacher in zip(student_label_ids, teacher_label_ids, strict=True):
        columns[student] = teacher
    return None if columns == list(range(len(columns))) else columns


def teacher_dtype(config: TeacherConfig, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the teacher's weights; auto is bfloat16 if training uses half precision, else float32."""
    if config.dtype == "auto":
        return torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
    return DTYPES[config.dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as a config has it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def _head(model: PreTrainedModel, task: Task) -> LinearHead | None:
    """Return the head of a language model, if it is a single matrix."""
    head = find_head(model, task.forward_options) if task.has_language_head else None
    return head if isinstance(head, LinearHead) else None


def _on_device(columns: list[int] | None, accelerator: Accelerator) -> torch.Tensor | None:
    """Return the columns as a tensor, made once: made of a list for each batch, it would wait for the GPU."""
    return None if columns is None else torch.tensor(columns, device=accelerator.device)
