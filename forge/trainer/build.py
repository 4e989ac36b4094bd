"""Builds the trainer that a run's components ask for."""

from forge.attempt.attempt import Attempt
from forge.attempt.components import Components
from forge.teacher.loading import label_columns
from forge.teacher.placement import place
from forge.teacher_cache.reader import TeacherCache
from forge.trainer.loop import LoopTrainer
from forge.trainer.trainer import Trainer


def build_trainer(components: Components, attempt: Attempt) -> Trainer:
    """SFT without a teacher, KD with one, whatever its placement."""
    taught = components.teacher
    if taught is None:
        return LoopTrainer(components, attempt)
    config, accelerator = attempt.config, attempt.ranks.accelerator
    columns = label_columns(components.student.label_ids, taught.label_ids)
    if isinstance(taught, TeacherCache):
        teacher = taught.placed(accelerator, columns)
    else:
        teacher = place(taught.model, config.teacher, accelerator, components.task, columns)
    return LoopTrainer(components, attempt, teacher)
