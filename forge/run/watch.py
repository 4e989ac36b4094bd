"""Sees from outside how far a run is: its stage, its saves and what lies in its directory, many times a second."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from forge.errors import UsageError
from forge.run.directory import STATE_FILE, RunDirectory
from forge.run.files import read_json_lines
from forge.run.state import Stage, TrainingState

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STAGING = re.compile(r"\.tmp-(?:checkpoint-)?(\d+)(?:-.*)?")
OF_SAVES = re.compile(r"checkpoint-\d+|\.tmp-.*|\.trash-.*|\.bad-.*|final")


@dataclass(frozen=True)
class Sight:
    """What the directory showed at one instant."""

    state: TrainingState | None  # None: the run is not there yet
    staging: dict[str, int]  # folders of checkpoints that are being written, or were left so: name to step
    checkpoints: tuple[int, ...]  # steps, in their order
    saves: tuple[str, ...]  # the names of all that a save, an export or a resume makes


@dataclass
class Tempo:
    """How long a run's stages and saves took, in seconds, as far as its directory showed it."""

    opened: float = math.nan  # the run directory's first sight
    stages: dict[Stage, float] = field(default_factory=dict)  # when each was first seen
    staging: dict[str, float] = field(default_factory=dict)  # when each folder of a save was first seen
    saves: list[float] = field(default_factory=list)  # how long each took
    total: float = math.nan  # to be set at the run's end

    def see(self, sight: Sight, seconds: float) -> None:
        if sight.state is None:
            return
        if math.isnan(self.opened):
            self.opened = seconds
        self.stages.setdefault(sight.state.stage, seconds)
        for name in sight.staging:
            self.staging.setdefault(name, seconds)
        for name in [name for name in self.staging if name not in sight.staging]:
            self.saves.append(seconds - self.staging.pop(name))

    def of_stage(self, stage: Stage) -> float:
        later = [start for other, start in self.stages.items() if other.order > stage.order]
        return max(0.0, min(later, default=self.total) - self.stages.get(stage, math.inf))

    @property
    def of_save(self) -> float:
        return sorted(self.saves)[len(self.saves) // 2] if self.saves else 0.0


class Watch:
    """Looks at one run directory; reads its state only when that has changed."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._seen: tuple[int, int] | None = None
        self._state: TrainingState | None = None

    def look(self) -> Sight:
        try:
            names = sorted(os.listdir(self._run.path))
        except FileNotFoundError:
            names = []
        if STATE_FILE in names:
            self._read_state(self._run.state_file)
        checkpoints = [int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name))]
        return Sight(
            self._state,
            {name: int(found[1]) for name in names if (found := STAGING.fullmatch(name))},
            tuple(sorted(checkpoints)),
            tuple(name for name in names if OF_SAVES.fullmatch(name)),
        )

    def reported_step(self) -> int:
        """The last step that the run's metrics tell of; 0 before the first report."""
        return max((row.get("step", 0) for row in read_json_lines(self._run.metrics_file)), default=0)

    def _read_state(self, file: Path) -> None:
        try:
            status = file.stat()
            if (status.st_ino, status.st_mtime_ns) != self._seen:
                self._state = TrainingState.load(file)
                self._seen = status.st_ino, status.st_mtime_ns
        except (FileNotFoundError, UsageError):  # gone, or half written: the next look finds out
            return
