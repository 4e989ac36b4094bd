"""A teacher's own metrics: evaluated once as if it were the student, and stored for later runs."""

import copy
import json
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
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from forge.config.former_names import current_metrics
from forge.config.schema import Config
from forge.data.batches import Batch, with_teacher_inputs
from forge.errors import Stopped, TrainingError
from forge.model.origin import Origin
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import gathered
from forge.run.files import write_atomically
from forge.run.state import now
from forge.student.evaluation import Evaluator
from forge.student.student import Student
from forge.task.task import Task
from forge.teacher.placement import dtype_name, evaluates_teacher, teacher_dtype
from forge.teacher.teacher import Teacher, TeacherOutputs, as_dtype
from forge.teacher_cache.job import FilledCache
from forge.teacher_cache.key import ContentKey, content_key, digest

logger = logging.getLogger(__name__)

FOLDER = ".teachers"  # under the output root; a folder that starts with a dot holds no runs
METRICS_VERSION = 1  # increase it when a metric is added or counted differently: older files are then evaluated again
DIGITS = 16  # of the key's digest, in a file's name

Metrics = dict[str, Any]  # by `split/metric`


class TeacherMetrics(BaseModel):
    """One evaluation of a teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    metrics: Metrics
    made_by: str  # the run or the command that evaluated it
    made_at: str  # UTC

    @field_validator("metrics")
    @classmethod
    def _are_metrics(cls, metrics: Metrics) -> Metrics:
        if not metrics or not all("/" in name for name in metrics):
            raise ValueError("expected metrics named split/metric")
        return current_metrics(metrics)


class StoredMetrics(BaseModel):
    """The contents of a file: an evaluation, and all that it depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: ContentKey
    numbers: TeacherMetrics


def teacher_metrics(
    config: Config,
    task: Task,
    origin: Origin | None,
    accelerator: Accelerator,
    compute: Callable[[], Metrics | None],
    made_by: str,
) -> Metrics | None:
    """Return a teacher's metrics: those that an earlier run stored, else those that `compute` gives, which are stored.

    All ranks call it together, and get the same.

    Args:
        task: The task as the student needs it.
        origin: The teacher's origin; None if it is not known, and then nothing is read or stored.
        compute: evaluate_teacher with its arguments. It may return None if the teacher is not in memory: then one
            warning is logged, and None returned.
        made_by: The run or command, recorded in the file.
    """
    root, key = Path(config.output_root), None
    if origin is not None:
        key = metrics_key(config, task, origin, dtype_name(teacher_dtype(config.teacher, accelerator)))
    known = on_rank_0(accelerator, lambda: stored_metrics(root, key) if key is not None else None)
    if known is not None:
        logger.info("the teacher's metrics are those that %s stored at %s", known.made_by, known.made_at)
        return known.metrics
    metrics = compute()
    if metrics is None:
        logger.warning(
            "the teacher's own metrics are missing: with teacher.placement: cached it is not in memory, and no earlier "
            "run evaluated it on these rows; `forge cache-teacher` does, and so does a run with teacher.placement: "
            "replicated"
        )
    elif key is not None:
        on_rank_0(accelerator, lambda: store_metrics(root, key, metrics, made_by))
    return metrics


def evaluate_teacher(
    config: Config, task: Task, teacher: Teacher, accelerator: Accelerator, between_batches: Callable[[], None]
) -> Metrics | None:
    """Return the metrics that the teacher would have as a student, the same on every rank; None if not in memory.

    task is the one that the student needs. between_batches is called equally often on every rank, and may raise to
    stop the evaluation. Raises TrainingError if a loss is not finite.
    """
    loaded = teacher.loaded
    if loaded is None:
        return None
    dtype = loaded.model.dtype
    workers = config.training.num_workers
    evaluator = Evaluator(
        _in_dtype(task.for_model(loaded).without_shown_texts(), dtype),
        accelerator,
        batch_size=config.evaluation.per_device_batch_size,
        max_rows=config.evaluation.max_rows,
        seed=config.training.seed,
        num_workers=task.num_workers if workers is None else workers,
        teacher_outputs=lambda batch, split: None,
        between_batches=between_batches,
    )
    try:
        metrics, _ = evaluator.evaluate(_TeacherAsStudent(loaded.model, task.forward_options, teacher.head))
    finally:
        loaded.model.eval()  # an evaluation leaves the model in training mode
    bad = [name for name, value in metrics.items() if name.endswith("/ce") and not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{bad[0]} of the teacher {config.teacher.path} is {metrics[bad[0]]} in {dtype_name(dtype)}: a student "
            "would learn nothing from it; set teacher.dtype: float32, or name another teacher"
        )
    return metrics


def keep_teacher_metrics(cache: FilledCache) -> None:
    """Evaluate the teacher of a cache for the runs that will not have it in memory, unless that is done or unwanted.

    All ranks call it together. Raises Stopped.
    """
    if not evaluates_teacher(cache.config):
        return
    accelerator, vote = cache.ranks.accelerator, cache.ranks.vote

    def between_batches() -> None:
        if vote.now():
            raise Stopped(
                f"stopped by {vote.reason()} while evaluating the teacher; run the same command again to resume"
            )

    def compute() -> Metrics | None:
        return evaluate_teacher(cache.config, cache.task, cache.teacher(), accelerator, between_batches)

    logger.info("the teacher's own metrics on the validation rows")
    asked = (cache.config, cache.task, cache.origin, accelerator)
    metrics = teacher_metrics(*asked, compute, "forge cache-teacher") or {}
    shown = [f"{name} {value:.4f}" for name, value in metrics.items() if name.split("/")[-1] in cache.task.headline]
    logger.info("%s", "  ".join(shown))


def metrics_key(config: Config, task: Task, origin: Origin, dtype: str) -> ContentKey:
    """Return all that a teacher's metrics depend on.

    origin is the teacher's, with its hashes. dtype is the one that it computes in, such as float32.
    """
    max_rows = config.evaluation.max_rows
    return {
        **content_key(config, task, origin, dtype),
        "teacher.labels": config.teacher.labels,
        "forge's metrics": METRICS_VERSION,
        "evaluation.max_samples": max_rows,  # the former name: another would make every stored file useless
        "training.seed": config.training.seed if max_rows else None,  # it draws the rows that are evaluated
    }


def metrics_file(output_root: Path, key: ContentKey) -> Path:
    """Return the file that holds the metrics of a key."""
    return output_root / FOLDER / f"{digest(key)[:DIGITS]}.json"


def stored_metrics(output_root: Path, key: ContentKey) -> TeacherMetrics | None:
    """Return the metrics that were stored for a key; None if there are none.

    A file that is broken, or belongs to another key, is reported by a warning and counts as none.
    """
    file = metrics_file(output_root, key)
    try:
        stored = StoredMetrics.model_validate(json.loads(file.read_bytes()))
        if stored.key != json.loads(json.dumps(key)):
            raise ValueError("it belongs to another teacher, or to other rows")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        logger.warning("%s cannot be used (%s); the teacher is evaluated again", file, reason)
        return None
    return stored.numbers


def store_metrics(output_root: Path, key: ContentKey, metrics: Metrics, made_by: str) -> None:
    """Store metrics for later runs. If they cannot be written, that is only a warning."""
    file = metrics_file(output_root, key)
    stored = StoredMetrics(key=key, numbers=TeacherMetrics(metrics=metrics, made_by=made_by, made_at=now()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(stored.model_dump(), indent=2) + "\n")
    except OSError as error:
        logger.warning(
            "the teacher's metrics could not be stored in %s (%s); later runs will evaluate it again", file, error
        )


class _TeacherAsStudent(Student):
    """A placed teacher in the student's place."""

    def forward(self, batch: Batch, teacher: TeacherOutputs | None = None) -> dict[str, Tensor]:
        # An offloaded head has its weight only during its own forward, but the loss reads it outside.
        linear = None if self.head is None else self.head.linear
        weights = [] if linear is None else [*linear.parameters(recurse=False)]
        with nullcontext() if linear is None else align_module_device(linear), gathered(weights):
            return super().forward(with_teacher_inputs(batch), teacher)


def _in_dtype(task: Task, dtype: torch.dtype) -> Task:
    """Return the task with images in the dtype of the model that reads them, also where it generates texts."""
    if dtype == torch.float32:
        return task
    cast = copy.copy(task)
    object.__setattr__(cast, "collate", partial(_collate, task, dtype))  # tasks are frozen
    return cast


def _collate(task: Task, dtype: torch.dtype, rows: list[dict[str, Any]]) -> Batch:
    return as_dtype(task.collate(rows), dtype)
