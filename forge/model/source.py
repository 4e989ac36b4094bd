"""Finds a model by what the config calls it: hub id, folder, run, adapter with its base, or folder in a package."""

import importlib.util
import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from forge.config.schema import Config, ModelConfig
from forge.errors import UsageError
from forge.model.origin import ADAPTER_CONFIG, BASE_FILE, Origin, WeightFiles, hashed, read_file, short
from forge.run.directory import find_run, find_runs, valid_run_name

logger = logging.getLogger(__name__)

# What an adapter's folder may have of its own; else the base has it.
PARTS = {
    "config.json": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "processor": ("processor_config.json", "preprocessor_config.json"),
}


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: what to give to from_pretrained, how the config named it, and its adapters."""

    name: str  # as the config has it; of an adapter, where there is one
    location: str  # a local folder, or a hub id; of the base where there are adapters
    revision: str | None = None
    adapters: tuple[WeightFiles, ...] = ()  # to be put on one after the other; locations are folders
    recorded: Origin | None = None  # what the newest adapter was trained on, as its base.json has it
    base: str | None = None  # what the base is called; None: name
    base_is_given: bool = False  # by model.base: the user knows better than the record
    continues: bool = False  # the newest adapter is trained on, and not merged
    in_4bit: bool = False  # QLoRA

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    def place_of(self, part: str) -> "ModelSource":
        """Where a part is read from: the newest adapter's folder that has it, else the base."""
        for adapter in reversed(self.adapters):
            if any((Path(adapter.location) / file).is_file() for file in PARTS[part]):
                return ModelSource(self.name, adapter.location)
        return self


def with_run_paths(config: Config) -> Config:
    """The config with the names of runs below output_root as their paths: in model and in teacher.

    A folder of that name comes first, then the run, then the hub. Raises UsageError where several runs have the name.
    """

    @cache  # a name that stands in several places is told of once
    def path_of(name: str | None) -> str | None:
        if name is None or not valid_run_name(name) or Path(name).exists():
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
    """The model that the section `key` of the config names, with all adapters that it comes with."""
    assert config.path is not None
    if config.base is not None and config.adapter is not None:
        raise UsageError(
            f"{key}.base is {config.base}, and {key}.adapter is put on {key}.path and not on that; take {key}.base "
            f"out, or name the adapter in {key}.path instead of {key}.adapter"
        )
    source = find_model(config.path, f"{key}.path", config.revision, base=config.base)
    if config.adapter is not None:
        source = _with_adapter(source, config, key)
    if config.base is not None and not source.adapters:
        raise UsageError(f"{key}.base is {config.base}, and {config.path} is no adapter that needs one; take it out")
    if config.continue_adapter and not source.adapters:
        raise UsageError(
            f"{key}.continue_adapter is true, and {config.path} is no adapter; name an adapter or its run, or start a "
            f"new adapter with {key}.lora"
        )
    return replace(source, continues=config.continue_adapter, in_4bit=config.load_in_4bit)


def find_model(name: str, key: str, revision: str | None = None, *, base: str | None = None) -> ModelSource:
    """Resolves a name of the config's `key`. Raises UsageError where nothing of that name can exist here.

    base: what an adapter is put on, in place of all that it was trained on.
    """
    folder = _folder(name, key)
    if folder is None:
        return ModelSource(name, name, revision)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(name, folder, key, base)
    return ModelSource(name, str(folder))


def _folder(name: str, key: str) -> Path | None:
    """The local folder that a name means; None for a hub id."""
    if name.startswith("package:"):
        return _package_folder(name, key)
    folder = Path(name).expanduser()
    if (folder / "training_state.json").is_file():
        final = folder / "final"
        if not any((final / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise UsageError(f"{key} is the run {name}, which has no final model yet; resume it first, or name another")
        return final.absolute()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UsageError(f"{key} is {name}, which is not a folder here; check the path (you are in {Path.cwd()})")
    return None


def _with_base(name: str, folder: Path, key: str, base: str | None) -> ModelSource:
    """The base of the adapter in `folder`, with the adapters that lie between the two."""
    adapter = WeightFiles(name, str(folder))
    section = key.split(".")[0]
    if not (folder / BASE_FILE).is_file():
        below = _base_of_strangers_adapter(name, folder, key, base)
        return replace(below, adapters=(*below.adapters, adapter), recorded=None)
    recorded = Origin.read(folder / BASE_FILE)
    if base is not None:  # in place of all that lies below the adapter
        below = find_model(base, f"{section}.base")
    else:
        below = ModelSource(recorded.base.name, *_placed(recorded.base, f"the base of {name}", section))
        below = replace(below, adapters=_chain(recorded, f"the adapter below {name}", section))
    return replace(
        below,
        name=name,
        base=below.base or below.name,
        adapters=(*below.adapters, adapter),
        recorded=recorded,
        base_is_given=base is not None,
    )


def _chain(recorded: Origin, what: str, section: str) -> tuple[WeightFiles, ...]:
    """The adapters that an adapter was trained on, where they lie now."""
    return tuple(replace(item, location=_placed(item, what, section)[0]) for item in recorded.adapters)


def _base_of_strangers_adapter(name: str, folder: Path, key: str, base: str | None) -> ModelSource:
    """Of an adapter that forge did not train: what adapter_config.json tells."""
    section = key.split(".")[0]
    if base is not None:
        return replace(find_model(base, f"{section}.base"), name=name, base=base, base_is_given=True)
    told = read_file(folder / ADAPTER_CONFIG)
    path = told.get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{key}: the adapter {name} does not tell its base; name it with {section}.base")
    try:
        return replace(find_model(path, f"the base of {key}", told.get("revision")), name=name, base=path)
    except UsageError as error:
        raise UsageError(f"{error}; {section}.base names it where it lies elsewhere") from None


def _placed(weights: WeightFiles, what: str, section: str) -> tuple[str, str | None]:
    """Where weights of a record lie now: location and revision. Raises UsageError where they do not."""
    if Path(weights.location).is_dir():
        return weights.location, None
    if weights.commit is not None:  # of the hub: the very commit, whatever its branch has now
        return weights.location, weights.commit
    if not weights.location.startswith("/"):
        return weights.location, weights.revision
    try:
        folder = _folder(weights.name, "")
    except UsageError:
        folder = None
    if folder is None:
        raise UsageError(
            f"{what} is not at {weights.location} any more; put it back, or name the adapter in {section}.path and "
            f"what it is to be put on in {section}.base"
        )
    return str(folder), None


def _with_adapter(source: ModelSource, config: ModelConfig, key: str) -> ModelSource:
    """The adapter of model.adapter on top of model.path: on the adapters that come with that, or, where there are none,
    on those that it was trained on."""
    assert config.adapter is not None
    folder = _folder(config.adapter, f"{key}.adapter") or _downloaded(config.adapter, f"{key}.adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{key}.adapter is {config.adapter}, which has no {ADAPTER_CONFIG}; name a LoRA adapter")
    recorded = Origin.read(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else None
    below = source.adapters
    if recorded is not None and not below:
        below = _chain(recorded, f"the adapter below {config.adapter}", key)
    return replace(
        source,
        base=source.base or source.name,
        adapters=(*below, WeightFiles(config.adapter, str(folder))),
        recorded=recorded,
    )


def _downloaded(name: str, key: str) -> Path:
    """The folder in the hub's cache with an adapter of the hub."""
    logger.info("%s: looking for %s in the local cache and on the hub", key, name)
    wanted = ["adapter_*", BASE_FILE, *(file for files in PARTS.values() for file in files)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UsageError(not_found(ModelSource(name, name), key, "adapter", error)) from error


def origin_of(source: ModelSource, key: str) -> Origin:
    """The files that the model is made of, with their hashes: reads all of them, so on rank 0 only.

    Raises UsageError where the newest adapter was trained on others, and where one adapter would be applied twice.
    """
    base = hashed(WeightFiles(source.base or source.name, source.location, source.revision))
    origin = Origin(base, tuple(hashed(adapter) for adapter in source.adapters))
    for number, adapter in enumerate(origin.adapters):
        if adapter.sha256 is not None and adapter.sha256 in [other.sha256 for other in origin.adapters[:number]]:
            raise UsageError(
                f"{key}: the adapter {adapter.name} would be applied twice; name its base in {key}.path, or leave "
                f"{key}.adapter and {key}.base out"
            )
    if source.recorded is not None:
        _compare_with_record(source, origin.without_last(), source.recorded, key)
    return origin


def _compare_with_record(source: ModelSource, below: Origin, recorded: Origin, key: str) -> None:
    """Of everything below an adapter; a base that the user gave may be another, and is only told of."""
    pairs = zip((recorded.base, *recorded.adapters), (below.base, *below.adapters), strict=False)
    changed = [
        f"{then.name} with the weights {short(then.sha256)}, and {now.location} has {short(now.sha256)}"
        for then, now in pairs
        if then.sha256 and now.sha256 and then.sha256 != now.sha256
    ]
    if not changed and len(recorded.adapters) != len(below.adapters):
        changed = [f"{recorded.base.name} with {len(recorded.adapters)} adapters on it, and not {len(below.adapters)}"]
    if not changed:
        return
    told = f"{source.adapters[-1].name} was trained on {changed[0]}"
    if source.base_is_given:
        logger.warning("%s; %s.base asks for it", told, key)
        return
    raise UsageError(
        f"{key}: {told}; bring the weights back that it was trained on, or name the adapter in {key}.path and what it "
        f"is to be put on in {key}.base"
    )


def load_model_config(source: ModelSource, key: str) -> PreTrainedConfig:
    """The model's transformers config, with the labels of its newest adapter. Raises UsageError where it cannot be
    read, and for an adapter of another type of model."""
    config: PreTrainedConfig = _from_pretrained(AutoConfig, source, key, "config.json")
    place = source.place_of("config.json")
    if place is not source:
        told: PreTrainedConfig = _from_pretrained(AutoConfig, place, key, "config.json")
        if told.model_type != config.model_type:
            raise UsageError(
                f"{key}: the adapter {source.adapters[-1].name} does not fit {source.base or source.name}: it was "
                f"trained on a {told.model_type} model, and this is a {config.model_type}"
            )
        config.id2label, config.label2id = told.id2label, told.label2id
    return config


def load_tokenizer(source: ModelSource, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token. Raises UsageError where it cannot be read."""
    tokenizer = _from_pretrained(AutoTokenizer, source.place_of("tokenizer"), key, "tokenizer")
    if tokenizer.pad_token is None:  # decoder models have none; padded positions are masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(f"{key}: the tokenizer of {source.name} has neither a padding nor an end token; use another")
    return tokenizer


def load_processor(source: ModelSource, key: str) -> ProcessorMixin:
    """What prepares images and texts for the model. Raises UsageError where there is no such thing."""
    processor = _from_pretrained(AutoProcessor, source.place_of("processor"), key, "processor")
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
    name = source.name
    if valid_run_name(name):  # when the run began, with_run_paths would have made a path of a run's name
        name += " was the name of no run below output_root (`forge runs` lists them), and it"
    if is_offline_mode():
        return (
            f"{key}: {name} is neither a folder here nor in the local hub cache, and HF_HUB_OFFLINE forbids to "
            f"download it; name a local folder, or fetch it on a machine with a network: `hf download {source.name}`"
        )
    if "connect" in reason.lower():
        reason = "there is no connection to it; HF_HUB_OFFLINE=1 says so at once"
    return (
        f"{key}: {name} is not a folder here, and the hub gave no {what} for it ({reason}); check the spelling, "
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
