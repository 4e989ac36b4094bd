"""Which keys of a config have no effect in its mode, and why."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from forge.config.plans import PlanError, contradictions, read_plan
from forge.config.schema import CausalLmTask, ClassificationTask, Config, LossConfig
from forge.config.teacher_schema import WHOLE_LOGITS_COLUMNS, DistillationConfig, TeacherConfig


class Inert(NamedTuple):
    """Why a key has no effect, and the key that decided it."""

    reason: str
    mode_key: str


def inert_keys(config: Config) -> dict[str, Inert]:
    """Dotted keys without effect in this config, whether or not anybody set them."""
    inert: dict[str, Inert] = {}

    def add(keys: str, reason: str, mode_key: str) -> None:
        for key in keys.split():
            inert[key] = Inert(reason, mode_key)

    dataset, training, evaluation = config.task.dataset, config.training, config.evaluation
    for key, why in _of_the_teacher(config):
        inert.setdefault(key, why)
    if dataset.name is None:
        source = "task.dataset.path" if dataset.path else "task.dataset.demo"
        add("task.dataset.name task.dataset.config task.dataset.revision", f"{source} is set", source)
    if dataset.demo is not None:
        add("task.dataset.train_split task.dataset.validation_splits", "task.dataset.demo is set", "task.dataset.demo")
    if not dataset.streaming:
        add("task.dataset.shuffle_buffer", "task.dataset.streaming is false", "task.dataset.streaming")
    else:
        reason = "a stream is read in its order, whatever the lengths of its rows"
        add("training.length_grouping", reason, "task.dataset.streaming")
        add("training.num_workers", "a stream is read by the training process", "task.dataset.streaming")
    if config.model.config is not None:
        reason = "the model is built from model.config"
        add("model.path model.revision model.base model.adapter model.keep_layers", reason, "model.config")
        add("model.labels model.new_head", reason, "model.config")
    elif config.model.new_head:
        add("model.labels", "model.new_head is true", "model.new_head")
    if config.model.config is None and config.model.new_tokenizer is not None:
        add("model.new_tokenizer", "model.path is set", "model.path")
    if config.model.lora is None and not config.model.continue_adapter:
        add("export.merge", "no adapter is trained (model.lora is null)", "model.lora")
    elif not config.export.merge:
        reason = "an adapter is exported in float32, and export.merge is false"
        add("export.dtype", reason, "export.merge")
    if training.max_steps is not None:
        add("training.epochs", "training.max_steps is set", "training.max_steps")
    if training.warmup_steps is not None:
        add("training.warmup_ratio", "training.warmup_steps is set", "training.warmup_steps")
    if training.batch_size is not None:
        add("training.gradient_accumulation_steps", "training.batch_size is set", "training.batch_size")
    if not isinstance(config.task, CausalLmTask):
        of_loss = " ".join(f"training.loss.{name}" for name in LossConfig.model_fields)
        add(of_loss, f"task.type is {config.task.type}, whose loss is computed from logits", "task.type")
    if not evaluation.baseline and not evaluation.final and evaluation.every_steps is None:
        reason = "evaluation.baseline and evaluation.final are false"
        add("evaluation.max_rows evaluation.per_device_batch_size", reason, "evaluation.final")
    if evaluation.every_steps is None:
        add("checkpoint.keep_best checkpoint.best_metric", "evaluation.every_steps is null", "evaluation.every_steps")
    elif not config.checkpoint.keep_best:
        add("checkpoint.best_metric", "checkpoint.keep_best is false", "checkpoint.keep_best")
    return inert


def _of_the_teacher(config: Config) -> Iterator[tuple[str, Inert]]:
    """Keys of teacher and distillation, and of evaluation where they decide."""
    teacher, distillation = config.teacher, config.distillation

    def each(keys: Iterable[str], reason: str, mode_key: str) -> Iterator[tuple[str, Inert]]:
        return ((key, Inert(reason, mode_key)) for key in keys)

    if distillation.alpha == 0:
        of_loss = [f"distillation.{name}" for name in DistillationConfig.model_fields if name != "alpha"]
        yield from each([*of_loss, "evaluation.control"], "distillation.alpha is 0", "distillation.alpha")
        if not config.evaluation.teacher:
            of_teacher = [f"teacher.{name}" for name in TeacherConfig.model_fields]
            yield from each(of_teacher, "distillation.alpha is 0", "distillation.alpha")
    if distillation.divergence != "jsd":
        reason = f"distillation.divergence is {distillation.divergence}"
        yield from each(["distillation.beta"], reason, "distillation.divergence")
    if distillation.divergence not in ("skew_kl", "skew_reverse_kl"):
        reason = f"distillation.divergence is {distillation.divergence}"
        yield from each(["distillation.skew"], reason, "distillation.divergence")
    if teacher.placement != "cached":
        keys = ("teacher.cache", "distillation.missing_mass")  # teacher.top_k is also for who makes a cache
        yield from each(keys, f"teacher.placement is {teacher.placement}", "teacher.placement")
    if teacher.placement != "zero3":
        yield from each(["deepspeed.teacher"], f"teacher.placement is {teacher.placement}", "teacher.placement")
    if not isinstance(config.task, ClassificationTask):
        yield from each(["teacher.labels"], f"task.type is {config.task.type}", "task.type")
    elif config.task.labels is not None and len(config.task.labels) <= WHOLE_LOGITS_COLUMNS:
        reason = f"task.labels has {len(config.task.labels)} labels, of which a cache keeps whole logits"
        yield from each(["teacher.top_k", "distillation.missing_mass"], reason, "task.labels")


def unsupported(config: Config) -> dict[str, str]:
    """Dotted keys whose value cannot be trained with in this config, or not yet, each with a sentence."""
    problems = _not_distilled(config) if config.distillation.alpha > 0 else {}
    if config.evaluation.teacher and config.teacher.path is None:
        problems["evaluation.teacher"] = "evaluation.teacher is true, and there is no teacher; set teacher.path"
    if config.task.dataset.streaming and (reason := _not_streamed(config)):
        problems["task.dataset.streaming"] = f"task.dataset.streaming is true, and {reason}"
    if config.training.compile and config.distillation.alpha > 0 and config.distillation.relations is not None:
        problems["training.compile"] = (
            "training.compile is true, and distillation.relations listens within the layers, where compiled ones are "
            "deaf; set training.compile: false"
        )
    return problems | _not_sharded(config)


def _not_sharded(config: Config) -> dict[str, str]:
    """What does not go together with the plans for DeepSpeed."""
    plan = config.deepspeed.student
    problems: dict[str, str] = {}
    named = [("deepspeed.student", plan)] if plan is not None else []
    if config.teacher.placement == "zero3" and config.wants_teacher:
        named.append(("deepspeed.teacher", config.deepspeed.teacher))
    for key, name in named:
        try:
            of_other = contradictions(read_plan(name), config, key)
        except PlanError as error:
            problems[key] = f"{key} is {name}: {error}"
            continue
        if of_other:
            problems[key] = "; ".join(of_other)
    if plan is None:
        if config.teacher.placement == "zero3" and config.wants_teacher:
            problems["teacher.placement"] = (
                "teacher.placement is zero3, and deepspeed.student is null: DeepSpeed shards both models or none; set "
                "deepspeed.student, such as zero1"
            )
        return problems
    if config.training.mixed_precision == "fp16":
        problems["training.mixed_precision"] = (
            f"training.mixed_precision is fp16, and deepspeed.student is {plan}; set it to bf16 or to no, or "
            "deepspeed.student to null"
        )
    if ("deepspeed.teacher", config.deepspeed.teacher) in named and config.teacher.dtype == "float16":
        problems["teacher.dtype"] = (
            "teacher.dtype is float16, and teacher.placement is zero3; set it to bfloat16, or to auto"
        )
    if config.model.load_in_4bit:
        problems["model.load_in_4bit"] = (
            f"model.load_in_4bit is true, and deepspeed.student is {plan}, which shards no 4-bit weights; set "
            "deepspeed.student: null"
        )
    return problems


def _not_distilled(config: Config) -> dict[str, str]:
    """What of teacher and distillation does not go together."""
    teacher, distillation, problems = config.teacher, config.distillation, {}
    is_lm = isinstance(config.task, CausalLmTask)
    cached = teacher.placement == "cached"
    if teacher.path is None:
        given = f"distillation.alpha is {distillation.alpha:g}"
        problems["distillation.alpha"] = f"{given}, and there is no teacher; set teacher.path, or alpha to 0"
    if distillation.divergence == "uld" and not is_lm:
        problems["distillation.divergence"] = (
            f"distillation.divergence is uld, which aligns the tokens of causal LMs, and task.type is "
            f"{config.task.type}; take forward_kl"
        )
    if distillation.divergence == "uld" and isinstance(config.task, CausalLmTask):
        aligned = (
            "distillation.divergence is uld, which aligns the rows of student and teacher one by one before training"
        )
        if config.task.packing:
            problems["task.packing"] = f"{aligned}; set task.packing: false"
        if config.task.dataset.streaming:
            problems["task.dataset.streaming"] = f"{aligned}; set task.dataset.streaming: false"
    if cached and is_lm and distillation.divergence != "forward_kl":
        problems["distillation.divergence"] = (
            f"distillation.divergence is {distillation.divergence}, and a cached top k gives forward_kl only; set "
            "that, or teacher.placement: replicated"
        )
    if cached and config.task.dataset.streaming:
        problems["teacher.placement"] = (
            "teacher.placement is cached, and the rows of a stream are not known before; set it to replicated, or "
            "task.dataset.streaming to false"
        )
    if distillation.relations is not None and not isinstance(config.task, ClassificationTask):
        problems["distillation.relations"] = (
            f"distillation.relations compares the rows of encoders, and task.type is {config.task.type}; take it out"
        )
    elif distillation.relations is not None and cached:
        problems["distillation.relations"] = (
            "distillation.relations needs the teacher's attention, which no cache holds; set teacher.placement: "
            "replicated"
        )
    if distillation.divergence == "uld" and distillation.hidden is not None:
        problems["distillation.hidden"] = (
            "distillation.hidden compares token by token, and with distillation.divergence: uld the tokens differ; "
            "take it out"
        )
    return problems


def _not_streamed(config: Config) -> str | None:
    """Why the training rows of this config cannot be read as they come, and what to do."""
    if not isinstance(config.task, CausalLmTask):
        return f"only a causal_lm task reads its rows so; set it to false for {config.task.type}"
    if config.task.dataset.demo is not None:
        return "demo data are made at once; set it to false"
    if config.training.max_steps is None:
        return "the number of its rows is unknown; set training.max_steps"
    if config.task.packing:
        return "rows can be packed only where all are known; set task.packing: false"
    if config.model.new_tokenizer is not None and config.model.config is not None:
        return "model.new_tokenizer is made from all training rows; name one with model.tokenizer"
    if config.task.dataset.path is None and config.evaluation.max_rows is None:
        return "of a split on the hub only the first rows are evaluated then; set evaluation.max_rows"
    return None
