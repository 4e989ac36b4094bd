"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.losses.cross_entropy import cross_entropy_sum
from forge.task.batches import Batch


class Student(nn.Module):
    """Gives the sums that a step's loss is made of; the model's own loss is never asked for."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: the model's inputs and labels (B,). Returns ce_sum, a float32 scalar in nats, and logits (B, V),
        V the labels."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits
        return {"ce_sum": cross_entropy_sum(logits, batch["labels"]), "logits": logits}
