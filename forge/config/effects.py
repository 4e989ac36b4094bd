"""Decides which keys of a config have no effect in its mode, and which values cannot be combined, and why."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from forge.config.plans import PlanError, contradictions, read_plan
from forge.config.schema import Config, LossConfig
from forge.config.teacher_schema import WHOLE_LOGITS_COLUMNS, DistillationConfig, TeacherConfig


class Inert(NamedTuple):
    """Why a key has no effect, and the key that decides it."""

    reason: str
    mode_key: str


def inert_keys(config: Config) -> dict[str, Inert]:
    """Return the dotted keys without effect in this config, whether or not anyone set them."""
    inert: dict[str, Inert] = {}
    for found in (_inert_of_teacher, _inert_of_task, _inert_of_model, _inert_of_training, _inert_of_evaluation):
        for key, why in found(config):
            inert[key] = why
    return inert


def unsupported(config: Config) -> dict[str, str]:
    """Return the dotted keys whose value cannot be used in this config, each with a sentence."""
    problems = _not_distilled(config) if config.distillation.alpha > 0 else {}
    if config.evaluation.teacher and config.teacher.path is None:
        problems["evaluation.teacher"] = "evaluation.teacher is true, but there is no teacher; set teacher.path"
    if config.task.dataset.streaming and (reason := _not_streamed(config)):
        problems["task.dataset.streaming"] = f"task.dataset.streaming is true, but {reason}"
    if config.training.compile and config.distillation.alpha > 0 and config.distillation.relations is not None:
        problems["training.compile"] = (
            "training.compile is true, but distillation.relations needs forward hooks inside the layers, which "
            "torch.compile bypasses; set training.compile: false"
        )
    return problems | _not_sharded(config)


Found = Iterator[tuple[str, Inert]]


def _each(keys: str | Iterable[str], reason: str, mode_key: str) -> Found:
    names = keys.split() if isinstance(keys, str) else keys
    return ((key, Inert(reason, mode_key)) for key in names)


def _inert_of_task(config: Config) -> Found:
    task, dataset = config.task, config.task.dataset
    if dataset.name is None:
        source = "task.dataset.path" if dataset.path else "task.dataset.demo"
        yield from _each("task.dataset.name task.dataset.config task.dataset.revision", f"{source} is set", source)
    if dataset.demo is not None:
        keys = "task.dataset.train_split task.dataset.validation_splits"
        yield from _each(keys, "task.dataset.demo is set", "task.dataset.demo")
    if not dataset.streaming:
        reason = "task.dataset.streaming is false"
        yield from _each("task.dataset.shuffle_buffer", reason, "task.dataset.streaming")
    else:
        reason = "a stream is read in its own order, whatever the lengths of its rows"
        yield from _each("training.length_grouping", reason, "task.dataset.streaming")
        reason = "a stream is read by the training process"
        yield from _each("training.num_workers", reason, "task.dataset.streaming")
    if not task.loss_from_hidden_states:
        keys = [f"training.loss.{name}" for name in LossConfig.model_fields]
        yield from _each(keys, f"task.type is {task.type}, whose loss is computed from logits", "task.type")


def _inert_of_model(config: Config) -> Found:
    model = config.model
    if model.config is not None:
        reason = "the model is built from model.config"
        keys = "model.path model.revision model.base model.adapter model.keep_layers model.labels model.new_head"
        yield from _each(keys, reason, "model.config")
    else:
        if model.new_head:
            yield from _each("model.labels", "model.new_head is true", "model.new_head")
        if model.new_tokenizer is not None:
            yield from _each("model.new_tokenizer", "model.path is set", "model.path")
    if model.lora is None and not model.continue_adapter:
        yield from _each("export.merge", "no adapter is trained (model.lora is null)", "model.lora")
    elif not config.export.merge:
        reason = "an adapter is exported in float32, and export.merge is false"
        yield from _each("export.dtype", reason, "export.merge")


def _inert_of_training(config: Config) -> Found:
    training = config.training
    if training.max_steps is not None:
        yield from _each("training.epochs", "training.max_steps is set", "training.max_steps")
    if training.warmup_steps is not None:
        yield from _each("training.warmup_ratio", "training.warmup_steps is set", "training.warmup_steps")
    if training.batch_size is not None:
        keys = "training.gradient_accumulation_steps"
        yield from _each(keys, "training.batch_size is set", "training.batch_size")


def _inert_of_evaluation(config: Config) -> Found:
    evaluation, best = config.evaluation, "checkpoint.best_metric"
    if not evaluation.baseline and not evaluation.final and evaluation.every_steps is None:
        reason = "evaluation.baseline and evaluation.final are false"
        yield from _each("evaluation.max_rows evaluation.per_device_batch_size", reason, "evaluation.final")
    if evaluation.every_steps is None:
        keys = f"checkpoint.keep_best {best}"
        yield from _each(keys, "evaluation.every_steps is null", "evaluation.every_steps")
    elif not config.checkpoint.keep_best:
        yield from _each(best, "checkpoint.keep_best is false", "checkpoint.keep_best")


def _inert_of_teacher(config: Config) -> Found:
    """Keys of teacher and distillation, and the evaluation keys that depend on them; of two reasons the first holds."""
    found: dict[str, Inert] = {}
    for key, why in _all_inert_of_teacher(config):
        found.setdefault(key, why)
    yield from found.items()


def _all_inert_of_teacher(config: Config) -> Found:
    teacher, distillation, divergence = config.teacher, config.distillation, config.distillation.divergence
    if distillation.alpha == 0:
        keys = [f"distillation.{name}" for name in DistillationConfig.model_fields if name != "alpha"]
        yield from _each([*keys, "evaluation.control"], "distillation.alpha is 0", "distillation.alpha")
        if not config.evaluation.teacher:
            keys = [f"teacher.{name}" for name in TeacherConfig.model_fields]
            yield from _each(keys, "distillation.alpha is 0", "distillation.alpha")
    if divergence != "jsd":
        yield from _each("distillation.beta", f"distillation.divergence is {divergence}", "distillation.divergence")
    if divergence not in ("skew_kl", "skew_reverse_kl"):
        yield from _each("distillation.skew", f"distillation.divergence is {divergence}", "distillation.divergence")
    if teacher.placement != "cached":
        keys = "teacher.cache distillation.missing_mass"  # teacher.top_k also has an effect on `forge cache-teacher`
        yield from _each(keys, f"teacher.placement is {teacher.placement}", "teacher.placement")
    if teacher.placement != "zero3":
        yield from _each("deepspeed.teacher", f"teacher.placement is {teacher.placement}", "teacher.placement")
    labels = config.task.label_count
    if not config.task.has_labels:
        yield from _each("teacher.labels", f"task.type is {config.task.type}", "task.type")
    elif labels is not None and labels <= WHOLE_LOGITS_COLUMNS:
        reason = f"task.labels has {labels} labels, for which a cache keeps all logits"
        yield from _each("teacher.top_k distillation.missing_mass", reason, "task.labels")


def _not_sharded(config: Config) -> dict[str, str]:
    """What cannot be combined with the DeepSpeed plans."""
    plan = config.deepspeed.student
    problems: dict[str, str] = {}
    named = [("deepspeed.student", plan)] if plan is not None else []
    if config.teacher.placement == "zero3" and config.wants_teacher:
        named.append(("deepspeed.teacher", config.deepspeed.teacher))
    for key, name in named:
        try:
            found = contradictions(read_plan(name), config, key)
        except PlanError as error:
            problems[key] = f"{key} is {name}: {error}"
            continue
        if found:
            problems[key] = "; ".join(found)
    if plan is None:
        if config.teacher.placement == "zero3" and config.wants_teacher:
            problems["teacher.placement"] = (
                "teacher.placement is zero3, but deepspeed.student is null, and DeepSpeed shards both models or none; "
                "set deepspeed.student, such as zero1"
            )
        return problems
    if config.training.mixed_precision == "fp16":
        problems["training.mixed_precision"] = (
            f"training.mixed_precision is fp16, but deepspeed.student is {plan}; set training.mixed_precision to bf16 "
            "or no, or deepspeed.student to null"
        )
    if ("deepspeed.teacher", config.deepspeed.teacher) in named and config.teacher.dtype == "float16":
        problems["teacher.dtype"] = (
            "teacher.dtype is float16, but teacher.placement is zero3; set teacher.dtype to bfloat16 or auto"
        )
    if config.model.load_in_4bit:
        problems["model.load_in_4bit"] = (
            f"model.load_in_4bit is true, but deepspeed.student is {plan}, which cannot shard 4-bit weights; set "
            "deepspeed.student: null"
        )
    return problems


def _not_distilled(config: Config) -> dict[str, str]:
    """What cannot be combined in teacher and distillation."""
    task, teacher, distillation = config.task, config.teacher, config.distillation
    problems: dict[str, str] = {}
    cached = teacher.placement == "cached"
    if teacher.path is None:
        problems["distillation.alpha"] = (
            f"distillation.alpha is {distillation.alpha:g}, but there is no teacher; set teacher.path, or alpha to 0"
        )
    if distillation.divergence == "uld" and not task.can_align_tokens:
        problems["distillation.divergence"] = (
            f"distillation.divergence is uld, which aligns the tokens of causal LMs, but task.type is {task.type}; set "
            "it to forward_kl"
        )
    elif distillation.divergence == "uld":
        aligned = "distillation.divergence is uld, which aligns each row of student and teacher before training"
        if task.packs_rows:
            problems["task.packing"] = f"{aligned}; set task.packing: false"
        if task.dataset.streaming:
            problems["task.dataset.streaming"] = f"{aligned}; set task.dataset.streaming: false"
    if cached and task.caches_only_top_k and distillation.divergence != "forward_kl":
        problems["distillation.divergence"] = (
            f"distillation.divergence is {distillation.divergence}, but a cached top k only allows forward_kl; set "
            "that, or teacher.placement: replicated"
        )
    if cached and task.dataset.streaming:
        problems["teacher.placement"] = (
            "teacher.placement is cached, but the rows of a stream are not known in advance; set it to replicated, or "
            "task.dataset.streaming to false"
        )
    if distillation.relations is not None and not task.has_relations:
        problems["distillation.relations"] = (
            f"distillation.relations compares the rows of encoders, but task.type is {task.type}; remove it"
        )
    elif distillation.relations is not None and cached:
        problems["distillation.relations"] = (
            "distillation.relations needs the teacher's attention, which a cache does not hold; set "
            "teacher.placement: replicated"
        )
    if distillation.divergence == "uld" and distillation.hidden is not None:
        problems["distillation.hidden"] = (
            "distillation.hidden compares token by token, but with distillation.divergence: uld the tokens differ; "
            "remove it"
        )
    return problems


def _not_streamed(config: Config) -> str | None:
    """Why the training rows of this config cannot be streamed, and what to do."""
    if not config.task.can_stream:
        return f"only a causal_lm task can stream its rows; set it to false for {config.task.type}"
    if config.task.dataset.demo is not None:
        return "demo data are generated all at once; set it to false"
    if config.training.max_steps is None:
        return "the number of rows is unknown; set training.max_steps"
    if config.task.packs_rows:
        return "rows can only be packed if all of them are known; set task.packing: false"
    if config.model.new_tokenizer is not None and config.model.config is not None:
        return "model.new_tokenizer is built from all training rows; name a tokenizer with model.tokenizer"
    if config.task.dataset.path is None and config.evaluation.max_rows is None:
        return "only the first rows of a split on the hub can then be evaluated; set evaluation.max_rows"
    return None
