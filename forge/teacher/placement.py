"""Puts a loaded teacher where the config wants it: whole on the device, or in host memory between its forwards."""

import logging
from typing import cast

import torch
from accelerate import Accelerator, cpu_offload
from torch import nn
from transformers import PreTrainedModel

from forge.config.teacher_schema import TeacherConfig
from forge.model.head import LinearHead, find_head
from forge.ranks.deepspeed import prepare_teacher, round_weights
from forge.task.task import Task
from forge.teacher.teacher import ModelTeacher, Teacher, TeacherModule

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(
    model: PreTrainedModel, config: TeacherConfig, accelerator: Accelerator, task: Task, columns: list[int] | None
) -> Teacher:
    """The teacher in its dtype, where the config wants it. model: frozen, in eval mode.

    columns: of a classifier, the teacher's output for each of the student's; None: the same ones.

    offload: accelerate brings each layer's weights to the device for its forward and drops them after it, so that the
    device holds one layer of them at a time.
    """
    if config.placement == "zero3":
        return _sharded(model, config, accelerator, task, columns)
    device = accelerator.device if config.placement == "replicated" else torch.device("cpu")
    round_weights(model, teacher_dtype(config, accelerator))
    cast(nn.Module, model).to(device)
    # Before its weights are taken away: the head is tried out.
    head = find_head(model, task.forward_options) if task.has_language_head else None
    if config.placement == "offload":
        if accelerator.device.type == "cpu":
            logger.warning("teacher.placement: offload saves nothing here: the device is the CPU, as the host")
        model = cpu_offload(model, execution_device=accelerator.device)
    dtype = str(teacher_dtype(config, accelerator)).removeprefix("torch.")
    millions = model.num_parameters() / 1e6
    logger.info("teacher: %s, %s, %s, %.1f M parameters", config.path, config.placement, dtype, millions)
    found = head if isinstance(head, LinearHead) else None
    # Made once: from a list each batch would bring it to the device, and wait.
    index = None if columns is None else torch.tensor(columns, device=accelerator.device)
    return ModelTeacher(model, task.forward_options, head=found, columns=index)


def _sharded(
    model: PreTrainedModel, config: TeacherConfig, accelerator: Accelerator, task: Task, columns: list[int] | None
) -> Teacher:
    """Each rank keeps a part of every weight; a layer is whole for its forward alone."""
    dtype = teacher_dtype(config, accelerator)
    round_weights(model, dtype)
    head = find_head(model, task.forward_options) if task.has_language_head else None
    found = head if isinstance(head, LinearHead) else None
    millions = model.num_parameters() / 1e6
    module = prepare_teacher(accelerator, TeacherModule(model, found).eval())
    held = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())  # type: ignore[attr-defined]
    logger.info(
        "teacher: %s, zero3, %s, %.1f M parameters, of which this rank holds %.1f MiB",
        *(config.path, str(dtype).removeprefix("torch."), millions, held / 2**20),
    )
    index = None if columns is None else torch.tensor(columns, device=accelerator.device)
    return ModelTeacher(model, task.forward_options, head=found, columns=index, module=module)


def teacher_dtype(config: TeacherConfig, accelerator: Accelerator) -> torch.dtype:
    """auto: bfloat16 where training computes in half precision, else float32."""
    if config.dtype == "auto":
        return torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
    return DTYPES[config.dtype]
