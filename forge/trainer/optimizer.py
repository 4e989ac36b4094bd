"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from forge.config.schema import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Matrices and embeddings decay; biases and norm weights, which have one dimension, do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # one pass over the weights, on CPU too: a fifth of MiniLM's step there
    )


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """The rate of update number `step`, counted from 0: a linear warm-up, then the schedule's decay towards 0.

    The warm-up ends at the peak: update w - 1 of w takes the full rate, and no update takes the rate 0.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)  # from 1 down to 1 / (total - warmup)
    decay = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.schedule]
    return config.learning_rate * decay
