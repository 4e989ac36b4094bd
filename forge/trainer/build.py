"""Builds the trainer that a run's components ask for."""

from forge.attempt.attempt import Attempt
from forge.attempt.components import Components
from forge.teacher.placement import label_columns
from forge.trainer.loop import LoopTrainer
from forge.trainer.trainer import Trainer


def build_trainer(components: Components, attempt: Attempt) -> Trainer:
    """SFT without a teacher, KD with one, whatever its placement."""
    source, student = components.teacher, components.student
    if source is None:
        return LoopTrainer(components, attempt)
    columns = label_columns(student.label_ids, source.label_ids)
    teacher = source.place(attempt.ranks.accelerator, components.task, columns)
    return LoopTrainer(components, attempt, teacher)
