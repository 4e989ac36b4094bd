"""Tells which runs a model descends from, out of what those runs tell of themselves."""

import logging
from pathlib import Path
from typing import Any

from forge.config.explain import config_name
from forge.errors import UsageError
from forge.model.origin import Origin, Weights
from forge.run.directory import RunDirectory
from forge.run.files import read_json
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

DEPTH = 3  # a model of a run lies in RUN/final/merged at the deepest


def lineage(origin: Origin | None, role: str = "model") -> list[dict[str, Any]]:
    """The runs that the model comes from, the oldest first, each once; empty where no run of forge made it.

    role: what the model is in the new run. Below adapters the base has the role `base`, and each adapter `adapter`.
    """
    if origin is None:
        return []
    parts = [("base" if origin.adapters else role, origin.base), *(("adapter", part) for part in origin.adapters)]
    found: dict[str, dict[str, Any]] = {}
    for part_role, weights in parts:
        for entry in _line_of(part_role, weights):
            found.setdefault(entry["run_id"], entry)
    return list(found.values())


def _line_of(role: str, weights: Weights) -> list[dict[str, Any]]:
    """The ancestors of the run that holds these weights, and the run itself."""
    folder = Path(weights.location)
    run = _run_above(folder) if folder.is_absolute() else None  # a hub id is no place here
    if run is None:
        return []
    try:
        metadata, state = read_json(run.metadata_file), TrainingState.load(run.state_file)
        own = {
            "role": role,
            "run_id": metadata["run_id"],
            "name": run.name,
            "path": str(run.path.absolute()),
            "config": str(config_name(Path(metadata["config_file"]))),
            "weights_sha256": weights.sha256,
            "steps": _steps(folder, state),
        }
        return [*metadata.get("lineage", []), own]
    except (UsageError, KeyError, TypeError) as error:  # a run that was copied in part can still be trained on
        logger.warning("the run %s does not tell where it comes from (%s)", run.path, error)
        return []


def _run_above(folder: Path) -> RunDirectory | None:
    for path in (folder, *folder.parents)[:DEPTH]:
        if (run := RunDirectory(path)).state_file.is_file():
            return run
    return None


def _steps(folder: Path, state: TrainingState) -> int:
    """Of a checkpoint its own, else all that the run has taken."""
    name, _, step = folder.name.partition("-")
    return int(step) if name == "checkpoint" and step.isdigit() else state.step
