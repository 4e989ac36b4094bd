"""Losses between hidden states of student and teacher, for pairs of layers that the caller has chosen."""

import torch
from torch import Tensor

from forge.losses.checks import check_mask

KINDS = ("mse", "cosine")
PER = ("row", "position")


def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor, *, kind: str, per: str) -> Tensor:
    """The distance of hidden states, summed over rows or over positions; 0 where both are equal.

        mse     sum over D of (s - t)^2, over D    (FitNets, Romero et al. 2014, arXiv 1412.6550; TinyBERT, Jiao et al.
                                                   2019, arXiv 1909.10351)
        cosine  1 - s.t / (|s| |t|)                (DistilBERT, Sanh et al. 2019, arXiv 1910.01108)

    student, teacher: (B, T, D) in any float dtype, computed in float32; float64 stays. The teacher gets no gradient.
        Where the student's width differs, its caller projects it first.
    mask: (B, T) bool, true at the positions that count. What stands elsewhere, NaN included, has no part in the value
        nor in any gradient.
    kind: mse or cosine. cosine is computed as |s/|s| - t/|t||^2 / 2, which is the same and exactly 0 at equality; a
        vector of zeros stays one there, and gets no gradient.
    per: "row" for each row's mean over its positions, summed over the rows that have any; "position" for the sum over
        all positions. Either is a sum: pieces of a batch add up to the batch. There is no temperature in it, and so no
        T^2.

    Returns (), float32 or float64, differentiable in student; 0 where nothing counts.
    Raises ValueError for shapes that disagree, and for a word that is none of these.
    """
    if student.dim() != 3 or teacher.shape != student.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape (B, T, D); "
            "project the student where the widths differ."
        )
    check_mask(mask, student)
    if kind not in KINDS or per not in PER:
        raise ValueError(f"kind must be mse or cosine and per row or position, and they are {kind!r} and {per!r}.")
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    inside = mask[..., None]
    s = torch.where(inside, student, 0.0).to(work)  # (B, T, D)
    t = torch.where(inside, teacher.detach(), 0.0).to(work)
    distance = (s - t).square().mean(-1) if kind == "mse" else 0.5 * (unit(s) - unit(t)).square().sum(-1)  # (B, T)
    if per == "position":
        return distance.sum()
    return (distance.sum(1) / mask.sum(1).clamp(min=1)).sum()


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; 0, and no gradient, where x is 0."""
    square = x.square().sum(-1, keepdim=True)
    zero = square == 0.0
    return x * torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
