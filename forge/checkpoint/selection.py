"""Finds the checkpoint a run goes on from: the newest one that is what its manifest says. Bad ones are set aside."""

import logging
import os
import re
import shutil
from itertools import count
from pathlib import Path

from forge.checkpoint.manifest import BadCheckpoint, Manifest, verify
from forge.errors import TrainingError
from forge.run.directory import RunDirectory
from forge.run.files import sync_folder, write_json
from forge.run.state import TrainingState, now

logger = logging.getLogger(__name__)

BAD_PREFIX, STAGING_PREFIX, TRASH_PREFIX = ".bad-", ".tmp-", ".trash-"


def checkpoints(run: RunDirectory) -> list[Path]:
    """All that are named as checkpoints, the one of the highest step first. No time stamp is asked: clocks jump."""
    named = [
        path for path in run.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", path.name)
    ]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def select(run: RunDirectory, state: TrainingState) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies; None where the run never had one. By rank 0, under the run's lock.

    The rename of a checkpoint is its commit, so that all of them are candidates; latest_checkpoint and
    training_state.json may lag behind, and are only compared. Every bad one that is met is renamed and told of.
    Raises TrainingError where the run had checkpoints and none is left that can be trusted.
    """
    hint = _hint(run)
    _refuse_foreign(run, state)
    for folder in checkpoints(run):
        try:
            manifest = verify(folder, state.run_id)
        except BadCheckpoint as problem:
            quarantine(run, folder, str(problem))
            continue
        if hint != folder.name:
            logger.warning(
                "latest_checkpoint %s; going on from %s, the newest that holds what its manifest says",
                f"names {hint}" if hint else "is empty or missing",
                folder.name,
            )
        return folder, manifest
    bad = sorted(path.name for path in run.path.glob(f"{BAD_PREFIX}*"))
    if bad or state.latest_checkpoint is not None:
        what = f"{', '.join(bad)} cannot be trusted" if bad else f"{state.latest_checkpoint} is gone"
        raise TrainingError(
            f"no checkpoint of {run.path} can be gone on from: {what}. Put a whole checkpoint-N back there, or start "
            f"anew under another --run_name"
        )
    return None


def _refuse_foreign(run: RunDirectory, state: TrainingState) -> None:
    """Where all checkpoints are of one other run, it is the state that is foreign, and they are left alone."""
    owners = set()
    for folder in checkpoints(run):
        try:
            owners.add(Manifest.read(folder).run_id)
        except BadCheckpoint:
            continue
    if len(owners) == 1 and state.run_id not in owners:
        raise TrainingError(
            f"{run.state_file} is of the run {state.run_id}, and all checkpoints beside it are of the run "
            f"{owners.pop()}; put the state or the checkpoints back that belong together (nothing was changed)"
        )


def quarantine(run: RunDirectory, folder: Path, reason: str) -> None:
    """Takes a bad checkpoint's name away, so that nothing ever loads it, and keeps it for whoever asks why."""
    names = (f"{BAD_PREFIX}{folder.name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    aside = next(run.path / name for name in names if not (run.path / name).exists())
    os.rename(folder, aside)
    sync_folder(run.path)
    if aside.is_dir():
        write_json(aside / "quarantine.json", {"reason": reason, "at": now()})
    logger.error("%s is set aside as %s: %s", folder.name, aside.name, reason)


def remove_leftovers(run: RunDirectory) -> None:
    """What attempts before this one began to write, or to delete, and did not end. Under the run's lock."""
    prefixes = (STAGING_PREFIX, TRASH_PREFIX)
    for folder in [found for above in (run.path, run.samples) for name in prefixes for found in above.glob(f"{name}*")]:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (run.path, run.final, run.attempts):
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)


def _hint(run: RunDirectory) -> str:
    try:
        return run.latest_checkpoint_file.read_text(errors="replace").strip()
    except OSError:
        return ""
