"""Follows a run from outside: its stage, its saves and what its directory holds, many times a second."""

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
class Snapshot:
    """What a run directory showed at one instant."""

    state: TrainingState | None = None  # None: the run does not exist yet
    staging: dict[str, int] = field(default_factory=dict)  # folders of saves that are not committed: name to step
    checkpoints: tuple[int, ...] = ()  # their steps, ascending
    saves: tuple[str, ...] = ()  # the names of everything that a save, an export or a resume creates

    @property
    def attempt(self) -> int:
        """The number of the latest attempt at the run; 0 before the first."""
        return self.state.attempts if self.state is not None else 0

    @property
    def complete(self) -> bool:
        """True if the run has done all of its stages."""
        return self.state is not None and self.state.pipeline_complete


class Watch:
    """Takes snapshots of one run directory. Reads the run's state only when the file has changed."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._seen: tuple[int, int] | None = None  # inode and time of the state that was read last
        self._state: TrainingState | None = None

    def look(self) -> Snapshot:
        """Return what the directory holds now."""
        try:
            names = sorted(os.listdir(self._run.path))
        except FileNotFoundError:
            return Snapshot()
        if STATE_FILE in names:
            self._read_state(self._run.state_file)
        return Snapshot(
            self._state,
            {name: int(found[1]) for name in names if (found := STAGING.fullmatch(name))},
            tuple(sorted(int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name)))),
            tuple(name for name in names if OF_SAVES.fullmatch(name)),
        )

    def reported_step(self) -> int:
        """Return the last step in the run's metrics; 0 before the first report."""
        return max((row.get("step", 0) for row in read_metrics(self._run.metrics_file)), default=0)

    def _read_state(self, file: Path) -> None:
        try:
            status = file.stat()
            if (status.st_ino, status.st_mtime_ns) != self._seen:
                self._state = TrainingState.load(file)
                self._seen = status.st_ino, status.st_mtime_ns
        except (FileNotFoundError, UsageError):  # deleted or broken meanwhile: the state that was read last stands
            return


class Timings:
    """How long the stages and the saves of one attempt took, in seconds, as far as snapshots showed it."""

    def __init__(self) -> None:
        self._stages: dict[Stage, float] = {}  # when each was first seen
        self._first_save: float | None = None
        self._staging: dict[str, float] = {}  # when the folder of each unfinished save was first seen
        self._saves: list[float] = []  # how long each save took
        self._end = 0.0

    def add(self, snapshot: Snapshot, seconds: float) -> None:
        """Learn from a snapshot, which was taken so many seconds after the attempt's start.

        The more often it is called, the more exact the timings are.
        """
        self._end = seconds
        if snapshot.state is None:
            return
        self._stages.setdefault(snapshot.state.stage, seconds)
        for name in snapshot.staging:
            self._staging.setdefault(name, seconds)
        for name in [name for name in self._staging if name not in snapshot.staging]:
            self._saves.append(seconds - self._staging.pop(name))
        if self._first_save is None and (snapshot.staging or snapshot.checkpoints):
            self._first_save = seconds

    def total_s(self) -> float:
        """Return the time from the attempt's start to the last snapshot."""
        return self._end

    def stage_s(self, stage: Stage) -> float:
        """Return how long a stage took; 0 for one that no snapshot showed."""
        later = [start for other, start in self._stages.items() if other.order > stage.order]
        return min(later, default=self._end) - self._stages[stage] if stage in self._stages else 0.0

    def until_training_s(self) -> float:
        """Return the time from the first snapshot of the run to the beginning of training."""
        return self._stages.get(Stage.TRAINING, 0.0) - min(self._stages.values(), default=0.0)

    def until_first_save_s(self) -> float:
        """Return the time from the beginning of training to the first save."""
        start = self._stages.get(Stage.TRAINING)
        return max(0.0, self._first_save - start) if start is not None and self._first_save is not None else 0.0

    def save_s(self) -> float:
        """Return the median time of a save; 0 if no snapshot showed one."""
        return sorted(self._saves)[len(self._saves) // 2] if self._saves else 0.0
