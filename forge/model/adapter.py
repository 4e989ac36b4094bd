"""LoRA adapters on a model: attach, merge, and their weights by the names that peft gives them in files.

The model stays the same object: peft only replaces the layers that it trains. So everything that works on a model (its
generation, its config, a task's metrics) also works on a model with an adapter.
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from forge.errors import ForgeError, UsageError
from forge.model.origin import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_file

logger = logging.getLogger(__name__)

NAME = "default"  # what peft calls the only adapter of a model
PREFIX = "base_model.model."  # every name in an adapter's file starts with this
TIED_IN_BASE = "tied_in_base"  # attribute of a model that was untied: what its configs said about tying before


def is_adapted(model: nn.Module) -> bool:
    """True if the model has an adapter that is not merged."""
    return bool(getattr(model, "peft_config", None))


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Attach a new adapter to the model and freeze all other weights; return peft's handle on it."""
    with _quiet():
        return cast(PeftModel, get_peft_model(cast(Any, model), config))


def load_adapter(
    model: PreTrainedModel, folder: Path, key: str, *, trainable: bool = False
) -> tuple[PeftModel, set[str]]:
    """Attach the adapter in a folder to the model.

    Returns:
        peft's handle on the adapter, and the names in the bare model of the parameters that the adapter holds in full.

    Raises:
        UsageError: the adapter does not fit the model, or forge cannot apply it.
    """
    config, tensors = read_adapter(folder, key)
    config.inference_mode = not trainable
    fits = f"{key}: the adapter {folder} does not fit {type(model).__name__} of {model.config.name_or_path}"
    advice = f"it was trained on another model; set {key.split('.')[0]}.base to that one"
    try:
        adapter = attach(model, config)
        unexpected = load_adapter_tensors(model, tensors)
    except ForgeError:
        raise
    except Exception as error:
        raise UsageError(f"{fits} ({_first_line(error)}); {advice}") from error
    missing = sorted(set(adapter_tensors(model)) - set(tensors))
    if missing or unexpected:
        side, names = ("model", sorted(unexpected)) if unexpected else ("adapter", missing)
        raise UsageError(f"{fits} (the {side} has no {names[0].removeprefix(PREFIX)}, {len(names)} in all); {advice}")
    return adapter, set(_saved_in_full(model))


def merge(adapter: PeftModel) -> None:
    """Add the adapter to the weights that it changes; the bare model is left, and all of it can be trained."""
    model = cast(Any, adapter.get_base_model())
    untie(model)
    with _quiet():
        cast(Any, adapter).merge_and_unload()
    vars(model).pop("peft_config", None)  # some versions of peft remove it themselves
    model.requires_grad_(True)


def untie(model: PreTrainedModel) -> None:
    """Untie weights shared with a layer that the adapter changes, such as embeddings and head.

    Merged, the adapter would change the other layer too. The config says so, so that the merged model loads untied.
    """
    wrapped = {id(_bare(module)) for module in model.modules() if _is_adapted(module)}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(_bare(module), "weight", None)
        if isinstance(weight, nn.Parameter) and id(module) not in wrapped:
            users.setdefault(id(weight), []).append(module)
    shared = [module for modules in users.values() if len(modules) > 1 for module in modules if _is_adapted(module)]
    for module in shared:
        layer = _bare(module)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if shared:
        configs = _tying(model.config)
        vars(model).setdefault(TIED_IN_BASE, [config.tie_word_embeddings for config in configs])
        for config in configs:
            config.tie_word_embeddings = False


def config_of_base(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the model's config as it was before `untie`, as the files of its base need it."""
    config = copy.deepcopy(model.config)
    for part, tied in zip(_tying(config), vars(model).get(TIED_IN_BASE, []), strict=False):
        part.tie_word_embeddings = tied
    return config


def is_untied(model: PreTrainedModel) -> bool:
    """True if `untie` has separated layers that share one weight in the files of the base."""
    return TIED_IN_BASE in vars(model)


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the adapter's weights, not copied, under the names that peft gives them in a file."""
    with _quiet():
        found = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def load_adapter_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[str]:
    """Load what `adapter_tensors` returned, and return the names that the model does not have.

    Raises:
        RuntimeError: a shape differs.
        KeyError: a module that is trained in full is missing.
    """
    with _quiet():
        result: Any = set_peft_model_state_dict(
            model, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, adapter_name=NAME
        )
    return list(result.unexpected_keys)


def adapter_config(model: PreTrainedModel) -> LoraConfig:
    """Return peft's config of the adapter that is attached to the model."""
    return cast(LoraConfig, cast(Any, model).peft_config[NAME])


def adapter_config_text(model: PreTrainedModel, base: str, revision: str | None) -> str:
    """Return the content of adapter_config.json; sorted, since peft's sets have no order."""
    values = adapter_config(model).to_dict() | {
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    }
    return json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"


def read_adapter(folder: Path, key: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the config and the weights of an adapter's folder. Raises UsageError if forge cannot apply it."""
    kind = read_file(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != PeftType.LORA.value:
        raise UsageError(f"{key}: {folder} is a {kind} adapter, but forge applies only LoRA adapters")
    safe, pickled = (folder / name for name in ADAPTER_WEIGHTS)
    if not safe.is_file() and not pickled.is_file():
        raise UsageError(f"{key}: the adapter in {folder} has no weights; put {safe.name} back")
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
        if safe.is_file():
            return config, load_file(safe)
        return config, torch.load(pickled, map_location="cpu", weights_only=True)
    except ForgeError:
        raise
    except Exception as error:  # a library may raise anything for a file that it cannot read
        raise UsageError(f"{key}: the adapter in {folder} cannot be read ({_first_line(error)})") from error


def _tying(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configs that say whether the embeddings and the head share one weight."""
    return [config, config.get_text_config(decoder=True)]


def _saved_in_full(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names in the bare model of the parameters that modules_to_save trains in full."""
    for name, _ in model.named_parameters():
        if f".modules_to_save.{NAME}." in name:
            yield name.replace(f".modules_to_save.{NAME}.", ".")


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(module, "original_module")


def _bare(module: nn.Module) -> Any:
    """Return the layer that the adapter wraps, or the module itself."""
    return getattr(module, "base_layer", getattr(module, "original_module", module))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # load_state_dict names the class in its first line, and the first parameter that does not fit in the second.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else " ".join(lines))[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence peft's warnings about tied embeddings and hub look-ups, which forge handles itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
