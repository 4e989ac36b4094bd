"""Joins a loss to gradients that forward has computed already, so that backward keeps those and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forge.losses.linear_kd import scaled_gradient


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """value (), whose gradient in the first tensor of each pair is the second, of its shape; None: no gradient.

    A gradient may be in another dtype than its tensor (float32 for float16). Backward multiplies it by what comes in,
    in at least float32, rounds once, and leaves it as it was for another backward. There is no double backward.
    """
    wanted = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if not wanted:
        return value
    tensors, gradients = zip(*wanted, strict=True)
    return _GivenGradients.apply(value, *tensors, *gradients)


def wants_gradient(tensor: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient in it."""
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


class _GivenGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        half = len(tensors_and_gradients) // 2
        ctx.dtypes = [tensor.dtype for tensor in tensors_and_gradients[:half]]
        ctx.save_for_backward(*tensors_and_gradients[half:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            scaled_gradient(gradient, d_value, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *found, *[None] * len(found)
