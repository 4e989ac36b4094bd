"""Gives each run a directory of its own, names the files in it, and finds it again."""

import difflib
import errno
import os
import shlex
import shutil
import string
import tempfile
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from forge.errors import UsageError
from forge.run.state import TrainingState

PROBE_BYTES = 1 << 20  # small against any checkpoint, too large for a disk that is full but for a few blocks
NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._-+=")
STATE_FILE = "training_state.json"  # the folder that holds it is a run directory


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metadata_file(self) -> Path:
        return self.path / "run_metadata.json"

    @property
    def state_file(self) -> Path:
        return self.path / STATE_FILE

    @property
    def log_file(self) -> Path:
        return self.path / "output.log"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def peak_file(self) -> Path:
        return self.path / "peak_metrics.json"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def latest_checkpoint_file(self) -> Path:
        return self.path / "latest_checkpoint"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"


def check_writable(output_root: Path) -> None:
    """Fails before any work is done where a run could not be written. Creates nothing and leaves nothing behind."""
    existing = output_root
    try:
        while not existing.exists():
            if existing.is_symlink():
                raise UsageError(f"output root {output_root}: {existing} is a broken link; repair or remove it")
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(
                f"output root {output_root}: {existing} is a file, not a folder; give another --output_root"
            )
        # On Linux a TemporaryFile has no name: even a kill at this instant leaves nothing.
        with tempfile.TemporaryFile(dir=existing, buffering=0) as probe:
            remaining = os.urandom(PROBE_BYTES)  # random: a file system that compresses would store zeros in no space
            while remaining:
                remaining = remaining[probe.write(remaining) :]
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_mib = shutil.disk_usage(existing).free / (1 << 20)
            why = "the disk is full" if error.errno == errno.ENOSPC else "your quota is used up"
            raise UsageError(
                f"output root {output_root}: {why} at {existing} ({free_mib:.1f} MiB free there); free some space or "
                f"give another --output_root"
            ) from None
        raise UsageError(
            f"output root {output_root} cannot be written: {error.strerror} at {existing}; give another --output_root"
        ) from None


def create_run_directory(output_root: Path, config_name: Path, run_name: str | None) -> RunDirectory:
    """Makes <output_root>/<config_name>/<run_name>/, which nobody else gets; with no name, one of the time of day."""
    if config_name.is_absolute() or ".." in config_name.parts:
        raise ValueError(f"{config_name} must be a path below configs/")
    if run_name is not None:
        check_run_name(output_root, config_name, run_name)
    parent = output_root / config_name
    _refuse_run_above(output_root, parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return _create_named(parent, run_name) if run_name is not None else _create_timed(parent)
    except OSError as error:
        raise UsageError(
            f"run directory cannot be created: {error.strerror} at {error.filename}; give another --output_root"
        ) from None


def check_run_name(output_root: Path, config_name: Path, run_name: str) -> None:
    """Raises UsageError for a name that cannot be used, or is taken; another process may still take it after this."""
    if not valid_run_name(run_name):
        raise UsageError(
            f"run name {run_name!r} is not allowed: use letters, digits and . _ - + = only, and begin with none of . -"
        )
    run = RunDirectory(output_root / config_name / run_name)
    if run.path.exists():
        raise UsageError(_taken(run))


def complete_message(run: RunDirectory) -> str:
    """What a resume says of a run that has nothing left to do."""
    return f"{run.path} is complete; its model is in {run.final}"


def valid_run_name(name: str) -> bool:
    """May it be one folder's name on every system, on every command line, with no quotes?"""
    return bool(name) and name[0] not in ".-" and NAME_CHARACTERS.issuperset(name)


def find_run(output_root: Path, run: str) -> RunDirectory:
    """RUN of the command line: the path of a run directory, or the name of the only run so called below output_root."""
    if run and _is_run(Path(run)):
        return RunDirectory(Path(run))
    runs = find_runs(output_root)
    named = [found for found in runs if found.name == run]
    if len(named) == 1:
        return named[0]
    if named:
        paths = "".join(f"\n  {found.path}" for found in named)
        raise UsageError(f"{len(named)} runs below {output_root} are named {run}; give the path of one:{paths}")
    if run and Path(run).is_dir():
        raise UsageError(f"{run} is no run directory: it holds no {STATE_FILE}; `forge runs` lists the runs")
    near = difflib.get_close_matches(run, [found.name for found in runs], n=1)
    hint = f"did you mean {near[0]}?" if near else "`forge runs` lists the runs"
    raise UsageError(f"no run named {run!r} below {output_root}, and no run directory of that path; {hint}")


def find_runs(output_root: Path) -> list[RunDirectory]:
    """Every run below output_root, the oldest first."""
    runs = []
    for folder, subfolders, files in os.walk(output_root):
        if STATE_FILE in files:
            runs.append(RunDirectory(Path(folder)))
            subfolders.clear()  # no run lies within a run; its checkpoints may hold thousands of files
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(runs, key=lambda run: (_started_s(run), run.path))


def _create_named(parent: Path, run_name: str) -> RunDirectory:
    run = RunDirectory(parent / run_name)
    try:
        run.path.mkdir()  # the only test for existence that two processes cannot both pass
    except FileExistsError:
        raise UsageError(_taken(run)) from None
    return run


def _create_timed(parent: Path) -> RunDirectory:
    start = start_name()
    for number in count(1):
        run = RunDirectory(parent / (start if number == 1 else f"{start}-{number}"))
        try:
            run.path.mkdir()
        except FileExistsError:
            continue
        return run
    raise AssertionError("count() ended")


def start_name() -> str:
    """Local time, as on the user's clock: 2026-11-23_00-45-12."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _taken(run: RunDirectory) -> str:
    if not _is_run(run.path):
        why = f"it holds no {STATE_FILE}; another process may be creating it"
        return f"{run.path} exists and is no run directory ({why}): choose another --run_name, or remove it"
    if TrainingState.load(run.state_file).pipeline_complete:
        return f"run {run.path} exists and is complete: choose another --run_name, such as {_free_name(run)}"
    return (
        f"run {run.path} exists: go on with `python forge.py --resume {shlex.quote(str(run.path))}`, "
        f"or choose another --run_name, such as {_free_name(run)}"
    )


def _free_name(run: RunDirectory) -> str:
    names = (f"{run.name}-{number}" for number in count(2))
    return next(name for name in names if not run.path.with_name(name).exists())


def _refuse_run_above(output_root: Path, parent: Path) -> None:
    """A config named like a run (x.yaml with the run y, and x/y.yaml) would put a run where find_runs does not look."""
    for folder in (parent, *parent.parents):
        if folder == output_root:
            return
        if _is_run(folder):
            raise UsageError(f"{parent} lies inside the run {folder}; give another --output_root")


def _is_run(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def _started_s(run: RunDirectory) -> float:
    try:
        return datetime.fromisoformat(TrainingState.load(run.state_file).created_at).timestamp()
    except (UsageError, ValueError):  # a broken state must not hide the other runs
        return run.state_file.stat().st_mtime
