"""What every trainer gives to the page: forge's loop for SFT and KD implements it, and so can any library's loop."""

from pathlib import Path
from typing import Any, Protocol

from forge.checkpoint.contents import Training
from forge.model.weights import TrainedWeights


class Trainer(Protocol):
    """Trains in an attempt, which owns its files, checkpoints and stops."""

    total_steps: int  # optimizer steps of the whole run
    weights: TrainedWeights  # of the bare model, as files name them
    training: Training  # what checkpoints and the export take: weights, optimizer, random numbers

    def restore(self, checkpoint: Path | None) -> None:
        """Continue from a verified checkpoint; None: start from the beginning."""

    def evaluate_teacher(self) -> None:
        """Report the teacher's own metrics, if there is a teacher and the config wants them."""

    def evaluate(self, stage: str) -> dict[str, Any]:
        """Evaluate and report every validation split; stage is baseline, training or final. Raises Stopped."""

    def train(self) -> None:
        """Train from the state's step to the last one. Raises Stopped, with a checkpoint, and TrainingError."""

    def close(self) -> None:
        """However training ended, leave no process, no thread and no model behind."""
