"""Losses between what is inside two models: their hidden states, and how their self-attention relates tokens."""

import torch
from torch import Tensor

from forge.losses.checks import check_mask
from forge.losses.linear_kd_plain import weighted
from forge.losses.products import gradient_dtype, wants_gradient, with_gradients

KINDS = ("mse", "cosine")
PER = ("row", "position")
RELATIONS_AT_ONCE = 2**24  # elements of the relations of one chunk: 64 MiB in float32, and some six such are alive


def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor, *, kind: str, per: str) -> Tensor:
    """Return the distance of hidden states, summed over rows or over positions; 0 where both are equal.

        mse     sum over D of (s - t)^2, over D    (FitNets, Romero et al. 2014, arXiv 1412.6550; TinyBERT, Jiao et al.
                                                   2019, arXiv 1909.10351)
        cosine  1 - s.t / (|s| |t|)                (DistilBERT, Sanh et al. 2019, arXiv 1910.01108)

    cosine is computed as |s/|s| - t/|t||^2 / 2, which is the same and exactly 0 at equality; a vector of zeros stays
    one there, and gets no gradient. There is no temperature in either, hence no T^2.

    Args:
        student, teacher: (B, T, D) in any float dtype, computed in float32; float64 stays. The teacher gets no
            gradient. A student of another width is projected by the caller.
        mask: (B, T) bool, true at the positions that count. Values at other positions, even NaN, have no effect on the
            loss or on any gradient.
        kind: mse or cosine.
        per: "row" for the mean over each row's positions, summed over the rows that have any; "position" for the sum
            over all positions. Both are sums: pieces of a batch add up to the batch.

    Returns a scalar, float32 or float64, differentiable in student; 0 if nothing counts.
    Raises ValueError for shapes that disagree and for any other kind or per.
    """
    if student.dim() != 3 or teacher.shape != student.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape (B, T, D); "
            "project the student if the widths differ."
        )
    check_mask(mask, student)
    if kind not in KINDS or per not in PER:
        raise ValueError(f"kind must be mse or cosine and per row or position, got {kind!r} and {per!r}.")
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    inside = mask[..., None]
    s = torch.where(inside, student, 0.0).to(work)  # (B, T, D)
    t = torch.where(inside, teacher.detach(), 0.0).to(work)
    distance = (s - t).square().mean(-1) if kind == "mse" else 0.5 * (unit(s) - unit(t)).square().sum(-1)  # (B, T)
    if per == "position":
        return distance.sum()
    return (distance.sum(1) / mask.sum(1).clamp(min=1)).sum()


def relation_loss(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: int) -> Tensor:
    """Return KL(A_teacher || A_student) of the relations A = softmax(x x^T / sqrt(D / heads)) of one kind of vector.

    MiniLMv2 (Wang et al. 2020, arXiv 2012.15828; of values alone in MiniLM, arXiv 2002.10957). x are the queries, the
    keys or the values of a layer, all attention heads side by side, split again into `heads` relation heads, so that
    student and teacher may differ in width and in attention heads. Call it once for each kind and add the results.

    Relations exist for a few heads at a time; forward computes the gradient and backward only scales it, so there is no
    double backward. There is no temperature, hence no T^2.

    Args:
        student: (B, T, Ds) in any float dtype, computed in float32; float64 stays.
        teacher: (B, T, Dt); it gets no gradient.
        mask: (B, T) bool, true at tokens. Relations are over the row's keys with mask; the KL is averaged over the
            row's queries with mask and over the relation heads, and summed over the rows that have any. Values at
            other positions, even NaN, have no effect.
        heads: divides Ds and Dt.

    Returns a scalar, float32 or float64, differentiable in student; 0 if both are equal or nothing counts.
    Raises ValueError for shapes that disagree and for widths that heads does not divide.
    """
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (B, T, Ds) and (B, T, Dt)."
        )
    check_mask(mask, student)
    for whose, width in (("student", student.shape[2]), ("teacher", teacher.shape[2])):
        if heads < 1 or width == 0 or width % heads:
            raise ValueError(f"heads must divide the {whose}'s width {width}, got {heads}.")
    wanted = wants_gradient(student)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        value, gradient = _value_and_gradient(student.detach(), teacher.detach(), mask, heads, wanted)
    return with_gradients(value, (student, gradient))


def _value_and_gradient(
    student: Tensor, teacher: Tensor, mask: Tensor, heads: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    B, T, Ds = student.shape
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    value = student.new_zeros((), dtype=work)
    gradient = None
    if wanted:
        gradient = student.new_empty((B * heads, T, Ds // heads), dtype=gradient_dtype(student.dtype))
    vectors = [_by_head(x, mask, heads) for x in (student, teacher)]  # (B * heads, T, D / heads)
    share = mask / (heads * mask.sum(1, keepdim=True).clamp(min=1)).to(work)  # (B, T) of each query
    share = share.repeat_interleave(heads, 0)
    # A row without any key keeps all of them, so that its softmax is finite; its queries have no share.
    keys = (mask | ~mask.any(1, keepdim=True)).repeat_interleave(heads, 0)

    step = max(1, RELATIONS_AT_ONCE // max(T * T, 1))
    for start in range(0, B * heads, step):
        part = slice(start, start + step)
        s, t = (x[part].to(work) for x in vectors)
        log_p, log_q = (_log_relations(x, keys[part]) for x in (s, t))
        q = log_q.exp()
        kl = weighted(q, log_q - log_p).sum(-1)  # (n, T)
        value += (kl * share[part]).sum()
        if gradient is not None:
            d_scores = (log_p.exp() - q) * share[part, :, None]
            # Each vector is a query in its row and a key in its column.
            gradient[part] = ((d_scores + d_scores.mT) @ s / s.shape[-1] ** 0.5).to(gradient.dtype)
    if gradient is not None:
        gradient = gradient.reshape(B, heads, T, Ds // heads).transpose(1, 2).flatten(2)  # (B, T, Ds)
    return value, gradient


def _by_head(x: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return (B, T, D) as (B * heads, T, D / heads), zero where mask is false."""
    x = torch.where(mask[..., None], x, 0.0)
    B, T, D = x.shape
    return x.reshape(B, T, heads, D // heads).transpose(1, 2).flatten(0, 1)


def _log_relations(x: Tensor, keys: Tensor) -> Tensor:
    """Return log softmax of x x^T / sqrt(width) over the keys that count, -inf at the others: (n, T, T)."""
    scores: Tensor = x @ x.mT / x.shape[-1] ** 0.5
    return scores.masked_fill(~keys[:, None, :], -torch.inf).log_softmax(-1)


def unit(x: Tensor) -> Tensor:
    """Return x / |x| along the last dimension; 0, and no gradient, where x is 0."""
    square = x.square().sum(-1, keepdim=True)
    zero = square == 0.0
    return x * torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
