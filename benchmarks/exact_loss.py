"""The distillation loss in float64 by autograd, some rows at a time: the reference for the benchmarks' numbers.

Written from the formulas in docs/losses.md, without any code of forge.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100


def exact_loss(
    x: dict[str, Tensor],
    alpha: float,
    temperature: float,
    divergence: str = "forward_kl",
    share: float = 0.5,
    top: tuple[Tensor, Tensor] | None = None,
    rows: int = 256,
) -> tuple[float, float, Tensor, Tensor]:
    """Return the loss per counted label, the sum of D, and the gradients of the loss in hidden (N, H) and head (V, H).

    Args:
        x: student_hidden, student_head and labels; for alpha > 0 also teacher_hidden and teacher_head. Any float dtype.
        share: beta of jsd, or skew of the two skew divergences.
        top: instead of a whole teacher, its top k: log-probabilities at the temperature, and indices. The remaining
            probability is one more event.
        rows: number of rows whose logits exist at a time.
    """
    head = x["student_head"].detach().double().requires_grad_()
    teacher_head = x["teacher_head"].double() if alpha > 0 and top is None else None
    labels, T = x["labels"], temperature
    count = (labels != IGNORE).sum().clamp(min=1)
    loss = divergence_sum = 0.0
    d_hidden = torch.zeros(x["student_hidden"].shape, dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), rows):
        kept = start + torch.nonzero(labels[start : start + rows] != IGNORE).squeeze(1)
        hidden = x["student_hidden"].detach()[kept].double().requires_grad_()
        logits = hidden @ head.T
        total = (1 - alpha) * functional.cross_entropy(logits, labels[kept], reduction="sum")
        if alpha > 0:
            log_p = (logits / T).log_softmax(-1)
            if teacher_head is not None:
                log_q = (x["teacher_hidden"][kept].double() @ teacher_head.T / T).log_softmax(-1)
                d = of_distributions(divergence, log_p, log_q, share)
            else:
                assert top is not None
                d = of_top_k(log_p, top[0][kept].double(), top[1][kept])
            total = total + alpha * T * T * d
            divergence_sum += d.item()
        (total / count).backward()
        loss += (total / count).item()
        d_hidden[kept] = hidden.grad  # type: ignore[assignment]
    assert head.grad is not None
    return loss, divergence_sum, d_hidden, head.grad


def of_distributions(divergence: str, log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return D(q || p) summed over rows, from log-probabilities (n, V) of the student, p, and the teacher, q."""
    if divergence == "forward_kl":
        return kl(log_q, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "jsd":
        log_m = mixture(log_q, log_p, share)
        return share * kl(log_q, log_m) + (1 - share) * kl(log_p, log_m)
    if divergence == "skew_kl":
        return kl(log_q, mixture(log_q, log_p, share))
    if divergence == "skew_reverse_kl":
        return kl(log_p, mixture(log_p, log_q, share))
    assert divergence == "tvd"
    p, q = log_p.exp(), log_q.exp()
    distance = (p - q).abs()
    # Probabilities within 1e-4 of each other count as equal and give no gradient; docs/kernels.md says why.
    return torch.where(distance > 1e-4 * torch.maximum(p, q), distance, distance.detach()).sum() / 2


def of_top_k(log_p: Tensor, log_q: Tensor, indices: Tensor) -> Tensor:
    """Return forward KL, summed over rows, of k events (n, k) and one more event for all other tokens."""
    among = log_p.gather(1, indices)
    rest, student_rest = 1 - log_q.exp().sum(-1), 1 - among.exp().sum(-1)
    return kl(log_q, among) + (rest * (rest / student_rest).log()).sum()


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error of a whole tensor, in the Frobenius norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()
