"""Keeps training_state.json: the stage a run has reached, and the numbers that a resume and `forge runs` need."""

import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, get_type_hints

from forge.config.former_names import current_metric
from forge.errors import UsageError
from forge.run.files import Guard, write_json


class Stage(StrEnum):
    """The stages of a run in their order."""

    SETUP = "setup"
    BASELINE_EVALUATION = "baseline_evaluation"
    TRAINING = "training"
    EXPORT = "export"
    FINAL_EVALUATION = "final_evaluation"
    COMPLETE = "complete"

    @property
    def order(self) -> int:
        return list(Stage).index(self)


def now() -> str:
    """UTC, ISO 8601, whole seconds: the form of every time that forge writes to a file."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id() -> str:
    """Names a run for ever, also when its directory is moved; serves as the W&B id and as a file name."""
    return secrets.token_hex(6)


@dataclass
class TrainingState:
    run_id: str
    stage: Stage = Stage.SETUP  # the one the run is in
    pipeline_complete: bool = False
    step: int = 0
    total_steps: int = 0  # 0 until the data is known
    epoch: float = 0.0
    samples: int = 0  # rows trained on, over all ranks and epochs
    tokens: int = 0  # likewise
    step_sizes: list = field(default_factory=list)  # [first step, rows of each step from there on]
    evaluated_step: int = 0  # of the last evaluation during training that was finished
    latest_checkpoint: str | None = None  # its folder's name, as in checkpoint-500
    best_metric: dict | None = None  # {"name", "value", "step"}
    kept_best: int | None = None  # the step of the best one that a checkpoint holds
    attempts: int = 0
    preemptions: int = 0  # attempts that ended on a signal
    error: str | None = None  # the sentence the last attempt ended with, if it failed
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)

    def reached(self, stage: Stage) -> bool:
        """Has the run come to this stage, or beyond it?"""
        return self.stage.order >= stage.order

    def save(self, path: Path, guard: Guard | None = None) -> None:
        """guard: raises where this process may no longer write."""
        self.updated_at = now()
        write_json(path, asdict(self), *(() if guard is None else (guard,)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the file back; a UsageError names it where it is missing, broken or from a newer forge."""
        return cls.from_values(_read_object(path), path)

    @classmethod
    def from_values(cls, values: dict[str, Any], path: Path) -> Self:
        """Checks what asdict gave, read from path; raises UsageError like load."""
        known = {item.name for item in fields(cls)}
        newer = [key for key in values if key not in known]
        if newer:
            raise UsageError(
                f"{path} was written by a newer forge: this one does not know {', '.join(newer)}; update forge to use "
                f"this run"
            )
        hints = get_type_hints(cls)
        values = {key: _checked(path, key, value, hints[key]) for key, value in values.items()}
        if "run_id" not in values or "stage" not in values:
            raise UsageError(f"{path} is broken: it names no run_id or no stage; start the run anew under another name")
        if best := values.get("best_metric"):
            values["best_metric"] = {**best, "name": current_metric(best["name"])}
        return cls(**values)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); is its folder a run directory?") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f'{path} is broken, it is not JSON ({error}); the newest checkpoint\'s state.json holds it below "state": '
            f"put that back, or start the run anew under another name"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is broken: it holds no JSON object; start the run anew under another name")
    return value


def _checked(path: Path, key: str, value: Any, hint: Any) -> Any:
    if hint is Stage:
        if value == "control":  # forge 0.1.0: everything is done but the twin, which is a run of its own now
            return Stage.COMPLETE
        if value in list(Stage):
            return Stage(value)
        raise UsageError(f"{path} is broken: stage {value!r} is none of {', '.join(Stage)}")
    if hint is float and type(value) is int:  # 3 for 3.0, by hand
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = getattr(hint, "__name__", hint)
        raise UsageError(f"{path} is broken: {key} must be {expected}, not {value!r}")
    return value
