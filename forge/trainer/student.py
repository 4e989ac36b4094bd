"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.linear_kd import linear_kd
from forge.model.head import LinearHead
from forge.task.batches import OF_THE_LOOP, Batch

ROWS_OF_LOGITS = 1024  # logits of so many positions exist at a time where only the likeliest token is sought


class Student(nn.Module):
    """Gives the sums that a step's loss is made of; the model's own loss is never asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any] | None = None,
        head: LinearHead | None = None,
    ):
        """head: of this model; with it the loss is computed in pieces, and no batch of logits is ever held."""
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}
        self.head = head

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: the model's inputs, and labels (...) aligned with its logits (..., V).

        Returns ce_sum, a float32 scalar in nats; in eval mode also predictions (...), int64: the likeliest labels,
        and anything where no label is counted.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name not in OF_THE_LOOP}
        if self.head is None:
            logits = self.model(**inputs, **self.forward_options).logits
            outputs = {"ce_sum": cross_entropy_sum(logits, batch["labels"])}
            return outputs if self.training else {**outputs, "predictions": logits.argmax(dim=-1)}
        hidden = self.head.body(**inputs, **self.forward_options).last_hidden_state  # (B, T, D)
        return self._from_hidden(self.head, hidden.flatten(0, -2), batch)

    def _from_hidden(self, head: LinearHead, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """hidden: (B * T, D). Only what carries a label goes through the head, where the batch says which that is."""
        labels = batch["labels"].flatten()
        positions = batch.get("positions")  # (N,) int64: known on the CPU, so that nothing waits for the GPU
        if positions is not None:
            hidden, counted = hidden[positions], labels[positions]
        else:
            counted = labels
        ce_sum, _ = linear_kd(
            hidden,
            head.linear.weight,
            counted,
            student_bias=head.linear.bias,
            alpha=0.0,
            logit_scale=head.scale,
            softcap=head.softcap,
            ignore_index=IGNORE,
            normalizer=torch.ones((), device=hidden.device),
        )
        if self.training:
            return {"ce_sum": ce_sum}
        with torch.autocast(hidden.device.type, enabled=False):  # in bf16 one row in twenty has two likeliest tokens
            exact = hidden.to(head.linear.weight.dtype)
            likeliest = torch.cat([head.logits(rows).argmax(dim=-1) for rows in exact.split(ROWS_OF_LOGITS)])
        if positions is not None:
            likeliest = torch.zeros_like(labels).index_copy_(0, positions, likeliest)
        return {"ce_sum": ce_sum, "predictions": likeliest.view_as(batch["labels"])}
