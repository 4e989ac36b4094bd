"""Evaluates a teacher as if it were the student: the task's own metrics on every validation split."""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import align_module_device
from torch import Tensor

from forge.cluster.signals import StopRequest
from forge.config.schema import Config
from forge.data.batches import Batch, as_teacher_reads
from forge.errors import Stopped, TrainingError
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import gathered
from forge.ranks.stop_vote import StopVote
from forge.student.evaluation import evaluate
from forge.student.stored_metrics import numbers_key, store_numbers, stored_numbers
from forge.student.student import Student
from forge.task.task import Task
from forge.teacher.loading import evaluates_teacher
from forge.teacher.placement import teacher_dtype
from forge.teacher.teacher import ModelTeacher, TeacherOutputs, as_dtype

logger = logging.getLogger(__name__)

HOW_TO_GET_THEM = (
    "the teacher's own numbers are missing: with teacher.placement: cached it is not in memory, and nobody has "
    "evaluated it on these rows; `forge cache-teacher` does, and so does a run with teacher.placement: replicated"
)


def teacher_numbers(
    config: Config,
    task: Task,
    origin: Origin | None,
    accelerator: Accelerator,
    compute: Callable[[], dict[str, Any]] | None,
    made_by: str,
) -> dict[str, Any] | None:
    """A teacher's metrics as `split/metric`: those that were stored by an earlier run with the same teacher and rows,
    else what `compute` gives, which is stored. On every rank at once; the same on each.

    task: the student's. origin: of the teacher; None: it is not known, and nothing is stored. compute: as
    evaluate_teacher does; None: there is no model in memory. Returns None, with one warning, where there is neither.
    """
    root, key = Path(config.output_root), None
    if origin is not None:
        key = numbers_key(config, task, origin, str(teacher_dtype(config.teacher, accelerator)).removeprefix("torch."))
    known = on_rank_0(accelerator, lambda: stored_numbers(root, key) if key is not None else None)
    if known is not None:
        logger.info("the teacher's numbers are those of %s (%s)", known.made_by, known.made_at)
        return known.metrics
    if compute is None:
        logger.warning(HOW_TO_GET_THEM)
        return None
    metrics = compute()
    if key is not None:
        on_rank_0(accelerator, lambda: store_numbers(root, key, metrics, made_by))
    return metrics


def evaluate_teacher(
    config: Config,
    task: Task,
    taught: LoadedModel,
    teacher: ModelTeacher,
    accelerator: Accelerator,
    between_batches: Callable[[], None],
) -> dict[str, Any]:
    """The metrics that this model would have as a student, as `split/metric`; the same on every rank.

    task: the student's. taught, teacher: the same model, loaded and placed. between_batches: called as often on every
    rank; may raise to break off. Raises TrainingError where a loss is not finite.
    """
    dtype = teacher.model.dtype
    workers = config.training.num_workers
    try:
        metrics, _ = evaluate(
            _Taught(teacher.model, task.forward_options, teacher.head),
            _in_dtype(task.for_model(taught).without_samples(), dtype),
            accelerator,
            batch_size=config.evaluation.per_device_batch_size,
            max_samples=config.evaluation.max_samples,
            seed=config.training.seed,
            num_workers=task.num_workers if workers is None else workers,
            teacher_outputs=lambda batch, split: None,
            between_batches=between_batches,
        )
    finally:
        teacher.model.eval()  # an evaluation leaves what it has evaluated in training mode
    bad = [name for name, value in metrics.items() if name.endswith("/loss") and not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{bad[0]} of the teacher {config.teacher.path} is {metrics[bad[0]]} in {str(dtype).removeprefix('torch.')}"
            ": a student would learn nothing from it; set teacher.dtype: float32, or name another teacher"
        )
    return metrics


def keep_numbers(
    stop: StopRequest,
    config: Config,
    task: Task,
    origin: Origin,
    accelerator: Accelerator,
    load: Callable[[], tuple[LoadedModel, ModelTeacher]],
) -> None:
    """Evaluates a teacher for the runs that will not have it in memory, unless none asks, or it is done already.

    load: the teacher, placed; called where it is needed. Raises Stopped.
    """
    vote = StopVote(accelerator, stop)

    def between_batches() -> None:
        if vote.now():
            raise Stopped(f"stopped by {vote.reason()} in the teacher's evaluation; the same command goes on")

    def compute() -> dict[str, Any]:
        return evaluate_teacher(config, task, *load(), accelerator, between_batches)

    if evaluates_teacher(config):
        logger.info("the teacher's own numbers, on the rows that are not trained on")
        metrics = teacher_numbers(config, task, origin, accelerator, compute, "forge cache-teacher") or {}
        shown = [f"{name} {value:.4f}" for name, value in metrics.items() if name.split("/")[-1] in task.headline]
        logger.info("%s", "  ".join(shown))


class _Taught(Student):
    """A placed teacher in the student's place."""

    def forward(self, batch: Batch, teacher: TeacherOutputs | None = None) -> dict[str, Tensor]:
        # Offloaded, the head has its weight in its own forward only, and the loss wants it outside.
        linear = None if self.head is None else self.head.linear
        weights = [] if linear is None else [*linear.parameters(recurse=False)]
        with nullcontext() if linear is None else align_module_device(linear), gathered(weights):
            return super().forward(as_teacher_reads(batch), teacher)


def _in_dtype(task: Task, dtype: torch.dtype) -> Task:
    """Its images come in the dtype of the model that reads them, also where it writes a text from them."""
    if dtype == torch.float32:
        return task
    cast = copy.copy(task)
    object.__setattr__(cast, "collate", partial(_collate, task, dtype))  # tasks are frozen
    return cast


def _collate(task: Task, dtype: torch.dtype, rows: list[dict[str, Any]]) -> Batch:
    return as_dtype(task.collate(rows), dtype)
