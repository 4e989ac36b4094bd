"""The control of a distilled run: its twin without the teacher, trained for as many steps in a run beside it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.config.changes import ROWS, Kind, changes
from forge.config.explain import effective
from forge.config.loader import load_config
from forge.config.placing import located
from forge.config.schema import Config
from forge.errors import UsageError
from forge.run.directory import RunDirectory
from forge.run.metadata import read_metadata
from forge.run.state import TrainingState

SUFFIX = "-sft"
# What open_run writes before the state, which marks a run: a folder with no more was left by a kill in its midst.
FIRST_FILES = ("config.yaml", "run_metadata.json", "requirements.txt", "dirty_1.diff")
FACTS = (  # of run_metadata.json: what it says, and whose
    ("data", "fingerprint", "rows, or their tokens,"),
    ("model", "weights_sha256", "weights of the model"),
    ("teacher", "weights_sha256", "weights of the teacher"),
    ("world", "rows_per_step", "rows of a step"),
)


@dataclass(frozen=True)
class Control:
    """The control that there is already."""

    run: RunDirectory
    complete: bool
    allowed: list[str]  # keys of --allow-change that it is resumed with


def wants_control(config: Config) -> bool:
    return config.evaluation.control is not None and config.distillation.alpha > 0


def control_of(run: RunDirectory) -> RunDirectory:
    """Where the run's control lies, whether or not it is there."""
    return RunDirectory(run.path.with_name(f"{run.name}{SUFFIX}"))


def control_config(config: Config, steps: int) -> Config:
    """The config of the control: nothing differs but the teacher's part in the loss. Its weights go to no hub, where
    they would take the place of the run's own."""
    compared = config.evaluation.teacher is not False and config.distillation.divergence != "uld"  # else of no use
    updates: dict[str, dict[str, object]] = {
        "distillation": {"alpha": 0.0},  # the other keys stay, without effect: a cache of outputs is found by some
        "evaluation": {"control": None, "teacher": compared},
        "training": {"max_steps": steps},
        "export": {"push_to_hub": None},
    }
    whole = located(config)
    sections = {name: getattr(whole, name).model_copy(update=update) for name, update in updates.items()}
    return whole.model_copy(update=sections)


def place_of(run: RunDirectory, config: Config) -> tuple[Path, Path]:
    """Output root and config name of a run beside this one, also where this one has been moved."""
    root, parent = Path(config.output_root).absolute(), run.path.absolute().parent
    return (root, parent.relative_to(root)) if parent.is_relative_to(root) else (parent, Path())


def check_control(
    control: RunDirectory,
    wanted: Config,
    *,
    steps: int | None = None,
    facts: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
) -> Control | None:
    """The control that an earlier attempt has begun, or completed; None: the name is free.

    wanted: its config, by control_config. steps: of the whole run; None: not known yet. facts: what run_metadata.json
    would tell of it. allowed: keys that may change the meaning. Raises UsageError where another thing has the name.
    """
    if not control.path.exists() or is_half_made(control):
        return None
    if not control.state_file.is_file():
        raise UsageError(_other(control, "it holds no training_state.json"))
    state = TrainingState.load(control.state_file)
    recorded = effective(located(load_config(control.config_file).config))
    found = [
        change
        for change in changes(recorded, wanted, rows_per_step_old=0, rows_per_step_new=0)
        if change.kind is Kind.MEANING
    ]
    if strange := [str(change) for change in found if change.key not in allowed]:
        raise UsageError(_other(control, f"its config differs: {'; '.join(strange)}"))
    own = read_metadata(control).model_dump()
    for section, name, words in FACTS if facts is not None and ROWS not in allowed else ():
        here = ((facts or {}).get(section) or {}).get(name)
        there = (own.get(section) or {}).get(name)
        if here is not None and there is not None and here != there:
            raise UsageError(_other(control, f"its {words} are {str(there)[:12]} instead of {str(here)[:12]}"))
    if steps is not None and (state.step != steps if state.pipeline_complete else state.step > steps):
        done = "complete at" if state.pipeline_complete else "at"
        raise UsageError(_other(control, f"it is {done} step {state.step}, and this run takes {steps}"))
    keys = [change.key for change in found] + [key for key in allowed if key == ROWS]
    return Control(control, state.pipeline_complete, keys)


def is_half_made(control: RunDirectory) -> bool:
    """Was its folder made by an attempt that was killed before it was a run?"""
    if control.state_file.exists() or not control.path.is_dir():
        return False
    return all(path.name in FIRST_FILES or path.name.startswith(".") for path in control.path.iterdir())


def remove_half_made(control: RunDirectory) -> None:
    if is_half_made(control):
        shutil.rmtree(control.path)


def _other(control: RunDirectory, why: str) -> str:
    return (
        f"{control.path} is where the control of this run is to lie (evaluation.control: sft), and it is another "
        f"thing: {why}; move it away, give this run another name, or set evaluation.control=null"
    )
