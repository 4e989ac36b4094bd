"""Loads the teacher of a config for the task and the student that it teaches."""

from dataclasses import replace

from forge.config.schema import Config, ModelConfig
from forge.errors import UsageError
from forge.model.load import LoadedModel, not_pooler
from forge.task.task import Task


def evaluates_teacher(config: Config) -> bool:
    """Are its own numbers, and the student's agreement with it, asked for?"""
    asked = config.evaluation.teacher
    return config.distillation.alpha > 0 if asked is None else asked


def teacher_config(config: Config) -> ModelConfig:
    """The section teacher in the form of the section model."""
    named = ("path", "revision", "base", "adapter", "tokenizer", "labels")
    return ModelConfig(**{name: getattr(config.teacher, name) for name in named})


def load_teacher(config: Config, task: Task) -> LoadedModel:
    """The teacher in float32 on the CPU, its adapters merged. task: as the student needs it.

    Raises UsageError where there is no such model, where it has weights that nobody trained, and where its labels are
    not the student's.
    """
    training = config.training.model_copy(update={"gradient_checkpointing": False})
    loaded = task.load_model(teacher_config(config), training, "teacher")
    if missing := not_pooler(loaded.new_weights):
        raise UsageError(
            f"teacher.path: {config.teacher.path} has no {missing[0]} ({len(missing)} such weights): it was not "
            "trained for this task, and could only teach noise; fine-tune it first, then name that run"
        )
    loaded.model.requires_grad_(False)
    return replace(loaded, model=loaded.model.eval())


def label_columns(student_label_ids: list[int], teacher_label_ids: list[int]) -> list[int] | None:
    """Of a classifier: for each output of the student the teacher's of the same label; None where they are the same
    ones, and where there are no labels.

    Both: for each label of the data the index of the model's output, and as many as the model has.
    """
    columns = [0] * len(student_label_ids)
    for student, teacher in zip(student_label_ids, teacher_label_ids, strict=True):
        columns[student] = teacher
    return None if columns == list(range(len(columns))) else columns
