"""Keeps the best value that every metric had since training began, with its step."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from forge.attempt.callbacks.callback import Callback, Metrics
from forge.report.figures import LOWER_IS_BETTER
from forge.run.directory import RunDirectory
from forge.run.files import write_json
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

STAGES = ("training", "final")  # of the trained student: not of the teacher, and not before training
AVERAGED = "agreement"


class PeakMetrics(Callback):
    """Writes peak_metrics.json: {"value", "step", "stage"} for each metric.

    For agreement also the mean over the evaluations of the trained student, each step counted once, and their number.
    It is derived from metrics.jsonl after each evaluation, and after a resumed run has dropped rows of it, so it comes
    after MetricsFile in the list of callbacks.
    """

    def __init__(self, run: RunDirectory, headline: Sequence[str]):
        """headline: the metrics that the log reports at the end."""
        self._run, self._headline = run, (*headline, AVERAGED)

    def training_started(self, state: TrainingState) -> None:
        self._write()

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        self._write()

    def completing(self, state: TrainingState) -> None:
        rows = [row for row in read_metrics(self._run.metrics_file) if row.get("stage") in STAGES]
        if len({row["step"] for row in rows}) < 2:  # the best of one evaluation says nothing new
            return
        best = peaks(rows)
        shown = [_shown(name, peak) for name, peak in best.items() if name.split("/")[-1] in self._headline]
        if shown:
            logger.info("best: %s", "; ".join(shown))

    def _write(self) -> None:
        found = peaks(read_metrics(self._run.metrics_file))
        if found:
            write_json(self._run.peak_file, found)
        else:
            self._run.peak_file.unlink(missing_ok=True)


def peaks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the peaks in the rows of metrics.jsonl, by `split/metric`; of equal values, the earliest.

    Counts have no peak, and values that are not finite are left out.
    """
    best: dict[str, dict[str, Any]] = {}
    averaged: dict[str, dict[int, float]] = {}  # by step: the last one may have two evaluations
    for row in rows:
        if row.get("stage") not in STAGES:
            continue
        for name, value in row.items():
            metric = name.split("/")[-1]
            if "/" not in name or not isinstance(value, float) or metric == "seconds":
                continue
            sign = -1 if metric in LOWER_IS_BETTER else 1
            if name not in best or sign * value > sign * best[name]["value"]:
                best[name] = {"value": value, "step": row["step"], "stage": row["stage"]}
            if metric == AVERAGED:
                averaged.setdefault(name, {})[row["step"]] = value
    for name, values in averaged.items():
        best[name] |= {"mean": sum(values.values()) / len(values), "evaluations": len(values)}
    return best


def read_peaks(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Return what peak_metrics.json holds; empty if it is missing or broken."""
    try:
        found = json.loads(run.peak_file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(name: str, peak: Mapping[str, Any]) -> str:
    mean = f" (mean {peak['mean']:.4f} of {peak['evaluations']})" if "mean" in peak else ""
    return f"{name} {peak['value']:.4f} at step {peak['step']}{mean}"
