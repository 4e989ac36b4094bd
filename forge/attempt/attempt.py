"""One attempt at a run: its directory, lock, state, checkpoints, callbacks and stop vote, for any trainer.

A trainer asks its attempt to report, to note an evaluation and to pass a boundary between two steps, and knows
nothing else of files. The order of calls is the page of forge/pipeline.py.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

from forge.attempt.best import BestMetric
from forge.attempt.callbacks.build import build_callbacks
from forge.attempt.callbacks.callback import Callback, Callbacks, Metrics, Samples
from forge.attempt.components import Components
from forge.attempt.control import remove_half_made
from forge.attempt.opening import AttemptFacts, open_run
from forge.attempt.outcome import Result, last_evaluation, publish_result, record_outcome
from forge.attempt.request import Request
from forge.attempt.resume import ResumePoint, check_base, check_rows, check_teacher, prepare_resume
from forge.checkpoint.commit import Checkpoints, RunFacts, Saved
from forge.checkpoint.contents import Training
from forge.config.explain import config_name, effective, with_absolute_paths
from forge.config.schema import Config
from forge.data.progress import hide_progress_bars
from forge.errors import Stopped, TrainingError
from forge.model.source import with_run_paths
from forge.ranks.agreement import on_every_rank
from forge.ranks.world import Ranks
from forge.run.directory import RunDirectory, check_run_name, check_writable
from forge.run.files import sync_file, unguarded
from forge.run.lock import RunLock
from forge.run.log import RunLog
from forge.run.provenance import code_facts
from forge.run.registry import update
from forge.run.state import Stage, TrainingState

logger = logging.getLogger(__name__)

WORK = (Stage.BASELINE_EVALUATION, Stage.TRAINING, Stage.EXPORT, Stage.FINAL_EVALUATION)


class Saveable(Protocol):
    """What an attempt asks of the loop that it saves."""

    def settle(self) -> dict[str, Any]:
        """Bring the state up to the last step, waiting for the device; return the next report's progress so far.

        Raises:
            TrainingError: A loss since the last report is not finite: nothing may be saved.
        """

    def paused(self) -> AbstractContextManager[None]:
        """Time spent inside does not count as training time."""


class Attempt:
    """One attempt at a run, new or resumed. Every rank has one; rank 0 alone writes."""

    run: RunDirectory
    state: TrainingState
    components: Components
    best: BestMetric

    def __init__(self, request: Request, ranks: Ranks):
        self.request, self.ranks, self.loaded = request, ranks, request.loaded
        self._lock = RunLock(request.resumed) if request.resumed is not None else None
        self.point = ResumePoint()
        self.callbacks: Callback = Callbacks([])
        self._checkpoints: Checkpoints | None = None
        self._loop: Saveable | None = None

    @classmethod
    @contextmanager
    def prepare(cls, request: Request, ranks: Ranks) -> Iterator[Self]:
        """Hold the lock of a resumed run and choose its checkpoint; of a new run, nothing is on the disk yet.

        Raises:
            UsageError: The run cannot be written, is held by another process, or was asked to change its meaning.
            AlreadyComplete: Another process has completed it.
            TrainingError: It has checkpoints, and none can be trusted.
        """
        attempt = cls(ranks.on_rank_0(lambda: _with_run_paths(request)), ranks)
        try:
            attempt.point = ranks.on_rank_0(attempt._resume_point)
            if attempt.checkpoint is not None:  # before models are loaded, whose weights it replaces
                logger.info("resuming from %s", attempt.checkpoint.name)
            yield attempt
        finally:
            if attempt._lock is not None:
                attempt._lock.release()

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def lock(self) -> RunLock:
        """The run's lock, which a new run has once it is open."""
        assert self._lock is not None
        return self._lock

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, once a trainer is attached."""
        assert self._checkpoints is not None
        return self._checkpoints

    @property
    def checkpoint(self) -> Path | None:
        """The verified checkpoint that this attempt resumes from; None: it starts from the beginning."""
        return self.point.checkpoint

    def check(self, components: Components) -> None:
        """Compare rows and weights with those that the run had. Still nothing of a new run is on the disk.

        Raises:
            UsageError: They differ, and `--allow-change` does not name the change.
            Stopped: A signal came while they were loaded.
        """
        self.components = components
        self.best = BestMetric(self.config.checkpoint, components.task)
        self.point = self.ranks.on_rank_0(self._checked_point)
        self.ranks.stop_early_if_asked()

    def open(self, log: RunLog) -> None:
        """Create the run, or reopen it: directory, config, metadata, state, registry entry, output.log, callbacks."""
        self.run, self.state = self.ranks.on_rank_0(self._opened)
        if self._lock is None:
            self._lock = RunLock(self.run)
            self.ranks.on_rank_0(self._lock.take)
        log.open(self.run.log_file)
        hide_progress_bars()
        if self.ranks.is_main:
            for notice in [*self.loaded.notices, *self.point.changes]:
                logger.warning(notice)
        what = "new" if self.request.resumed is None else f"attempt {self.state.attempts}"
        logger.info("run %s (%s)", self.run.path, what)

    @contextmanager
    def outcome_recorded(self, log: RunLog) -> Iterator[None]:
        """However the attempt ends, the run's state says how; an outdated attempt leaves that to the later one.

        The callbacks live as long, and no half-written checkpoint outlives it.
        """
        try:
            with record_outcome(self.run, self.state, self.ranks, self.lock):
                self.callbacks = Callbacks(on_every_rank(lambda: self._own_callbacks(log)))
                yield
        finally:
            if self._checkpoints is not None:
                self._checkpoints.abandon()
            self.callbacks.finished(self.state)

    # Stages

    def remaining_stages(self) -> Iterator[Stage]:
        """The stages that the run has not finished, in order; a restored trainer may have set it back."""
        return (stage for stage in WORK if self.state.stage.order <= stage.order)

    def enter(self, stage: Stage) -> None:
        """Note that a stage begins. Raises Stopped on all ranks, with the last step saved, if any was asked to stop."""
        self.state.stage = stage  # before the vote: a stop here must not have the finished stage done again
        if self.ranks.vote.now():
            self.save_and_stop()
        logger.info("stage: %s", stage.replace("_", " "))
        self.ranks.on_rank_0(self._record_stage)

    def complete(self) -> Result:
        """Write the model card, leave the registry, upload what the config says; return where it is and its numbers."""
        self.callbacks.completing(self.state)
        check = self.lock.check
        return self.ranks.on_rank_0(
            lambda: publish_result(self.run, self.state, self.config, self.components.task.headline, check)
        )

    # What a trainer asks for

    def attach(self, training: Training, loop: Saveable) -> None:
        """Take charge of the checkpoints of a trainer's weights, optimizer and random numbers."""
        self._loop = loop
        accelerator = self.ranks.accelerator
        facts = RunFacts(
            ranks=self.ranks.count,
            rows_per_step=self.config.training.step_shape(self.ranks.count)[0],
            mixed_precision=accelerator.mixed_precision,
            config=effective(with_absolute_paths(self.config)),
            data_fingerprint=self.components.task.fingerprint,
            **code_facts(),
        )
        self._checkpoints = Checkpoints(self.run, self.lock, training, self.config.checkpoint, facts, self._saved)
        if self.request.before_training is not None:
            before_training = self.request.before_training
            self.ranks.on_rank_0(lambda: before_training(self.run, self.state.total_steps))

    def stepped(self) -> None:
        """A step was taken. Does not wait for the device."""
        self.callbacks.stepped(self.state)

    def training_started(self) -> None:
        """Training starts or resumes at the state's step."""
        self.write(lambda: self.callbacks.training_started(self.state))

    def training_ended(self) -> None:
        """The last step was taken; a checkpoint that is still being written is committed."""
        self.checkpoints.finish(self.state)
        self.callbacks.training_ended(self.state)

    def report(self, metrics: Metrics) -> None:
        """Step metrics, to every callback."""
        self.write(lambda: self.callbacks.reported(self.state, metrics))

    def evaluated(self, stage: str, metrics: Metrics, samples: Samples) -> None:
        """An evaluation's metrics, and rows with the text that the model generated, to every callback.

        Raises:
            TrainingError: The loss is not finite before any training.
            UsageError: At the baseline: `checkpoint.best_metric` is none of the metrics.
        """
        self.write(lambda: self.callbacks.evaluated(self.state, stage, metrics))
        if stage == "baseline":
            self.best.check_baseline(metrics, self.ranks.accelerator.mixed_precision, self.config)
        if samples:
            self.write(lambda: self.callbacks.sampled(self.state, stage, samples))

    def is_new_best(self, metrics: Metrics) -> bool:
        """Note an evaluation during training; True if its checkpoint is to be kept as the best so far."""
        self.state.evaluated_step = self.state.step
        return self.best.note(self.state, metrics) and self.config.checkpoint.keep_best

    def boundary(self, *, save: bool) -> None:
        """Between two steps, on every rank: vote on stopping, commit what is written, save if it is due.

        Raises:
            Stopped: A rank was asked to stop before the vote of the boundary before; this step is committed.
        """
        assert self._loop is not None
        stop, written = self.ranks.vote.cast(self.checkpoints.written)
        with self._loop.paused():
            if stop:
                self.save_and_stop()
            if written:
                self.checkpoints.finish(self.state)
            if save:
                self.save()

    def stop_if_asked(self) -> None:
        """Between two batches of an evaluation, on every rank: raise Stopped if any rank was asked to stop."""
        stop, _ = self.ranks.vote.cast(ready=False)
        if stop:
            raise Stopped("stopped")

    def save(self, *, must: bool = False) -> None:
        """Save a checkpoint of the state's step, unless there is one; must: raise where it cannot be written."""
        assert self._loop is not None
        if self.state.latest_checkpoint == self.run.checkpoint(self.state.step).name:
            return  # of this very step, by the attempt before
        self.checkpoints.save(self.state, self._loop.settle(), must=must)

    def save_and_stop(self) -> NoReturn:
        """Save and raise Stopped; every rank calls it at the same step.

        Raises:
            TrainingError: No checkpoint could be written.
        """
        reason = self.ranks.vote.reason()
        try:
            self.checkpoints.finish(self.state)
        except TrainingError as error:  # an earlier step's checkpoint; this one may still succeed
            logger.error("%s", error)
        if self.state.step > 0:
            self.save(must=True)
        raise Stopped(f"stopped by {reason}")

    def prune(self) -> None:
        """Delete checkpoints that the attempt before was about to delete."""
        self.ranks.on_rank_0(lambda: self.checkpoints.prune(self.state))

    def write(self, work: Callable[[], None]) -> None:
        """Run work on rank 0 if no later attempt has taken the run over; a full disk there ends all ranks."""
        self.ranks.on_rank_0(lambda: self._guarded(work))

    def needs_teacher_metrics(self) -> bool:
        """True if the run has no metrics of its teacher yet, or continues with another teacher."""
        return self.point.other_teacher or not self.ranks.on_rank_0(lambda: bool(last_evaluation(self.run, "teacher")))

    # On rank 0

    def _guarded(self, work: Callable[[], None]) -> None:
        self.lock.check()
        try:
            work()
        except OSError as error:
            newest = self.state.latest_checkpoint or "none yet"
            raise TrainingError(
                f"step {self.state.step} could not be reported in {self.run.path} ({error}); the newest checkpoint "
                f"is {newest}. Free some space there, then resume"
            ) from error

    def _own_callbacks(self, log: RunLog) -> list[Callback]:
        """The callbacks of this rank: only rank 0 has any."""
        if not self.ranks.is_main:
            return []
        return build_callbacks(self.config, self.run, self.state, log, self.components.task.headline)

    def _resume_point(self) -> ResumePoint:
        """Refuse a run that cannot be written, or not under its name, before the work and not after it."""
        output_root = Path(self.config.output_root)
        check_writable(output_root)
        if self.request.resumed is None:
            if self.request.run_name is not None:
                if self.request.place is not None:
                    remove_half_made(RunDirectory(output_root / self._place / self.request.run_name))
                check_run_name(output_root, self._place, self.request.run_name)
            return ResumePoint()
        return prepare_resume(
            self.request.resumed,
            self.lock,
            self.config,
            rows_per_step=self.config.training.step_shape(self.ranks.count)[0],
            precision=self.ranks.accelerator.mixed_precision,
            allowed_changes=list(self.request.allowed_changes),
            take_over=self.request.take_over,
        )

    def _checked_point(self) -> ResumePoint:
        components, allowed = self.components, list(self.request.allowed_changes)
        if components.student.origin is not None:
            check_base(self.point, components.student.base_sha256, components.student.origin.weights_sha256)
        point = check_teacher(self.point, components.teacher_sha256, allowed)
        return check_rows(point, components.task.fingerprint, components.task.description, allowed)

    def _opened(self) -> tuple[RunDirectory, TrainingState]:
        guard = unguarded if self._lock is None else self._lock.check
        return open_run(
            self.loaded,
            self.request.run_name,
            self.request.resumed,
            list(self.request.command),
            {**self.components.facts(self.config, self.ranks.accelerator), **self.request.facts},
            AttemptFacts(self.point.attempt, self.point.changes, self.point.allowed, guard),
            self._place,
        )

    @property
    def _place(self) -> Path:
        """Where a new run goes, below the output root."""
        return self.request.place if self.request.place is not None else config_name(self.loaded.file)

    def _record_stage(self) -> None:
        sync_file(self.run.metrics_file)  # what a finished stage has written is not written again
        self.state.save(self.run.state_file, self.lock.check)
        update(Path(self.config.output_root), self.state.run_id, self.state.stage)

    def _saved(self, state: TrainingState, saved: Saved) -> None:
        self.callbacks.saved(state, asdict(saved))


def _with_run_paths(request: Request) -> Request:
    """The request with the runs that a new config names as paths; rank 0's view of the disk counts for all ranks."""
    if request.resumed is not None or request.place is not None:  # of a run or its control, whose config has paths
        return request  # already: a name in it is the hub's, even if there is a run of that name now
    return replace(request, loaded=replace(request.loaded, config=with_run_paths(request.config)))
