"""Checkpoints: saves a training so that a folder named checkpoint-N is always complete.

All ranks write into a temporary folder, rank 0 lists the files with their hashes, and one rename commits the
checkpoint, so a crash at any time leaves no incomplete checkpoint-N. What follows the rename (latest_checkpoint, the
state, the deletion of older checkpoints) can be lost without harm.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge.checkpoint.contents import Snapshot, Training, take_snapshot, write_snapshot
from forge.checkpoint.manifest import FORMAT, BadCheckpoint, Manifest, StoredFile, check_files, digest, verify
from forge.checkpoint.selection import STAGING_PREFIX, TRASH_PREFIX, checkpoints, step_of
from forge.config.schema import CheckpointConfig
from forge.errors import Superseded, TrainingError
from forge.ranks.agreement import gather_values, on_rank_0
from forge.run.directory import RunDirectory
from forge.run.files import open_to_others, sync_file, sync_folder, write_atomically
from forge.run.lock import RunLock
from forge.run.state import TrainingState, now

logger = logging.getLogger(__name__)

# Free space required beyond the checkpoint itself, or as much again if that is less: the log, the metrics and the
# final model share the disk. Not required of a save that must succeed, the last that can be made.
SPARE_BYTES = 64 << 20
FAILURES_IN_A_ROW = 3  # a disk that stays full is not worth training on for


@dataclass(frozen=True)
class RunFacts:
    """What the manifests of an attempt have in common."""

    ranks: int
    rows_per_step: int
    mixed_precision: str  # what auto came to
    config: dict[str, Any]  # the effective one
    data_fingerprint: str
    git_commit: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Saved:
    """A committed save, and what it cost."""

    name: str
    mib: float
    seconds: float  # from the start to the commit
    stall_seconds: float  # while training waited


@dataclass
class _Writing:
    """A save whose files are being written."""

    staging: Path
    state: TrainingState  # a copy, as it was
    started: float
    stall: float
    thread: threading.Thread | None = None
    # This rank's files, or what went wrong.
    outcome: tuple[dict[str, StoredFile], str | None] = ({}, "its writer ended without a result")
    finish_started: float | None = None  # of an asynchronous one


class Checkpoints:
    """The checkpoints of one training run. Every rank has this object and calls the same methods at the same step."""

    def __init__(
        self,
        run: RunDirectory,
        lock: RunLock,
        training: Training,
        config: CheckpointConfig,
        facts: RunFacts,
        on_commit: Callable[[TrainingState, Saved], None],
    ):
        """on_commit: called on rank 0 after each commit."""
        self._run, self._lock, self._training = run, lock, training
        self._config, self._facts, self._on_commit = config, facts, on_commit
        self._writing: _Writing | None = None
        self._failures = 0

    def save(self, state: TrainingState, progress: dict[str, Any], *, must: bool = False) -> bool:
        """Save now, or start to with checkpoint.asynchronous. True if the save was committed or started.

        A failure is logged, and training continues with the checkpoints there are. It raises TrainingError if the save
        must succeed, and after three failures in a row; and Superseded if a later attempt has taken over.
        """
        self.finish(state)
        started = time.perf_counter()
        asynchronous = self._config.asynchronous and not must
        try:
            snapshot, problem = take_snapshot(self._training, state, progress, copy=asynchronous), None
        except (RuntimeError, MemoryError) as error:  # the host has no room for a copy
            snapshot, problem = None, f"{type(error).__name__}: {error}"
        of_all = gather_values((problem, 0 if snapshot is None else snapshot.bytes))
        problem = next((found for found, _ in of_all if found is not None), None)
        if problem is not None or snapshot is None:
            return self._failed(state, str(problem), must)
        size = sum(size for _, size in of_all)
        staging, problem = on_rank_0(self._training.accelerator, lambda: self._stage(state, size, must))
        if problem is not None:
            return self._failed(state, problem, must)
        writing = _Writing(staging, state.model_copy(), started, 0.0)
        if asynchronous:
            writing.thread = threading.Thread(target=_write, args=(writing, snapshot), name="checkpoint")
            writing.thread.start()
            writing.stall = time.perf_counter() - started
            self._writing = writing
            return True
        _write(writing, snapshot)
        return self._commit(writing, state, must)

    @property
    def written(self) -> bool:
        """True if this rank has written its files of the save in progress; when all have, finish() does not wait."""
        return self._writing is not None and self._writing.thread is not None and not self._writing.thread.is_alive()

    def finish(self, state: TrainingState) -> None:
        """Commit the save in progress, if there is one; waits until all ranks have written their files."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        started = time.perf_counter()
        assert writing.thread is not None
        writing.thread.join()
        writing.finish_started = started
        self._commit(writing, state, must=False)

    def prune(self, state: TrainingState) -> None:
        """Delete what exceeds keep_last; on rank 0.

        Called after each commit and at the start of an attempt, since the previous one may have ended in between.
        """
        try:
            if state.best_metric is not None and self._run.checkpoint(state.best_metric.step).exists():
                state.kept_best = state.best_metric.step  # until then, the previous best stays
            for old in self._outdated(state):
                self._lock.check()
                _discard(old)
        except (OSError, TrainingError) as error:
            logger.warning("could not delete older checkpoints (%s)", error)

    def abandon(self) -> None:
        """Give up the save in progress after an error: wait for its writer, which may share memory; commit nothing."""
        if self._writing is not None and self._writing.thread is not None:
            self._writing.thread.join()
            shutil.rmtree(self._writing.staging, ignore_errors=True)
        self._writing = None

    def _stage(self, state: TrainingState, snapshot_bytes: int, must: bool) -> tuple[Path, str | None]:
        """Return the folder to write into, and why it cannot be used, if so; on rank 0."""
        self._lock.check()
        staging = self._run.path / f"{STAGING_PREFIX}{state.step}-{self._lock.attempt}-{secrets.token_hex(6)}"
        size = max(snapshot_bytes, self._size_of_the_last())
        spare = 0 if must else min(size, SPARE_BYTES)
        try:
            free = shutil.disk_usage(self._run.path).free
            if free < size + spare:
                kept = f" and {_mib(spare)} to spare" if spare else ""
                return staging, f"it needs {_mib(size)}{kept}, but only {_mib(free)} are free on the disk"
            staging.mkdir()
        except OSError as error:
            return staging, str(error)
        return staging, None

    def _size_of_the_last(self) -> int:
        for folder in checkpoints(self._run)[:1]:
            with suppress(BadCheckpoint):
                return Manifest.read(folder).bytes
        return 0

    def _commit(self, writing: _Writing, state: TrainingState, must: bool) -> bool:
        """Agree on whether every rank has written its files; then rank 0 renames the folder."""
        accelerator = self._training.accelerator
        outcomes = gather_values(writing.outcome)
        problem = next((problem for _, problem in outcomes if problem is not None), None)
        if problem is None:
            files = {name: file for part, _ in outcomes for name, file in part.items()}
            problem = on_rank_0(accelerator, lambda: self._rename(writing, files))
        if problem is not None:
            if accelerator.is_main_process:
                shutil.rmtree(writing.staging, ignore_errors=True)
            return self._failed(writing.state, problem, must)
        self._failures = 0
        state.latest_checkpoint = self._run.checkpoint(writing.state.step).name
        on_rank_0(accelerator, lambda: self._after_commit(writing, files, state))
        return True

    def _rename(self, writing: _Writing, files: dict[str, StoredFile]) -> str | None:
        """Write the manifest and rename the folder, on rank 0. Returns what went wrong; raises Superseded."""
        target = self._run.checkpoint(writing.state.step)
        try:
            open_to_others(writing.staging)
            self._manifest(writing.state, files).write(writing.staging)
            # No file system should lose bytes silently, but if this one does, find out now.
            check_files(writing.staging, Manifest.read(writing.staging), hashes=False)
            sync_folder(writing.staging)
            sync_file(self._run.metrics_file)  # a resume will not write its rows up to this step again
            self._lock.check()  # as late as possible
            if target.exists():  # never replaced: it is complete, whichever attempt wrote it
                return f"{target.name} exists already"
            os.rename(writing.staging, target)
            sync_folder(self._run.path)
        except (OSError, BadCheckpoint, TrainingError) as error:
            return str(error)
        except Superseded:
            shutil.rmtree(writing.staging, ignore_errors=True)
            raise
        return None

    def _after_commit(self, writing: _Writing, files: dict[str, StoredFile], state: TrainingState) -> None:
        """Write latest_checkpoint and the state, and delete old checkpoints; on rank 0. Failures are only logged."""
        name, size_mib = self._run.checkpoint(writing.state.step).name, sum(f.bytes for f in files.values()) / 2**20
        seconds = time.perf_counter() - writing.started
        since = writing.started if writing.finish_started is None else writing.finish_started
        stall = writing.stall + time.perf_counter() - since
        notes: list[Callable[[], None]] = [
            lambda: write_atomically(self._run.latest_checkpoint_file, f"{name}\n", self._lock.check),
            lambda: state.save(self._run.state_file, self._lock.check),
        ]
        for note in notes:
            try:
                note()
            except OSError as error:
                logger.warning("%s is committed, but the run's files could not be updated (%s)", name, error)
        self.prune(state)
        logger.info("saved %s: %.1f MiB in %.2f s, of which training waited %.2f s", name, size_mib, seconds, stall)
        self._on_commit(writing.state, Saved(name, round(size_mib, 2), round(seconds, 3), round(stall, 3)))

    def _outdated(self, state: TrainingState) -> list[Path]:
        """Return those that exceed keep_last. A checkpoint with a file of the wrong size does not count as kept."""
        best = state.kept_best if self._config.keep_best else None
        kept, outdated = 0, []
        for folder in checkpoints(self._run):
            if kept < self._config.keep_last:
                try:
                    verify(folder, state.run_id, hashes=False)
                    kept += 1
                except BadCheckpoint as problem:
                    logger.warning("%s is not complete: %s", folder.name, problem)
            elif step_of(folder) != best:
                outdated.append(folder)
        return outdated

    def _manifest(self, state: TrainingState, files: dict[str, StoredFile]) -> Manifest:
        return Manifest(
            format=FORMAT,
            run_id=state.run_id,
            attempt=self._lock.attempt,
            step=state.step,
            epoch=state.epoch,
            samples=state.samples,
            tokens=state.tokens,
            base=self._training.weights.base,
            config_hash=digest(self._facts.config),
            created_at=now(),
            files=files,
            **asdict(self._facts),
        )

    def _failed(self, state: TrainingState, problem: str, must: bool) -> bool:
        self._failures += 1
        newest = state.latest_checkpoint or "none yet"
        text = (
            f"could not save checkpoint-{state.step} in {self._run.path} ({' '.join(problem.split())[:300]}); the "
            f"newest checkpoint is {newest}"
        )
        if must or self._failures >= FAILURES_IN_A_ROW:
            again = "" if must else f", and {self._failures} saves in a row have failed"
            raise TrainingError(f"{text}{again}; free some space, then resume")
        if self._training.accelerator.is_main_process:  # all ranks have agreed on it
            logger.error("%s; training continues", text)
        return False


def _write(writing: _Writing, snapshot: Snapshot) -> None:
    """Write this rank's files. An error is kept as a value, so that no rank is left waiting for another."""
    try:
        writing.outcome = write_snapshot(snapshot, writing.staging), None
        if snapshot.rank != 0:
            sync_folder(writing.staging)  # each host may see a network file system differently
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting for the outcome, whatever it is
        writing.outcome = {}, f"rank {snapshot.rank}: {type(error).__name__}: {error}"


def _discard(folder: Path) -> None:
    """Delete a checkpoint; the rename comes first, so that a half-deleted folder is not taken for one."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}-{secrets.token_hex(6)}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
