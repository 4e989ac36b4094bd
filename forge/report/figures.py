"""Reads a run's numbers from its files: evaluations by stage, the time per step, and the config behind them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forge.config.explain import config_name, effective, flattened
from forge.config.former_names import current_config
from forge.config.schema import Config
from forge.errors import UsageError
from forge.run.directory import RunDirectory
from forge.run.metadata import RunMetadata, read_metadata
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState

ALSO_SHOWN = ("agreement", "kl", "kl_top_k", "ece")  # after the headline; all but ece need a teacher
LOWER_IS_BETTER = ("ce", "perplexity", "cer", "wer", "kl", "kl_top_k", "ece")
NOT_FINITE = ("nan", "inf", "-inf")  # as metrics.jsonl writes them
TINY = 1e-3  # relative to the larger number: a smaller gap is due to rounding, or to a row or two


@dataclass(frozen=True)
class RunFigures:
    """What a comparison reads of one run."""

    run: RunDirectory
    state: TrainingState
    metadata: RunMetadata
    config: dict[str, Any]  # the effective one, by dotted key
    evaluations: dict[str, dict[str, float]]  # the last one of each stage: baseline, final, teacher
    seconds_per_step: float | None  # None if no report has it

    @property
    def seed(self) -> int:
        return int(self.config["training.seed"])

    @property
    def alpha(self) -> float:
        return float(self.config.get("distillation.alpha", 0.0))

    @property
    def headline(self) -> list[str]:
        return self.metadata.task.headline

    @property
    def config_name(self) -> Path:
        return config_name(self.metadata.config_file)


def read_figures(run: RunDirectory) -> RunFigures:
    """Read what a comparison needs of a run. Raises UsageError, which names the file, if one is missing or broken."""
    metadata, state = read_metadata(run), TrainingState.load(run.state_file)
    rows = read_metrics(run.metrics_file)
    try:
        sizes = state.step_sizes or [[0, metadata.world.rows_per_step]]
        figures = RunFigures(
            run, state, metadata, read_config(run), evaluations_of(rows), seconds_per_step(rows, sizes)
        )
        _ = figures.seed, figures.alpha
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{run.path} lacks what a comparison needs ({type(error).__name__}: {error}); is it a run of this version "
            f"of forge?"
        ) from None
    return figures


def read_config(run: RunDirectory) -> dict[str, Any]:
    """Return the run's effective config by dotted key; keys that an older forge did not write have their defaults."""
    try:
        tree = yaml.safe_load(run.config_file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{run.config_file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{run.config_file} does not hold a config; is its folder a run directory?")
    tree = current_config(tree)
    with suppress(ValidationError):  # keys of another version: used as recorded, and shown if they differ
        tree = effective(Config.model_validate(tree))
    return {key: value for key, value in flattened(tree).items() if value != {}}  # an empty map sets nothing


def read_evaluations(run: RunDirectory) -> dict[str, dict[str, float]]:
    """Return the run's last evaluation of each stage, such as {"final": {"matched/ce": 0.5, …}, …}."""
    return evaluations_of(read_metrics(run.metrics_file))


def evaluations_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the last evaluation of each stage from the rows of metrics.jsonl."""
    return {row["stage"]: _numbers(row) for row in rows if "stage" in row}


def seconds_per_step(rows: Sequence[Mapping[str, Any]], step_sizes: Sequence[Sequence[int]]) -> float | None:
    """Return the seconds of training per optimizer step: the mean over the reports, weighted by their steps.

    Args:
        rows: the rows of metrics.jsonl. A report has the rows per second since the report before it.
        step_sizes: [first step, rows of each step from there on], ascending.
    """
    seconds, steps, last = 0.0, 0, 0
    for row in rows:
        if "rows_per_second" not in row:
            continue
        speed = _number(row["rows_per_second"])
        first, last = last, row["step"]
        if speed is None or not 0 < speed < math.inf:
            continue
        ends = [*(start for start, _ in step_sizes[1:]), last]
        taken = [
            size * max(0, min(last, end) - max(first, start))
            for (start, size), end in zip(step_sizes, ends, strict=True)
        ]
        seconds += sum(taken) / speed
        steps += last - first
    return seconds / steps if steps else None


def splits_of(metrics: Iterable[str]) -> list[str]:
    """Return the splits of metrics named `split/metric`, each once, in their order."""
    return list(dict.fromkeys(name.split("/")[0] for name in metrics))


def shown_metrics(evaluations: Sequence[Mapping[str, float]], headline: Sequence[str]) -> list[str]:
    """Return the metrics to show of these evaluations, `split/metric`: for each split the headline, then ALSO_SHOWN."""
    known = {name: None for evaluation in evaluations for name in evaluation}
    wanted = dict.fromkeys((*headline, *ALSO_SHOWN))
    return [name for split in splits_of(known) for metric in wanted if (name := f"{split}/{metric}") in known]


def gap_closed(metric: str, before: float, after: float, teacher: float) -> float | None:
    """Return (after - before) / (teacher - before): 0 at `before`, 1 at the teacher, for losses and accuracies alike.

    Returns None if there is no gap to close: it is tiny, or the teacher is worse.
    """
    gap = teacher - before
    lower = metric.split("/")[-1] in LOWER_IS_BETTER
    if not math.isfinite(gap) or not math.isfinite(after) or (gap > 0) is lower:
        return None
    return (after - before) / gap if abs(gap) > TINY * max(abs(teacher), abs(before)) else None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    found = {name: _number(value) for name, value in row.items() if "/" in name}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in NOT_FINITE):
        return None
    return float(value) if isinstance(value, str) else value
