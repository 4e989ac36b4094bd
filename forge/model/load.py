"""Loads and builds models in float32: the steps that all tasks share, and LoadedModel, which they return."""

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from forge.config.schema import ModelConfig, TrainingConfig
from forge.errors import ForgeError, UsageError
from forge.model.adapter import is_adapted, is_untied, load_adapter, merge
from forge.model.layers import KeptLayers, check_layers, keep_layers
from forge.model.origin import Origin
from forge.model.source import ModelSource, find_model, load_model_config, load_tokenizer, model_source, reading
from forge.run.metadata import AdapterFacts

logger = logging.getLogger(__name__)

AutoModelClass = type[_BaseAutoModelClass]  # the class of transformers that loads a kind of model


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32, and where it comes from."""

    model: PreTrainedModel
    source: ModelSource | None  # None: built from scratch
    new_weights: list[str]  # the parameters that no checkpoint has, initialised at random
    label_ids: list[int]  # of a classifier: for each label of the data, the index of the model's output
    adapter: AdapterFacts | None = None  # facts of the adapter that is trained; None: all weights are
    origin: Origin | None = None  # the files that it came from, once rank 0 has read them
    layers: KeptLayers | None = None  # those of the source that it is made of; None: all

    @property
    def base_origin(self) -> Origin | None:
        """The files of what a trained adapter is applied to."""
        continued = self.origin is not None and self.source is not None and self.source.continues
        return self.origin.without_last() if self.origin is not None and continued else self.origin

    @property
    def base_sha256(self) -> str | None:
        """The hash of what the trained adapter is applied to; None if there is no adapter."""
        return self.base_origin.weights_sha256 if self.base_origin is not None and is_adapted(self.model) else None

    def facts(self) -> dict[str, Any]:
        """Return what run_metadata.json records of the model."""
        return {
            "source": self.source.name if self.source else "from scratch",
            "location": self.source.location if self.source else None,
            "revision": self.source.revision if self.source else None,
            "commit": self.origin.base.commit if self.origin else None,
            "weights_sha256": self.origin.weights_sha256 if self.origin else None,
            "location_sha256": self.origin.base.sha256 if self.origin else None,
            "adapters": [adapter.model_dump() for adapter in self.origin.adapters] if self.origin else [],
            "base_sha256": self.base_sha256,
            "kept_layers": self.layers.numbers if self.layers else None,
            "layers_of": self.layers.of if self.layers else None,
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "untied": is_untied(self.model),
            "adapter": self.adapter.model_dump() if self.adapter else None,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "labels": list((self.model.config.id2label or {}).values()) if self.label_ids else [],
            "new_weights": self.new_weights if self.source else "all",
        }


class ReadWeights(NamedTuple):
    """A model with the weights of a checkpoint."""

    model: PreTrainedModel
    missing: list[str]  # the parameters that are initialised at random, sorted: the checkpoint lacks them, or
    mismatched: list[str]  # has them in another shape


def not_pooler(names: Iterable[str]) -> list[str]:
    """Return the weights that logits need, among those that no file has.

    Encoders come without their pooler. Only classifiers like BERT's read it, and then their adapter has it.
    """
    return [name for name in names if ".pooler." not in name]


def load_whole(
    auto_model: AutoModelClass,
    config: ModelConfig,
    key: str,
    what: str,
    scratch: PreTrainedConfig | None,
    may_lack: str = "",
) -> LoadedModel:
    """Return the model of the config's section `key`, built from `scratch` or read from a checkpoint with all weights.

    Args:
        what: the weights in a few words, for a message.
        may_lack: part of the name of weights that the checkpoint may lack.

    Raises:
        UsageError: the model cannot be built, or the checkpoint is incomplete.
    """
    if scratch is not None:
        set_dropout(scratch, config.dropout)
        model = build_model(auto_model, scratch, key)
        return LoadedModel(model, None, [name for name, _ in model.named_parameters()], [])
    source = model_source(config, key)
    checkpoint = load_model_config(source, f"{key}.path")
    set_dropout(checkpoint, config.dropout)
    kept = kept_layers(config, source, checkpoint, key)
    model, missing, _ = read_checkpoint(auto_model, source, checkpoint, key, what)
    refuse_missing(source, model, [name for name in missing if not may_lack or may_lack not in name], key)
    model = keep_layers(model, kept, source.name, key)
    return LoadedModel(model, source, missing, [], layers=kept)


def kept_layers(config: ModelConfig, source: ModelSource, checkpoint: PreTrainedConfig, key: str) -> KeptLayers | None:
    """Return the layers that `keep_layers` asks for, if any. Raises UsageError if the model does not have them."""
    return None if config.keep_layers is None else check_layers(config.keep_layers, checkpoint, source.name, key)


def load_own_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer, or the one that the config names. Raises UsageError if it cannot be read."""
    return load_tokenizer(*processing_source(config))


def processing_source(config: ModelConfig, key: str = "model") -> tuple[ModelSource, str]:
    """Return the source of the tokenizer or processor of the section `key`, and the key that names it."""
    if config.tokenizer:
        return find_model(config.tokenizer, f"{key}.tokenizer"), f"{key}.tokenizer"
    return model_source(config, key), f"{key}.path"


def read_checkpoint(
    auto_model: AutoModelClass, source: ModelSource, config: PreTrainedConfig, key: str, what: str
) -> ReadWeights:
    """Return the model of `config` with the weights of `source`, in float32, and its adapters merged into it.

    If the newest adapter is to be trained, it is attached instead of merged.

    Raises:
        UsageError: there are no such weights, or an adapter does not fit them.
    """
    options = _in_4bit(source, key) if source.in_4bit else {}
    with _quiet_about_missing_weights(), reading(source, f"{key}.path", what):
        model, info = auto_model.from_pretrained(
            source.location,
            revision=source.revision,
            config=config,
            dtype=torch.float32,  # master weights; mixed precision computes in fewer bits
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of another size is judged by its task
            trust_remote_code=False,
            **options,
        )
    if is_adapted(model):
        raise UsageError(
            f"{key}.path: {source.name} is an adapter on the hub; set {key}.path to its base, and {key}.adapter to it"
        )
    in_full = _attach_adapters(model, source, key)
    mismatched = [entry[0] for entry in info["mismatched_keys"] if entry[0] not in in_full]
    return ReadWeights(model, sorted((set(info["missing_keys"]) | set(mismatched)) - in_full), mismatched)


def refuse_missing(source: ModelSource, model: PreTrainedModel, missing: list[str], key: str) -> None:
    """Raise UsageError if a checkpoint lacks weights that must not be initialised at random."""
    if missing:
        raise UsageError(
            f"{key}.path: {source.name} lacks weights of {model.config.model_type} ({', '.join(missing[:3])}, "
            f"{len(missing)} in all); it is a checkpoint of another architecture, or only a part of one"
        )


def build_model(auto_model: AutoModelClass, config: PreTrainedConfig, key: str) -> PreTrainedModel:
    """Return a model with random weights, in float32. Raises UsageError if it cannot be built from the config."""
    try:
        model = auto_model.from_config(config)
    except ForgeError:
        raise
    except Exception as error:  # sizes that do not fit each other
        raise UsageError(_not_buildable(f"{key}.config", error)) from error
    logger.info("%s: built from scratch (%s)", key, model.config.model_type)
    return cast(PreTrainedModel, model.float())


def scratch_config(keys: dict[str, Any], where: str, **defaults: Any) -> PreTrainedConfig:
    """Return the transformers config with these keys, which include model_type.

    Args:
        where: the place of the keys in forge's config.
        defaults: keys that apply unless `keys` has them.

    Raises:
        UsageError: models of this type have no such key, or the values do not fit.
    """
    given = dict(keys)
    model_type = str(given.pop("model_type"))
    try:
        known = AutoConfig.for_model(model_type)
        unknown = [name for name in given if not hasattr(known, name)]
        if unknown:
            raise UsageError(f"{where}.{unknown[0]} is not a setting of {model_type} models")
        return AutoConfig.for_model(model_type, **{**defaults, **given})
    except ForgeError:
        raise
    except Exception as error:
        raise UsageError(_not_buildable(where, error)) from error


def set_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """Set every dropout rate in the config, whose names differ from model to model; None: leave them."""
    if rate is not None:
        for name, value in config.to_dict().items():
            # A boolean, such as ESM's token_dropout, is a switch.
            is_rate = isinstance(value, int | float | None) and not isinstance(value, bool)
            if ("dropout" in name or "pdrop" in name) and is_rate:
                setattr(config, name, rate)
        for part in config.sub_configs:
            if getattr(config, part) is not None:  # ESM has a part for folding alone
                set_dropout(getattr(config, part), rate)


def check_embeddings(embeddings: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raise UsageError if the tokenizer has more tokens than the model embeds."""
    rows = len(cast(torch.nn.Embedding, embeddings).weight)
    if len(tokenizer) > rows:
        raise UsageError(
            f"{key}: the tokenizer has {len(tokenizer)} tokens, but the model embeds only {rows}; use its own tokenizer"
        )


def limit_of(value: int | None) -> int | None:
    """Return a limit that a checkpoint states; None where it states none, which some write as -1 or 0."""
    return value if value is not None and value > 0 else None


def check_limit(max_length: int, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Raise UsageError if the rows may be longer than a tokenizer says that its model reads."""
    limit = limit_of(tokenizer.model_max_length)
    if limit is not None and max_length > limit:
        raise UsageError(f"task.max_length is {max_length}, but {whose} takes at most {limit}")


def check_fits(model: PreTrainedModel, max_length: int, training: TrainingConfig) -> None:
    """Raise UsageError if the model cannot read rows of max_length tokens, or cannot be trained as asked."""
    positions = limit_of(getattr(model.config.get_text_config(), "max_position_embeddings", None))
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from padding_idx + 1 on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = positions and positions - module.padding_idx - 1
    if positions is not None and max_length > positions:
        raise UsageError(
            f"task.max_length is {max_length}, but the model has only {positions} positions; lower task.max_length"
        )
    if training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise UsageError(f"{name} cannot recompute activations; set training.gradient_checkpointing: false")


def _attach_adapters(model: PreTrainedModel, source: ModelSource, key: str) -> set[str]:
    """Return the names of the parameters that an adapter holds in full, which its base may lack."""
    found: set[str] = set()
    for adapter in source.adapters:
        trained = source.continues and adapter is source.adapters[-1]
        handle, in_full = load_adapter(model, Path(adapter.location), f"{key}.path", trainable=trained)
        found |= in_full
        if not trained:
            merge(handle)
    if source.adapters:
        logger.info("%s: %s on %s", key, ", ".join(item.name for item in source.adapters), source.base)
    return found


def _in_4bit(source: ModelSource, key: str) -> dict[str, Any]:
    """Return the options of from_pretrained for QLoRA (arXiv 2305.14314). Raises UsageError if it cannot be done."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{key}.load_in_4bit needs the package bitsandbytes; `pip install bitsandbytes`, or set it to false"
        )
    if not torch.cuda.is_available():
        raise UsageError(f"{key}.load_in_4bit needs a GPU, but there is none here; set it to false")
    if len(source.adapters) > int(source.continues):
        raise UsageError(
            f"{key}.load_in_4bit: an adapter cannot be merged into 4-bit weights; set {key}.path to its run's "
            "final/merged (export.merge: true writes it), or set it to false"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def _not_buildable(where: str, error: Exception) -> str:
    return f"{where}: transformers cannot build a model from this ({' '.join(str(error).split())[:200]})"


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _quiet_about_missing_weights() -> Iterator[None]:
    """Silence the table in which transformers reports missing weights: the task judges and reports what they mean."""
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_no_load_report)
    try:
        yield
    finally:
        report.removeFilter(_no_load_report)
