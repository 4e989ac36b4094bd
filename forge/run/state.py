"""TrainingState: the stage that a run has reached and the numbers that a resume and `forge runs` need."""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, field_validator

from forge.config.former_names import current_metric
from forge.errors import UsageError
from forge.run.files import Guard, unguarded, write_json
from forge.run.records import Record, read_record

ADVICE = (
    "the newest checkpoint's state.json has a copy under the key `state`: restore it from there, or start a new run "
    "under another name"
)


class Stage(StrEnum):
    """The stages of a run, in order."""

    SETUP = "setup"
    BASELINE_EVALUATION = "baseline_evaluation"
    TRAINING = "training"
    EXPORT = "export"
    FINAL_EVALUATION = "final_evaluation"
    COMPLETE = "complete"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Read the stage in which forge once trained a control inside its run, when all else was done, as complete."""
        return cls.COMPLETE if value == "control" else None

    @property
    def order(self) -> int:
        return list(Stage).index(self)


def now() -> str:
    """Return the time in UTC as ISO 8601 with whole seconds: the form of every time that forge writes to a file."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id() -> str:
    """Return a permanent id for a run, which stays when its directory moves; also the W&B id and a file name."""
    return secrets.token_hex(6)


class BestEvaluation(Record):
    """The best evaluation so far, by one of its metrics."""

    name: str
    value: float | int
    step: int

    @field_validator("name")
    @classmethod
    def _current_name(cls, name: str) -> str:
        return current_metric(name)


class TrainingState(Record):
    """What training_state.json holds. Training changes it in place; it is checked when it is read."""

    model_config = ConfigDict(frozen=False)

    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+=-]{0,99}$")]  # it names files
    stage: Stage = Stage.SETUP  # the one the run is in
    pipeline_complete: bool = False
    step: int = 0
    total_steps: int = 0  # 0 until the data is known
    epoch: float = 0.0
    samples: int = 0  # rows trained on, over all ranks and epochs
    tokens: int = 0  # likewise
    step_sizes: list[list[int]] = Field(default_factory=list)  # [first step, rows of each step from there on]
    evaluated_step: int = 0  # of the last evaluation that was finished during training
    latest_checkpoint: str | None = None  # its folder's name, as in checkpoint-500
    best_metric: BestEvaluation | None = None
    kept_best: int | None = None  # the step of the best evaluation that has a checkpoint
    attempts: int = 0
    preemptions: int = 0  # attempts that ended on a signal
    error: str | None = None  # why the last attempt failed, if it did
    created_at: str = Field(default_factory=now)
    updated_at: str = Field(default_factory=now)

    def reached(self, stage: Stage) -> bool:
        """True if the run is in this stage or a later one."""
        return self.stage.order >= stage.order

    def save(self, path: Path, guard: Guard = unguarded) -> None:
        """Write the file with the current time. The guard raises if this process may no longer write."""
        self.updated_at = now()
        write_json(path, self.model_dump(), guard)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file. Raises UsageError, which names it, if it is missing, broken or from a newer forge."""
        state = read_record(cls, path, ADVICE)
        if "stage" not in state.model_fields_set:  # a new state starts in setup, a file must say where it is
            raise UsageError(f"{path} is broken: stage is missing; {ADVICE}")
        if state.pipeline_complete and state.stage is not Stage.COMPLETE:
            raise UsageError(f"{path} is broken: pipeline_complete is true, but stage is {state.stage}; {ADVICE}")
        return state
