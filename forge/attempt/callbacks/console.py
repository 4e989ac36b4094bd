"""Reports a run in the log, and with a progress bar on a terminal."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forge.attempt.callbacks.callback import Callback, Metrics
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

PARTS = ("ce", "divergence", "hidden", "relation")  # of a distilled run's loss


class ConsoleReport(Callback):
    """Log lines; on a terminal, also a progress bar."""

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
            f"{metrics['rows_per_second']:.1f} rows/s  {metrics['tokens_per_second']:.0f} tokens/s  "
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
            rows = f"{values['rows']} of {values['rows_of']}" if "rows_of" in values else values["rows"]
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
