"""The supervised loss as a sum, which the trainer divides by the number of labels in the whole optimizer step."""

import torch
from torch import Tensor

IGNORE = -100  # the label of a position that does not count


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over counted positions of -log softmax(logits)[label], in nats.

    logits: (..., V) in any float dtype, computed in float32; float64 stays. labels: (...) int64, IGNORE at positions
    that do not count. Returns a float32 scalar (float64 for float64 logits), differentiable in logits; 0 if no position
    counts.
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.to(work).flatten(0, -2)  # (N, V)
    return torch.nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def count_labels(labels: Tensor) -> Tensor:
    """Return the number of positions that count, an int64 scalar on the device of labels."""
    return (labels != IGNORE).sum()
