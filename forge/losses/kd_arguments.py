"""What a call of the distillation losses takes and gives: where logits come from, the formula, and the loss."""

from dataclasses import dataclass

from torch import Tensor

from forge.losses.cross_entropy import IGNORE
from forge.losses.kd_settings import Chunks


@dataclass(frozen=True)
class HeadInput:
    """The hidden states and the head that logits would be made of; the logits of all rows never exist at once.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)        scale * (...) without a softcap

    This is the order of the models: Gemma 2 caps what its head gives, Cohere scales it.
    """

    hidden: Tensor  # (N, D) any float dtype
    weight: Tensor  # (V, D) of the same dtype, or under autocast any
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None  # None: not capped


@dataclass(frozen=True)
class TopK:
    """A teacher of which the k most probable tokens of each row are known, and nothing else."""

    log_probs: Tensor  # (N, K) at the formula's temperature, -inf for an absent entry
    indices: Tensor  # (N, K) int64, distinct within a row


@dataclass(frozen=True)
class Formula:
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student)

    CE is the cross-entropy at temperature 1 over all columns of the student. D compares the two distributions at
    temperature T over the columns that both models have; the rest of the wider head is padding. The factor T^2 keeps
    the size of D's gradient as T grows (Hinton et al. 2015, arXiv 1503.02531).

    divergence, with p the student and q the teacher:

        forward_kl       KL(q || p)
        reverse_kl       KL(p || q)
        jsd              beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
        skew_kl          KL(q || skew q + (1 - skew) p)
        skew_reverse_kl  KL(p || skew p + (1 - skew) q)
        tvd              sum |p - q| / 2

    Sources and gradients are in forge.losses.linear_kd_plain.divergence_rows.
    """

    alpha: float = 0.5  # in [0, 1]; at 0 no teacher is needed, and one that is given is not touched
    temperature: float = 1.0  # T > 0
    divergence: str = "forward_kl"
    beta: float = 0.5  # of jsd, in (0, 1)
    skew: float = 0.1  # of the two skew divergences, in [0, 1)
    missing_mass: str = "tail"  # of a TopK: tail, renormalise or zero; see linear_kd_plain.sparse_rows
    ignore_index: int = IGNORE  # the label of a row that counts neither in CE nor in D


@dataclass(frozen=True)
class Computing:
    """How a loss is computed: it decides speed, memory and rounding, and changes nothing in the formula."""

    precision: str | None = None
    """Of the logits between product and loss, on the fused path: "difference" (float16 teacher logits and float16
    differences to them), "fp32", or "bf16" (the dtype of the inputs: fast, and wrong near convergence). None: the
    difference where it can run, else fp32. What cannot run falls back to fp32 with one warning."""
    memory_budget: int | None = None
    """Bytes of scratch memory in addition to the gradients; None: 3 GiB with kernels, 256 MiB without."""
    low_memory: bool = False
    """Take smaller chunks, see kd_settings.plan_chunks and plain_rows."""
    chunks: Chunks | None = None
    """Take these chunks, whatever memory_budget and low_memory say."""
    compact: bool = False
    """Leave ignored rows out of the products. It waits once for the device, to learn how many rows are left."""


@dataclass(frozen=True)
class KDLoss:
    """A loss and its parts, summed over the N' rows that count. Only loss_sum has a gradient."""

    loss_sum: Tensor  # () (1 - alpha) * ce_sum + alpha * T^2 * divergence_sum
    ce_sum: Tensor  # () cross-entropy in nats
    divergence_sum: Tensor  # () D at temperature T, without T^2; 0 where alpha is 0
    count: Tensor  # () int64, N'

    @property
    def loss_mean(self) -> Tensor:
        """The loss of this call per row that counts, (); 0 if none counts.

        For a batch in several pieces, or on several ranks, divide each loss_sum by the count of the whole step instead.
        """
        return self.loss_sum / self.count.clamp(min=1).to(self.loss_sum.dtype)
