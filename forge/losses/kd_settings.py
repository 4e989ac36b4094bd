"""What the paths of the distillation loss share: the settings of the formula, inputs, outputs and chunk sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
MISSING_MASS = ("tail", "renormalise", "zero")
PRECISIONS = ("difference", "fp32", "bf16")
TAIL_FLOOR = 1e-6  # a tail lighter than this is lost in the float32 rounding of 1 - sum(top k), so it counts as none
# Probabilities that differ by less than this share count as equal where a loss takes the sign of their difference: two
# float32 products of some thousand terms agree no better, and that rounding would decide the sign for half of p.
EQUAL = 1e-4
DEFAULT_BUDGET = 3 * 2**30  # holds the fastest chunks of 8,192 rows at a vocabulary of 151,936
PLAIN_BUDGET = 2**28


@dataclass(frozen=True)
class Settings:
    """The formula as the kernels read it: one number for beta or skew, and the scales and softcaps of both heads."""

    alpha: float = 0.5
    temperature: float = 1.0
    divergence: str = "forward_kl"
    mix: float = 0.0  # the teacher's share of the mixture, see teacher_share
    missing_mass: str = "tail"
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    teacher_logit_scale: float = 1.0
    teacher_softcap: float = 0.0
    ignore_index: int = -100


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call. A teacher is hidden states with a head, or top-k log-probabilities, or absent."""

    hidden: Tensor  # (N, Hs)
    head: Tensor  # (V, Hs)
    labels: Tensor  # (N,) int64
    bias: Tensor | None = None  # (V,)
    teacher_hidden: Tensor | None = None  # (N, Ht)
    teacher_head: Tensor | None = None  # (Vt, Ht)
    teacher_bias: Tensor | None = None  # (Vt,)
    top_log_probs: Tensor | None = None  # (N, K) at temperature T
    top_indices: Tensor | None = None  # (N, K) int64
    dtype: torch.dtype = torch.float32  # what the student's hidden states and head are multiplied in
    teacher_dtype: torch.dtype = torch.float32

    @property
    def shared(self) -> int:
        """The number of columns that both models have; the rest of the wider head is padding, which D leaves out."""
        V = self.head.shape[0]
        return V if self.teacher_head is None else min(V, self.teacher_head.shape[0])


@dataclass(frozen=True)
class Needs:
    """Which gradients backward may ask for."""

    hidden: bool
    head: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.head or self.bias


@dataclass(frozen=True)
class Outputs:
    """Sums over the counted rows, and the gradients of the loss; an empty tensor where none was needed."""

    ce_sum: Tensor  # ()
    kl_sum: Tensor  # ()
    d_hidden: Tensor  # (N, Hs)
    d_head: Tensor  # (V, Hs)
    d_bias: Tensor  # (V,)


@dataclass(frozen=True)
class Chunks:
    """How many rows have logits at a time, and how many have their gradients collected for one product."""

    rows: int  # of logits
    wide: int  # of the logits' gradients, which the products for hidden states and head take together


def teacher_share(divergence: str, beta: float, skew: float) -> float:
    """Return the teacher's share w in the mixture m = w q + (1 - w) p of the divergence; 0 if it has none.

    It is beta in jsd. In the skew divergences, `skew` is the share of the distribution whose log-ratio is averaged: the
    teacher's in skew_kl, the student's in skew_reverse_kl.
    """
    if divergence == "jsd":
        return float(beta)
    if divergence == "skew_kl":
        return float(skew)
    return 1.0 - float(skew) if divergence == "skew_reverse_kl" else 0.0


def plain_rows(V: int, itemsize: int, memory_budget: int | None = None, low_memory: bool = False) -> int:
    """Return how many rows plain torch computes at a time; some six (rows, V) tensors are alive at once.

    itemsize: bytes per element. memory_budget: bytes for all six; None: 256 MiB. low_memory: at most 64 MiB.
    """
    budget = PLAIN_BUDGET if memory_budget is None else memory_budget
    budget = min(budget, PLAIN_BUDGET // 4) if low_memory else budget
    return max(16, min(1024, budget // (6 * itemsize * max(V, 1))))


def row_pitch(V: int) -> int:
    """Return the elements from one row of logits to the next: whole 128-byte lines keep an odd vocabulary aligned."""
    return -(-V // 64) * 64


def plan_chunks(
    N: int,
    V: int,
    H: int,
    *,
    logit_bytes: int,
    gradient_bytes: int = 2,
    head_gradient_bytes: int = 2,
    memory_budget: int | None = None,
    low_memory: bool = False,
) -> Chunks:
    """Return the fastest chunk sizes whose scratch memory fits the budget; the smallest sizes if none does.

    The result depends on the arguments alone, so every rank and every resume gets the same.

    Args:
        N, V, H: rows, columns, and the student's width.
        logit_bytes: bytes per column of one row of logits, of both models together, without gradients.
        gradient_bytes: bytes per logit of the gradient.
        head_gradient_bytes: bytes per element of the head's gradient as it is returned; 0 for a frozen head.
        memory_budget: bytes of scratch memory in addition to the returned gradients; None: 3 GiB.
        low_memory: at most 2,048 rows of gradients.
    """
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    sizes = [(rows, wide) for wide in (N, 16384, 8192, 4096) for rows in (2048, 1024)]
    sizes = [] if low_memory else [(rows, wide) for rows, wide in sizes if wide <= N]
    sizes += [(1024, 2048), (1024, 1024), (512, 1024), (512, 512), (256, 256), (128, 128)]
    for rows, wide in sizes:
        chunks = Chunks(min(rows, wide, N), min(wide, N))
        if scratch_bytes(chunks, N, V, H, logit_bytes, gradient_bytes, head_gradient_bytes) <= budget:
            return chunks
    return chunks


def scratch_bytes(
    chunks: Chunks, N: int, V: int, H: int, logit_bytes: int, gradient_bytes: int, head_gradient_bytes: int
) -> int:
    """Return the bytes that the chunks need in addition to the returned gradients; arguments as in plan_chunks."""
    pitch = row_pitch(V)
    one_pass = chunks.wide >= N
    logits = chunks.rows * pitch * logit_bytes
    # With one pass over dW its memory is free until the end, and holds logits until then.
    lent = V * H * head_gradient_bytes if one_pass else 0
    accumulator = 0 if one_pass or not head_gradient_bytes else V * H * 4
    return max(0, logits - lent) + chunks.wide * pitch * gradient_bytes + accumulator
