"""Finds the trained weights that an output does not depend on: data parallelism would wait for their gradients."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def unused_weights(module: nn.Module, output: Tensor) -> list[str]:
    """Return the names of the module's trained weights that get no gradient in a backward pass from the output."""
    used = weights_reached_by(output)
    return [name for name, weight in module.named_parameters() if weight.requires_grad and id(weight) not in used]


def use_varies(model: PreTrainedModel) -> bool:
    """True if the rows, or chance, decide which weights a forward pass uses: experts one by one, or dropped layers."""
    experts = any(".experts.0." in name for name, _ in model.named_parameters())
    return experts or _drops_layers(model.config.to_dict())


def weights_reached_by(output: Tensor) -> set[int]:
    """Return the id of every tensor that would get a gradient in a backward pass from the output."""
    found: set[int] = set()
    seen: set[Any] = {None}
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf of the graph, where a gradient is stored
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found


def _drops_layers(config: dict[str, Any]) -> bool:
    return any(
        _drops_layers(value) if isinstance(value, dict) else "layerdrop" in str(name) and bool(value)
        for name, value in config.items()
    )
