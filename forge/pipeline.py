"""The one page of a run: from a checked config to a trained, exported and evaluated model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

from forge.cluster.ranks import build_accelerator, on_rank_0, rank_0_first
from forge.config.explain import effective, to_yaml
from forge.config.loader import LoadedConfig
from forge.config.schema import Config
from forge.model.export import CardFacts, compare, export_model, model_card
from forge.model.load import LoadedModel, check_length, load_classifier
from forge.model.source import find_model, load_tokenizer
from forge.run.directory import RunDirectory, check_writable, create_run_directory
from forge.run.files import read_json, read_json_lines, write_atomically, write_json
from forge.run.log import RunLog
from forge.run.provenance import package_freeze, provenance, write_dirty_diff
from forge.run.registry import register, unregister, update
from forge.run.state import Stage, TrainingState, new_run_id
from forge.task.classification import Classification, load_classification
from forge.trainer.callbacks import Callback, Callbacks, ConsoleReport, MetricsFile
from forge.trainer.finetuning import FinetuningTrainer
from forge.trainer.optimizer import step_shape
from forge.trainer.tracking import WandbTracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    loaded: LoadedConfig
    command: list[str]
    run_name: str | None = None
    resumed: RunDirectory | None = None  # None: a new run


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its numbers before and after, empty where an evaluation was not asked for."""

    run: RunDirectory
    before: dict[str, Any]
    after: dict[str, Any]

    def table(self) -> list[tuple[str, str, str]]:
        return compare(self.before, self.after)


def run_pipeline(request: Request, log: RunLog) -> Result:
    """Runs every stage that the run has not finished. Raises ForgeError, with the run's state saved."""
    config = request.loaded.config
    accelerator = build_accelerator(config.training.mixed_precision, config.training.seed)
    log.adopt_library_loggers()
    if not log.console.is_terminal or not accelerator.is_main_process:
        _hide_progress_bars()
    on_rank_0(accelerator, lambda: check_writable(Path(config.output_root)))

    # What bad input can break comes first: until here and through the next two lines nothing is created.
    task = rank_0_first(accelerator, lambda: _load_task(config))
    loaded_model = rank_0_first(accelerator, lambda: _load_model(config, task))
    task = replace(task, label_ids=loaded_model.label_ids)

    run, state = on_rank_0(accelerator, lambda: _open_run(request, accelerator, task, loaded_model))
    log.open(run.log_file)
    _hide_progress_bars()  # in a file they are noise; the log says the same in lines
    for notice in request.loaded.notices if accelerator.is_main_process else []:
        logger.warning(notice)
    logger.info("run %s (%s)", run.path, "new" if request.resumed is None else f"attempt {state.attempts}")

    callbacks: Callback = Callbacks([])
    if accelerator.is_main_process:
        callbacks = Callbacks(_callbacks(config, run, state, log))
    trainer = FinetuningTrainer(config, accelerator, task, loaded_model.model, run, state, callbacks)
    trainer.restore()

    def evaluate(stage: str) -> None:
        callbacks.evaluated(state, stage, trainer.evaluate())

    stages: list[tuple[Stage, Callable[[], None]]] = [
        (Stage.BASELINE_EVALUATION, lambda: evaluate("baseline") if config.evaluation.baseline else None),
        (Stage.TRAINING, trainer.train),
        (Stage.EXPORT, lambda: _export(trainer, accelerator, run)),
        (Stage.FINAL_EVALUATION, lambda: evaluate("final") if config.evaluation.final else None),
    ]
    try:
        for stage, work in stages:
            if state.stage.order <= stage.order:
                on_rank_0(accelerator, lambda stage=stage: _enter(stage, run, state, config))  # type: ignore[misc]
                work()
        result = Result(run, _evaluation(run, "baseline"), _evaluation(run, "final"))
        on_rank_0(accelerator, lambda: _complete(result, state, config, task))
    except BaseException as error:  # also an interrupt: whatever ends the attempt stands in the state
        if accelerator.is_main_process:
            state.error = f"{type(error).__name__}: {error}".strip(": ")
            state.save(run.state_file)
        raise
    finally:
        callbacks.finished(state)
    return result


def _hide_progress_bars() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _load_task(config: Config) -> Classification:
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    name = config.model.tokenizer or config.model.path
    assert name is not None  # the schema requires one of the two
    tokenizer = load_tokenizer(find_model(name, key, None if config.model.tokenizer else config.model.revision), key)
    return load_classification(config.task, tokenizer)


def _load_model(config: Config, task: Classification) -> LoadedModel:
    set_seed(config.training.seed)  # new weights depend on the seed alone, not on what was drawn before
    loaded = load_classifier(config.model, task.labels, task.tokenizer)
    check_length(loaded.model, config.task.max_length)
    return loaded


def _open_run(
    request: Request, accelerator: Accelerator, task: Classification, model: LoadedModel
) -> tuple[RunDirectory, TrainingState]:
    """Creates the run's directory, or reopens it: config, metadata, state and registry are in it from the start."""
    config = request.loaded.config
    output_root = Path(config.output_root)
    attempt = {**provenance(None, request.command), "ranks": accelerator.num_processes}
    if request.resumed is None:
        run = create_run_directory(output_root, config_name(request.loaded.file), request.run_name)
        state = TrainingState(run_id=new_run_id())
        write_atomically(run.config_file, f"# The merged config of {run.name}\n\n{to_yaml(located(config))}")
        write_atomically(run.path / "requirements.txt", "\n".join(package_freeze()) + "\n")
        metadata: dict[str, Any] = {
            "run_id": state.run_id,
            "name": run.name,
            "created_at": state.created_at,
            "config_file": str(request.loaded.file.absolute()),
            "attempts": [],
        }
    else:
        run = request.resumed
        state = TrainingState.load(run.state_file)
        state.error = None
        metadata = read_json(run.metadata_file)
        if state.latest_checkpoint is None and state.reached(Stage.EXPORT):
            state.stage = Stage.TRAINING  # nothing holds the trained weights: they are trained again
    state.attempts += 1
    dirty_diff = run.path / f"dirty_{state.attempts}.diff"
    attempt["dirty_diff"] = dirty_diff.name if write_dirty_diff(dirty_diff) else None
    metadata |= _facts(config, accelerator, task, model)
    metadata["attempts"] = [*metadata["attempts"], attempt]
    write_json(run.metadata_file, metadata)
    state.save(run.state_file)
    register(output_root, run, state.run_id, state.stage)
    return run, state


def _facts(config: Config, accelerator: Accelerator, task: Classification, loaded: LoadedModel) -> dict[str, Any]:
    """What this run trains on, and how: the same at every attempt unless somebody changed it."""
    rows_per_step, micro_batches = step_shape(config.training, accelerator.num_processes)
    return {
        "data": {
            "description": task.description,
            "fingerprint": task.fingerprint,
            "rows": {"train": len(task.train), **{name: len(rows) for name, rows in task.validation.items()}},
            "truncated": task.truncated,
            "labels": task.labels,
        },
        "model": {
            "source": loaded.source.name if loaded.source else "from scratch",
            "location": loaded.source.location if loaded.source else None,
            "architecture": type(loaded.model).__name__,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "trained_parameters": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
            "labels": list((loaded.model.config.id2label or {}).values()),
            "new_weights": loaded.new_weights if loaded.source else "all",
        },
        "world": {
            "ranks": accelerator.num_processes,
            "device": accelerator.device.type,
            "mixed_precision": accelerator.mixed_precision,
            "rows_per_step": rows_per_step,
            "micro_batches_per_rank": micro_batches,
        },
    }


def _callbacks(config: Config, run: RunDirectory, state: TrainingState, log: RunLog) -> list[Callback]:
    callbacks: list[Callback] = [MetricsFile(run), ConsoleReport(log.console)]
    if config.tracking.wandb is not None:
        contents = {**effective(config), "run_metadata": read_json(run.metadata_file)}
        callbacks.append(WandbTracker(config.tracking.wandb, run, state, contents))
    return callbacks


def _enter(stage: Stage, run: RunDirectory, state: TrainingState, config: Config) -> None:
    state.stage = stage
    state.save(run.state_file)
    update(Path(config.output_root), state.run_id, stage)
    logger.info("stage: %s", stage.replace("_", " "))


def _export(trainer: FinetuningTrainer, accelerator: Accelerator, run: RunDirectory) -> None:
    on_rank_0(accelerator, lambda: export_model(trainer.model, trainer.task.tokenizer, run.final))
    logger.info("final model in %s", run.final)


def _complete(result: Result, state: TrainingState, config: Config, task: Classification) -> None:
    run = result.run
    metadata = read_json(run.metadata_file)
    attempt = metadata["attempts"][-1]
    git = attempt["git"]
    facts = CardFacts(
        run_name=run.name,
        run_id=state.run_id,
        command=attempt["command"],
        base=config.model.path,
        data=task.description,
        data_fingerprint=task.fingerprint,
        rows=len(task.train),
        labels=metadata["model"]["labels"],
        steps=state.step,
        config_yaml=to_yaml(config),
        versions={name: attempt["packages"][name] for name in ("torch", "transformers", "accelerate", "datasets")},
        code=f"commit {git['commit']}{' with changes' if git['dirty'] else ''}" if git["commit"] else "no git commit",
    )
    write_atomically(run.final / "README.md", model_card(facts, result.before, result.after))
    state.stage, state.pipeline_complete = Stage.COMPLETE, True
    state.save(run.state_file)
    unregister(Path(config.output_root), state.run_id)


def _evaluation(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The last evaluation of that stage in metrics.jsonl, without its step and stage."""
    if not run.metrics_file.exists():
        return {}
    found = [row for row in read_json_lines(run.metrics_file) if row.get("stage") == stage]
    return {name: value for name, value in found[-1].items() if name not in ("step", "stage")} if found else {}


def config_name(file: Path) -> Path:
    """Where a config's runs lie below the output root: its path below configs/, or its bare name elsewhere."""
    path = file.resolve().with_suffix("")
    if "configs" in path.parts[:-1]:
        below = len(path.parts) - 1 - path.parts[::-1].index("configs")
        return Path(*path.parts[below + 1 :])
    return Path(path.name)


def located(config: Config) -> Config:
    """The config with local folders as absolute paths: a run's own config.yaml holds wherever it is read from."""

    def place(name: str | None) -> str | None:
        return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().is_dir() else name

    dataset = config.task.dataset.model_copy(update={"path": place(config.task.dataset.path)})
    model = {"path": place(config.model.path), "tokenizer": place(config.model.tokenizer)}
    return config.model_copy(
        update={
            "task": config.task.model_copy(update={"dataset": dataset}),
            "model": config.model.model_copy(update=model),
            "output_root": str(Path(config.output_root).absolute()),
        }
    )
