"""Partitions: the part of each trained weight that this rank has under ZeRO, with its optimizer moments.

For every group of parameters DeepSpeed has one flat float32 tensor on each rank, its part of the weights, and moments
of the same length. Once prepared, DeepSpeed knows the position of each parameter in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge.ranks.deepspeed import is_partitioned

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class Part:
    """A part of one parameter, as float32 views of the optimizer's tensors: writing to them changes those."""

    start: int  # in the flattened parameter
    weight: Tensor  # (n,) float32
    moments: dict[str, Tensor]  # (n,) float32 each; empty before the first step


class Partitions:
    """This rank's parts of the parameters of a DeepSpeed optimizer."""

    def __init__(self, optimizer: Any):
        """optimizer: as prepared by accelerate."""
        self._zero = optimizer.optimizer
        self._stage_3 = hasattr(self._zero, "fp32_partitioned_groups_flat")

    def of(self, parameter: Any) -> Part | None:
        """Return this rank's part of a parameter; None if it has none."""
        flat, offset, start, length = self._place(parameter)
        if not length:
            return None
        state = self._zero.optimizer.state.get(flat, {})
        moments = {name: state[name].narrow(0, offset, length) for name in MOMENTS if name in state}
        return Part(start, flat.detach().narrow(0, offset, length), moments)

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has taken, on which its bias correction depends."""
        return max((int(state["step"]) for state in self._zero.optimizer.state.values() if "step" in state), default=0)

    def begin(self, steps: int) -> None:
        """Create moments of zero, as if that many steps had been taken; with 0, none, as before the first step."""
        state = self._zero.optimizer.state
        state.clear()
        for flat in self._flat if steps else ():  # even if all of it is padding
            step = torch.tensor(float(steps), device=flat.device)
            state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}

    @torch.no_grad()
    def set_weights(self, weights: Sequence[tuple[Any, Tensor]]) -> None:
        """Set the float32 weights that the optimizer starts from. weights: parameters with their whole values."""
        for parameter, whole in weights:
            part = self.of(parameter)
            if part is not None:
                part.weight.copy_(whole.flatten()[part.start : part.start + part.weight.numel()])

    @torch.no_grad()
    def publish(self) -> None:
        """Make the model use the weights that are in the parts now. Called on every rank at once."""
        zero = self._zero
        if not self._stage_3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _place(self, parameter: Any) -> tuple[Any, int, int, int]:
        """Return the flat tensor with the part, the offset in it, the start in the parameter, and its length."""
        zero = self._zero
        if is_partitioned(parameter):
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = torch.distributed.get_rank() * size  # equal parts; the last may end in padding
            length = max(0, min(size, parameter.ds_numel - start))
            return self._flat[group], offset, start, length
        found = parameter._hp_mapping
        if found is None:
            return None, 0, 0, 0
        inside = found.get_hp_fragment_address()
        return self._flat[found.param_group_index], inside.start, found.lp_fragment_address.start, inside.numel

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's float32 weights, one tensor per group, under the name that the stage (and bf16) gives them."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(list(getattr(self._zero, name)) for name in names if hasattr(self._zero, name))


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter, even if this rank has only a part."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


def whole_float32(parameter: Any) -> Tensor:
    """Return a trained parameter, whole, in float32, on every rank's device. Called on every rank at once."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter)
    return found.view(shape_of(parameter))
