"""The k most probable tokens at each label, and the probability of all others, where logits are too wide to keep."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The top k at N label positions."""

    log_probs: Tensor  # (N, K) float16, at temperature 1, descending
    indices: Tensor  # (N, K) int64
    tails: Tensor  # (N, 2) float32: the probability of all others, at temperature 1 and at the training's


def top_k(logits: Tensor, k: int, temperature: float) -> TopK:
    """Return the top k of logits (N, V) in any float dtype, computed in float32; k <= V."""
    logits = logits.float()
    log_probs, indices = logits.log_softmax(dim=-1).topk(k, dim=-1)
    # Summed, because 1 - sum(top k) would lose a small tail in rounding.
    others = [(logits / t).softmax(dim=-1).scatter_(1, indices, 0.0).sum(dim=-1) for t in (1.0, temperature)]
    return TopK(log_probs.half(), indices, torch.stack(others, dim=1))


def at_temperature(log_probs: Tensor, tail: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (N, K) float32 at a temperature T:

    log q_T = log q_1 / T - logsumexp_k(log q_1 / T) + log(1 - tail_T).

    log_probs is (N, K), at temperature 1; tail is (N,), at T. Rounding of log_probs does not change the total
    probability, which is 1 - tail.
    """
    scaled = log_probs.float() / temperature
    return scaled - scaled.logsumexp(dim=-1, keepdim=True) + torch.log1p(-tail.float())[:, None]


def truncation_kl(logits: Tensor, kept: TopK, temperature: float) -> Tensor:
    """Return KL(teacher || top k with its tail spread evenly over the other V - k): (N,) float32, in nats.

    logits is (N, V); kept was made of them, with this temperature.
    """
    log_q = (logits.float() / temperature).log_softmax(dim=-1)
    tail = kept.tails[:, 1]
    others = log_q.shape[1] - kept.indices.shape[1]
    even = (tail.log() - math.log(others))[:, None] if others else log_q.new_zeros(len(log_q), 1)
    read = even.expand_as(log_q).scatter(1, kept.indices, at_temperature(kept.log_probs, tail, temperature))
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - read), 0.0).sum(dim=-1)
