"""The divergences once more, written from their formulas for tests alone."""

import torch
from torch import Tensor


def divergence(name: str, student: Tensor, teacher: Tensor, beta: float = 0.5, skew: float = 0.1) -> Tensor:
    """D(teacher || student) of each row of (n, V) logits that are divided by the temperature already: (n,)."""
    p, q = student.softmax(-1), teacher.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if name == "jsd":
        mixture = beta * q + (1 - beta) * p
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "skew_kl": lambda: kl(q, skew * q + (1 - skew) * p),
        "skew_reverse_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "tvd": lambda: 0.5 * torch.abs(p - q).sum(-1),
    }[name]()
