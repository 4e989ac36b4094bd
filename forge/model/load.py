"""Loads and builds models in float32: the parts that every task uses, and what is known of the result."""

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from forge.config.schema import ModelConfig, TrainingConfig
from forge.errors import UsageError
from forge.model.adapter import is_adapted, is_untied, load_adapter, merge
from forge.model.layers import KeptLayers, check_layers, keep_layers
from forge.model.origin import Origin
from forge.model.source import ModelSource, find_model, load_model_config, load_tokenizer, model_source, not_found

logger = logging.getLogger(__name__)

AutoModelClass = type[_BaseAutoModelClass]  # the class of transformers that loads a kind of model


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32, and where it comes from."""

    model: PreTrainedModel
    source: ModelSource | None  # None: built from scratch
    new_weights: list[str]  # the parameters that no checkpoint gave
    label_ids: list[int]  # of a classifier: for each label of the data the index of the model's output
    adapter: dict[str, Any] | None = None  # what is known of the one that is trained; None: all weights are
    origin: Origin | None = None  # the files that it came from, where rank 0 has read them
    layers: KeptLayers | None = None  # those of the source that it is made of; None: all

    @property
    def below(self) -> Origin | None:
        """What an adapter that is trained lies on."""
        continued = self.origin is not None and self.source is not None and self.source.continues
        return self.origin.without_last() if self.origin is not None and continued else self.origin

    @property
    def base_sha256(self) -> str | None:
        """The hash of what an adapter that is trained lies on; None where there is none."""
        return self.below.weights_sha256 if self.below is not None and is_adapted(self.model) else None

    def facts(self) -> dict[str, Any]:
        """What run_metadata.json tells of the model."""
        return {
            "source": self.source.name if self.source else "from scratch",
            "location": self.source.location if self.source else None,
            "revision": self.source.revision if self.source else None,
            "commit": self.origin.base.commit if self.origin else None,
            "weights_sha256": self.origin.weights_sha256 if self.origin else None,
            "location_sha256": self.origin.base.sha256 if self.origin else None,
            "adapters": [asdict(adapter) for adapter in self.origin.adapters] if self.origin else [],
            "base_sha256": self.base_sha256,
            "kept_layers": self.layers.numbers if self.layers else None,
            "layers_of": self.layers.of if self.layers else None,
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "untied": is_untied(self.model),
            "adapter": self.adapter,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "labels": list((self.model.config.id2label or {}).values()) if self.label_ids else [],
            "new_weights": self.new_weights if self.source else "all",
        }


class ReadWeights(NamedTuple):
    """A model with the weights of a checkpoint."""

    model: PreTrainedModel
    missing: list[str]  # names of parameters that start new, sorted: the checkpoint lacks them, or
    mismatched: list[str]  # has them in another shape


def not_pooler(names: Iterable[str]) -> list[str]:
    """Of weights that no file has, those that logits need: encoders come without their pooler, which only a classifier
    of BERT's kind reads, and there the adapter that was trained on it holds it."""
    return [name for name in names if ".pooler." not in name]


def load_whole(
    auto_model: AutoModelClass,
    config: ModelConfig,
    key: str,
    what: str,
    scratch: PreTrainedConfig | None,
    may_lack: str = "",
) -> LoadedModel:
    """The model of the config's section `key`: new, as `scratch` says, or of a checkpoint that has all its weights.

    what: the weights in a few words, for a message. may_lack: what is in the name of a weight that may start new.
    Raises UsageError where the model cannot be built, or read whole.
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
    """What `keep_layers` asks for; None where nothing does. Raises UsageError where the model has no such layers."""
    return None if config.keep_layers is None else check_layers(config.keep_layers, checkpoint, source.name, key)


def load_own_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model, or that the config names for it. Raises UsageError."""
    return load_tokenizer(*processing_source(config))


def processing_source(config: ModelConfig, key: str = "model") -> tuple[ModelSource, str]:
    """Where the tokenizer or processor of the section `key` comes from, and the key that says so."""
    if config.tokenizer:
        return find_model(config.tokenizer, f"{key}.tokenizer"), f"{key}.tokenizer"
    return model_source(config, key), f"{key}.path"


def read_checkpoint(
    auto_model: AutoModelClass, source: ModelSource, config: PreTrainedConfig, key: str, what: str
) -> ReadWeights:
    """The model of `config` with the weights of `source`, in float32, its adapters merged into it, the newest put on it
    if that is to be trained. Raises UsageError where there are no such weights, or an adapter does not fit them."""
    options = _in_4bit(source, key) if source.in_4bit else {}
    with _quiet_about_missing_weights():
        try:
            model, info = auto_model.from_pretrained(
                source.location,
                revision=source.revision,
                config=config,
                dtype=torch.float32,  # master weights; mixed precision computes in less
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head of another size is judged by its task, with a sentence
                **options,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UsageError(not_found(source, f"{key}.path", what, error)) from error
    if is_adapted(model):
        raise UsageError(
            f"{key}.path: {source.name} is an adapter on the hub; set {key}.path to its base and {key}.adapter to it"
        )
    given = _with_adapters(model, source, key)
    mismatched = [entry[0] for entry in info["mismatched_keys"] if entry[0] not in given]
    return ReadWeights(model, sorted((set(info["missing_keys"]) | set(mismatched)) - given), mismatched)


def refuse_missing(source: ModelSource, model: PreTrainedModel, missing: list[str], key: str) -> None:
    """Raises UsageError if a checkpoint lacks weights that cannot start new."""
    if missing:
        raise UsageError(
            f"{key}.path: {source.name} lacks weights of {model.config.model_type} ({', '.join(missing[:3])}, "
            f"{len(missing)} in all); it is a checkpoint of another architecture or a part of one"
        )


def build_model(auto_model: AutoModelClass, config: PreTrainedConfig, key: str) -> PreTrainedModel:
    """A model with new weights, in float32. Raises UsageError for a config that no model can be built from."""
    try:
        model = auto_model.from_config(config)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # sizes that do not fit each other
        raise UsageError(_not_buildable(f"{key}.config", error)) from error
    logger.info("%s: built from scratch (%s)", key, model.config.model_type)
    return cast(PreTrainedModel, model.float())


def scratch_config(keys: dict[str, Any], where: str, **defaults: Any) -> PreTrainedConfig:
    """The transformers config of these keys, model_type among them; `where` is their place in forge's config.

    Raises UsageError for a key that it lacks.
    """
    given = dict(keys)
    model_type = str(given.pop("model_type"))
    try:
        known = AutoConfig.for_model(model_type)
        unknown = [name for name in given if not hasattr(known, name)]
        if unknown:
            raise UsageError(f"{where}.{unknown[0]} is not a setting of {model_type} models")
        return AutoConfig.for_model(model_type, **{**defaults, **given})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UsageError(_not_buildable(where, error)) from error


def set_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """Sets every dropout rate of the config; their names differ from model to model."""
    if rate is not None:
        for name, value in config.to_dict().items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, int | float | None):
                setattr(config, name, rate)
        for part in config.sub_configs:
            set_dropout(getattr(config, part), rate)


def check_embeddings(embeddings: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises UsageError for a tokenizer with more tokens than the model embeds."""
    rows = len(cast(torch.nn.Embedding, embeddings).weight)
    if len(tokenizer) > rows:
        raise UsageError(
            f"{key}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; use its own tokenizer"
        )


def check_fits(model: PreTrainedModel, max_length: int, training: TrainingConfig) -> None:
    """Raises UsageError where the model cannot take rows of max_length tokens, or be trained as asked."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1 on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    if positions is not None and max_length > positions:
        raise UsageError(
            f"task.max_length is {max_length}, and the model has {positions} positions; lower task.max_length"
        )
    if training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise UsageError(f"{name} cannot recompute activations; set training.gradient_checkpointing: false")


def _with_adapters(model: PreTrainedModel, source: ModelSource, key: str) -> set[str]:
    """The names of the parameters that an adapter holds in full, which its base may lack."""
    given: set[str] = set()
    for adapter in source.adapters:
        trained = source.continues and adapter is source.adapters[-1]
        handle, in_full = load_adapter(model, Path(adapter.location), f"{key}.path", trainable=trained)
        given |= in_full
        if not trained:
            merge(handle)
    if source.adapters:
        logger.info("%s: %s on %s", key, ", ".join(item.name for item in source.adapters), source.base)
    return given


def _in_4bit(source: ModelSource, key: str) -> dict[str, Any]:
    """What from_pretrained is given for QLoRA (arXiv 2305.14314). Raises UsageError where it cannot be done."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{key}.load_in_4bit needs the package bitsandbytes; `pip install bitsandbytes`, or set it to false"
        )
    if not torch.cuda.is_available():
        raise UsageError(f"{key}.load_in_4bit needs a GPU, and there is none here; set it to false")
    if len(source.adapters) > int(source.continues):
        raise UsageError(
            f"{key}.load_in_4bit: an adapter cannot be merged into weights of 4 bits; set {key}.path to its run's "
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
    """transformers reports them as a table; what they mean is judged and said by the task."""
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_no_load_report)
    try:
        yield
    finally:
        report.removeFilter(_no_load_report)
