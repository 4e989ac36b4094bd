"""What a cache keeps of logits that are too wide to be kept whole: the likeliest k, and the mass of the others."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Of N positions."""

    log_probs: Tensor  # (N, K) float16, at temperature 1, the likeliest first
    indices: Tensor  # (N, K) int64
    tails: Tensor  # (N, 2) float32: the mass of all others at temperature 1, and at that of the training


def top_k(logits: Tensor, k: int, temperature: float) -> TopK:
    """logits: (N, V) in any float dtype, computed in float32; k <= V."""
    logits = logits.float()
    log_probs, indices = logits.log_softmax(dim=-1).topk(k, dim=-1)
    # Summed and not 1 - sum(top k), which would lose a small one in the rounding.
    others = [(logits / t).softmax(dim=-1).scatter_(1, indices, 0.0).sum(dim=-1) for t in (1.0, temperature)]
    return TopK(log_probs.half(), indices, torch.stack(others, dim=1))


def at_temperature(log_probs: Tensor, tail: Tensor, temperature: float) -> Tensor:
    """log q_T = log q_1 / T - logsumexp_k(log q_1 / T) + log(1 - tail_T): (N, K) float32.

    log_probs: (N, K) at temperature 1; tail: (N,) at this one. Whatever float16 has rounded, the mass is 1 - tail.
    """
    scaled = log_probs.float() / temperature
    return scaled - scaled.logsumexp(dim=-1, keepdim=True) + torch.log1p(-tail.float())[:, None]


def truncation_kl(logits: Tensor, kept: TopK, temperature: float) -> Tensor:
    """KL(teacher || what is read back, with its tail spread evenly over the other V - k): (N,) float32, in nats.

    logits: (N, V), of which `kept` was made, with this temperature.
    """
    log_q = (logits.float() / temperature).log_softmax(dim=-1)
    tail = kept.tails[:, 1]
    others = log_q.shape[1] - kept.indices.shape[1]
    even = (tail.log() - math.log(others))[:, None] if others else log_q.new_zeros(len(log_q), 1)
    read = even.expand_as(log_q).scatter(1, kept.indices, at_temperature(kept.log_probs, tail, temperature))
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - read), 0.0).sum(dim=-1)
