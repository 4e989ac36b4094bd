"""What happens beside training: reports go to the log, to metrics.jsonl, to the terminal's progress bar and to W&B."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forge.run.directory import RunDirectory
from forge.run.files import append_json_line, write_atomically
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState
from forge.task.task import Sample

logger = logging.getLogger(__name__)
Metrics = dict[str, Any]
Samples = dict[str, list[Sample]]
PARTS = ("ce", "divergence", "hidden", "relation")  # of a distilled run's loss


class Callback:
    """Hears of a run's events on rank 0; each does nothing unless overridden."""

    def training_started(self, state: TrainingState) -> None: ...

    def stepped(self, state: TrainingState) -> None:
        """After every optimizer step; must not wait for the device."""

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        """Step metrics: loss and speed since the last report, the last step's rate and gradient norm."""

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        """Metrics of an evaluation; stage is teacher, baseline, training or final."""

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        """Rows of that evaluation, by split, with the text that the model gave."""

    def saved(self, state: TrainingState, facts: Metrics) -> None:
        """A checkpoint of that state is committed: its name, size, seconds, and those that training waited."""

    def training_ended(self, state: TrainingState) -> None: ...

    def trained(self, state: TrainingState) -> None:
        """All stages of the run are done, its last evaluation too; its control is yet to come."""

    def finished(self, state: TrainingState) -> None:
        """The pipeline ends, complete or not."""


class Callbacks(Callback):
    """Passes every event on to each of several callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks = list(callbacks)

    def training_started(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.training_started(state)

    def stepped(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.stepped(state)

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        for callback in self._callbacks:
            callback.reported(state, metrics)

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        for callback in self._callbacks:
            callback.evaluated(state, stage, metrics)

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        for callback in self._callbacks:
            callback.sampled(state, stage, samples)

    def saved(self, state: TrainingState, facts: Metrics) -> None:
        for callback in self._callbacks:
            callback.saved(state, facts)

    def training_ended(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.training_ended(state)

    def trained(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.trained(state)

    def finished(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.finished(state)


class MetricsFile(Callback):
    """One JSON object per report and per evaluation in metrics.jsonl."""

    def __init__(self, run: RunDirectory):
        self._file = run.metrics_file

    def training_started(self, state: TrainingState) -> None:
        """A resumed run takes steps again that the last attempt had reported: one curve, no step twice."""
        self._keep(lambda row: row["step"] <= state.step)

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        append_json_line(self._file, {"step": state.step, "epoch": round(state.epoch, 4), **metrics})

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        # The attempt before may have ended after this line and before the next stage, or the next checkpoint.
        self._keep(lambda row: row.get("stage") != stage or (stage == "training" and row["step"] != state.step))
        append_json_line(self._file, {"step": state.step, "stage": stage, **metrics})

    def _keep(self, wanted: Callable[[Metrics], bool]) -> None:
        """Rewrites the file without the other rows, and without the torn line of an attempt that was killed."""
        if not self._file.exists():
            return
        text = "".join(json.dumps(row) + "\n" for row in read_metrics(self._file) if wanted(row))
        if text.encode() != self._file.read_bytes():
            write_atomically(self._file, text)


class ConsoleReport(Callback):
    """Log lines for a reader; on a terminal a progress bar takes the place of the step lines there."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        self._start = (0, 0.0)  # step and time at which training began

    def training_started(self, state: TrainingState) -> None:
        self._start = (state.step, time.perf_counter())
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # what is printed goes through the descriptors into output.log
                redirect_stderr=False,
            )
            self._bar.add_task("", total=state.total_steps, completed=state.step)
            self._bar.start()

    def stepped(self, state: TrainingState) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.step)

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        parts = "  ".join(f"{name} {metrics[name]:.4f}" for name in PARTS if name in metrics)
        line = (
            f"loss {metrics['loss']:.4f}{f' ({parts})' if parts else ''}  "
            f"rate {metrics['learning_rate']:.2e}  grad norm {metrics['grad_norm']:.2f}  "
            f"{metrics['samples_per_second']:.1f} samples/s  {metrics['tokens_per_second']:.0f} tokens/s  "
            f"peak {metrics['peak_memory_mib']:.0f} MiB"
        )
        if "truncated" in metrics:
            line += f"  {metrics['truncated']} rows cut or left out"
        logger.info("step %d/%d  %s  left %s", state.step, state.total_steps, line, self._left(state))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"loss {metrics['loss']:.4f}")

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        for split in dict.fromkeys(name.split("/")[0] for name in metrics):
            values = {name.split("/", 1)[1]: value for name, value in metrics.items() if name.startswith(f"{split}/")}
            seconds = values.pop("seconds")
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
            rows = f"{values['samples']} of {values['samples_of']}" if "samples_of" in values else values["samples"]
            logger.info("%s evaluation, %s (%s rows, %.1f s): %s", stage, split, rows, seconds, shown)

    def training_ended(self, state: TrainingState) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finished(self, state: TrainingState) -> None:
        self.training_ended(state)  # also where training broke off

    def _left(self, state: TrainingState) -> str:
        step, start = self._start
        seconds = (time.perf_counter() - start) / max(1, state.step - step) * (state.total_steps - state.step)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
