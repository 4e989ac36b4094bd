"""Loads what a run is made of: its task, its student and its teacher."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from forge.cluster.launch import option_words
from forge.config.loader import LoadedConfig
from forge.config.schema import Config, TrainingConfig
from forge.data.stream import RowStream
from forge.model.load import LoadedModel
from forge.model.lora import with_lora
from forge.model.origin import lineage
from forge.model.source import origin_of
from forge.ranks.deepspeed import plans_of
from forge.ranks.world import Ranks
from forge.student.feature_terms import check_features
from forge.task.load import load_task
from forge.task.task import Task
from forge.teacher.placement import LoadedTeacher, load_teacher
from forge.teacher.teacher import TeacherSource
from forge.teacher.vocabulary import for_teacher, warn_of_columns
from forge.teacher_cache.reader import find_teacher_cache


@dataclass(frozen=True)
class Components:
    """Task, student and teacher of a run, all on the CPU, as each rank has them."""

    task: Task  # as the two models need it
    student: LoadedModel
    teacher: TeacherSource | None  # in memory, or files with its outputs; None: the config wants none

    @property
    def teacher_sha256(self) -> str | None:
        """The hash of the teacher's weights; None if there is no teacher, or it is unknown."""
        return self.teacher.weights_sha256 if self.teacher is not None else None

    def facts(self, config: Config, accelerator: Accelerator) -> dict[str, Any]:
        """What run_metadata.json records of them and of the ranks."""
        of_teacher = lineage(self.teacher.origin, "teacher") if self.teacher is not None else []
        return {
            "task": self.task.about(),
            "data": self.task.facts(),
            "model": self.student.facts(),
            "teacher": self.teacher.facts() if self.teacher is not None else None,
            "lineage": [ancestor.model_dump() for ancestor in (*lineage(self.student.origin), *of_teacher)],
            "world": world_facts(accelerator, config.training, self.task),
        }


def load_components(loaded: LoadedConfig, ranks: Ranks, command: Sequence[str]) -> Components:
    """Load what a config names, on all ranks at once; command: the user's, for a message that suggests another.

    Raises:
        UsageError: Data, models and config do not fit together.
        Stopped: A signal came meanwhile.
    """
    config = loaded.config
    task = ranks.rank_0_first(lambda: load_task(config))
    student = ranks.on_every_rank(lambda: _load_student(config, task))
    student = _with_origin(student, ranks, "model")
    task = task.for_model(student)
    if not config.wants_teacher:
        return Components(task, student, None)
    task = ranks.rank_0_first(lambda: for_teacher(config, task))
    if config.teacher.placement == "cached":
        making = cache_command(loaded.file, command)
        return Components(task, student, find_teacher_cache(config, task, student, ranks.accelerator, making))
    teacher = ranks.on_every_rank(lambda: _load_teacher(config, task, student))
    return Components(task, student, LoadedTeacher(_with_origin(teacher, ranks, "teacher"), config.teacher))


def shape_of_step(accelerator: Accelerator, training: TrainingConfig, task: Task) -> tuple[int, int]:
    """The rows per optimizer step, and the micro-batches on each rank, no more than the training rows fill."""
    known = None if isinstance(task.train, RowStream) or plans_of(accelerator) else len(task.train)  # a plan fixes them
    return training.step_shape(accelerator.num_processes, known)


def world_facts(accelerator: Accelerator, training: TrainingConfig, task: Task) -> dict[str, Any]:
    """What run_metadata.json records of the ranks, and of how a step is spread over them."""
    rows_per_step, micro_batches = shape_of_step(accelerator, training, task)
    return {
        "ranks": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "rows_per_step": rows_per_step,
        "micro_batches_per_rank": micro_batches,
        "deepspeed": plans_of(accelerator) or None,
    }


def cache_command(file: Path, command: Sequence[str]) -> str:
    """The command that makes the teacher's cache of a config file, with the overrides of the user's command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--debug", action="store_true")
    valued = ("output_root", "max_steps", "epochs")
    for name in valued:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given, _ = parser.parse_known_args(list(command))
    options = option_words(**{name: getattr(given, name) for name in ("debug", *valued, "set")})
    return shlex.join(["forge", "cache-teacher", str(file), *options])


def _load_student(config: Config, task: Task) -> LoadedModel:
    set_seed(config.training.seed)  # new weights depend on the seed alone, not on what was drawn before
    return with_lora(task.load_model(config.model, config.training), config.model, config.training.seed)


def _load_teacher(config: Config, task: Task, student: LoadedModel) -> LoadedModel:
    teacher = load_teacher(config, task)
    check_features(config.distillation, student.model, teacher.model)
    warn_of_columns(student.model, teacher.model, task)
    return teacher


def _with_origin(loaded: LoadedModel, ranks: Ranks, key: str) -> LoadedModel:
    """Hash the files that a model came from, on rank 0. Raises UsageError where an adapter was made for others."""
    source = loaded.source
    if source is None:
        return loaded
    return replace(loaded, origin=ranks.on_rank_0(lambda: origin_of(source, key)))
