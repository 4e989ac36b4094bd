"""Which part of each trained weight this rank keeps under ZeRO, with the moments of the optimizer that belong to it.

DeepSpeed keeps, for every group of parameters, one flat float32 tensor on each rank: its part of the weights. The
optimizer's moments are as long. Where a parameter lies in it, DeepSpeed knows since it was prepared.
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
    """Of one parameter, as float32 views of what the optimizer computes with: writing into them changes it."""

    start: int  # of the flattened parameter
    weight: Tensor  # (n,)
    moments: dict[str, Tensor]  # (n,) each; empty before the first step


class Partitions:
    """The parts that this rank has of the parameters of an optimizer of DeepSpeed's."""

    def __init__(self, optimizer: Any):
        """optimizer: as accelerate has prepared it."""
        self._zero = optimizer.optimizer
        self._stage_3 = hasattr(self._zero, "fp32_partitioned_groups_flat")

    def of(self, parameter: Any) -> Part | None:
        """None where all of it is other ranks'."""
        flat, offset, start, length = self._place(parameter)
        if not length:
            return None
        state = self._zero.optimizer.state.get(flat, {})
        moments = {name: state[name].narrow(0, offset, length) for name in MOMENTS if name in state}
        return Part(start, flat.detach().narrow(0, offset, length), moments)

    @property
    def steps(self) -> int:
        """How many the optimizer has taken, which its bias correction goes by."""
        return max((int(state["step"]) for state in self._zero.optimizer.state.values() if "step" in state), default=0)

    def begin(self, steps: int) -> None:
        """Makes room for the moments, at zero, as if so many steps had been taken; 0: as before the first one."""
        state = self._zero.optimizer.state
        state.clear()
        for flat in self._flat if steps else ():  # also where all of it is padding
            step = torch.tensor(float(steps), device=flat.device)
            state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}

    @torch.no_grad()
    def set_weights(self, weights: Sequence[tuple[Any, Tensor]]) -> None:
        """The float32 weights that the optimizer starts from. weights: parameters, and what they are, whole."""
        for parameter, whole in weights:
            part = self.of(parameter)
            if part is not None:
                part.weight.copy_(whole.flatten()[part.start : part.start + part.weight.numel()])

    @torch.no_grad()
    def publish(self) -> None:
        """The model computes with the weights as they are in the parts now. On every rank at once."""
        zero = self._zero
        if not self._stage_3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _place(self, parameter: Any) -> tuple[Any, int, int, int]:
        """The flat tensor that has this rank's part, where in it, from where on in the parameter, and its length."""
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
        """This rank's float32 weights, a tensor for each group: of stage 3, of stages 1 and 2, of stage 1 in bf16."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(list(getattr(self._zero, name)) for name in names if hasattr(self._zero, name))


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where this rank has a part."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


def whole_float32(parameter: Any) -> Tensor:
    """A trained parameter as the optimizer has it, in float32, on the device of every rank. On every rank at once."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter)
    return found.view(shape_of(parameter))
