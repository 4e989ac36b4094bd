"""Knows the unfinished runs below an output root by one small file for each: no lock, no shared database."""

import json
import logging
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from forge.errors import UsageError
from forge.run.directory import RunDirectory, valid_run_name
from forge.run.files import write_json
from forge.run.state import Stage, TrainingState, now

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IncompleteRun:
    run_id: str
    path: Path  # absolute
    name: str
    host: str  # of the attempt that registered last
    pid: int
    created_at: str
    stage: Stage


def register(output_root: Path, run: RunDirectory, run_id: str, stage: Stage) -> None:
    """At the start of every attempt, by rank 0: the entry then names this host and process."""
    file = _entry_file(output_root, run_id)
    created_at = now()
    if file.exists():
        known = _read(file)
        created_at = known.created_at if known else created_at
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(
        file,
        IncompleteRun(run_id, run.path.absolute(), run.name, socket.gethostname(), os.getpid(), created_at, stage),
    )


def update(output_root: Path, run_id: str, stage: Stage) -> None:
    """The run has come to another stage. A vanished entry is a warning: it is no reason to stop training."""
    file = _entry_file(output_root, run_id)
    known = _read(file)
    if known is not None:
        _write(file, IncompleteRun(**{**asdict(known), "stage": stage}))


def is_alive(run: IncompleteRun) -> bool | None:
    """Is the process that registered last still there, at work or frozen? None: it ran on another host."""
    if run.host != socket.gethostname():
        return None
    try:
        command = Path(f"/proc/{run.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"forge" in command  # else the number was given to another program since


def unregister(output_root: Path, run_id: str) -> None:
    """The run is complete."""
    _entry_file(output_root, run_id).unlink(missing_ok=True)


def incomplete_runs(output_root: Path) -> list[IncompleteRun]:
    """The oldest first. Only reads: a stale or broken entry is warned of and left out, its file stays."""
    runs = []
    for file in sorted((output_root / ".incomplete").glob("[!.]*.json")):
        run = _read(file)
        if run is None:
            continue
        stale = _why_stale(run)
        if stale is None:
            runs.append(run)
        else:
            logger.warning("stale entry, left out: the run %s %s; %s may be removed", run.path, stale, file)
    return sorted(runs, key=lambda run: (run.created_at, run.run_id))


def _entry_file(output_root: Path, run_id: str) -> Path:
    if not valid_run_name(run_id):
        raise ValueError(f"run id {run_id!r} cannot name a file")
    return output_root / ".incomplete" / f"{run_id}.json"


def _write(file: Path, run: IncompleteRun) -> None:
    write_json(file, asdict(run))


def _read(file: Path) -> IncompleteRun | None:
    try:
        values = json.loads(file.read_bytes())
        return IncompleteRun(
            run_id=str(values["run_id"]),
            path=Path(values["path"]),
            name=str(values["name"]),
            host=str(values["host"]),
            pid=int(values["pid"]),
            created_at=str(values["created_at"]),
            stage=Stage(values["stage"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("entry of an incomplete run %s cannot be read (%s: %s)", file, type(error).__name__, error)
        return None


def _why_stale(run: IncompleteRun) -> str | None:
    if not run.path.is_dir():
        return "is gone"
    try:
        complete = TrainingState.load(RunDirectory(run.path).state_file).pipeline_complete
    except UsageError:  # no state yet, or a broken one: unfinished either way
        return None
    return "is complete" if complete else None
