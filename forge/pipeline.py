"""The one page of a run: from a checked config to a trained, exported and evaluated model."""

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import release_memory

from forge.attempt.callbacks.callback import Callback, Callbacks, ConsoleReport, MetricsFile
from forge.attempt.callbacks.peak import PeakMetrics
from forge.attempt.callbacks.samples import SamplesFolder
from forge.attempt.callbacks.wandb import WandbTracker
from forge.attempt.control import (
    Control,
    check_control,
    control_config,
    control_of,
    place_of,
    remove_half_made,
    wants_control,
)
from forge.attempt.opening import Attempt, open_run
from forge.attempt.resume import Beginning, begin_again, check_base, check_teacher, with_rows
from forge.cluster.signals import StopRequest, stopped_early
from forge.config.explain import effective
from forge.config.loader import LoadedConfig
from forge.config.placing import config_name
from forge.config.schema import Config
from forge.errors import AlreadyComplete, LostRank, Stopped, Superseded
from forge.model.export import push_to_hub
from forge.model.load import LoadedModel
from forge.model.source import with_run_paths
from forge.ranks.agreement import lost_rank, on_every_rank, on_rank_0
from forge.ranks.deepspeed import accelerator_of
from forge.ranks.stop_vote import StopVote
from forge.report.evidence import Evidence, evidence, evidence_markdown
from forge.report.model_card import compare, model_card
from forge.run.directory import RunDirectory, check_run_name, check_writable
from forge.run.files import read_json_lines, sync_file, unguarded, write_atomically
from forge.run.lock import RunLock
from forge.run.log import RunLog
from forge.run.metadata import amend_metadata, named, read_metadata
from forge.run.registry import unregister, update
from forge.run.state import Stage, TrainingState
from forge.teacher.loading import evaluates_teacher
from forge.trainer.components import Parts, build_trainer, load_parts
from forge.trainer.distillation import DistillationTrainer
from forge.trainer.export import export
from forge.trainer.loop import FinetuningTrainer
from forge.trainer.measured_memory import train_measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    loaded: LoadedConfig
    command: list[str]
    run_name: str | None = None
    resumed: RunDirectory | None = None  # None: a new run
    allowed_changes: list[str] = field(default_factory=list)  # keys that may change the meaning of a resumed run
    take_over: bool = False  # of a process that is frozen, or on a dead host
    control_of: RunDirectory | None = None  # the run that this one is the control of, beside which it lies


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its numbers before and after, empty where an evaluation was not asked for."""

    run: RunDirectory
    before: dict[str, Any]
    after: dict[str, Any]
    headline: tuple[str, ...]  # the metrics that count most
    evidence: Evidence | None = None  # of a run that has a teacher to be compared with

    def table(self) -> list[list[str]]:
        return [list(row) for row in compare(self.before, self.after, self.headline)]


def run_pipeline(request: Request, log: RunLog, stop: StopRequest) -> Result:
    """Runs every stage that the run has not finished. Raises ForgeError, with the run's state saved."""
    if request.resumed is None:  # later its config has paths; a name in it is the hub's, whatever runs there are now
        request = replace(request, loaded=replace(request.loaded, config=with_run_paths(request.loaded.config)))
    accelerator = _accelerator(request.loaded.config)
    result = _run(request, accelerator, log, stop)
    accelerator.end_training()
    return result


def _run(request: Request, accelerator: Accelerator, log: RunLog, stop: StopRequest) -> Result:
    config = request.loaded.config
    log.adopt_library_loggers()
    if not log.console.is_terminal or not accelerator.is_main_process:
        _hide_progress_bars()
    vote = StopVote(accelerator, stop)
    lock: RunLock | None = RunLock(request.resumed) if request.resumed is not None else None
    try:
        beginning = on_rank_0(accelerator, lambda: _begin(request, lock, accelerator))

        # What bad input can break comes first: until the next call of on_rank_0 nothing of a new run is created.
        parts = load_parts(request.loaded, accelerator, stop, request.command)
        beginning = on_rank_0(accelerator, lambda: _check_parts(beginning, parts, request.allowed_changes))
        if vote.now():
            raise stopped_early(vote.reason())

        facts, headline = parts.facts(config, accelerator), parts.task.headline
        if request.control_of is not None:
            facts["control_of"] = named(request.control_of).model_dump()
        run, state = on_rank_0(accelerator, lambda: _open(request, beginning, facts, lock))
        if lock is None:
            lock = RunLock(run)
            on_rank_0(accelerator, lock.take)
        log.open(run.log_file)
        _hide_progress_bars()  # in a file they are noise; the log says the same in lines
        for notice in [*request.loaded.notices, *beginning.changes] if accelerator.is_main_process else []:
            logger.warning(notice)
        logger.info("run %s (%s)", run.path, "new" if request.resumed is None else f"attempt {state.attempts}")

        with _recorded(run, state, accelerator, lock):
            own = _callbacks(config, run, state, log, headline) if accelerator.is_main_process else []
            callbacks = Callbacks(own)
            trainer = build_trainer(parts, config, accelerator, run, state, callbacks, lock, stop)
            try:
                if wants_control(config):
                    steps = trainer.total_steps
                    on_rank_0(accelerator, lambda: _existing_control(request, run, steps, facts))
                _run_stages(trainer, beginning, parts)
            finally:
                trainer.close()
                callbacks.finished(state)
            if wants_control(config):
                # The two models of this run would lie beside those of the control. They refer to each other in circles.
                del trainer, callbacks, own, parts
                accelerator.free_memory()
                release_memory()  # what the accelerator itself held until now
                _train_control(request, run, state, facts, accelerator, log, stop)
            return on_rank_0(accelerator, lambda: _complete(run, state, config, headline, lock))
    finally:
        if lock is not None:
            lock.release()


def _run_stages(trainer: FinetuningTrainer, beginning: Beginning, parts: Parts) -> None:
    config, state, accelerator = trainer.config, trainer.state, trainer.accelerator
    on_every_rank(accelerator, lambda: trainer.restore(beginning.checkpoint))
    if beginning.checkpoint is not None:
        logger.info("goes on from %s", beginning.checkpoint.name)
        on_rank_0(accelerator, lambda: trainer.checkpoints.prune(state))
    if state.reached(Stage.TRAINING):  # else within the first stage
        _report_teacher(trainer, beginning, parts)

    def baseline() -> None:
        _report_teacher(trainer, beginning, parts)
        if config.evaluation.baseline:
            trainer.evaluate("baseline")

    stages: list[tuple[Stage, Callable[[], object]]] = [
        (Stage.BASELINE_EVALUATION, baseline),
        (Stage.TRAINING, lambda: train_measured(trainer, parts)),
        (Stage.EXPORT, lambda: export(trainer)),
        (Stage.FINAL_EVALUATION, lambda: trainer.evaluate("final") if config.evaluation.final else None),
    ]
    for stage, work in stages:
        if state.stage.order <= stage.order:
            trainer.stop_if_asked()
            _enter(stage, trainer)
            work()
    if not state.reached(Stage.CONTROL):  # in this attempt
        trainer.callbacks.trained(state)
    if wants_control(config):
        trainer.stop_if_asked()
        trainer.keep()
        _enter(Stage.CONTROL, trainer)


def _report_teacher(trainer: FinetuningTrainer, beginning: Beginning, parts: Parts) -> None:
    """The teacher's own numbers, unless the run has them."""
    if not isinstance(trainer, DistillationTrainer) or not evaluates_teacher(trainer.config):
        return
    known = on_rank_0(trainer.accelerator, lambda: bool(_recorded_evaluation(trainer.run, "teacher")))
    if not known or beginning.other_teacher:
        taught = parts.teacher
        loaded = taught if isinstance(taught, LoadedModel) else None
        trainer.report_teacher(loaded, taught.origin if taught is not None else None)


def _train_control(
    request: Request,
    run: RunDirectory,
    state: TrainingState,
    facts: dict[str, Any],
    accelerator: Accelerator,
    log: RunLog,
    stop: StopRequest,
) -> None:
    """Trains the run's twin without the teacher, or goes on with it. Raises Stopped, for the run itself."""
    config = request.loaded.config
    twin = control_config(config, state.total_steps)
    known = on_rank_0(accelerator, lambda: _existing_control(request, run, state.total_steps, facts))
    control = control_of(run)
    if known is not None and known.complete:
        logger.info("the control run %s is complete already", control.path)
        return
    on_rank_0(accelerator, lambda: remove_half_made(control))
    root, _ = place_of(run, config)
    twin = twin.model_copy(update={"output_root": str(root)})
    file = on_rank_0(accelerator, lambda: read_metadata(run).config_file)
    asked = Request(
        LoadedConfig(twin, file),
        request.command,
        control.name,
        known.run if known is not None else None,
        known.allowed if known is not None else [],
        request.take_over and known is not None,
        control_of=run,
    )
    logger.info("control run %s: the same without the teacher, %d steps", control.path, state.total_steps)
    try:
        with log.of_another():
            _run(asked, _accelerator(twin), log, stop)  # the ranks are the same, and the seed is set again
    except AlreadyComplete:  # by another process, just now
        pass
    except Stopped:
        raise Stopped(f"stopped by {StopVote(accelerator, stop).reason()}") from None
    logger.info("control run %s: complete", control.path)


def _existing_control(
    request: Request, run: RunDirectory, steps: int | None = None, facts: dict[str, Any] | None = None
) -> Control | None:
    """run: the one that is controlled. Raises UsageError where another thing has the control's name."""
    config = request.loaded.config
    wanted = control_config(config, steps or 1)
    return check_control(control_of(run), wanted, steps=steps, facts=facts, allowed=request.allowed_changes)


@contextmanager
def _recorded(run: RunDirectory, state: TrainingState, accelerator: Accelerator, lock: RunLock) -> Iterator[None]:
    """Whatever ends the attempt stands in the run's state; but an outdated attempt leaves that to the later one."""

    def record() -> None:
        if accelerator.is_main_process:
            try:
                state.save(run.state_file, lock.check)
            except OSError as error:  # a full disk, say: what ended the attempt is to be told, and not this
                logger.error("%s could not be written (%s)", run.state_file, error)

    try:
        yield
    except Superseded:
        raise
    except Stopped as stop:
        state.error = f"{stop} in {state.stage.replace('_', ' ')} at step {state.step}"
        state.preemptions += 1
        record()
        kept = f"from {state.latest_checkpoint}" if state.latest_checkpoint else "from the start"
        entry = "forge.py --resume" if accelerator.num_processes == 1 else "-m forge.cli resume"
        command = f"python {entry} {shlex.quote(str(run.path))}"
        raise Stopped(f"{state.error}; go on {kept} with `{command}`") from None
    except BaseException as error:
        lost = lost_rank(error)
        state.error = "another rank has died" if lost else f"{type(error).__name__}: {error}".strip(": ")
        record()
        if lost:
            newest = state.latest_checkpoint or "none, so it starts anew"
            here = str(error).splitlines()[0][:200]
            raise LostRank(
                f"another rank has died in {state.stage.replace('_', ' ')} at step {state.step}; its own messages, or "
                f"the system's log, say why (here: {here}). Resume the run (its newest "
                f"checkpoint: {newest})"
            ) from error
        raise


def _begin(request: Request, lock: RunLock | None, accelerator: Accelerator) -> Beginning:
    """A run that could not be written, or not under its name, is refused before the work and not after it."""
    output_root = Path(request.loaded.config.output_root)
    check_writable(output_root)
    if request.resumed is None or lock is None:
        if request.run_name is not None:
            place = _place(request)
            check_run_name(output_root, place, request.run_name)
            if wants_control(request.loaded.config):
                _existing_control(request, RunDirectory(output_root / place / request.run_name))
        return Beginning()
    config = request.loaded.config
    beginning = begin_again(
        request.resumed,
        lock,
        config,
        rows_per_step=config.training.step_shape(accelerator.num_processes)[0],
        precision=accelerator.mixed_precision,
        allowed_changes=request.allowed_changes,
        take_over=request.take_over,
    )
    if wants_control(config):  # behind the checks of the run itself: what it may not change is not the control's fault
        _existing_control(request, request.resumed)
    return beginning


def _check_parts(beginning: Beginning, parts: Parts, allowed_changes: list[str]) -> Beginning:
    """The beginning with the weights and rows there are now. Raises UsageError where they are not the run's."""
    if parts.student.origin is not None:
        check_base(beginning, parts.student.base_sha256, parts.student.origin.weights_sha256)
    beginning = check_teacher(beginning, parts.teacher_sha256, allowed_changes)
    return with_rows(beginning, parts.task.fingerprint, parts.task.description, allowed_changes)


def _open(
    request: Request, beginning: Beginning, facts: dict[str, Any], lock: RunLock | None
) -> tuple[RunDirectory, TrainingState]:
    return open_run(
        request.loaded,
        request.run_name,
        request.resumed,
        request.command,
        facts,
        Attempt(beginning.attempt, beginning.changes, beginning.allowed, unguarded if lock is None else lock.check),
        _place(request),
    )


def _place(request: Request) -> Path:
    """Of a new run, below the output root."""
    if request.control_of is not None:
        return place_of(request.control_of, request.loaded.config)[1]
    return config_name(request.loaded.file)


def _accelerator(config: Config) -> Accelerator:
    return accelerator_of(config)


def _hide_progress_bars() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _callbacks(
    config: Config, run: RunDirectory, state: TrainingState, log: RunLog, headline: Sequence[str]
) -> list[Callback]:
    callbacks: list[Callback] = [MetricsFile(run), ConsoleReport(log.console), SamplesFolder(run)]
    callbacks.append(PeakMetrics(run, headline))
    if config.tracking.wandb is not None:
        contents = {**effective(config), "run_metadata": read_metadata(run).model_dump(mode="json", exclude_unset=True)}
        callbacks.append(WandbTracker(config.tracking.wandb, run, state, contents))
    return callbacks


def _enter(stage: Stage, trainer: FinetuningTrainer) -> None:
    run, state = trainer.run, trainer.state
    state.stage = stage
    logger.info("stage: %s", stage.replace("_", " "))

    def record() -> None:
        sync_file(run.metrics_file)  # what a finished stage has written is not written again
        state.save(run.state_file, trainer.lock.check)
        update(Path(trainer.config.output_root), state.run_id, stage)

    on_rank_0(trainer.accelerator, record)


def _complete(
    run: RunDirectory, state: TrainingState, config: Config, headline: tuple[str, ...], lock: RunLock
) -> Result:
    before, after = _recorded_evaluation(run, "baseline"), _recorded_evaluation(run, "final")
    metadata = read_metadata(run)
    control = None
    if wants_control(config):
        control = control_of(run)
        metadata = amend_metadata(run, lock.check, control=named(control))
    known = evidence(run, control) if evaluates_teacher(config) else None
    card = model_card(metadata, state.step, config, before, after, evidence_markdown(known) if known else None)
    write_atomically(run.final / "README.md", card, lock.check)
    state.stage, state.pipeline_complete = Stage.COMPLETE, True
    state.save(run.state_file, lock.check)
    unregister(Path(config.output_root), state.run_id)
    if config.export.push_to_hub is not None:
        push_to_hub(run.final, config.export.push_to_hub)
    return Result(run, before, after, headline, known)


def _recorded_evaluation(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The last evaluation of that stage in metrics.jsonl, without its step and stage."""
    if not run.metrics_file.exists():
        return {}
    found = [row for row in read_json_lines(run.metrics_file) if row.get("stage") == stage]
    return {name: value for name, value in found[-1].items() if name not in ("step", "stage")} if found else {}
