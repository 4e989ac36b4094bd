"""Which keys of a config have no effect in its mode, and why."""

from typing import NamedTuple

from forge.config.schema import CausalLmTask, Config


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
    if config.distillation.alpha == 0:
        add("distillation.temperature teacher.path", "distillation.alpha is 0", "distillation.alpha")
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
    if not evaluation.baseline and not evaluation.final and evaluation.every_steps is None:
        reason = "evaluation.baseline and evaluation.final are false"
        add("evaluation.max_samples evaluation.per_device_batch_size", reason, "evaluation.final")
    if evaluation.every_steps is None:
        add("checkpoint.keep_best checkpoint.best_metric", "evaluation.every_steps is null", "evaluation.every_steps")
    elif not config.checkpoint.keep_best:
        add("checkpoint.best_metric", "checkpoint.keep_best is false", "checkpoint.keep_best")
    return inert


def unsupported(config: Config) -> dict[str, str]:
    """Dotted keys whose value cannot be trained with in this config, or not yet, each with a sentence."""
    problems: dict[str, str] = {}
    if config.distillation.alpha > 0:
        given = f"distillation.alpha is {config.distillation.alpha:g}"
        problems["distillation.alpha"] = f"{given}, and this version of forge trains with 0 only; set it to 0"
    if config.task.dataset.streaming and (reason := _not_streamed(config)):
        problems["task.dataset.streaming"] = f"task.dataset.streaming is true, and {reason}"
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
    if config.task.dataset.path is None and config.evaluation.max_samples is None:
        return "of a split on the hub only the first rows are evaluated then; set evaluation.max_samples"
    return None
