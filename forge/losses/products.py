"""The arithmetic that the losses share: products with float32 sums, and gradients that forward has computed."""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
SCALED_AT_ONCE = 2**22  # elements of a gradient that plain torch scales at a time, so that it makes no wide copy


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to the dtype of its product, and on a CPU widened again: there float32 products are fast."""
    x = x.to(dtype)
    return x if x.is_cuda and dtype in HALF else x.to(torch.promote_types(dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of two operands in float32, or float64. Autocast, which would round them again, must be off."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype in HALF else a @ b


def in_range_of(dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x in the dtype, and the factor () float32 that undoes the scaling of its products; None if there is none.

    float16 would lose the small elements of x: x is scaled until its largest element is 2^14, so that even 2^-38 of
    that is not 0.
    """
    if dtype != torch.float16:
        return x.to(dtype), None
    factor = x.abs().amax().clamp(min=1e-30) / 2**14
    return (x / factor).to(dtype), factor


def restored(x: Tensor, factor: Tensor | None) -> Tensor:
    """Undo the scaling of in_range_of in a product, in place."""
    return x if factor is None else x.mul_(factor)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a summed gradient waits for backward: float16 would overflow before it is divided."""
    return torch.float32 if dtype == torch.float16 else dtype


def wants_gradient(tensor: Tensor | None) -> bool:
    """True if a gradient in the tensor may be asked for."""
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return value (), whose gradient in the first tensor of each pair is the second, of the same shape, or none.

    A gradient may have another dtype than its tensor (float32 for float16). Backward multiplies it by the incoming
    gradient in at least float32, rounds once, and leaves it unchanged for another backward. There is no double
    backward.
    """
    wanted = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if not wanted:
        return value
    tensors, gradients = zip(*wanted, strict=True)
    joined: Tensor = _GivenGradients.apply(value, *tensors, *gradients)  # type: ignore[no-untyped-call]
    return joined


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
        scaled = [
            scaled_gradient(gradient, d_value, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled, *[None] * len(scaled)


@torch.library.custom_op("forge::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor, with factor () on the device, rounded once to dtype; gradient stays unchanged."""
    if refusal_of_kernels(gradient.device, gradient.dtype) is None:
        from forge.losses.linear_kd_triton import scaled

        with torch.cuda.device(gradient.device):
            return scaled(gradient, factor, dtype)
    work = torch.promote_types(gradient.dtype, torch.float32)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCALED_AT_ONCE * gradient.shape[0] // max(gradient.numel(), 1))
    for part, scaled_part in zip(torch.split(gradient, rows), torch.split(out, rows), strict=True):
        scaled_part.copy_(part.to(work) * factor.to(work))
    return out


@scaled_gradient.register_fake
def _(gradient, factor, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient, dtype=dtype)


def refusal_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot run, or None if they can."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels do not compute in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
