"""Adds a teacher to the loop: nothing of it changes but what the student is given beside a batch."""

from typing import Any

from transformers import PreTrainedModel

from forge.task.batches import Batch
from forge.teacher.teacher import Teacher, TeacherOutputs
from forge.trainer.finetuning import FinetuningTrainer
from forge.trainer.objective import Objective
from forge.trainer.student import Student


class DistillationTrainer(FinetuningTrainer):
    """Trains with (1 - alpha) * CE + alpha * T^2 * D(teacher || student), the mean over all labels of a step.

    With alpha 0 it trains as the FinetuningTrainer does, bit for bit; the teacher is asked in evaluations only.
    """

    def __init__(self, *args: Any, teacher: Teacher, **options: Any):
        """teacher: placed."""
        self.teacher = teacher
        super().__init__(*args, **options)

    def build_student(self, model: PreTrainedModel) -> Student:
        """A student that takes its teacher's outputs."""
        objective = Objective(self.config.distillation, self.teacher.logit_scale, self.teacher.softcap)
        student = Student(model, self.task.forward_options, self.language_head(model), objective)
        self.teacher.whole_logits = student.head is None
        return student

    def teacher_outputs(self, batch: Batch, split: str | None = None) -> TeacherOutputs | None:
        distillation = self.config.distillation
        if split is None:
            return self.teacher.outputs(batch, split, distillation.temperature) if distillation.alpha > 0 else None
        if distillation.alpha > 0 and distillation.divergence == "uld":
            return None  # over other tokens there is no agreement, and no KL
        return self.teacher.outputs(batch, split, 1.0)
