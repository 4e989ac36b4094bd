"""Adds a teacher to the loop: nothing of it changes but what the student is given beside a batch."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from forge.attempt.callbacks.callback import Metrics
from forge.data.batches import Batch, for_the_loop
from forge.errors import Stopped
from forge.model.layers import compile_layers
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.student.feature_terms import build_features
from forge.student.objective import Objective
from forge.student.student import Student
from forge.student.teacher_metrics import evaluate_teacher, teacher_numbers
from forge.teacher.loading import evaluates_teacher
from forge.teacher.teacher import ModelTeacher, Teacher, TeacherOutputs
from forge.trainer.loop import FinetuningTrainer

logger = logging.getLogger(__name__)


class DistillationTrainer(FinetuningTrainer):
    """Trains with (1 - alpha) * CE + alpha * T^2 * D(teacher || student) + the terms of features, the mean over all
    labels of a step.

    With alpha 0 it trains as the FinetuningTrainer does, bit for bit; the teacher is asked in evaluations only.
    """

    def __init__(self, *args: Any, teacher: Teacher, **options: Any):
        """teacher: placed."""
        self.teacher = teacher
        super().__init__(*args, **options)
        if self.config.training.compile and isinstance(teacher, ModelTeacher):
            compile_layers(teacher.model)

    def close(self) -> None:
        """The teacher goes too."""
        super().close()
        self.teacher.close()

    def build_student(self, model: PreTrainedModel) -> Student:
        """A student that takes its teacher's outputs."""
        config, options = self.config, self.task.forward_options
        teacher = self.teacher
        objective = Objective(config.distillation, teacher.logit_scale, teacher.softcap, config.training.loss)
        features = build_features(config.distillation, config.training.seed, model, options, teacher, self._any_batch())
        student = Student(model, options, self.language_head(model), objective, features)
        teacher.whole_logits = student.head is None
        return student

    def _any_batch(self) -> Batch:
        """One row, to see what the models make of it."""
        row = next(iter(self.task.validation.values()))[0]
        return send_to_device(for_the_loop(self.task.collate([row]), [0]), self.accelerator.device)

    def teacher_outputs(self, batch: Batch, split: str | None = None) -> TeacherOutputs | None:
        distillation = self.config.distillation
        if split is None:
            return self.teacher.outputs(batch, split, distillation.temperature) if distillation.alpha > 0 else None
        if distillation.aligns_tokens:
            return None  # over other tokens there is no agreement, and no KL
        return self.teacher.outputs(batch, split, 1.0) if evaluates_teacher(self.config) else None

    def report_teacher(self, taught: LoadedModel | None, origin: Origin | None) -> None:
        """The teacher's own numbers, as the evaluation `teacher`: computed, or those of an earlier run of the same one.
        Raises Stopped.

        taught: the model that the teacher computes with; None: it is not in memory. origin: of the teacher.
        """
        if self.config.distillation.aligns_tokens:
            logger.info("the teacher reads other tokens than these: its own numbers are not evaluated")
            return
        compute: Callable[[], Metrics] | None = None
        if taught is not None and isinstance(self.teacher, ModelTeacher):
            given = (self.config, self.task, taught, self.teacher, self.accelerator)
            compute = partial(evaluate_teacher, *given, self._break_off_if_stopped)
        try:
            metrics = teacher_numbers(self.config, self.task, origin, self.accelerator, compute, str(self.run.path))
        except Stopped:
            self._save_and_stop()
        if metrics is not None:
            self._on_rank_0_of_this_attempt(lambda: self.callbacks.evaluated(self.state, "teacher", metrics))
