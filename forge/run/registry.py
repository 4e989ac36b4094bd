"""The registry of unfinished runs: one small file for each in the output root, without a lock or a shared database."""

import glob
import logging
import os
import socket
from pathlib import Path

from forge.errors import UsageError
from forge.run.directory import RunDirectory, valid_run_name
from forge.run.files import write_json
from forge.run.records import Record, read_record
from forge.run.state import Stage, TrainingState, now

logger = logging.getLogger(__name__)


class IncompleteRun(Record):
    """The registry's entry of an unfinished run."""

    run_id: str
    path: Path  # absolute
    name: str
    host: str  # of the attempt that registered last
    pid: int
    created_at: str
    stage: Stage


def register(output_root: Path, run: RunDirectory, run_id: str, stage: Stage) -> None:
    """Write the entry at the start of an attempt, on rank 0; it names this host and process."""
    file = _entry_file(output_root, run_id)
    known = _read(file) if file.exists() else None
    entry = IncompleteRun(
        run_id=run_id,
        path=run.path.absolute(),
        name=run.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        created_at=known.created_at if known else now(),
        stage=stage,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(file)
    write_json(file, entry.model_dump())


def update(output_root: Path, run_id: str, stage: Stage) -> None:
    """Note that the run has entered another stage. An entry that vanished is a warning, and no reason to stop."""
    file = _entry_file(output_root, run_id)
    known = _read(file)
    if known is not None:
        write_json(file, known.model_copy(update={"stage": stage}).model_dump())


def is_alive(run: IncompleteRun) -> bool | None:
    """True if the process that registered last still exists, running or frozen; None if it ran on another host."""
    if run.host != socket.gethostname():
        return None
    try:
        command = Path(f"/proc/{run.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"forge" in command  # otherwise another program has been given the pid since


def unregister(output_root: Path, run_id: str) -> None:
    """Remove the entry of a run that is complete."""
    file = _entry_file(output_root, run_id)
    file.unlink(missing_ok=True)
    _remove_leftovers(file)


def incomplete_runs(output_root: Path) -> list[IncompleteRun]:
    """Return the entries, oldest first. Stale and broken ones are skipped with a warning; their files stay."""
    runs = []
    for file in sorted((output_root / ".incomplete").glob("[!.]*.json")):
        run = _read(file)
        if run is None:
            continue
        stale = _why_stale(run)
        if stale is None:
            runs.append(run)
        else:
            logger.warning("skipping a stale entry: the run %s %s; %s can be removed", run.path, stale, file)
    return sorted(runs, key=lambda run: (run.created_at, run.run_id))


def _remove_leftovers(file: Path) -> None:
    """Delete what a kill left of an entry that was being written; the run is locked, so nobody writes it now."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _entry_file(output_root: Path, run_id: str) -> Path:
    if not valid_run_name(run_id):
        raise ValueError(f"run id {run_id!r} cannot name a file")
    return output_root / ".incomplete" / f"{run_id}.json"


def _read(file: Path) -> IncompleteRun | None:
    try:
        return read_record(IncompleteRun, file, "resume the run by its path, or remove the file")
    except UsageError as error:
        logger.warning("skipping the entry of an incomplete run: %s", error)
        return None


def _why_stale(run: IncompleteRun) -> str | None:
    if not run.path.is_dir():
        return "is gone"
    try:
        complete = TrainingState.load(RunDirectory(run.path).state_file).pipeline_complete
    except UsageError:  # no state yet, or a broken one: unfinished either way
        return None
    return "is complete" if complete else None
