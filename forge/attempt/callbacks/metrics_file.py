"""Keeps metrics.jsonl: one curve over all attempts, no step twice."""

import json
from collections.abc import Callable

from forge.attempt.callbacks.callback import Callback, Metrics
from forge.run.directory import RunDirectory
from forge.run.files import append_json_line, write_atomically
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState


class MetricsFile(Callback):
    """One JSON object per report and per evaluation."""

    def __init__(self, run: RunDirectory):
        self._file = run.metrics_file

    def training_started(self, state: TrainingState) -> None:
        """Drop what the last attempt reported of steps that this one takes again."""
        self._keep(lambda row: row["step"] <= state.step)

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        append_json_line(self._file, {"step": state.step, "epoch": round(state.epoch, 4), **metrics})

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        # The attempt before may have ended after this line and before the next stage, or the next checkpoint.
        self._keep(lambda row: row.get("stage") != stage or (stage == "training" and row["step"] != state.step))
        append_json_line(self._file, {"step": state.step, "stage": stage, **metrics})

    def _keep(self, wanted: Callable[[Metrics], bool]) -> None:
        """Rewrite the file without the other rows, and without the torn line of an attempt that was killed."""
        if not self._file.exists():
            return
        text = "".join(json.dumps(row) + "\n" for row in read_metrics(self._file) if wanted(row))
        if text.encode() != self._file.read_bytes():
            write_atomically(self._file, text)
