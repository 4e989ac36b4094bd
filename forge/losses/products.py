"""Products with sums in float32, whatever their operands are rounded to."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to the dtype of its product, and on a CPU widened again, where float32 products are the fast ones."""
    x = x.to(dtype)
    return x if x.is_cuda and dtype in HALF else x.to(torch.promote_types(dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or float64, of two operands. Autocast, which would round them again, must be off."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype in HALF else a @ b


def in_range_of(dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x in the dtype, and what its products are then multiplied by, float32 () on the device; None: by nothing.

    float16 would lose what is small in x: it is stretched until its largest element is 2^14, and 2^-38 of that still
    something.
    """
    if dtype != torch.float16:
        return x.to(dtype), None
    factor = x.abs().amax().clamp(min=1e-30) / 2**14
    return (x / factor).to(dtype), factor


def restored(x: Tensor, factor: Tensor | None) -> Tensor:
    """A product of what in_range_of gave, as of what it was given; in place."""
    return x if factor is None else x.mul_(factor)
