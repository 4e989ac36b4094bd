"""LoRA adapters on a bare model: puts them on, merges them, and gives and takes their weights in peft's own names.

The model stays the object that it was: peft only exchanges the layers that it trains. So whatever works on a model (its
generation, its config, a task's metrics) works on one with an adapter.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from forge.errors import UsageError
from forge.model.origin import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_file

logger = logging.getLogger(__name__)

NAME = "default"  # peft's word for the only adapter of a model
PREFIX = "base_model.model."  # of every name in an adapter's file
TIED_BELOW = "tied_below"  # of a model whose weights were parted: what its configs said before


def is_adapted(model: nn.Module) -> bool:
    """Is an adapter on the model, not merged?"""
    return bool(getattr(model, "peft_config", None))


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Puts a new adapter on the model; only that is trained from now on. Returns peft's handle on it."""
    with _quiet():
        return cast(PeftModel, get_peft_model(cast(Any, model), config))


def load_adapter(
    model: PreTrainedModel, folder: Path, key: str, *, trainable: bool = False
) -> tuple[PeftModel, set[str]]:
    """Puts the adapter of a folder on the model; tells which parameters it holds in full, by the bare model's names.

    Raises UsageError, with one sentence, for an adapter that does not fit or that forge cannot apply.
    """
    config, tensors = read_adapter(folder, key)
    config.inference_mode = not trainable
    fits = f"{key}: the adapter {folder} does not fit {type(model).__name__} of {model.config.name_or_path}"
    advice = f"it was trained on another model, which {key.split('.')[0]}.base can name"
    try:
        adapter = attach(model, config)
        strange = load_adapter_tensors(model, tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"{fits} ({_first_line(error)}); {advice}") from error
    lost = sorted(set(adapter_tensors(model)) - set(tensors))
    if lost or strange:
        side, names = ("model", sorted(strange)) if strange else ("adapter", lost)
        raise UsageError(f"{fits} (the {side} has no {names[0].removeprefix(PREFIX)}, {len(names)} in all); {advice}")
    return adapter, set(_saved_in_full(model))


def merge(adapter: PeftModel) -> None:
    """Adds the adapter to the weights below it: what is left is the bare model, and all of it can be trained."""
    model = cast(Any, adapter.get_base_model())
    untie(model)
    with _quiet():
        cast(Any, adapter).merge_and_unload()
    vars(model).pop("peft_config", None)  # peft takes it away itself in some versions
    model.requires_grad_(True)


def untie(model: PreTrainedModel) -> None:
    """Layers that share one weight (the embeddings and the head) part where the adapter changes one of them: merged, it
    would change the other too. The config says so, and whoever loads the merged model ties nothing."""
    within = {id(_bare(module)) for module in model.modules() if _is_adapted(module)}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(_bare(module), "weight", None)
        if isinstance(weight, nn.Parameter) and id(module) not in within:
            users.setdefault(id(weight), []).append(module)
    parted = [module for modules in users.values() if len(modules) > 1 for module in modules if _is_adapted(module)]
    for module in parted:
        layer = _bare(module)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if parted:
        configs = _tying(model.config)
        vars(model).setdefault(TIED_BELOW, [config.tie_word_embeddings for config in configs])
        for config in configs:
            config.tie_word_embeddings = False


def config_below(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's config as the files of its base need it: they tie what a merged adapter has parted since."""
    config = copy.deepcopy(model.config)
    for part, tied in zip(_tying(config), vars(model).get(TIED_BELOW, []), strict=False):
        part.tie_word_embeddings = tied
    return config


def is_untied(model: PreTrainedModel) -> bool:
    """Has a merged adapter parted layers that share their weight in the base's files?"""
    return TIED_BELOW in vars(model)


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights under the names that peft gives them in a file; not copied."""
    with _quiet():
        found = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def load_adapter_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[str]:
    """Puts adapter_tensors back; returns names that the model has no place for. Raises RuntimeError for other shapes,
    KeyError where a module that was saved in full is missing."""
    with _quiet():
        result: Any = set_peft_model_state_dict(
            model, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, adapter_name=NAME
        )
    return list(result.unexpected_keys)


def adapter_config(model: PreTrainedModel) -> LoraConfig:
    """peft's config of the adapter that is on the model."""
    return cast(LoraConfig, cast(Any, model).peft_config[NAME])


def adapter_config_text(model: PreTrainedModel, base: str, revision: str | None) -> str:
    """adapter_config.json, the same text for the same adapter: peft's sets have no order."""
    values = adapter_config(model).to_dict() | {
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    }
    return json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"


def read_adapter(folder: Path, key: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and weights of an adapter's folder. Raises UsageError for what forge cannot apply."""
    kind = read_file(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != PeftType.LORA.value:
        raise UsageError(f"{key}: {folder} is a {kind} adapter, and forge applies LoRA adapters only")
    safe, pickled = (folder / name for name in ADAPTER_WEIGHTS)
    if not safe.is_file() and not pickled.is_file():
        raise UsageError(f"{key}: the adapter in {folder} has no weights; put {safe.name} back")
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
        if safe.is_file():
            return config, load_file(safe)
        return config, torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{key}: the adapter in {folder} cannot be read ({_first_line(error)})") from error


def _tying(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Where a config says whether the embeddings and the head are one weight."""
    return [config, config.get_text_config(decoder=True)]


def _saved_in_full(model: PreTrainedModel) -> Iterator[str]:
    """Of modules_to_save: the parameters by their names in the bare model."""
    for name, _ in model.named_parameters():
        if f".modules_to_save.{NAME}." in name:
            yield name.replace(f".modules_to_save.{NAME}.", ".")


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(module, "original_module")


def _bare(module: nn.Module) -> Any:
    """The layer as it was before an adapter took its place."""
    return getattr(module, "base_layer", getattr(module, "original_module", module))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # load_state_dict tells the class in its first line, and the first of what does not fit in the second.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else " ".join(lines))[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """peft warns of tied embeddings and of hub look-ups that forge sees to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
