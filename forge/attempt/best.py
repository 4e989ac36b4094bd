"""Which evaluation of a run is its best so far, by the metric that the config names."""

import math
from typing import Any

from forge.config.former_names import current_headline
from forge.config.schema import CheckpointConfig, Config
from forge.errors import TrainingError, UsageError
from forge.report.figures import LOWER_IS_BETTER
from forge.run.state import BestEvaluation, TrainingState
from forge.task.task import Task

Metrics = dict[str, Any]


class BestMetric:
    """`checkpoint.best_metric`, or the task's main metric on its first validation split."""

    def __init__(self, config: CheckpointConfig, task: Task):
        self._name = config.best_metric or f"{next(iter(task.validation))}/{task.main_metric}"

    def name_in(self, metrics: Metrics) -> str:
        """Return the name of the metric that picks the best checkpoint.

        Raises:
            UsageError: The evaluation has no metric of that name.
        """
        name = self._name
        if name not in metrics:
            # The metrics that a checkpoint may be chosen by, not those of a single class.
            there = [key for key, value in metrics.items() if isinstance(value, float) and key.count("/") == 1]
            there = [key for key in there if not key.endswith("/seconds")]
            meant = [key for key in there if key.endswith(f"/{current_headline([name])[0]}")]
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise UsageError(f"checkpoint.best_metric is {name}, but an evaluation has only {', '.join(there)}{hint}")
        return name

    def note(self, state: TrainingState, metrics: Metrics) -> bool:
        """Note an evaluation at the state's step; True if it is the best so far (of equal ones, the earliest is)."""
        name = self.name_in(metrics)
        value, best = metrics[name], state.best_metric
        lower = name.split("/")[-1] in LOWER_IS_BETTER
        if best is not None and best.name == name and (value >= best.value if lower else value <= best.value):
            return False
        state.best_metric = BestEvaluation(name=name, value=value, step=state.step)
        return True

    def check_baseline(self, metrics: Metrics, mixed_precision: str, config: Config) -> None:
        """Refuse now what training would fail at hours later.

        Raises:
            TrainingError: A cross-entropy is not finite before any training.
            UsageError: The evaluation has no metric of the name that the config gives.
        """
        bad = [name for name, value in metrics.items() if name.endswith("/ce") and not math.isfinite(value)]
        if bad:  # training would fail at its first report, and blame the rate
            raise TrainingError(
                f"{bad[0]} is {metrics[bad[0]]} before any training, with mixed precision {mixed_precision}: the "
                "weights that the run starts from are not sound"
            )
        if config.checkpoint.keep_best and config.evaluation.every_steps is not None:
            self.name_in(metrics)
