"""Keeps a run's best numbers: the peak of every metric over its evaluations, with the step that it was reached at."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from forge.report.figures import LOWER_IS_BETTER
from forge.run.directory import RunDirectory
from forge.run.files import read_json_lines, write_json
from forge.run.state import Stage, TrainingState
from forge.trainer.callbacks import Callback, Metrics

logger = logging.getLogger(__name__)

STAGES = ("baseline", "training", "final")  # of the student; the teacher's numbers are no peak of its
AVERAGED = "agreement"


class PeakMetrics(Callback):
    """Writes peak_metrics.json: for each metric {"value", "step", "stage"}, for agreement also the mean and the number
    of evaluations that it is taken over.

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

    def finished(self, state: TrainingState) -> None:
        if not state.reached(Stage.CONTROL):
            return
        best = peaks(read_json_lines(self._run.metrics_file))
        told = [_told(name, peak) for name, peak in best.items() if name.split("/")[-1] in self._headline]
        if told:
            logger.info("best: %s", "; ".join(told))

    def _write(self) -> None:
        found = peaks(read_json_lines(self._run.metrics_file))
        if found:
            write_json(self._run.peak_file, found)
        else:
            self._run.peak_file.unlink(missing_ok=True)


def peaks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the rows of metrics.jsonl, by `split/metric`; of equal values the earliest. Counts have no peak, nor has what
    is not finite."""
    best: dict[str, dict[str, Any]] = {}
    sums: dict[str, tuple[float, int]] = {}
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
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
    for name, (total, count) in sums.items():
        best[name] |= {"mean": total / count, "evaluations": count}
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
