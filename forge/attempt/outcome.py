"""How an attempt ends: with a reason in the run's state, or with a model card, a result and an upload."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.attempt.control import wants_control
from forge.config.loader import load_config
from forge.config.schema import Config
from forge.errors import LostRank, Stopped, Superseded, UsageError
from forge.model.export import push_to_hub
from forge.ranks.agreement import lost_rank
from forge.ranks.world import Ranks
from forge.report.evidence import Evidence, evidence, evidence_markdown
from forge.report.model_card import headline_rows, model_card
from forge.run.directory import RunDirectory
from forge.run.files import Guard, unguarded, write_atomically
from forge.run.hints import resume_command
from forge.run.lock import RunLock
from forge.run.metadata import RunMetadata, amend_metadata, named, read_metadata
from forge.run.metrics import read_metrics
from forge.run.registry import unregister
from forge.run.state import Stage, TrainingState
from forge.teacher.placement import evaluates_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Where a complete run is, and its metrics before and after; empty where an evaluation was not asked for."""

    run: RunDirectory
    before: dict[str, Any]
    after: dict[str, Any]
    headline: tuple[str, ...]  # the metrics that count most
    evidence: Evidence | None = None  # of a run that has a teacher to be compared with

    def table(self) -> list[list[str]]:
        """Rows of text: metric, before, after."""
        return [list(row) for row in headline_rows(self.before, self.after, self.headline)]


@contextmanager
def record_outcome(run: RunDirectory, state: TrainingState, ranks: Ranks, lock: RunLock) -> Iterator[None]:
    """Write the reason into the run's state, whatever ends the attempt.

    Raises:
        Stopped, LostRank: With where the run stands, and how to resume it.
    """

    def record() -> None:
        if ranks.is_main:
            try:
                state.save(run.state_file, lock.check)
            except OSError as error:  # a full disk, say: report what ended the attempt, and not this
                logger.error("%s could not be written (%s)", run.state_file, error)

    try:
        yield
    except Superseded:
        raise  # the later attempt writes the state
    except Stopped as stop:
        state.error = f"{stop} {_where(state)}"
        state.preemptions += 1
        record()
        kept = f"from {state.latest_checkpoint}" if state.latest_checkpoint else "from the start"
        raise Stopped(f"{state.error}; resume {kept} with `{resume_command(run.path, ranks.count)}`") from None
    except BaseException as error:
        if not lost_rank(error):
            state.error = f"{type(error).__name__}: {error}".strip(": ")
            record()
            raise
        state.error = "another rank has died"
        record()
        here = str(error).splitlines()[0][:200]
        raise LostRank(
            f"another rank has died {_where(state)}; its own messages, or the system's log, say why (here: {here}). "
            f"Resume the run (newest checkpoint: {state.latest_checkpoint or 'none, so it starts again'})"
        ) from error


def publish_result(
    run: RunDirectory, state: TrainingState, config: Config, headline: Sequence[str], check: Guard
) -> Result:
    """Write the model card, mark the run complete and upload it; on rank 0.

    A run that has a control to come is uploaded with its metrics, by record_control.
    """
    result = result_of(run, config, headline)
    write_card(result, read_metadata(run), config, state.step, check)
    state.stage, state.pipeline_complete = Stage.COMPLETE, True
    state.save(run.state_file, check)
    unregister(Path(config.output_root), state.run_id)
    if config.export.push_to_hub is not None and not wants_control(config):
        push_to_hub(run.final, config.export.push_to_hub)
    return result


def record_control(run: RunDirectory, control: RunDirectory) -> Result:
    """Write a complete control into the model card and the metadata of its run; return the run's result with it.

    The metadata come last: a run without `control` in them has this still to be done.
    """
    config, state = load_config(run.config_file).config, TrainingState.load(run.state_file)
    if config.evaluation.final and not last_evaluation(control, "final"):
        raise UsageError(
            f"{control.metrics_file} has no final evaluation of the control of {run.path}; restore the file, or delete "
            f"{control.path} and resume {run.path}, which trains its control again"
        )
    metadata = read_metadata(run).model_copy(update={"control": named(control)})
    result = result_of(run, config, metadata.task.headline, control)
    write_card(result, metadata, config, state.step)
    if config.export.push_to_hub is not None:
        push_to_hub(run.final, config.export.push_to_hub)
    amend_metadata(run, control=named(control))
    return result


def result_of(
    run: RunDirectory, config: Config, headline: Sequence[str], control: RunDirectory | None = None
) -> Result:
    """Read a run's result from its files. control: its twin without the teacher, once that is complete."""
    before, after = last_evaluation(run, "baseline"), last_evaluation(run, "final")
    compared = evidence(run, control) if evaluates_teacher(config) else None
    return Result(run, before, after, tuple(headline), compared)


def write_card(result: Result, metadata: RunMetadata, config: Config, steps: int, check: Guard = unguarded) -> None:
    """Write the model card, final/README.md."""
    run, compared = result.run, result.evidence
    table = evidence_markdown(compared) if compared else None
    card = model_card(metadata, steps, config, result.before, result.after, table)
    write_atomically(run.final / "README.md", card, check)


def last_evaluation(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The last evaluation of that stage in metrics.jsonl, without its step and stage; empty if it was not made."""
    if not run.metrics_file.exists():
        return {}
    found = [row for row in read_metrics(run.metrics_file) if row.get("stage") == stage]
    return {name: value for name, value in found[-1].items() if name not in ("step", "stage")} if found else {}


def _where(state: TrainingState) -> str:
    return f"in {state.stage.replace('_', ' ')} at step {state.step}"
