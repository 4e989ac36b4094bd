"""Selection of the checkpoint to resume from: the newest one that matches its manifest. Bad ones are set aside."""

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
    """Return the checkpoints of the run, highest step first. Time stamps are ignored, since clocks jump."""
    named = [
        path for path in run.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", path.name)
    ]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def select(run: RunDirectory, state: TrainingState) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies; None if the run never had one. On rank 0, under the run's lock.

    Every checkpoint is a candidate, since its rename is its commit; latest_checkpoint and training_state.json may lag
    behind. Bad ones on the way are renamed and logged. Raises TrainingError if the run had checkpoints but none is
    usable.
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
                "latest_checkpoint %s; resuming from %s, the newest checkpoint that matches its manifest",
                f"names {hint}" if hint else "is empty or missing",
                folder.name,
            )
        return folder, manifest
    bad = sorted(path.name for path in run.path.glob(f"{BAD_PREFIX}*"))
    if bad or state.latest_checkpoint is not None:
        what = f"{', '.join(bad)} cannot be trusted" if bad else f"{state.latest_checkpoint} is gone"
        raise TrainingError(
            f"no usable checkpoint in {run.path}: {what}; put a complete checkpoint-N back there, or start a new run "
            "under another --run_name"
        )
    return None


def _refuse_foreign(run: RunDirectory, state: TrainingState) -> None:
    """Refuse a state that does not belong to the checkpoints, if all of those belong to one other run."""
    owners = set()
    for folder in checkpoints(run):
        try:
            owners.add(Manifest.read(folder).run_id)
        except BadCheckpoint:
            continue
    if len(owners) == 1 and state.run_id not in owners:
        raise TrainingError(
            f"{run.state_file} belongs to the run {state.run_id}, but all checkpoints next to it belong to the run "
            f"{owners.pop()}; restore a state and checkpoints that belong together (nothing was changed)"
        )


def quarantine(run: RunDirectory, folder: Path, reason: str) -> None:
    """Rename a bad checkpoint, so that nothing loads it, and keep it for inspection."""
    names = (f"{BAD_PREFIX}{folder.name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    aside = next(run.path / name for name in names if not (run.path / name).exists())
    os.rename(folder, aside)
    sync_folder(run.path)
    if aside.is_dir():
        write_json(aside / "quarantine.json", {"reason": reason, "at": now()})
    logger.error("%s was renamed to %s: %s", folder.name, aside.name, reason)


def remove_leftovers(run: RunDirectory) -> None:
    """Delete what earlier attempts left half written or half deleted. Under the run's lock."""
    parents, prefixes = (run.path, run.samples), (STAGING_PREFIX, TRASH_PREFIX)
    for folder in [found for parent in parents for prefix in prefixes for found in parent.glob(f"{prefix}*")]:
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
