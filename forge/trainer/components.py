"""Loads what a run is made of (its task, its student, its teacher) and builds the trainer of it."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from forge.cluster.launch import option_words
from forge.cluster.signals import StopRequest
from forge.config.loader import LoadedConfig
from forge.config.schema import Config
from forge.model.lineage import lineage
from forge.model.load import LoadedModel
from forge.model.lora import with_lora
from forge.model.source import origin_of
from forge.ranks.agreement import on_every_rank, on_rank_0, rank_0_first
from forge.student.feature_terms import check_features
from forge.task.load import load_task
from forge.task.task import Task
from forge.teacher.loading import label_columns, load_teacher
from forge.teacher.placement import place
from forge.teacher.vocabulary import for_teacher, tell_of_columns
from forge.teacher_cache.reader import TeacherCache, find_teacher_cache
from forge.trainer.distillation import DistillationTrainer
from forge.trainer.loop import FinetuningTrainer, world_facts


@dataclass(frozen=True)
class Parts:
    """All on the CPU, as each rank has it."""

    task: Task  # as the two models need it
    student: LoadedModel
    teacher: LoadedModel | TeacherCache | None  # in memory, or files with its outputs; None: the config wants none

    @property
    def teacher_sha256(self) -> str | None:
        """The hash of the teacher's weights; None where there is none, or it is not known."""
        origin = self.teacher.origin if self.teacher is not None else None
        return origin.weights_sha256 if origin is not None else None

    def facts(self, config: Config, accelerator: Accelerator) -> dict[str, Any]:
        """What run_metadata.json tells of them, and of the ranks."""
        of_teacher = lineage(self.teacher.origin, "teacher") if self.teacher is not None else []
        return {
            "task": self.task.about(),
            "data": self.task.facts(),
            "model": self.student.facts(),
            "teacher": self.teacher.facts() if self.teacher is not None else None,
            "lineage": [*lineage(self.student.origin), *of_teacher],
            "world": world_facts(accelerator, config.training),
        }


def load_parts(loaded: LoadedConfig, accelerator: Accelerator, stop: StopRequest, command: Sequence[str]) -> Parts:
    """Of all ranks at once. command: the user's. Raises UsageError for whatever does not fit together, and Stopped."""
    config = loaded.config
    task = rank_0_first(accelerator, lambda: stop.breaks(lambda: load_task(config)))
    student = on_every_rank(accelerator, lambda: stop.breaks(lambda: _load_student(config, task)))
    student = _with_origin(student, accelerator, "model")
    task = task.for_model(student)
    if not config.wants_teacher:
        return Parts(task, student, None)
    task = rank_0_first(accelerator, lambda: stop.breaks(lambda: for_teacher(config, task)))
    if config.teacher.placement == "cached":
        making = cache_command(loaded.file, command)
        return Parts(task, student, find_teacher_cache(config, task, student, accelerator, making))
    teacher = on_every_rank(accelerator, lambda: stop.breaks(lambda: _load_teacher(config, task, student)))
    return Parts(task, student, _with_origin(teacher, accelerator, "teacher"))


def cache_command(file: Path, command: Sequence[str]) -> str:
    """What makes the teacher's cache of a config file, with what the user's command changed of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--debug", action="store_true")
    valued = ("output_root", "max_steps", "epochs")
    for name in valued:
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(list(command))
    options = option_words(**{name: getattr(given, name) for name in ("debug", *valued, "set")})
    return shlex.join(["forge", "cache-teacher", str(file), *options])


def build_trainer(parts: Parts, config: Config, accelerator: Accelerator, *others: Any) -> FinetuningTrainer:
    """The trainer that the parts ask for; others: as FinetuningTrainer takes them, from the run on."""
    student, taught = parts.student, parts.teacher
    if taught is None:
        return FinetuningTrainer(config, accelerator, parts.task, student, *others)
    columns = label_columns(student.label_ids, taught.label_ids)
    if isinstance(taught, TeacherCache):
        teacher = taught.placed(accelerator, columns)
    else:
        teacher = place(taught.model, config.teacher, accelerator, parts.task, columns)
    return DistillationTrainer(config, accelerator, parts.task, student, *others, teacher=teacher)


def _load_student(config: Config, task: Task) -> LoadedModel:
    set_seed(config.training.seed)  # new weights depend on the seed alone, not on what was drawn before
    return with_lora(task.load_model(config.model, config.training), config.model, config.training.seed)


def _load_teacher(config: Config, task: Task, student: LoadedModel) -> LoadedModel:
    teacher = load_teacher(config, task)
    check_features(config.distillation, student.model, teacher.model)
    tell_of_columns(student.model, teacher.model, task)
    return teacher


def _with_origin(loaded: LoadedModel, accelerator: Accelerator, key: str) -> LoadedModel:
    """Rank 0 hashes the files that the model came from. Raises UsageError where an adapter was made for others."""
    source = loaded.source
    if source is None:
        return loaded
    return replace(loaded, origin=on_rank_0(accelerator, lambda: origin_of(source, key)))
