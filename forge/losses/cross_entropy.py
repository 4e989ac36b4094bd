"""The supervised loss, as a sum: the trainer divides by the labels of the whole optimizer step."""

import torch
from torch import Tensor

IGNORE = -100  # the label of a position that counts for nothing


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over counted positions of -log softmax(logits)[label], in nats.

    logits: (..., V) in any float dtype, computed in float32; float64 stays. labels: (...) int64, IGNORE where nothing
    is counted. Returns a float32 scalar (float64 for float64 logits), differentiable in logits; 0 where no position is
    counted.
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.to(work).flatten(0, -2)  # (N, V)
    return torch.nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def count_labels(labels: Tensor) -> Tensor:
    """How many positions of labels are counted: an int64 scalar on their device."""
    return (labels != IGNORE).sum()
