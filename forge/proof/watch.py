"""Sees from outside how far a run is: its stage, its saves and what lies in its directory, many times a second."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from forge.errors import UsageError
from forge.run.directory import STATE_FILE, RunDirectory
from forge.run.metrics import read_metrics
from forge.run.state import Stage, TrainingState

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STAGING = re.compile(r"\.tmp-(\d+)-.*")
OF_SAVES = re.compile(r"checkpoint-\d+|\.tmp-.*|\.trash-.*|\.bad-.*|final")


@dataclass(frozen=True)
class Sight:
    """What the directory showed at one instant."""

    state: TrainingState | None = None  # None: the run is not there yet
    staging: dict[str, int] = field(default_factory=dict)  # folders of saves, under way or left so: name to step
    checkpoints: tuple[int, ...] = ()  # their steps, in order
    saves: tuple[str, ...] = ()  # the names of all that a save, an export or a resume makes

    @property
    def attempt(self) -> int:
        """The number of the last attempt that took the run; 0 before the first."""
        return self.state.attempts if self.state is not None else 0

    @property
    def complete(self) -> bool:
        return self.state is not None and self.state.pipeline_complete


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
            return Sight()
        if STATE_FILE in names:
            self._read_state(self._run.state_file)
        return Sight(
            self._state,
            {name: int(found[1]) for name in names if (found := STAGING.fullmatch(name))},
            tuple(sorted(int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name)))),
            tuple(name for name in names if OF_SAVES.fullmatch(name)),
        )

    def reported_step(self) -> int:
        """The last step that the run's metrics tell of; 0 before the first report."""
        return max((row.get("step", 0) for row in read_metrics(self._run.metrics_file)), default=0)

    def _read_state(self, file: Path) -> None:
        try:
            status = file.stat()
            if (status.st_ino, status.st_mtime_ns) != self._seen:
                self._state = TrainingState.load(file)
                self._seen = status.st_ino, status.st_mtime_ns
        except (FileNotFoundError, UsageError):  # it is gone, or broken: what was seen last holds
            return


class Tempo:
    """How long the stages and the saves of one attempt took, in seconds, as far as its directory showed it."""

    def __init__(self) -> None:
        self._stages: dict[Stage, float] = {}  # when each was first seen
        self._first_save: float | None = None
        self._staging: dict[str, float] = {}  # when each folder of a save that is under way was first seen
        self._saves: list[float] = []  # how long each took
        self._end = 0.0

    def see(self, sight: Sight, seconds: float) -> None:
        """To be called as often as possible; seconds: since the attempt's start."""
        self._end = seconds
        if sight.state is None:
            return
        self._stages.setdefault(sight.state.stage, seconds)
        for name in sight.staging:
            self._staging.setdefault(name, seconds)
        for name in [name for name in self._staging if name not in sight.staging]:
            self._saves.append(seconds - self._staging.pop(name))
        if self._first_save is None and (sight.staging or sight.checkpoints):
            self._first_save = seconds

    def total_s(self) -> float:
        return self._end

    def of_stage_s(self, stage: Stage) -> float:
        """0 for one that passed unseen."""
        later = [start for other, start in self._stages.items() if other.order > stage.order]
        return min(later, default=self._end) - self._stages[stage] if stage in self._stages else 0.0

    def to_training_s(self) -> float:
        """From the first sight of the run directory."""
        return self._stages.get(Stage.TRAINING, 0.0) - min(self._stages.values(), default=0.0)

    def to_first_save_s(self) -> float:
        """From the beginning of training."""
        start = self._stages.get(Stage.TRAINING)
        return max(0.0, self._first_save - start) if start is not None and self._first_save is not None else 0.0

    def of_save_s(self) -> float:
        """The median; 0 where none was seen."""
        return sorted(self._saves)[len(self._saves) // 2] if self._saves else 0.0
