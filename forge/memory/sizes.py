"""Counts a model's parameters, on the meta device or in memory: the part of the estimate that no step tells."""

import math

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forge.memory.totals import ModelSizes


def sizes_of(model: PreTrainedModel, *, in_4bit: bool = False) -> ModelSizes:
    """Return the sizes of a model as it is, with its adapters and its frozen weights.

    in_4bit: the frozen weights of linear layers will be kept in 4 bits.
    """
    head = model.get_output_embeddings()
    head_weight = None if head is None else _weight(head)
    linear = [module for module in model.modules() if _is_linear(module) and module is not head]
    weights = {id(weight): weight for module in linear if (weight := _weight(module)) is not None}
    text = model.config.get_text_config(decoder=True)
    columns, width = getattr(model.config, "num_labels", None), getattr(text, "hidden_size", None)
    if head_weight is not None:
        columns, width = _shape(head_weight)
    return ModelSizes(
        architecture=type(model).__name__,
        parameters=sum(map(_numel, model.parameters())),
        trained=sum(_numel(p) for p in model.parameters() if p.requires_grad),
        linear=sum(map(_numel, weights.values())),
        in_4bit=sum(_numel(p) for p in weights.values() if not p.requires_grad) if in_4bit else 0,
        largest_layer=_largest_layer(model),
        head=0 if head_weight is None else _numel(head_weight),
        head_trained=head_weight is not None and head_weight.requires_grad,
        columns=int(columns or 0),
        width=int(width or 0),
    )


def _largest_layer(model: nn.Module) -> int:
    """Return the parameters of the largest entry of a list of modules; without lists, the largest parameter."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [sum(map(_numel, layer.parameters())) for layers in lists for layer in layers]
    return max(layers, default=max(map(_numel, model.parameters()), default=0))


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is a linear layer, or an adapter on one."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)


def _weight(module: nn.Module) -> nn.Parameter | None:
    bare = getattr(module, "base_layer", getattr(module, "original_module", module))
    weight = getattr(bare, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape, also of a weight that ZeRO-3 has taken away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(_shape(parameter))
