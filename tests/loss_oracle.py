"""Every loss once more in float64, one position at a time, from the papers' formulas; autograd gives its gradient.

Nothing here is shared with forge. `parameter` is beta for jsd and lambda (called skew) for the two skew divergences.
"""

import torch
from torch import Tensor

IGNORE = -100
SMOOTH = [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.3), ("skew_kl", 0.2), ("skew_reverse_kl", 0.15)]
DIVERGENCES = [*SMOOTH, ("tvd", 0.0)]


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(z_i / T) / sum_j exp(z_j / T) of one position."""
    z = logits.double() / temperature
    e = (z - z.detach().max()).exp()
    return e / e.sum()


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i log(a_i / b_i); an event that a does not know counts for nothing."""
    known = a > 0
    return (a[known] * (a[known] / b[known]).log()).sum()


def divergence(name: str, student: Tensor, teacher: Tensor, temperature: float, parameter: float = 0.0) -> Tensor:
    """D of one position from logits; the wider vocabulary's further columns are left out."""
    shared = min(len(student), len(teacher))
    p, q = softmax(student[:shared], temperature), softmax(teacher[:shared].detach(), temperature)
    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    if name == "jsd":
        m = parameter * q + (1 - parameter) * p
        return parameter * kl(q, m) + (1 - parameter) * kl(p, m)
    if name == "skew_kl":
        return kl(q, parameter * q + (1 - parameter) * p)
    if name == "skew_reverse_kl":
        return kl(p, (1 - parameter) * q + parameter * p)
    assert name == "tvd"
    return (p - q).abs().sum() / 2


def sparse_kl(student: Tensor, log_q: Tensor, indices: Tensor, temperature: float, missing_mass: str) -> Tensor:
    """Forward KL of one position from the teacher's top k alone."""
    present = log_q > -torch.inf
    q, chosen = log_q[present].double().exp(), indices[present]
    p = softmax(student, temperature)
    if missing_mass == "renormalise":
        q = q / q.sum()
    value = kl(q, p[chosen])
    if missing_mass == "tail" and 1 - q.sum() > 1e-6:
        value = value + (1 - q.sum()) * ((1 - q.sum()) / (1 - p[chosen].sum())).log()
    return value


def cross_entropy(student: Tensor, label: int) -> Tensor:
    return -softmax(student)[label].log()


def hidden_state(student: Tensor, teacher: Tensor, mask: Tensor, kind: str, per: str) -> Tensor:
    total = student.new_zeros((), dtype=torch.float64)
    for row in range(student.shape[0]):
        places = [t for t in range(student.shape[1]) if mask[row, t]]
        for place in places:
            s, t = student[row, place].double(), teacher[row, place].double()
            distance = ((s - t) ** 2).sum() / len(s) if kind == "mse" else 1 - (s @ t) / ((s @ s) * (t @ t)).sqrt()
            total = total + distance / (len(places) if per == "row" else 1)
    return total


def relation(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    total = student.new_zeros((), dtype=torch.float64)
    for row in range(student.shape[0]):
        s_row, t_row = student[row][mask[row]].double(), teacher[row][mask[row]].double()
        for s, t in zip(s_row.chunk(heads, -1), t_row.chunk(heads, -1), strict=True):
            for i in range(len(s)):
                p = softmax(s @ s[i] / s.shape[1] ** 0.5)
                q = softmax(t @ t[i] / t.shape[1] ** 0.5)
                total = total + kl(q, p) / (heads * len(s))
    return total


def uld(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """sum_i |p_(i) - q_(i)| over all positions."""
    total = student.new_zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        p = sorted(softmax(s, temperature), key=lambda x: -x.item())
        q = sorted(softmax(t.detach(), temperature), key=lambda x: -x.item())
        for i in range(max(len(p), len(q))):
            total = total + abs((p[i] if i < len(p) else 0.0) - (q[i] if i < len(q) else 0.0))
    return total
