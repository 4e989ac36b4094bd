"""Chooses the task that the config names."""

from forge.config.schema import Config
from forge.task.causal_lm.task import load_causal_lm
from forge.task.classification import load_classification
from forge.task.ocr.task import load_ocr
from forge.task.task import Task


def load_task(config: Config) -> Task:
    """The task with its data, checked and tokenized. Raises UsageError for data that cannot be trained on."""
    match config.task.type:
        case "classification":
            return load_classification(config)
        case "ocr":
            return load_ocr(config)
        case "causal_lm":
            return load_causal_lm(config)
