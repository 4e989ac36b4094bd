"""Creates a run, or reopens one, with its config, metadata, state and registry entry."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.config.explain import config_name, to_yaml, with_absolute_paths
from forge.config.loader import LoadedConfig
from forge.run.directory import RunDirectory, create_run_directory
from forge.run.files import Guard, unguarded, write_atomically
from forge.run.metadata import RunMetadata, read_metadata, write_metadata
from forge.run.provenance import package_freeze, provenance, write_dirty_diff
from forge.run.records import record_of
from forge.run.registry import register
from forge.run.state import Stage, TrainingState, new_run_id


@dataclass(frozen=True)
class AttemptFacts:
    """What metadata records of an attempt besides its provenance; with its defaults, the first one of a run."""

    number: int = 1  # from the run's lock
    changes: list[str] = field(default_factory=list)  # of the config since its checkpoint, one line each
    allowed: dict[str, str] = field(default_factory=dict)  # those that change the meaning, and their new values
    guard: Guard = unguarded  # the lock's check, called before each write


def open_run(
    loaded: LoadedConfig,
    run_name: str | None,
    resumed: RunDirectory | None,
    command: list[str],
    facts: dict[str, Any],
    attempt: AttemptFacts | None = None,
    place: Path | None = None,
) -> tuple[RunDirectory, TrainingState]:
    """Create a run named run_name, or open the next attempt at `resumed`; on rank 0 only.

    Args:
        facts: What the run trains on and how, for run_metadata.json, which also has the provenance of each attempt.
        attempt: The attempt at `resumed`.
        place: The new run's folder under the output root; None: as the config's file says.

    Raises:
        UsageError: The name is taken, or the files of the run are broken.
    """
    output_root = Path(loaded.config.output_root)
    if resumed is not None:
        return _next_attempt(loaded, resumed, command, facts, attempt or AttemptFacts())
    run = create_run_directory(output_root, place or config_name(loaded.file), run_name)
    try:
        state = TrainingState(run_id=new_run_id())
        _write_config(loaded, run, unguarded)
        write_atomically(run.path / "requirements.txt", "\n".join(package_freeze()) + "\n")
        metadata: dict[str, Any] = {
            "run_id": state.run_id,
            "name": run.name,
            "created_at": state.created_at,
            "config_file": str(loaded.file.absolute()),
            "attempts": [],
        }
        _record_attempt(loaded, run, state, metadata, command, facts, AttemptFacts())
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)  # leave nothing of a run that was not created
        raise
    return run, state


def _next_attempt(
    loaded: LoadedConfig,
    run: RunDirectory,
    command: list[str],
    facts: dict[str, Any],
    attempt: AttemptFacts,
) -> tuple[RunDirectory, TrainingState]:
    state = TrainingState.load(run.state_file)
    state.error = None
    metadata = read_metadata(run).model_dump(exclude_unset=True)
    if state.pipeline_complete:  # to be trained further: its final model and numbers are of fewer steps
        state.pipeline_complete, state.stage = False, Stage.TRAINING
        metadata.pop("control", None)
    _write_config(loaded, run, attempt.guard)
    _record_attempt(loaded, run, state, metadata, command, facts, attempt)
    return run, state


def _write_config(loaded: LoadedConfig, run: RunDirectory, guard: Guard) -> None:
    text = f"# The merged config of {run.name}\n\n{to_yaml(with_absolute_paths(loaded.config))}"
    write_atomically(run.config_file, text, guard)


def _record_attempt(
    loaded: LoadedConfig,
    run: RunDirectory,
    state: TrainingState,
    metadata: dict[str, Any],
    command: list[str],
    facts: dict[str, Any],
    attempt: AttemptFacts,
) -> None:
    state.attempts = attempt.number
    dirty_diff = run.path / f"dirty_{attempt.number}.diff"
    entry: dict[str, Any] = {"attempt": attempt.number, **provenance(None, command).model_dump(exclude_unset=True)}
    entry["dirty_diff"] = dirty_diff.name if write_dirty_diff(dirty_diff) else None
    entry |= {"ranks": facts["world"]["ranks"], "changes": attempt.changes, "allowed": attempt.allowed}
    attempts = [*metadata.pop("attempts"), entry]
    write_metadata(run, record_of(RunMetadata, metadata | facts | {"attempts": attempts}), attempt.guard)
    register(Path(loaded.config.output_root), run, state.run_id, state.stage)
    state.save(run.state_file, attempt.guard)  # last: it marks a run, which then has all that a resume needs
