"""Chooses the task that the config names."""

from forge.config.schema import Config
from forge.task.causal_lm.task import CausalLm
from forge.task.classification import Classification
from forge.task.ocr.task import Ocr
from forge.task.task import Task

TASKS: tuple[type[Task], ...] = (Classification, Ocr, CausalLm)


def task_class(config: Config) -> type[Task]:
    """Return the class of the config's task, which answers what is known before the data are read."""
    return next(task for task in TASKS if task.name == config.task.type)


def load_task(config: Config) -> Task:
    """Return the task with its data, checked and tokenized. Raises UsageError for data that cannot be trained on."""
    return task_class(config).load(config)
