"""The one page of a run: from a checked config to a trained, exported and evaluated model."""

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor

from forge.checkpoint.beginning import Beginning, begin_again, check_base, with_rows
from forge.cluster.ranks import StopVote, build_accelerator, lost_rank, on_every_rank, on_rank_0, rank_0_first
from forge.cluster.signals import StopRequest, stopped_early
from forge.config.explain import effective, to_yaml
from forge.config.loader import LoadedConfig
from forge.config.placing import config_name
from forge.config.schema import Config
from forge.errors import LostRank, Stopped, Superseded, TrainingError
from forge.losses.cross_entropy import IGNORE
from forge.model.card import compare, model_card
from forge.model.export import MERGED, export_adapter, export_merged, export_model, push_to_hub
from forge.model.lineage import lineage
from forge.model.load import LoadedModel
from forge.model.lora import with_lora
from forge.model.source import origin_of, with_run_paths
from forge.model.trained import AdapterWeights
from forge.run.directory import RunDirectory, check_run_name, check_writable
from forge.run.files import (
    publish_folder,
    read_json,
    read_json_lines,
    sync_file,
    unguarded,
    write_atomically,
    write_json,
)
from forge.run.lock import RunLock
from forge.run.log import RunLog
from forge.run.opening import Attempt, open_run
from forge.run.registry import unregister, update
from forge.run.state import Stage, TrainingState
from forge.task.batches import model_inputs
from forge.task.choice import load_task
from forge.task.task import Task
from forge.teacher.loading import label_columns, load_teacher, wants_teacher
from forge.teacher.placement import place
from forge.teacher.vocabulary import for_teacher, tell_of_columns
from forge.trainer.callbacks import Callback, Callbacks, ConsoleReport, MetricsFile
from forge.trainer.distillation import DistillationTrainer
from forge.trainer.finetuning import FinetuningTrainer, world_facts
from forge.trainer.optimizer import step_shape
from forge.trainer.samples import SamplesFolder
from forge.trainer.tracking import WandbTracker

logger = logging.getLogger(__name__)

ROWS_OF_PROOF = 4  # whose logits are compared, of the model with its adapter and of the merged one


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    loaded: LoadedConfig
    command: list[str]
    run_name: str | None = None
    resumed: RunDirectory | None = None  # None: a new run
    allowed_changes: list[str] = field(default_factory=list)  # keys that may change the meaning of a resumed run
    take_over: bool = False  # of a process that is frozen, or on a dead host


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its numbers before and after, empty where an evaluation was not asked for."""

    run: RunDirectory
    before: dict[str, Any]
    after: dict[str, Any]
    headline: tuple[str, ...]  # the metrics that count most

    def table(self) -> list[tuple[str, str, str]]:
        return compare(self.before, self.after, self.headline)


def run_pipeline(request: Request, log: RunLog, stop: StopRequest) -> Result:
    """Runs every stage that the run has not finished. Raises ForgeError, with the run's state saved."""
    if request.resumed is None:  # later its config has paths; a name in it is the hub's, whatever runs there are now
        request = replace(request, loaded=replace(request.loaded, config=with_run_paths(request.loaded.config)))
    config = request.loaded.config
    training = config.training
    accelerator = build_accelerator(training.mixed_precision, training.seed, deterministic=training.deterministic)
    log.adopt_library_loggers()
    if not log.console.is_terminal or not accelerator.is_main_process:
        _hide_progress_bars()
    vote = StopVote(accelerator, stop)
    lock: RunLock | None = RunLock(request.resumed) if request.resumed is not None else None
    try:
        beginning = on_rank_0(accelerator, lambda: _begin(request, lock, accelerator))

        # What bad input can break comes first: until the next call of on_rank_0 nothing of a new run is created.
        task = rank_0_first(accelerator, lambda: stop.breaks(lambda: load_task(config)))
        loaded_model = on_every_rank(accelerator, lambda: stop.breaks(lambda: _load_model(config, task)))
        loaded_model = _with_origin(loaded_model, accelerator, "model")
        on_rank_0(accelerator, lambda: _check_base(beginning, loaded_model))
        task = task.for_model(loaded_model)
        task = _for_teacher(config, task, accelerator, stop)
        taught = on_every_rank(accelerator, lambda: stop.breaks(lambda: _load_teacher(config, task)))
        taught = _with_origin(taught, accelerator, "teacher") if taught is not None else None
        beginning = on_rank_0(
            accelerator, lambda: with_rows(beginning, task.fingerprint, task.description, request.allowed_changes)
        )
        if vote.now():
            raise stopped_early(vote.reason())

        facts = {
            "task": task.about(),
            "data": task.facts(),
            "model": loaded_model.facts(),
            "teacher": taught.facts() if taught is not None else None,
            "lineage": [*lineage(loaded_model.origin), *(lineage(taught.origin, "teacher") if taught else [])],
            "world": world_facts(accelerator, training),
        }
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
            callbacks = Callbacks(_callbacks(config, run, state, log) if accelerator.is_main_process else [])
            trainer = _trainer(taught, config, accelerator, task, loaded_model, run, state, callbacks, lock, stop)
            try:
                result = _run_stages(trainer, beginning)
            finally:
                trainer.close()
                callbacks.finished(state)
    finally:
        if lock is not None:
            lock.release()
    accelerator.end_training()
    return result


def _run_stages(trainer: FinetuningTrainer, beginning: Beginning) -> Result:
    config, run, state, accelerator = trainer.config, trainer.run, trainer.state, trainer.accelerator
    on_every_rank(accelerator, lambda: trainer.restore(beginning.checkpoint))
    if beginning.checkpoint is not None:
        logger.info("goes on from %s", beginning.checkpoint.name)
        on_rank_0(accelerator, lambda: trainer.checkpoints.prune(state))
    stages: list[tuple[Stage, Callable[[], object]]] = [
        (Stage.BASELINE_EVALUATION, lambda: trainer.evaluate("baseline") if config.evaluation.baseline else None),
        (Stage.TRAINING, trainer.train),
        (Stage.EXPORT, lambda: _export(trainer)),
        (Stage.FINAL_EVALUATION, lambda: trainer.evaluate("final") if config.evaluation.final else None),
    ]
    for stage, work in stages:
        if state.stage.order <= stage.order:
            trainer.stop_if_asked()
            _enter(stage, trainer)
            work()
    before, after = _recorded_evaluation(run, "baseline"), _recorded_evaluation(run, "final")
    result = Result(run, before, after, trainer.task.headline)
    on_rank_0(accelerator, lambda: _complete(result, trainer))
    return result


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
            check_run_name(output_root, config_name(request.loaded.file), request.run_name)
        return Beginning()
    config = request.loaded.config
    return begin_again(
        request.resumed,
        lock,
        config,
        rows_per_step=step_shape(config.training, accelerator.num_processes)[0],
        precision=accelerator.mixed_precision,
        allowed_changes=request.allowed_changes,
        take_over=request.take_over,
    )


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
    )


def _hide_progress_bars() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _load_model(config: Config, task: Task) -> LoadedModel:
    set_seed(config.training.seed)  # new weights depend on the seed alone, not on what was drawn before
    return with_lora(task.load_model(config.model, config.training), config.model, config.training.seed)


def _for_teacher(config: Config, task: Task, accelerator: Accelerator, stop: StopRequest) -> Task:
    if not wants_teacher(config):
        return task
    return rank_0_first(accelerator, lambda: stop.breaks(lambda: for_teacher(config, task)))


def _load_teacher(config: Config, task: Task) -> LoadedModel | None:
    return load_teacher(config, task) if wants_teacher(config) else None


def _with_origin(loaded: LoadedModel, accelerator: Accelerator, key: str) -> LoadedModel:
    """Rank 0 hashes the files that the model came from. Raises UsageError where an adapter was made for others."""
    source = loaded.source
    if source is None:
        return loaded
    return replace(loaded, origin=on_rank_0(accelerator, lambda: origin_of(source, key)))


def _check_base(beginning: Beginning, loaded: LoadedModel) -> None:
    if loaded.origin is not None:
        check_base(beginning, loaded.base_sha256, loaded.origin.weights_sha256)


def _trainer(
    taught: LoadedModel | None,
    config: Config,
    accelerator: Accelerator,
    task: Task,
    loaded: LoadedModel,
    *others: Any,
) -> FinetuningTrainer:
    """taught: the teacher; None: there is none."""
    if taught is None:
        return FinetuningTrainer(config, accelerator, task, loaded, *others)
    tell_of_columns(loaded.model, taught.model, task)
    columns = label_columns(loaded.label_ids, taught.label_ids)
    teacher = place(taught.model, config.teacher, accelerator, task, columns)
    return DistillationTrainer(config, accelerator, task, loaded, *others, teacher=teacher)


def _callbacks(config: Config, run: RunDirectory, state: TrainingState, log: RunLog) -> list[Callback]:
    callbacks: list[Callback] = [MetricsFile(run), ConsoleReport(log.console), SamplesFolder(run)]
    if config.tracking.wandb is not None:
        contents = {**effective(config), "run_metadata": read_json(run.metadata_file)}
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


def _export(trainer: FinetuningTrainer) -> None:
    wanted, weights, task = trainer.config.export, trainer.weights, trainer.task
    merged: dict[str, Any] = {}

    def write(folder: Path) -> None:
        if not isinstance(weights, AdapterWeights):
            export_model(trainer.model, folder, wanted.dtype)
        else:
            export_adapter(weights, folder)
            if wanted.merge:
                proof = _few_inputs(task)
                merged.update(
                    asdict(export_merged(folder, weights.below, task.auto_model, trainer.model, wanted.dtype, *proof))
                )
                task.save_processing(folder / MERGED)
        task.save_processing(folder)

    def export() -> None:
        try:
            publish_folder(trainer.run.final, write, trainer.lock.check)
            metadata = read_json(trainer.run.metadata_file)
            metadata.pop("merged", None)  # of an earlier export, which this one replaces
            write_json(
                trainer.run.metadata_file, {**metadata, "merged": merged} if merged else metadata, trainer.lock.check
            )
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the final model could not be written ({reason}); free some space, then resume"
            ) from error

    on_rank_0(trainer.accelerator, export)
    logger.info("final model in %s", trainer.run.final)


def _few_inputs(task: Task) -> tuple[dict[str, Any], Tensor | None]:
    """What the model is given for the first rows of the first validation split, and which of its logits are learned;
    None: all, where none is."""
    rows = next(iter(task.validation.values()))
    batch = task.collate([rows[i] for i in range(min(ROWS_OF_PROOF, len(rows)))])
    counted = batch["labels"] != IGNORE
    return {**model_inputs(batch), **task.forward_options}, counted if counted.any() else None


def _complete(result: Result, trainer: FinetuningTrainer) -> None:
    state, config = trainer.state, trainer.config
    metadata = read_json(result.run.metadata_file)
    card = model_card(metadata, state.step, to_yaml(config), result.before, result.after)
    write_atomically(result.run.final / "README.md", card, trainer.lock.check)
    state.stage, state.pipeline_complete = Stage.COMPLETE, True
    state.save(result.run.state_file, trainer.lock.check)
    unregister(Path(config.output_root), state.run_id)
    if config.export.push_to_hub is not None:
        push_to_hub(result.run.final, config.export.push_to_hub)


def _recorded_evaluation(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The last evaluation of that stage in metrics.jsonl, without its step and stage."""
    if not run.metrics_file.exists():
        return {}
    found = [row for row in read_json_lines(run.metrics_file) if row.get("stage") == stage]
    return {name: value for name, value in found[-1].items() if name not in ("step", "stage")} if found else {}
