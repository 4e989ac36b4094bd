"""Saves and loads what a run needs to go on: model, optimizer, scaler, every rank's random numbers, and the step."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from forge.cluster.ranks import on_every_rank, on_rank_0
from forge.errors import ForgeError, TrainingError
from forge.run.directory import RunDirectory
from forge.run.files import open_to_others, write_atomically
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

STATE_FILE = "checkpoint_state.json"  # not training_state.json: that marks a run directory


def save_checkpoint(run: RunDirectory, state: TrainingState, accelerator: Accelerator, keep_last: int) -> None:
    """Writes checkpoint-N beside the others, named only when it is whole; then drops those beyond keep_last.

    Raises TrainingError where it could not be written; the checkpoints before it stay.
    """
    target = run.checkpoint(state.step)
    staging = run.path / f".tmp-{target.name}"

    def commit() -> None:
        saved = replace(state, latest_checkpoint=target.name)
        saved.save(staging / STATE_FILE)
        open_to_others(staging)
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was resumed from an older one
        os.replace(staging, target)
        write_atomically(run.latest_checkpoint_file, target.name + "\n")
        saved.save(run.state_file)
        for old in _checkpoints(run)[:-keep_last]:
            shutil.rmtree(old)

    try:
        on_rank_0(accelerator, lambda: shutil.rmtree(staging, ignore_errors=True))
        on_every_rank(accelerator, lambda: accelerator.save_state(str(staging)))
        on_rank_0(accelerator, commit)
    except (OSError, RuntimeError, SafetensorError, ForgeError) as error:  # torch's writer raises RuntimeError
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        free_mib = shutil.disk_usage(run.path).free / 2**20
        reason = " ".join(str(error).split())[:200] + f"; {free_mib:.0f} MiB are free there"
        newest = state.latest_checkpoint or "none yet"
        raise TrainingError(
            f"{target} could not be saved ({reason}); the newest checkpoint is {newest}. Free some space, then resume"
        ) from error
    state.latest_checkpoint = target.name
    logger.info("saved %s", target.name)


def load_checkpoint(run: RunDirectory, state: TrainingState, accelerator: Accelerator) -> None:
    """Puts everything back as it was at the state's latest checkpoint. Raises TrainingError if it is gone."""
    folder = run.path / str(state.latest_checkpoint)
    if not folder.is_dir():
        raise TrainingError(
            f"{folder} is named by training_state.json and does not exist; the run cannot go on from it"
        )
    accelerator.load_state(str(folder))
    saved = TrainingState.load(folder / STATE_FILE)
    state.step, state.epoch = saved.step, saved.epoch
    logger.info("resumed from %s at step %d", folder.name, state.step)


def _checkpoints(run: RunDirectory) -> list[Path]:
    """All checkpoints, the oldest first."""
    found = [path for path in run.path.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))
