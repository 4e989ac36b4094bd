"""Finds the model that a config names: a hub id, a folder, a run, an adapter with its base, or a package's folder."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import is_offline_mode, snapshot_download
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from forge.config.schema import Config, ModelConfig
from forge.errors import ForgeError, UsageError
from forge.model.origin import ADAPTER_CONFIG, BASE_CONFIG, BASE_FILE, Origin, WeightFiles, hashed, read_file, short
from forge.run.directory import find_run, find_runs, valid_run_name

logger = logging.getLogger(__name__)

# What an adapter's folder may hold; else the base has it.
PARTS = {
    "config.json": ("config.json", BASE_CONFIG),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "processor": ("processor_config.json", "preprocessor_config.json"),
}


@dataclass(frozen=True)
class ModelSource:
    """An existing model: what to pass to from_pretrained, what the config calls it, and its adapters."""

    name: str  # as the config has it: of the adapter if there is one
    location: str  # a local folder, or a hub id: of the base if there are adapters
    revision: str | None = None
    adapters: tuple[WeightFiles, ...] = ()  # to apply one after the other; their locations are folders
    recorded: Origin | None = None  # what the newest adapter was trained on, from its base.json
    base: str | None = None  # the name of the base; None: `name`
    base_is_given: bool = False  # model.base is set, which overrides the record
    continues: bool = False  # the newest adapter is trained further, not merged
    in_4bit: bool = False  # QLoRA

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()  # a folder, or the file BASE_CONFIG of an adapter

    def place_of(self, part: str) -> "ModelSource":
        """Return where a part is read from: the newest adapter whose folder has it, else the base."""
        for adapter in reversed(self.adapters):
            if any((Path(adapter.location) / file).is_file() for file in PARTS[part]):
                return ModelSource(self.name, adapter.location)
        return self


def with_run_paths(config: Config) -> Config:
    """Return the config with names of runs in output_root replaced by their paths, in `model` and `teacher`.

    A folder of that name is preferred to a run, and a run to a model on the hub.

    Raises:
        UsageError: several runs have the name.
    """

    @cache  # logs a name once, even if several keys have it
    def path_of(name: str | None) -> str | None:
        if name is None or not valid_run_name(name) or os.path.exists(name):
            return name
        root = Path(config.output_root)
        if all(run.name != name for run in find_runs(root)):
            return name
        path = str(find_run(root, name).path.absolute())
        logger.info("%s is the run %s", name, path)
        return path

    named = ("path", "base", "adapter", "tokenizer")
    model = {key: path_of(getattr(config.model, key)) for key in named}
    teacher = {key: path_of(getattr(config.teacher, key)) for key in named}
    update = {"model": config.model.model_copy(update=model), "teacher": config.teacher.model_copy(update=teacher)}
    return config.model_copy(update=update)


def model_source(config: ModelConfig, key: str) -> ModelSource:
    """Return the model that the config's section `key` names, with all its adapters. Raises UsageError if unusable."""
    assert config.path is not None
    if config.base is not None and config.adapter is not None:
        raise UsageError(
            f"{key}.base is {config.base}, but {key}.adapter is applied to {key}.path; remove {key}.base, or name the "
            f"adapter in {key}.path instead of {key}.adapter"
        )
    source = find_model(config.path, f"{key}.path", config.revision, base=config.base)
    if config.adapter is not None:
        source = _with_adapter(source, config, key)
    if config.base is not None and not source.adapters:
        raise UsageError(f"{key}.base is {config.base}, but {config.path} is not an adapter; remove {key}.base")
    if config.continue_adapter and not source.adapters:
        raise UsageError(
            f"{key}.continue_adapter is true, but {config.path} is not an adapter; name an adapter or its run, or "
            f"start a new adapter with {key}.lora"
        )
    return replace(source, continues=config.continue_adapter, in_4bit=config.load_in_4bit)


def find_model(name: str, key: str, revision: str | None = None, *, base: str | None = None) -> ModelSource:
    """Return the model that the name in the config's `key` stands for.

    Args:
        base: what to apply an adapter to, instead of everything that it was trained on.

    Raises:
        UsageError: nothing of that name can exist here.
    """
    folder = _folder(name, key)
    if folder is None:
        return ModelSource(name, name, revision)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(name, folder, key, base)
    return ModelSource(name, str(folder))


def _folder(name: str, key: str) -> Path | None:
    """Return the local folder that a name stands for; None for a hub id."""
    if name.startswith("package:"):
        return _package_folder(name, key)
    folder = Path(name).expanduser()
    if os.path.isfile(folder / "training_state.json"):  # unlike Path.is_file, also of names that no file can have
        final = folder / "final"
        if not any((final / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise UsageError(
                f"{key} is the run {name}, which has no final model yet; resume it first, or name another model"
            )
        return final.absolute()
    if os.path.isdir(folder):
        return folder.absolute()
    if os.path.exists(folder) or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"{key} is {name}, which is not a folder here; check the path (you are in {Path.cwd()})")
    return None


def _with_base(name: str, folder: Path, key: str, base: str | None) -> ModelSource:
    """Return the base of the adapter in `folder`, with the adapters that are applied before this one."""
    adapter = WeightFiles(name=name, location=str(folder))
    section = key.split(".")[0]
    if not (folder / BASE_FILE).is_file():
        source = _base_without_record(name, folder, key, base)
        return replace(source, adapters=(*source.adapters, adapter), recorded=None)
    recorded = Origin.read(folder / BASE_FILE)
    if base is not None:  # instead of everything that the adapter was trained on
        source = find_model(base, f"{section}.base")
    else:
        source = ModelSource(recorded.base.name, *_located(recorded.base, f"the base of {name}", section))
        source = replace(source, adapters=_chain(recorded, f"an adapter that {name} was trained on", section))
    return replace(
        source,
        name=name,
        base=source.base or source.name,
        adapters=(*source.adapters, adapter),
        recorded=recorded,
        base_is_given=base is not None,
    )


def _chain(recorded: Origin, what: str, section: str) -> tuple[WeightFiles, ...]:
    """Return the adapters that an adapter was trained on, with their present locations."""
    return tuple(item.model_copy(update={"location": _located(item, what, section)[0]}) for item in recorded.adapters)


def _base_without_record(name: str, folder: Path, key: str, base: str | None) -> ModelSource:
    """Return the base of an adapter that forge did not train, from adapter_config.json."""
    section = key.split(".")[0]
    if base is not None:
        return replace(find_model(base, f"{section}.base"), name=name, base=base, base_is_given=True)
    config = read_file(folder / ADAPTER_CONFIG)
    path = config.get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{key}: the adapter {name} does not name its base; set {section}.base")
    try:
        return replace(find_model(path, f"the base of {key}", config.get("revision")), name=name, base=path)
    except UsageError as error:
        raise UsageError(f"{error}; if it is elsewhere, set {section}.base") from None


def _located(weights: WeightFiles, what: str, section: str) -> tuple[str, str | None]:
    """Return the present location and revision of recorded weights. Raises UsageError if they are gone."""
    if Path(weights.location).is_dir():
        return weights.location, None
    if weights.commit is not None:  # on the hub: this very commit, whatever the branch has now
        return weights.location, weights.commit
    if not weights.location.startswith("/"):
        return weights.location, weights.revision
    try:
        folder = _folder(weights.name, "")
    except UsageError:
        folder = None
    if folder is None:
        raise UsageError(
            f"{what} is no longer at {weights.location}; put it back, or set {section}.path to the adapter and "
            f"{section}.base to what it should be applied to"
        )
    return str(folder), None


def _with_adapter(source: ModelSource, config: ModelConfig, key: str) -> ModelSource:
    """Return the model of model.path with the adapter of model.adapter on top.

    It is applied after the adapters of model.path, or, if there are none, after those that it was trained on.
    """
    assert config.adapter is not None
    folder = _folder(config.adapter, f"{key}.adapter") or _downloaded(config.adapter, f"{key}.adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{key}.adapter is {config.adapter}, which has no {ADAPTER_CONFIG}; name a LoRA adapter")
    recorded = Origin.read(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else None
    adapters = source.adapters
    if recorded is not None and not adapters:
        adapters = _chain(recorded, f"an adapter that {config.adapter} was trained on", key)
    return replace(
        source,
        base=source.base or source.name,
        adapters=(*adapters, WeightFiles(name=config.adapter, location=str(folder))),
        recorded=recorded,
    )


def _downloaded(name: str, key: str) -> Path:
    """Return the folder in the hub's cache that holds an adapter of the hub."""
    logger.info("%s: looking for %s in the local cache and on the hub", key, name)
    wanted = ["adapter_*", BASE_FILE, *(file for files in PARTS.values() for file in files)]
    with reading(ModelSource(name, name), key, "adapter"):
        return Path(snapshot_download(name, allow_patterns=wanted))


def origin_of(source: ModelSource, key: str) -> Origin:
    """Return the files that the model is made of, with their hashes. Reads all of them, so call it on rank 0 only.

    Raises:
        UsageError: the newest adapter was trained on other files, or an adapter would be applied twice.
    """
    base = hashed(WeightFiles(name=source.base or source.name, location=source.location, revision=source.revision))
    origin = Origin(base, tuple(hashed(adapter) for adapter in source.adapters))
    for number, adapter in enumerate(origin.adapters):
        if adapter.sha256 is not None and adapter.sha256 in [other.sha256 for other in origin.adapters[:number]]:
            raise UsageError(
                f"{key}: the adapter {adapter.name} would be applied twice; set {key}.path to its base, or remove "
                f"{key}.adapter and {key}.base"
            )
    if source.recorded is not None:
        _compare_with_record(source, origin.without_last(), source.recorded, key)
    return origin


def _compare_with_record(source: ModelSource, present: Origin, recorded: Origin, key: str) -> None:
    """Raise UsageError if an adapter was trained on other files; only warn if the user has set model.base."""
    pairs = zip((recorded.base, *recorded.adapters), (present.base, *present.adapters), strict=False)
    changed = [
        f"{then.name} with the weights {short(then.sha256)}, but {now.location} has {short(now.sha256)}"
        for then, now in pairs
        if then.sha256 and now.sha256 and then.sha256 != now.sha256
    ]
    if not changed and len(recorded.adapters) != len(present.adapters):
        changed = [f"{recorded.base.name} with {len(recorded.adapters)} adapters, not {len(present.adapters)}"]
    if not changed:
        return
    difference = f"{source.adapters[-1].name} was trained on {changed[0]}"
    if source.base_is_given:
        logger.warning("%s; used anyway, since %s.base is set", difference, key)
        return
    raise UsageError(
        f"{key}: {difference}; restore the weights that it was trained on, or set {key}.path to the adapter and "
        f"{key}.base to what it should be applied to"
    )


def load_model_config(source: ModelSource, key: str) -> PreTrainedConfig:
    """Return the model's transformers config, with the labels of its newest adapter.

    Raises:
        UsageError: it cannot be read, or the adapter is for another type of model.
    """
    config: PreTrainedConfig = _from_pretrained(AutoConfig, source, key, "config.json")
    _refuse_quantized(config, source, key)
    place = source.place_of("config.json")
    if place is not source:
        folder = Path(place.location)
        if not (folder / "config.json").is_file():
            place = replace(place, location=str(folder / BASE_CONFIG))
        adapted: PreTrainedConfig = _from_pretrained(AutoConfig, place, key, "config.json")
        if adapted.model_type != config.model_type:
            raise UsageError(
                f"{key}: the adapter {source.adapters[-1].name} does not fit {source.base or source.name}: it was "
                f"trained on a {adapted.model_type} model, but this is a {config.model_type}"
            )
        config.id2label, config.label2id = adapted.id2label, adapted.label2id
    return config


def _refuse_quantized(config: PreTrainedConfig, source: ModelSource, key: str) -> None:
    """Raise UsageError for a checkpoint whose weights are integers with scales, which no gradient can change."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    found = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(found.get("quant_method", "an unknown method"))
    if source.in_4bit and "bitsandbytes" in method:  # the form that model.load_in_4bit itself makes
        return
    section = key.split(".")[0]
    raise UsageError(
        f"{key}: {source.base or source.name} has quantized weights ({method}), which forge neither trains nor distils "
        f"from; set {section}.{'base' if source.adapters else 'path'} to the model that it was made from"
    )


def load_tokenizer(source: ModelSource, key: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token. Raises UsageError if it cannot be read."""
    tokenizer = _from_pretrained(AutoTokenizer, source.place_of("tokenizer"), key, "tokenizer")
    if tokenizer.pad_token is None:  # as of decoder models; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(
            f"{key}: the tokenizer of {source.name} has neither a padding nor an end token; use another one"
        )
    return tokenizer


def load_processor(source: ModelSource, key: str) -> ProcessorMixin:
    """Return the processor of images and texts. Raises UsageError if the model has none."""
    processor = _from_pretrained(AutoProcessor, source.place_of("processor"), key, "processor")
    if not isinstance(processor, ProcessorMixin):
        raise UsageError(
            f"{key}: {source.name} has a {type(processor).__name__}, but no processor of images and text; use a "
            "model that reads images, or the folder of one that was exported with its processor"
        )
    return processor


def _from_pretrained(factory: Any, source: ModelSource, key: str, what: str) -> Any:
    if not source.is_local:
        logger.info("%s: looking for %s in the local cache and on the hub", key, source.name)
    with reading(source, key, what):
        return factory.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)


@contextmanager
def reading(source: ModelSource, key: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises inside, while it reads a part of a model, into a sentence.

    Libraries raise any kind of exception for a file that they cannot read. The log file keeps the traceback.

    Raises:
        UsageError: The part cannot be read.
    """
    try:
        yield
    except (ForgeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logging.getLogger("libraries").info("%s: reading the %s failed", key, what, exc_info=error)
        raise UsageError(not_found(source, key, what, error)) from error


def not_found(source: ModelSource, key: str, what: str, error: Exception) -> str:
    """Return the message for a model that from_pretrained could not read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"{key}: {source.name} needs Python code that comes with the model (auto_map in its config), which forge "
            f"does not run; use a model that transformers {transformers.__version__} knows by itself"
        )
    if source.is_local:
        return f"{key}: the folder {source.location} has no usable {what} ({reason})"
    name = source.name
    if valid_run_name(name):  # with_run_paths would have replaced the name of a run by its path
        name += " is not the name of a run in output_root (`forge runs` lists them), and it"
    if is_offline_mode():
        return (
            f"{key}: {name} is neither a folder here nor in the local hub cache, and HF_HUB_OFFLINE prevents "
            f"downloading it; name a local folder, or fetch it on a machine with a network: `hf download {source.name}`"
        )
    if "connect" in reason.lower():
        reason = "no connection; with HF_HUB_OFFLINE=1 this fails at once"
    return (
        f"{key}: {name} is not a folder here, and the hub has no {what} for it ({reason}); check the spelling, "
        "the network and, for a gated model, your login"
    )


def _package_folder(name: str, key: str) -> Path:
    """Return the folder of package:NAME/FOLDER; the package is found without running its code."""
    package, _, inside = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise UsageError(
            f"{key} is {name}, but the package {package} is not installed; `pip install {wheel}` "
            "(forge's extra `demo` has it)"
        )
    folder = Path(next(iter(found.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise UsageError(f"{key} is {name}, but the package {package} has no folder {inside or '.'}")
    return folder
