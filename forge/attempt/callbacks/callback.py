"""What a callback hears of a run: its events, on rank 0, in their order."""

from collections.abc import Iterable
from typing import Any

from forge.run.state import TrainingState
from forge.task.task import Sample

Metrics = dict[str, Any]
Samples = dict[str, list[Sample]]  # by split


class Callback:
    """Hears a run's events on rank 0. Each method does nothing unless it is overridden."""

    def training_started(self, state: TrainingState) -> None:
        """Training starts, or resumes, at the state's step."""

    def stepped(self, state: TrainingState) -> None:
        """An optimizer step was taken. Must not wait for the device."""

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        """Step metrics: loss and speed since the last report, the last step's rate and gradient norm."""

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        """Metrics of an evaluation; stage is teacher, baseline, training or final."""

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        """Rows of that evaluation, by split, with the text that the model generated."""

    def saved(self, state: TrainingState, facts: Metrics) -> None:
        """A checkpoint of that state is committed: its name, MiB, seconds, and the seconds that training waited."""

    def training_ended(self, state: TrainingState) -> None:
        """The last step was taken."""

    def completing(self, state: TrainingState) -> None:
        """Every stage of the run is done, the last evaluation too."""

    def finished(self, state: TrainingState) -> None:
        """The attempt ends, complete (`state.pipeline_complete`) or not."""


class Callbacks(Callback):
    """Passes every event to each of several callbacks, in their order."""

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

    def completing(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.completing(state)

    def finished(self, state: TrainingState) -> None:
        for callback in self._callbacks:
            callback.finished(state)
