"""Reads off a model, on the meta device or a real one, what its memory is computed from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forge.memory.activations import Block, Stack
from forge.memory.totals import ModelSizes

# Parts of the names of the linear layers of an attention, and among them of those that leave it.
ATTENTION = ("attn", "attention")
LEAVES_ATTENTION = ("o_proj", "out_proj", "c_proj", "out_lin", "output.dense", "dense", "to_out")
CROSS = ("encoder_attn", "crossattention", "cross_attn")
# Tensors that an activation keeps of its input where that is not one: gelu_new is written out in Python, with a product
# of four factors; a relu keeps its output, which the next layer keeps anyway.
KEPT_BY = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2, "relu": 0}


@dataclass(frozen=True)
class RowShape:
    """What the longest row of a micro-batch has."""

    tokens: int  # that the writer, or the only stack, reads
    image_tokens: int = 0  # that an image is cut into for its encoder
    masked: bool = True  # rows are padded, or packed


def sizes_of(model: PreTrainedModel, shape: RowShape, *, in_4bit: bool = False) -> ModelSizes:
    """The sizes of a model as it is: adapters on it, and weights that are frozen."""
    head = model.get_output_embeddings()
    head_weight = _weight(head) if head is not None else None
    linear = [module for module in model.modules() if _is_linear(module) and module is not head]
    weights = {id(weight): weight for module in linear if (weight := _weight(module)) is not None}
    lists = dict(layer_lists(model))
    within = {id(part) for modules in lists.values() for part in modules.modules()}
    stacks = [_stack(model, name, modules, within, shape) for name, modules in lists.items()]
    layers = [sum(map(_numel, layer.parameters())) for modules in lists.values() for layer in modules]
    quantized = sum(_numel(p) for p in weights.values() if not p.requires_grad) if in_4bit else 0
    config = model.config.get_text_config(decoder=True)
    columns = _shape(head_weight)[0] if head_weight is not None else int(getattr(model.config, "num_labels", 0) or 0)
    return ModelSizes(
        architecture=type(model).__name__,
        parameters=sum(map(_numel, model.parameters())),
        trained=sum(_numel(p) for p in model.parameters() if p.requires_grad),
        linear=sum(map(_numel, weights.values())),
        in_4bit=quantized,
        largest_layer=max(layers, default=max(map(_numel, model.parameters()), default=0)),
        head=0 if head_weight is None else _numel(head_weight),
        head_trained=head_weight is not None and head_weight.requires_grad,
        columns=columns,
        width=_shape(head_weight)[1] if head_weight is not None else int(getattr(config, "hidden_size", 0) or 0),
        stacks=tuple(stacks),
    )


def layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of layers: those with an attention in each entry, that are within no other list."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{o}.") for o in found):
            names = [inner for inner, part in module[0].named_modules() if _is_linear(part)]
            if len(names) >= 3 and any(_of_attention(inner) for inner in names):
                found.append(name)
                yield name, module


def _stack(model: PreTrainedModel, name: str, layers: nn.ModuleList, within: set[int], shape: RowShape) -> Stack:
    config = _config_of(model, name)
    sees = shape.image_tokens and _reads_images(config)
    block = _block(layers[0], config, masked=shape.masked and not sees)
    if any(word in inner for inner, _ in layers[0].named_modules() for word in CROSS):
        block = replace(block, source=shape.image_tokens)
    around = _around(model, name)
    outside = [part for part in around.modules() if id(part) not in within]
    norms = [part for part in outside if _is_norm(part) and _elements(part) == block.width]
    dropouts = [part for part in outside if isinstance(part, nn.Dropout) and part.p > 0]
    tokens = shape.image_tokens if sees else shape.tokens
    return Stack(name, len(layers), block, tokens, len(norms), len(dropouts))


def _block(layer: nn.Module, config: Any, *, masked: bool) -> Block:
    named = [(name, part) for name, part in layer.named_modules() if "lora_" not in name]
    linear = {name: part for name, part in named if _is_linear(part) and not name.endswith("base_layer")}
    readers = {name: part for name, part in linear.items() if _keeps_input(part)}
    heads = int(_first(config, "num_attention_heads", "n_head", "decoder_attention_heads", "n_heads") or 1)
    cross = {name for name in linear if any(word in name for word in CROSS)}
    attention = {name for name in linear if _of_attention(name)} - cross
    leaving = {name for name in attention if name.endswith(LEAVES_ATTENTION)}
    width = next((_features(linear[name])[1] for name in sorted(leaving)), _features(next(iter(linear.values())))[0])
    head_dim = next((_features(linear[name])[0] for name in sorted(leaving)), width) // heads
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    mlp = {name: _features(part) for name, part in linear.items() if name not in attention | cross}
    into = {name for name, (read, _) in mlp.items() if read == width}
    down = [name for name, (read, given) in mlp.items() if given == width and (read != width or name not in into)]
    down = down or [name for name in mlp if name.endswith(("fc2", "wo", "output.dense", "down_proj"))]
    into -= set(down)
    inner = max((mlp[name][0] for name in down), default=4 * width)
    gated = len(into) > 1 or any(mlp[name][1] == 2 * inner for name in into)
    experts = [part for part in layer.parameters() if part.dim() == 3]  # of a mixture: those of one token at a time
    top_k = int(getattr(config, "num_experts_per_tok", None) or 1) if experts else 1
    if experts and not down:
        inner, gated = int(_first(config, "moe_intermediate_size", "intermediate_size") or inner), True
    norms = [part for _, part in layer.named_modules() if _is_norm(part)]
    own = [part for part in norms if _elements(part) == width]
    rate = float(_first(config, "dropout", "hidden_dropout_prob", "resid_pdrop") or 0.0)
    hidden_dropouts = [name for name, part in layer.named_modules() if _drops_width(layer, name, part)]
    in_python = isinstance(getattr(layer, "dropout", None), float) and rate > 0
    drops = (3 if cross else 2) if in_python else len(hidden_dropouts)
    attention_rate = _first(config, "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    adapters = [part for part in linear.values() if hasattr(part, "lora_A")]
    word = str(_first(config, "hidden_act", "hidden_activation", "activation_function", "activation") or "gelu")
    return Block(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner * top_k,
        gated=gated,
        activation=KEPT_BY.get(word, 1),
        attention_readers=len((attention - leaving) & readers.keys()),
        mlp_readers=len(into & readers.keys()) or (top_k if experts and experts[0].requires_grad else 0),
        down_reads=any(name in readers for name in down) or any(part.requires_grad for part in experts),
        norms=len(own) - bool(cross),  # the second attention brings its own
        rms=any("RMS" in type(part).__name__ for part in own),
        norms_trained=any(parameter.requires_grad for part in own for parameter in part.parameters()),
        qk_norm=any("RMS" in type(part).__name__ and _elements(part) != width for part in norms),
        dropouts=drops,
        attention_dropout=float(attention_rate or 0.0) > 0,
        masked=masked,
        eager=getattr(config, "_attn_implementation", None) == "eager",
        cross_reads=any(name in readers for name in cross if "q" in name.rpartition(".")[2]),
        ranks=sum(rank for part in adapters for rank in part.r.values()),
        dropped=sum(_features(part)[0] for part in adapters if _drops(part)),
    )


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or an adapter on one."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)


def _weight(module: nn.Module) -> nn.Parameter | None:
    bare = getattr(module, "base_layer", getattr(module, "original_module", module))
    weight = getattr(bare, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _features(module: nn.Module) -> tuple[int, int]:
    """(read, given) a token."""
    weight = _weight(module)
    assert weight is not None
    bare = getattr(module, "base_layer", module)
    a, b = _shape(weight)
    return (a, b) if isinstance(bare, Conv1D) else (b, a)


def _keeps_input(module: nn.Module) -> bool:
    if hasattr(module, "lora_A"):
        return not _drops(module)
    weight = _weight(module)
    return weight is not None and weight.requires_grad


def _drops(adapter: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in adapter.modules())


def _drops_width(layer: nn.Module, name: str, module: nn.Module) -> bool:
    """Is it dropout of the residual stream, and not of attention's probabilities or of an adapter?"""
    if not isinstance(module, nn.Dropout) or module.p == 0 or "lora_" in name:
        return False
    parent = layer.get_submodule(name.rpartition(".")[0])
    queries = any(word in own for own, _ in parent.named_children() for word in ("q_", "query", "c_attn", "q_proj"))
    return not queries or "resid" in name


def _of_attention(name: str) -> bool:
    return any(word in name for word in ATTENTION)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def _elements(module: nn.Module) -> int:
    return next((_numel(p) for p in module.parameters(recurse=False)), 0)


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that the config has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _config_of(model: nn.Module, name: str) -> Any:
    """Of the innermost part with a config that holds the list."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        config = getattr(model.get_submodule(".".join(parts[:count])), "config", None)
        if config is not None:
            return config
    return model.config


def _reads_images(config: Any) -> bool:
    return getattr(config, "patch_size", None) is not None


def _around(model: nn.Module, name: str) -> nn.Module:
    """The innermost pretrained model that holds the list, whose other modules lie before and behind its layers."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        part = model.get_submodule(".".join(parts[:count]))
        if isinstance(part, PreTrainedModel):
            return part
    return model


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Also of a weight that ZeRO-3 has taken away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(_shape(parameter))
