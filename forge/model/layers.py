"""Cuts a model down to some of its layers: a shallower student that starts with its teacher's weights."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from forge.errors import UsageError
from forge.model.adapter import TIED_IN_BASE

logger = logging.getLogger(__name__)

PER_LAYER = ("layer", "block")  # in the names of config lists with one entry per layer: layer_types, no_rope_layers


class KeptLayers(NamedTuple):
    """The layers of its source that a model is made of."""

    numbers: list[int]  # 0-based, ascending
    of: int

    def __str__(self) -> str:
        *others, last = map(str, self.numbers)
        return f"layers {', '.join(others)} and {last} of {self.of}" if others else f"layer {last} of {self.of}"


def check_layers(numbers: Sequence[int], config: PreTrainedConfig, name: str, key: str) -> KeptLayers:
    """Return the layers to keep of the model `name`, checked against its config before its weights are read.

    Raises:
        UsageError: the model does not have such a layer, or has several stacks of layers.
    """
    kind = config.model_type
    if config.is_encoder_decoder or config.sub_configs:
        parts = ", ".join(config.sub_configs) or "encoder, decoder"
        raise UsageError(
            f"{key}.keep_layers: {name} is of type {kind}, which has several stacks of layers ({parts}), but only a "
            "model with one stack can be cut; remove the key"
        )
    of = getattr(config, "num_hidden_layers", None)
    if not isinstance(of, int):
        raise UsageError(
            f"{key}.keep_layers: {name} is of type {kind}, which does not declare num_hidden_layers; remove the key"
        )
    if numbers[-1] >= of:
        count = "1 layer, numbered 0" if of == 1 else f"{of} layers, numbered 0 to {of - 1}"
        raise UsageError(f"{key}.keep_layers has layer {numbers[-1]}, but {name} has {count}")
    return KeptLayers(list(numbers), of)


def keep_layers(model: PreTrainedModel, kept: KeptLayers | None, name: str, key: str) -> PreTrainedModel:
    """Return a model with only these layers of `model`, renumbered from 0, and all its other weights.

    DistilBERT was initialised this way, with every second layer of BERT (arXiv 1910.01108). The result is built from a
    config with fewer layers, as it will be when its files are loaded; weights are copied, and tied ones stay tied. If
    `kept` is None, `model` itself is returned.

    Raises:
        UsageError: the layers are not in one list, or differ, so that a layer would compute something else in the
            place of another.
    """
    if kept is None:
        return model
    if len(kept.numbers) == kept.of:
        logger.info("%s: %s.keep_layers keeps all %d layers of %s", key, key, kept.of, name)
        return model
    stack = _stack(model, kept, name, key)
    try:
        cut = type(model)(cut_config(model.config, kept))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, StrictDataclassError) as error:
        raise UsageError(
            f"{key}.keep_layers: a model of type {model.config.model_type} cannot be built from {kept} "
            f"({' '.join(str(error).split())[:200]}); remove the key"
        ) from error
    _refuse_other_layers(model, cut, stack, kept, key)
    _copy_weights(model, cut, stack, kept, name, key)
    if model.can_generate():  # a new model has the defaults
        cut.generation_config = copy.deepcopy(model.generation_config)
    if TIED_IN_BASE in vars(model):
        setattr(cut, TIED_IN_BASE, getattr(model, TIED_IN_BASE))
    logger.info("%s: %s of %s", key, kept, name)
    return cut.train(model.training)


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself when it first runs: all layers of a stack share one graph, compiled once."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for path, layers in lists.items():
        if not _inside(path, lists) and len({type(layer) for layer in layers}) == 1:
            for layer in layers:
                layer.compile()


def _stack(model: PreTrainedModel, kept: KeptLayers, name: str, key: str) -> str:
    """Return the name of the list that holds the layers."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [path for path in lists if len(lists[path]) == kept.of and not _inside(path, lists)]
    if len(found) != 1:
        there = "not in a list" if not found else f"in {len(found)} lists ({', '.join(found)})"
        raise UsageError(
            f"{key}.keep_layers: the {kept.of} layers of {name} ({type(model).__name__}) are {there}, but only "
            "layers in one list can be cut; remove the key"
        )
    return found[0]


def _inside(path: str, lists: dict[str, nn.ModuleList]) -> bool:
    """True if the module is within another list, as the experts of a layer are."""
    return any(path.startswith(f"{other}.") for other in lists)


def cut_config(config: PreTrainedConfig, kept: KeptLayers) -> PreTrainedConfig:
    """Return the config of the cut model. Raises ValueError if it would change when saved and loaded."""
    cut = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == kept.of and any(word in name for word in PER_LAYER):
            setattr(cut, name, [value[number] for number in kept.numbers])
    if hasattr(cut, "attention_types"):  # GPT-Neo's, from which it makes attention_layers
        cut.attention_types = [[[kind], 1] for kind in cut.attention_layers]
    cut.num_hidden_layers = len(kept.numbers)
    if type(cut).from_dict(cut.to_dict()).to_dict() != cut.to_dict():
        raise ValueError("its config derives the kinds of the layers from their number")
    return cut


def _refuse_other_layers(model: PreTrainedModel, cut: PreTrainedModel, stack: str, kept: KeptLayers, key: str) -> None:
    """Raise UsageError if a layer differs from the new model's in its place: another window, rotation or scale."""
    for new, old in enumerate(kept.numbers):
        before, after = model.get_submodule(f"{stack}.{old}"), cut.get_submodule(f"{stack}.{new}")
        if differing := _difference(before, after, old, new):
            raise UsageError(
                f"{key}.keep_layers: layer {old} cannot become layer {new}: models of type "
                f"{model.config.model_type} have another kind of layer there ({differing}); keep other layers"
            )


def _difference(before: nn.Module, after: nn.Module, old: int, new: int) -> str | None:
    """Return the first difference of two layers, other than weights and the layer's number; None if there is none."""
    settings, others = dict(_settings(before)), dict(_settings(after))
    for name in dict.fromkeys([*settings, *others]):
        a, b = settings.get(name), others.get(name)
        if a != b and not (type(a) is type(b) is int and (a, b) == (old, new)):
            return f"{name} is {a} and would be {b}"
    old_buffers, new_buffers = dict(before.named_buffers()), dict(after.named_buffers())
    for name in sorted({*old_buffers, *new_buffers} - {*before.state_dict(), *after.state_dict()}):  # others are copied
        if name not in old_buffers or name not in new_buffers or not torch.equal(old_buffers[name], new_buffers[name]):
            return f"{name} differs"
    return None


def _settings(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the class and the plain attributes of each module in a layer: everything but its weights."""
    for path, module in layer.named_modules():
        yield f"{path or 'the layer'}", type(module).__name__
        for name, value in vars(module).items():
            own = name != "training" and not name.startswith("_")  # the rest is internal state
            if own and isinstance(value, bool | int | float | str | tuple | None):
                yield f"{path}.{name}".lstrip("."), value


def _copy_weights(
    model: PreTrainedModel, cut: PreTrainedModel, stack: str, kept: KeptLayers, name: str, key: str
) -> None:
    """Load the kept weights. Raises UsageError if the two models do not have the same ones."""
    new_number = {str(old): str(new) for new, old in enumerate(kept.numbers)}
    tensors = {}
    for path, tensor in model.state_dict().items():
        if not path.startswith(f"{stack}."):
            tensors[path] = tensor
            continue
        number, _, rest = path.removeprefix(f"{stack}.").partition(".")
        if number in new_number:
            tensors[f"{stack}.{new_number[number]}.{rest}"] = tensor
    wanted = cut.state_dict()
    differing = sorted(
        path for path in {*tensors, *wanted}
        if path not in tensors or path not in wanted or tensors[path].shape != wanted[path].shape
    )  # fmt: skip
    if differing:
        raise UsageError(
            f"{key}.keep_layers: {kept} of {name} do not make a model of type {model.config.model_type} "
            f"({differing[0]} does not fit, {len(differing)} weights in all); keep other layers"
        )
    cut.load_state_dict(tensors, strict=True)
