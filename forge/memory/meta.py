"""Builds a config's models on the meta device, where a tensor has a shape but no memory, and counts what they hold."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from forge.config.schema import Config, ModelConfig
from forge.data.batches import Batch, model_inputs
from forge.errors import ForgeError, UsageError
from forge.memory.activations import forward_bytes, row_bytes, step_bytes
from forge.memory.sizes import sizes_of
from forge.memory.totals import Form, Job, Pass, RowBytes, form_for
from forge.model.adapter import attach
from forge.model.layers import cut_config
from forge.model.load import LoadedModel, kept_layers, set_dropout
from forge.model.lora import with_lora
from forge.model.source import load_model_config, model_source
from forge.task.load import task_class
from forge.teacher.placement import teacher_config
from forge.teacher.teacher import known_depth, teacher_layers

# What a forward raises that cannot be run without memory, because it reads values or needs another device.
UNCOUNTABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)


def meta_job(config: Config) -> Job:
    """Return the job of a config on GPUs, with rows as long as task.max_length allows.

    Raises UsageError for a model that cannot be found or built.
    """
    student, teacher = student_on_meta(config), None
    if config.wants_teacher and config.teacher.placement != "cached":  # a cached teacher need not be here
        teacher = build_on_meta(teacher_config(config), config, "teacher")
        teacher.requires_grad_(False)
    half = config.training.mixed_precision != "no"
    job = _without_activations(config, student, teacher, half=half, on_cpu=False)
    forms = dict.fromkeys(form_for(half, False, sharded) for sharded in (False, True))
    recomputes = (False, True) if student.supports_gradient_checkpointing else (False,)

    def count() -> Job:
        passes = [Pass(form, recomputed) for recomputed in recomputes for form in forms]
        activations = row_bytes(student, _inputs(config, config.model, student), passes)
        for form in forms:  # a model that cannot recompute gains nothing by being told to
            activations.setdefault(Pass(form, True), activations[Pass(form, False)])
        if teacher is None:
            return replace(job, activations=activations)
        inputs = _inputs(config, teacher_config(config), teacher)
        forward = forward_bytes(teacher, inputs, Form(job.teacher_bytes, job.teacher_bytes))
        return replace(job, activations=activations, teacher_forward=forward)

    return _or_uncounted(job, count)


def running_job(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    form: Form,
    rows: int,
    longest: int | None,
) -> Job:
    """Return the job of a run whose models are in memory, for micro-batches of this many rows and for no other number.

    Nothing of the models is changed, and no random number is drawn.

    teacher: None also for a cached one. form: what the run computes in. longest: tokens of the longest row of the data;
    None: as many as task.max_length allows.
    """
    half = form.products == 2
    job = _without_activations(config, student, teacher, half=half, on_cpu=form.on_cpu, longest=longest)
    job = replace(job, rows=rows)

    def count() -> Job:
        each = Pass(form, job.checkpointing)
        inputs = _inputs(config, config.model, student, longest)
        peak = step_bytes(_twin_on_meta(student), inputs, each, rows).peak
        activations = {each: RowBytes(peak, 0)}
        if teacher is None:
            return replace(job, activations=activations)
        inputs = _inputs(config, teacher_config(config), teacher, longest)
        own = Form(job.teacher_bytes, job.teacher_bytes, form.on_cpu)
        return replace(job, activations=activations, teacher_forward=forward_bytes(_twin_on_meta(teacher), inputs, own))

    with torch.random.fork_rng(devices=[]):
        return _or_uncounted(job, count)


def student_on_meta(config: Config) -> PreTrainedModel:
    """Return the student with the adapter that is trained on it. Raises UsageError as loading it would."""
    model = build_on_meta(config.model, config, "model")
    section = config.model
    if section.lora is None and not section.continue_adapter:
        return model
    source = model_source(section, "model")
    if section.continue_adapter:
        adapter = peft.LoraConfig.from_pretrained(source.adapters[-1].location)
        adapter.inference_mode = False
        attach(model, cast(peft.LoraConfig, adapter))
        return model
    new = task_class(config).new_weights(section, load_model_config(source, "model.path"), model)
    return with_lora(LoadedModel(model, source, new, []), section, config.training.seed).model


def build_on_meta(section: ModelConfig, config: Config, key: str) -> PreTrainedModel:
    """Return the model of a section of the config, without adapters. Raises UsageError as loading it would.

    key: the section's name.
    """
    task = task_class(config)
    if section.config is not None:
        built = task.scratch_config(section, key)
    else:
        source = model_source(section, key)
        built = load_model_config(source, f"{key}.path")
        kept = kept_layers(section, source, built, key)
        if kept is not None:
            built = cut_config(built, kept)
    set_dropout(built, section.dropout)
    built = task.adapted_config(config, section, built)
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, task.auto_model.from_config(built))
    except ForgeError:
        raise
    except Exception as error:
        where = f"{key}.config" if section.config is not None else f"{key}.path"
        raise UsageError(f"{where}: no model can be built from it ({_first_words(error)})") from error


def _without_activations(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    half: bool,
    on_cpu: bool,
    longest: int | None = None,
) -> Job:
    task, distillation = task_class(config), config.distillation
    row = task.planned_batch(config, config.model, student.config, 1, longest)
    ids = row["decoder_input_ids" if "decoder_input_ids" in row else "input_ids"]
    own = config.teacher.dtype
    compared = 0
    if distillation.hidden is not None and distillation.alpha > 0:
        depth = known_depth(student.config) or 0
        teacher_depth = depth if teacher is None else known_depth(teacher.config) or 0
        compared = len(teacher_layers(distillation, depth, teacher_depth))
    return Job(
        student=sizes_of(student, in_4bit=config.model.load_in_4bit),
        activations={},
        teacher=None if teacher is None else sizes_of(teacher),
        teacher_forward=RowBytes(0, 0),
        placement=config.teacher.placement,
        teacher_bytes=4 if own == "float32" or (own == "auto" and not half) else 2,
        teacher_layers=compared,
        half=half,
        on_cpu=on_cpu,
        rows=config.training.per_device_batch_size,
        tokens=ids.shape[1],
        labels=row["labels"][0].numel(),
        fused=task.has_language_head and type(student.get_output_embeddings()) is nn.Linear,
        distils=distillation.alpha > 0,
        top_k=config.teacher.top_k,
        checkpointing=config.training.gradient_checkpointing,
        loss=config.training.loss,
    )


def _inputs(
    config: Config, section: ModelConfig, model: PreTrainedModel, longest: int | None = None
) -> Callable[[int], Batch]:
    task, built = task_class(config), model.config
    options: dict[str, Any] = task.forward_options

    def inputs(rows: int) -> dict[str, Any]:
        return {**model_inputs(task.planned_batch(config, section, built, rows, longest)), **options}

    return inputs


def _or_uncounted(job: Job, count: Callable[[], Job]) -> Job:
    """Return the job with what was counted, or without activations and with the reason.

    An architecture may do anything in its forward, and an estimate is not worth an error.
    """
    try:
        return count()
    except UNCOUNTABLE as error:
        return replace(job, uncounted=f"{type(error).__name__}: {_first_words(error)}")


def _twin_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same shape, with the same weights frozen, on the meta device."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
        adapters = getattr(model, "peft_config", None) or {}
        for adapter in adapters.values():
            attach(twin, copy.deepcopy(adapter))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    return twin


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
