"""Builds a config's models on the meta device, where a tensor has a shape and no memory: no weights are read."""

import logging
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from forge.config.schema import Config, ModelConfig
from forge.config.task_schema import CausalLmTask, ClassificationTask, OcrTask
from forge.errors import UsageError
from forge.memory.sizes import RowShape, sizes_of
from forge.memory.totals import Job
from forge.model.adapter import put_on
from forge.model.layers import cut_config
from forge.model.load import LoadedModel, kept_layers, load_own_tokenizer, scratch_config, set_dropout
from forge.model.lora import with_lora
from forge.model.recognizer import new_recognizer_config, reads_lines
from forge.model.source import ModelSource, load_model_config, model_source
from forge.task.causal_lm.task import CausalLm
from forge.task.classification import Classification
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.task import Ocr
from forge.teacher.layers import known_depth, teacher_layers
from forge.teacher.loading import teacher_config

logger = logging.getLogger(__name__)
TASKS = {task.name: task for task in (Classification, Ocr, CausalLm)}


def meta_job(config: Config) -> Job:
    """The job of a config on GPUs, its rows as long as task.max_length allows. Raises UsageError for a model that
    cannot be found, or built."""
    student = student_on_meta(config)
    shape = row_shape(config, student.config)
    teacher = None
    if config.wants_teacher:
        model = build_on_meta(teacher_config(config), config, "teacher")
        model.requires_grad_(False)
        teacher = model
    half = config.training.mixed_precision != "no"
    return job_of(config, student, teacher, shape, half=half, on_cpu=False)


def job_of(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    shape: RowShape,
    *,
    half: bool,
    on_cpu: bool,
) -> Job:
    """The job of models that are there, on the meta device or in memory. teacher: None also for a cached one."""
    task, distillation = config.task, config.distillation
    sizes = sizes_of(student, shape, in_4bit=config.model.load_in_4bit)
    own = config.teacher.dtype
    teacher_bytes = 4 if own == "float32" or (own == "auto" and not half) else 2
    drawn = 0
    if distillation.hidden is not None and distillation.alpha > 0:
        of_student = known_depth(student.config) or 0
        of_teacher = of_student if teacher is None else known_depth(teacher.config) or 0
        drawn = len(teacher_layers(distillation, of_student, of_teacher))
    fused = TASKS[task.type].has_language_head and type(student.get_output_embeddings()) is torch.nn.Linear
    return Job(
        student=sizes,
        teacher=None if teacher is None else sizes_of(teacher, shape),
        placement=config.teacher.placement,
        teacher_bytes=teacher_bytes,
        teacher_layers=drawn,
        half=half,
        on_cpu=on_cpu,
        rows=config.training.per_device_batch_size,
        labels=1 if isinstance(task, ClassificationTask) else shape.tokens,
        fused=fused,
        distils=distillation.alpha > 0,
        top_k=config.teacher.top_k,
        checkpointing=config.training.gradient_checkpointing,
        loss=config.training.loss,
    )


def row_shape(config: Config, model: PreTrainedConfig, longest: int | None = None) -> RowShape:
    """The longest row. longest: tokens of the longest that there is, where the data are known; else it is as long as
    task.max_length allows. An image is as large as task.image says, or as the model's own."""
    task = config.task
    tokens = task.max_length if longest is None else min(task.max_length, longest)
    if not isinstance(task, OcrTask):
        return RowShape(tokens)
    seeing = model.encoder if reads_lines(model) else getattr(model, "vision_config", model)
    images = _image_tokens(seeing, task.image.height, task.image.width)
    if reads_lines(model):
        return RowShape(tokens, images)
    merged = int(getattr(model, "scale_factor", None) or 1) ** 2  # Idefics 3 joins so many of them into a token
    return RowShape(tokens + images // merged, images)


def build_on_meta(model: ModelConfig, config: Config, key: str) -> PreTrainedModel:
    """The model of a section, without adapters. Raises UsageError as loading it would."""
    task = config.task
    if model.config is not None:
        built = _scratch(model, config, key)
    else:
        source = model_source(model, key)
        built = load_model_config(source, f"{key}.path")
        kept = kept_layers(model, source, built, key)
        if kept is not None:
            built = cut_config(built, kept)
    set_dropout(built, model.dropout)
    if isinstance(task, ClassificationTask) and task.labels is not None and _head_is_new(model, built):
        built.num_labels = len(task.labels)
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, TASKS[task.type].auto_model.from_config(built))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        where = f"{key}.config" if model.config is not None else f"{key}.path"
        raise UsageError(f"{where}: no model can be built from it ({' '.join(str(error).split())[:200]})") from error


def student_on_meta(config: Config) -> PreTrainedModel:
    """With the adapter that is trained on it."""
    model = build_on_meta(config.model, config, "model")
    section = config.model
    if section.lora is None and not section.continue_adapter:
        return model
    source = model_source(section, "model")
    if section.continue_adapter:
        adapter = peft.LoraConfig.from_pretrained(source.adapters[-1].location)
        adapter.inference_mode = False
        put_on(model, cast(peft.LoraConfig, adapter))
        return model
    loaded = LoadedModel(model, source, _new_weights(model, source, section, config), [])
    return with_lora(loaded, section, config.training.seed).model


def _head_is_new(section: ModelConfig, model: PreTrainedConfig) -> bool:
    """Of a classifier: does the checkpoint's config not say that it is one?"""
    told = model.architectures or []
    return section.new_head or not any("ForSequenceClassification" in name for name in told)


def _new_weights(model: PreTrainedModel, source: ModelSource, section: ModelConfig, config: Config) -> list[str]:
    """The names of a classifier's head where it starts new: it is trained in full beside an adapter."""
    is_classifier = isinstance(config.task, ClassificationTask)
    if not is_classifier or not _head_is_new(section, load_model_config(source, "model.path")):
        return []
    body = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(body)]


def _scratch(model: ModelConfig, config: Config, key: str) -> PreTrainedConfig:
    """The transformers config of model.config, its vocabulary that of the tokenizer."""
    assert model.config is not None
    keys, where = model.config, f"{key}.config"
    if isinstance(config.task, OcrTask) and reads_lines(keys):
        tokenizer: Any = load_own_tokenizer(model) if model.new_tokenizer is None else character_tokenizer([])
        return new_recognizer_config(keys, tokenizer, key)
    if isinstance(config.task, OcrTask):
        return scratch_config(keys, where)
    if model.new_tokenizer is None:
        tokens = len(load_own_tokenizer(model))
    elif isinstance(config.task, CausalLmTask) and model.new_tokenizer.kind == "bpe":
        tokens = model.new_tokenizer.vocab_size
    else:
        tokens = len(character_tokenizer([]))
    return scratch_config(keys, where, vocab_size=tokens)


def _image_tokens(config: Any, height: int | None, width: int | None) -> int:
    """Patches of an image, and the one that stands for it."""
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if size is None or patch is None:
        return 0
    sides = size if isinstance(size, list | tuple) else (size, size)
    patches = patch if isinstance(patch, list | tuple) else (patch, patch)
    return ((height or sides[0]) // patches[0]) * ((width or sides[1]) // patches[1]) + 1
