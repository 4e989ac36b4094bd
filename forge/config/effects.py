"""Which keys of a config have no effect in its mode, and why."""

from typing import NamedTuple

from forge.config.schema import Config


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
    if config.model.config is not None:
        reason = "the model is built from model.config"
        add("model.path model.revision model.labels model.new_head", reason, "model.config")
    elif config.model.new_head:
        add("model.labels", "model.new_head is true", "model.new_head")
    if config.model.config is None and config.model.new_tokenizer is not None:
        add("model.new_tokenizer", "model.path is set", "model.path")
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
    """Dotted keys whose value this version of forge cannot train with yet, each with a sentence."""
    if config.distillation.alpha == 0:
        return {}
    given = f"distillation.alpha is {config.distillation.alpha:g}"
    return {"distillation.alpha": f"{given}, and this version of forge trains with 0 only; set it to 0"}
