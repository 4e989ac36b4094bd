"""RunDirectory: the files of a run; creates the directories of runs and finds them again."""

import difflib
import errno
import os
import shutil
import string
import tempfile
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from forge.errors import UsageError
from forge.run.hints import resume_command
from forge.run.state import TrainingState

PROBE_BYTES = 1 << 20  # small beside any checkpoint, but too large for a disk with a few free blocks
NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._-+=")
NAME_LENGTH = 200  # bytes of a file's name end at 255, and names of temporary files and of controls are longer
STATE_FILE = "training_state.json"  # a folder that holds it is a run directory


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run, with the names of the files in it."""

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
    """Raise UsageError if no run could be written to the output root. Creates nothing and leaves nothing behind."""
    existing = output_root
    try:
        while not existing.exists():
            if existing.is_symlink():
                raise UsageError(f"output root {output_root}: {existing} is a broken link; fix or remove it")
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(
                f"output root {output_root}: {existing} is a file, not a folder; give another --output_root"
            )
        # On Linux a TemporaryFile has no name, so even a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=existing, buffering=0) as probe:
            remaining = os.urandom(PROBE_BYTES)  # random, because a compressing file system stores zeros in no space
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
    """Create <output_root>/<config_name>/<run_name>/ for this process alone; None names it by the time of the start."""
    if config_name.is_absolute() or ".." in config_name.parts:
        raise ValueError(f"{config_name} must be a path inside configs/")
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
    """Raise UsageError for a name that is not allowed or is taken. Another process may still take it afterwards."""
    if not valid_run_name(run_name):
        raise UsageError(
            f"run name {run_name!r} is not allowed: use up to {NAME_LENGTH} letters, digits and . _ - + =, and do not "
            "start with . or -"
        )
    run = RunDirectory(output_root / config_name / run_name)
    if run.path.exists():
        raise UsageError(_taken(run))


def complete_message(run: RunDirectory) -> str:
    """Return what a resume reports of a run that has nothing left to do."""
    return f"{run.path} is complete; its model is in {run.final}"


def valid_run_name(name: str) -> bool:
    """True if the name works as a folder on every system and on a command line without quotes."""
    return 0 < len(name) <= NAME_LENGTH and name[0] not in ".-" and NAME_CHARACTERS.issuperset(name)


def find_run(output_root: Path, run: str) -> RunDirectory:
    """Find the RUN of a command line: the path of a run directory, or a name that one run in the output root has."""
    if run and _is_run(Path(run)):
        return RunDirectory(Path(run))
    runs = find_runs(output_root)
    named = [found for found in runs if found.name == run]
    if len(named) == 1:
        return named[0]
    if named:
        paths = "".join(f"\n  {found.path}" for found in named)
        raise UsageError(f"{len(named)} runs in {output_root} are named {run}; give the path of one:{paths}")
    if run and os.path.isdir(run):
        raise UsageError(f"{run} is not a run directory: it has no {STATE_FILE}; `forge runs` lists the runs")
    near = difflib.get_close_matches(run, [found.name for found in runs], n=1)
    hint = f"did you mean {near[0]}?" if near else "`forge runs` lists the runs"
    shown = run if len(run) <= NAME_LENGTH else f"{run[:60]}…"
    raise UsageError(f"no run in {output_root} is named {shown!r}, and no run directory has that path; {hint}")


def find_runs(output_root: Path) -> list[RunDirectory]:
    """Return every run in the output root, oldest first; none if there is no such folder.

    Raises:
        UsageError: It is a file.
    """
    if output_root.is_file():
        raise UsageError(f"output root {output_root} is a file, not a folder; give another --output_root")
    runs = []
    for folder, subfolders, files in os.walk(output_root):
        if STATE_FILE in files:
            runs.append(RunDirectory(Path(folder)))
            subfolders.clear()  # a run contains no runs, but its checkpoints may hold thousands of files
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(runs, key=lambda run: (_started_s(run), run.path))


def _create_named(parent: Path, run_name: str) -> RunDirectory:
    run = RunDirectory(parent / run_name)
    try:
        run.path.mkdir()  # unlike a test for existence, only one process can pass this
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
    """Return the local time as a name: 2026-11-23_00-45-12."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _taken(run: RunDirectory) -> str:
    if not _is_run(run.path):
        why = f"it has no {STATE_FILE}; another process may be creating it"
        return f"{run.path} exists but is not a run directory ({why}): choose another --run_name, or remove it"
    if TrainingState.load(run.state_file).pipeline_complete:
        return f"run {run.path} exists and is complete: choose another --run_name, such as {_free_name(run)}"
    return (
        f"run {run.path} exists: resume it with `{resume_command(run.path)}`, "
        f"or choose another --run_name, such as {_free_name(run)}"
    )


def _free_name(run: RunDirectory) -> str:
    names = (f"{run.name}-{number}" for number in count(2))
    return next(name for name in names if not run.path.with_name(name).exists())


def _refuse_run_above(output_root: Path, parent: Path) -> None:
    """Refuse a config named like a run (x.yaml has the run y, and x/y.yaml exists): find_runs looks into no run."""
    for folder in (parent, *parent.parents):
        if folder == output_root:
            return
        if _is_run(folder):
            raise UsageError(f"{parent} is inside the run {folder}; give another --output_root")


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / STATE_FILE)  # unlike Path.is_file, also of names that no file can have


def _started_s(run: RunDirectory) -> float:
    try:
        return datetime.fromisoformat(TrainingState.load(run.state_file).created_at).timestamp()
    except (UsageError, ValueError):  # a broken state must not hide the other runs
        return run.state_file.stat().st_mtime
