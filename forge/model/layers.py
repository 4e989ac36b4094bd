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
from forge.model.adapter import TIED_BELOW

logger = logging.getLogger(__name__)

PER_LAYER = ("layer", "block")  # in the name of a config's list with one entry a layer: layer_types, no_rope_layers


class KeptLayers(NamedTuple):
    """Which layers of its source a model is made of."""

    numbers: list[int]  # 0-based, ascending
    of: int

    def __str__(self) -> str:
        *others, last = map(str, self.numbers)
        return f"layers {', '.join(others)} and {last} of {self.of}" if others else f"layer {last} of {self.of}"


def check_layers(numbers: Sequence[int], config: PreTrainedConfig, name: str, key: str) -> KeptLayers:
    """What keeping these layers of the model `name` comes to, before its weights are read.

    config: the model's. Raises UsageError for a layer that it does not have, and for a model with several stacks.
    """
    kind = config.model_type
    if config.is_encoder_decoder or config.sub_configs:
        parts = ", ".join(config.sub_configs) or "encoder, decoder"
        raise UsageError(
            f"{key}.keep_layers: {name} is of type {kind}, which has more than one stack of layers ({parts}), and only "
            "a model of one can be cut; take it out"
        )
    of = getattr(config, "num_hidden_layers", None)
    if not isinstance(of, int):
        raise UsageError(f"{key}.keep_layers: {name} is of type {kind}, which does not tell its layers; take it out")
    if numbers[-1] >= of:
        count = "1 layer, numbered 0" if of == 1 else f"{of} layers, numbered 0 to {of - 1}"
        raise UsageError(f"{key}.keep_layers names layer {numbers[-1]}, and {name} has {count}")
    return KeptLayers(list(numbers), of)


def keep_layers(model: PreTrainedModel, kept: KeptLayers | None, name: str, key: str) -> PreTrainedModel:
    """A model of the same class with these layers of `model` only, renumbered from 0, and all its other weights; the
    model itself where `kept` is None.

    DistilBERT was begun so, with every second layer of BERT (arXiv 1910.01108). The result is built from a config with
    fewer layers, as whoever loads its files will build it; the weights are copies, and tied ones stay tied.
    Raises UsageError where the layers are in no list, or are not alike: what is in place of a layer would then compute
    something else.
    """
    if kept is None:
        return model
    if len(kept.numbers) == kept.of:
        logger.info("%s: all %d layers of %s are kept; %s.keep_layers cuts nothing", key, kept.of, name, key)
        return model
    stack = _stack(model, kept, name, key)
    try:
        cut = type(model)(cut_config(model.config, kept))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, StrictDataclassError) as error:
        raise UsageError(
            f"{key}.keep_layers: no model of type {model.config.model_type} can be built of {kept} "
            f"({' '.join(str(error).split())[:200]}); take it out"
        ) from error
    _refuse_other_layers(model, cut, stack, kept, key)
    _copy_weights(model, cut, stack, kept, name, key)
    if model.can_generate():  # what its own file says, where a new model has the defaults
        cut.generation_config = copy.deepcopy(model.generation_config)
    if TIED_BELOW in vars(model):
        setattr(cut, TIED_BELOW, getattr(model, TIED_BELOW))
    logger.info("%s: %s of %s", key, kept, name)
    return cut.train(model.training)


def compile_layers(model: nn.Module) -> None:
    """Each layer by itself, as it runs: one graph serves all of a stack, so that compiling takes as long as for one."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for path, layers in lists.items():
        if not _inside(path, lists) and len({type(layer) for layer in layers}) == 1:
            for layer in layers:
                layer.compile()


def _stack(model: PreTrainedModel, kept: KeptLayers, name: str, key: str) -> str:
    """The name of the list that holds the layers."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [path for path in lists if len(lists[path]) == kept.of and not _inside(path, lists)]
    if len(found) != 1:
        there = "in no list" if not found else f"spread over {len(found)} lists ({', '.join(found)})"
        raise UsageError(
            f"{key}.keep_layers: the {kept.of} layers of {name} ({type(model).__name__}) are {there}, and only those "
            "of one list can be cut; take it out"
        )
    return found[0]


def _inside(path: str, lists: dict[str, nn.ModuleList]) -> bool:
    """Is it within another list: the experts of a layer?"""
    return any(path.startswith(f"{other}.") for other in lists)


def cut_config(config: PreTrainedConfig, kept: KeptLayers) -> PreTrainedConfig:
    """Raises ValueError where a file would not give the same config again."""
    cut = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == kept.of and any(word in name for word in PER_LAYER):
            setattr(cut, name, [value[number] for number in kept.numbers])
    if hasattr(cut, "attention_types"):  # GPT-Neo's, from which it makes attention_layers
        cut.attention_types = [[[kind], 1] for kind in cut.attention_layers]
    cut.num_hidden_layers = len(kept.numbers)
    if type(cut).from_dict(cut.to_dict()).to_dict() != cut.to_dict():
        raise ValueError("its config derives what the layers are from their number")
    return cut


def _refuse_other_layers(model: PreTrainedModel, cut: PreTrainedModel, stack: str, kept: KeptLayers, key: str) -> None:
    """Raises UsageError where a layer is not what the new model has in its place: another window, rotation, scale."""
    for new, old in enumerate(kept.numbers):
        before, after = model.get_submodule(f"{stack}.{old}"), cut.get_submodule(f"{stack}.{new}")
        if differing := _difference(before, after, old, new):
            raise UsageError(
                f"{key}.keep_layers: layer {old} cannot become layer {new}, where models of type "
                f"{model.config.model_type} have another kind of layer ({differing}); keep other layers"
            )


def _difference(before: nn.Module, after: nn.Module, old: int, new: int) -> str | None:
    """The first thing, besides weights and the layer's own number, that is not the same in the two layers."""
    settings, others = dict(_settings(before)), dict(_settings(after))
    for name in dict.fromkeys([*settings, *others]):
        a, b = settings.get(name), others.get(name)
        if a != b and not (type(a) is type(b) is int and (a, b) == (old, new)):
            return f"{name} is {a} and would be {b}"
    given, there = dict(before.named_buffers()), dict(after.named_buffers())
    for name in sorted({*given, *there} - {*before.state_dict(), *after.state_dict()}):  # the others are copied
        if name not in given or name not in there or not torch.equal(given[name], there[name]):
            return f"{name} differs"
    return None


def _settings(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that a layer is but its weights: the class and the plain values of each of its modules."""
    for path, module in layer.named_modules():
        yield f"{path or 'it'}", type(module).__name__
        for name, value in vars(module).items():
            own = name != "training" and not name.startswith("_")  # the rest is bookkeeping
            if own and isinstance(value, bool | int | float | str | tuple | None):
                yield f"{path}.{name}".lstrip("."), value


def _copy_weights(
    model: PreTrainedModel, cut: PreTrainedModel, stack: str, kept: KeptLayers, name: str, key: str
) -> None:
    """Raises UsageError where the two do not have the same weights."""
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
    strange = sorted(
        path for path in {*tensors, *wanted}
        if path not in tensors or path not in wanted or tensors[path].shape != wanted[path].shape
    )  # fmt: skip
    if strange:
        raise UsageError(
            f"{key}.keep_layers: {kept} of {name} do not make a model of type {model.config.model_type} ({strange[0]} "
            f"does not fit, {len(strange)} weights in all); keep other layers"
        )
    cut.load_state_dict(tensors, strict=True)
