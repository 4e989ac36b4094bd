"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.losses.cross_entropy import cross_entropy_sum
from forge.task.batches import OF_THE_LOOP, Batch


class Student(nn.Module):
    """Gives the sums that a step's loss is made of; the model's own loss is never asked for."""

    def __init__(self, model: PreTrainedModel, forward_options: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: the model's inputs, and labels (...) aligned with its logits (..., V).

        Returns ce_sum, a float32 scalar in nats; in eval mode also predictions (...), int64: the likeliest labels.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name not in OF_THE_LOOP}
        logits = self.model(**inputs, **self.forward_options).logits
        outputs = {"ce_sum": cross_entropy_sum(logits, batch["labels"])}
        return outputs if self.training else {**outputs, "predictions": logits.argmax(dim=-1)}
