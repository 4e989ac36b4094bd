"""Keeps a run's best numbers: the peak of every metric over its evaluations, with the step that it was reached at."""

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

STAGES = ("baseline", "training", "final")  # of the student; the teacher's numbers are no peak of its
AVERAGED, AVERAGED_STAGES = "agreement", ("training", "final")  # what an untrained student has is no property of it


class PeakMetrics(Callback):
    """Writes peak_metrics.json: for each metric {"value", "step", "stage"}, for agreement also the mean over the
    evaluations of the trained student and their number: each step counts once, and the untrained student not at all.

    It is derived from metrics.jsonl after each evaluation, and when a resumed run has dropped rows of it; so it comes
    behind MetricsFile in the list of callbacks.
    """

    def __init__(self, run: RunDirectory, headline: Sequence[str]):
        """headline: the metrics that are told in the log at the end."""
        self._run, self._headline = run, (*headline, AVERAGED)

    def training_started(self, state: TrainingState) -> None:
        self._write()

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        self._write()

    def completing(self, state: TrainingState) -> None:
        rows = [row for row in read_metrics(self._run.metrics_file) if row.get("stage") in STAGES]
        if len({row["step"] for row in rows}) < 2:  # the best of one is no news
            return
        best = peaks(rows)
        told = [_told(name, peak) for name, peak in best.items() if name.split("/")[-1] in self._headline]
        if told:
            logger.info("best: %s", "; ".join(told))

    def _write(self) -> None:
        found = peaks(read_metrics(self._run.metrics_file))
        if found:
            write_json(self._run.peak_file, found)
        else:
            self._run.peak_file.unlink(missing_ok=True)


def peaks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the rows of metrics.jsonl, by `split/metric`; of equal values the earliest. Counts have no peak, nor has what
    is not finite."""
    best: dict[str, dict[str, Any]] = {}
    averaged: dict[str, dict[int, float]] = {}  # by step: after the last one there may be two evaluations
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
            if metric == AVERAGED and row["stage"] in AVERAGED_STAGES:
                averaged.setdefault(name, {})[row["step"]] = value
    for name, values in averaged.items():
        best[name] |= {"mean": sum(values.values()) / len(values), "evaluations": len(values)}
    return best


def read_peaks(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What peak_metrics.json holds; empty where there is none, or a broken one."""
    try:
        found = json.loads(run.peak_file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(name: str, peak: Mapping[str, Any]) -> str:
    mean = f" (mean {peak['mean']:.4f} of {peak['evaluations']})" if "mean" in peak else ""
    return f"{name} {peak['value']:.4f} at step {peak['step']}{mean}"
