"""Finds the modules that compute queries, keys and values in a self-attention layer, and captures their outputs."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.errors import UsageError

KINDS = ("queries", "keys", "values")
# The names of the three in architectures: BERT, RoBERTa, ELECTRA; DistilBERT; DeBERTa; most later ones; MPNet.
NAMES = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)
FUSED = ("Wqkv", "qkv", "qkv_proj", "query_key_value", "in_proj", "c_attn")
LAYER = re.compile(r"(?P<stack>.*?\.)(?P<layer>\d+)\.(?P<within>.*)\.(?P<leaf>\w+)")
OTHER = ("crossattention", "cross_attn", "encoder_attn")  # attention to another model's states


def attention_modules(model: PreTrainedModel, layer: int | None, whose: str) -> dict[str, str]:
    """Return the names of the modules that compute each of KINDS in one layer of an encoder.

    Args:
        layer: counted from 1; None: the last.
        whose: student or teacher, for messages.

    Raises:
        UsageError: forge does not know these modules in this architecture, or there is no such layer.
    """
    leaves = {leaf: kind for names in NAMES for leaf, kind in zip(names, KINDS, strict=True)}
    layers: dict[tuple[str, int], dict[str, str]] = {}
    fused = ""
    for name, module in model.named_modules():
        if found := LAYER.fullmatch(name):
            attends = isinstance(getattr(module, "out_features", None), int) and "att" in found["within"].lower()
            if attends and found["leaf"] in leaves and not any(part in name for part in OTHER):
                layers.setdefault((found["stack"], int(found["layer"])), {})[leaves[found["leaf"]]] = name
            elif found["leaf"] in FUSED:
                fused = f" (one module computes all three, {name})"
    architecture = type(model).__name__
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    whole = all(len(modules) == len(KINDS) for modules in layers.values())
    if not whole or len({stack for stack, _ in layers}) != 1 or sorted(i for _, i in layers) != list(range(count or 0)):
        raise UsageError(
            f"distillation.relations: forge cannot find modules of queries, keys and values in each layer of the "
            f"{whose}, a {architecture}{fused}; remove distillation.relations, or use distillation.hidden"
        )
    if layer is not None and layer > len(layers):
        raise UsageError(
            f"distillation.relations.{whose}_layer is {layer}, but the {whose}, a {architecture}, has only "
            f"{len(layers)} layers"
        )
    chosen = layers[max(layers) if layer is None else (max(layers)[0], layer - 1)]
    if getattr(model.get_submodule(chosen["queries"].rpartition(".")[0]), "is_causal", False):
        raise UsageError(
            f"distillation.relations compares encoders, where each token attends to all others, but the {whose}, a "
            f"{architecture}, attends only to the left; remove it, or use distillation.hidden"
        )
    return chosen


def width_of(model: nn.Module, name: str) -> int:
    """Return the width of a module's output, even if its weight is sharded or an adapter wraps it."""
    return int(getattr(model.get_submodule(name), "out_features"))  # noqa: B009 - of a linear layer of any library


@contextmanager
def capture_outputs(model: nn.Module, modules: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Capture what each named module returns in a forward, (B, T, D) with its gradient, under its key in `modules`.

    Only the first output: DeBERTa calls the modules again, on positions. No hook stays on the model afterwards.
    """
    captured: dict[str, Tensor] = {}

    def hook(kind: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            captured.setdefault(kind, output)

        return keep

    with ExitStack() as hooks:
        for kind, name in modules.items():
            hooks.callback(model.get_submodule(name).register_forward_hook(hook(kind)).remove)
        yield captured
