"""Finds a model by what the config calls it: hub id, local folder, run directory, or folder in a package."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from forge.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: what to give to from_pretrained, and how the config named it."""

    name: str  # as the config has it
    location: str  # a local folder, or a hub id
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def find_model(name: str, key: str, revision: str | None = None) -> ModelSource:
    """Resolves a name of the config's `key`. Raises UsageError where nothing of that name can exist here."""
    if name.startswith("package:"):
        return ModelSource(name, str(_package_folder(name, key)))
    folder = Path(name).expanduser()
    if (folder / "training_state.json").is_file():
        if not (folder / "final" / "config.json").is_file():
            raise UsageError(f"{key} is the run {name}, which has no final model yet; resume it first, or name another")
        return ModelSource(name, str((folder / "final").absolute()))
    if folder.is_dir():
        return ModelSource(name, str(folder.absolute()))
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"{key} is {name}, which is not a folder here; check the path (you are in {Path.cwd()})")
    return ModelSource(name, name, revision)


def load_model_config(source: ModelSource, key: str) -> PreTrainedConfig:
    """The model's transformers config. Raises UsageError where it cannot be read."""
    return _from_pretrained(AutoConfig, source, key, "config.json")


def load_tokenizer(source: ModelSource, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token. Raises UsageError where it cannot be read."""
    tokenizer = _from_pretrained(AutoTokenizer, source, key, "tokenizer")
    if tokenizer.pad_token is None:  # decoder models have none; padded positions are masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(f"{key}: the tokenizer of {source.name} has neither a padding nor an end token; use another")
    return tokenizer


def load_processor(source: ModelSource, key: str) -> ProcessorMixin:
    """What prepares images and texts for the model. Raises UsageError where there is no such thing."""
    processor = _from_pretrained(AutoProcessor, source, key, "processor")
    if not isinstance(processor, ProcessorMixin):
        raise UsageError(
            f"{key}: {source.name} has a {type(processor).__name__} and no processor of images and text; use a model "
            "that reads images, or the folder of one that was exported with its processor"
        )
    return processor


def _from_pretrained(factory: Any, source: ModelSource, key: str, what: str) -> Any:
    if not source.is_local:
        logger.info("%s: looking for %s in the local cache and on the hub", key, source.name)
    try:
        return factory.from_pretrained(source.location, revision=source.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(not_found(source, key, what, error)) from error


def not_found(source: ModelSource, key: str, what: str, error: Exception) -> str:
    """One sentence for a model that from_pretrained could not read."""
    reason = " ".join(str(error).split())[:200]
    if source.is_local:
        return f"{key}: the folder {source.location} has no usable {what} ({reason})"
    if is_offline_mode():
        return (
            f"{key}: {source.name} is neither a folder here nor in the local hub cache, and HF_HUB_OFFLINE forbids to "
            f"download it; name a local folder, or fetch it on a machine with a network: `hf download {source.name}`"
        )
    if "connect" in reason.lower():
        reason = "there is no connection to it; HF_HUB_OFFLINE=1 says so at once"
    return (
        f"{key}: {source.name} is not a folder here, and the hub gave no {what} for it ({reason}); check the spelling, "
        "the network and, for a gated model, your login"
    )


def _package_folder(name: str, key: str) -> Path:
    """The folder of package:NAME/FOLDER; the package is located, its code is not run."""
    package, _, inside = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise UsageError(
            f"{key} is {name}, and the package {package} is not installed; `pip install {wheel}` "
            "(forge's extra `demo` has it)"
        )
    folder = Path(next(iter(found.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise UsageError(f"{key} is {name}, and the package {package} has no folder {inside or '.'}")
    return folder
