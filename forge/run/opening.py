"""Creates a run, or reopens one: its directory, config, metadata, state and registry entry are there from the start."""

import shutil
from pathlib import Path
from typing import Any

from forge.config.explain import to_yaml
from forge.config.loader import LoadedConfig
from forge.config.placing import config_name, located
from forge.run.directory import RunDirectory, create_run_directory
from forge.run.files import read_json, write_atomically, write_json
from forge.run.provenance import package_freeze, provenance, write_dirty_diff
from forge.run.registry import register
from forge.run.state import Stage, TrainingState, new_run_id


def open_run(
    loaded: LoadedConfig, run_name: str | None, resumed: RunDirectory | None, command: list[str], facts: dict[str, Any]
) -> tuple[RunDirectory, TrainingState]:
    """A new run named run_name, or the next attempt of `resumed`. On rank 0 only.

    facts: what the run trains on, and how; run_metadata.json holds them beside one entry of provenance per attempt.
    Raises UsageError for a name that is taken and for a run whose files are broken.
    """
    output_root = Path(loaded.config.output_root)
    if resumed is not None:
        return _next_attempt(loaded, resumed, command, facts)
    run = create_run_directory(output_root, config_name(loaded.file), run_name)
    try:
        state = TrainingState(run_id=new_run_id())
        state.save(run.state_file)  # first: it marks the folder as a run
        write_atomically(run.config_file, f"# The merged config of {run.name}\n\n{to_yaml(located(loaded.config))}")
        write_atomically(run.path / "requirements.txt", "\n".join(package_freeze()) + "\n")
        metadata: dict[str, Any] = {
            "run_id": state.run_id,
            "name": run.name,
            "created_at": state.created_at,
            "config_file": str(loaded.file.absolute()),
            "attempts": [],
        }
        _record_attempt(loaded, run, state, metadata, command, facts)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)  # nothing of a run that did not come to be
        raise
    return run, state


def _next_attempt(
    loaded: LoadedConfig, run: RunDirectory, command: list[str], facts: dict[str, Any]
) -> tuple[RunDirectory, TrainingState]:
    state = TrainingState.load(run.state_file)
    state.error = None
    if state.latest_checkpoint is None and state.reached(Stage.EXPORT):
        state.stage = Stage.TRAINING  # nothing holds the trained weights: they are trained again
    _record_attempt(loaded, run, state, read_json(run.metadata_file), command, facts)
    return run, state


def _record_attempt(
    loaded: LoadedConfig,
    run: RunDirectory,
    state: TrainingState,
    metadata: dict[str, Any],
    command: list[str],
    facts: dict[str, Any],
) -> None:
    state.attempts += 1
    dirty_diff = run.path / f"dirty_{state.attempts}.diff"
    attempt = provenance(None, command) | {"dirty_diff": dirty_diff.name if write_dirty_diff(dirty_diff) else None}
    attempts = [*metadata.pop("attempts"), attempt | {"ranks": facts["world"]["ranks"]}]
    write_json(run.metadata_file, metadata | facts | {"attempts": attempts})
    state.save(run.state_file)
    register(Path(loaded.config.output_root), run, state.run_id, state.stage)
