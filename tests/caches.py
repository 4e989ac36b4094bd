"""What the tests of teacher caches share: a cache is filled, and opened as a run opens it."""

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from conversations import config_on, conversation

from forge.cluster.signals import StopRequest
from forge.config.schema import Config
from forge.data.batches import Batch, with_positions
from forge.ranks.accelerator import build_accelerator
from forge.run.files import read_json
from forge.task.load import load_task
from forge.task.task import Task
from forge.teacher.vocabulary import for_teacher
from forge.teacher_cache.job import cache_teacher
from forge.teacher_cache.reader import CachedTeacher, find_teacher_cache


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fill(config: Config) -> tuple[Path, dict[str, Any]]:
    """The folder of the config's cache, filled, and the manifest as it is on the disk."""
    reset()
    filled = cache_teacher(config, StopRequest())
    filled.close()
    return filled.folder, read_json(filled.folder / "manifest.json")


def opened(config: Config) -> tuple[Task, CachedTeacher, Any]:
    """The task as its student has it, the teacher that a run reads, and what it knows of the cache."""
    reset()
    accelerator = build_accelerator("no", 0)
    task = load_task(config)
    student = task.load_model(config.model, config.training)
    task = for_teacher(config, task.for_model(student))
    found = find_teacher_cache(config, task, student, accelerator, "forge cache-teacher X.yaml")
    return task, found.place(accelerator, task, None), found


def distilled(teacher: Path, *settings: str) -> list[str]:
    return [f"teacher.path={teacher}", "distillation.alpha=0.6", *settings]


def batch_of(task: Task, *ids: int, split: str | None = None) -> Batch:
    rows = task.train if split is None else task.validation[split]
    return with_positions(task.collate([rows[i] for i in ids]), list(ids))


def lm_config(folder: Path, model: Path, teacher: Path, *settings: str) -> Config:
    rows = [conversation(i, turns=1 + i % 3) for i in range(14)]
    return config_on(folder, model, rows, rows[:5], *distilled(teacher, *settings))


class Death(BaseException):
    """A process that is killed; what it has not renamed is as good as not written."""
