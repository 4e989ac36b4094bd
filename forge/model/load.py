"""Loads the model that is trained: from a checkpoint or from scratch, its outputs matched to the data's labels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forge.config.schema import ModelConfig, TrainingConfig
from forge.errors import UsageError
from forge.model.labels import align, named_labels
from forge.model.source import ModelSource, find_model, load_model_config, not_found

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32, and for each label of the data the index of the model's output."""

    model: PreTrainedModel
    source: ModelSource | None  # None: built from scratch
    label_ids: list[int]
    new_weights: list[str]  # the parameters that no checkpoint gave

    def facts(self) -> dict[str, Any]:
        """What run_metadata.json tells of the model."""
        return {
            "source": self.source.name if self.source else "from scratch",
            "location": self.source.location if self.source else None,
            "revision": self.source.revision if self.source else None,
            "commit": getattr(self.model.config, "_commit_hash", None),  # of a hub model, whatever revision said
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "labels": list((self.model.config.id2label or {}).values()),
            "new_weights": self.new_weights if self.source else "all",
        }


def load_classifier(
    config: ModelConfig, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, key: str = "model"
) -> LoadedModel:
    """The sequence classifier of `config` for the data's labels. Raises UsageError where the two do not fit.

    A head that the checkpoint lacks is made anew, in the data's order of labels. One that it has keeps the
    checkpoint's order, and the data's labels are mapped to it by name.
    """
    if config.config is not None:
        scratch = _scratch_config(config.config, labels, tokenizer, key)
        _set_dropout(scratch, config.dropout)
        try:
            model = AutoModelForSequenceClassification.from_config(scratch)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # sizes that do not fit each other
            raise UsageError(_not_buildable(key, error)) from error
        logger.info("%s: built from scratch (%s)", key, model.config.model_type)
        loaded = LoadedModel(
            model.float(), None, list(range(len(labels))), [name for name, _ in model.named_parameters()]
        )
    else:
        assert config.path is not None  # the schema requires one of the two
        loaded = _load_checkpoint(find_model(config.path, f"{key}.path", config.revision), config, labels, key)
    embeddings = len(cast(torch.nn.Embedding, loaded.model.get_input_embeddings()).weight)
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"{key}: the tokenizer has {len(tokenizer)} tokens and the model embeds {embeddings}; use its own tokenizer"
        )
    if loaded.model.config.pad_token_id is None:  # decoder models find a row's last token by it
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
    return loaded


def check_fits(model: PreTrainedModel, max_length: int, training: TrainingConfig) -> None:
    """Raises UsageError where the model cannot take rows of max_length tokens, or be trained as asked."""
    positions = getattr(model.config, "max_position_embeddings", None)
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


def _load_checkpoint(source: ModelSource, config: ModelConfig, labels: Sequence[str], key: str) -> LoadedModel:
    checkpoint = load_model_config(source, f"{key}.path")
    _set_dropout(checkpoint, config.dropout)
    outputs = checkpoint.num_labels
    names = config.labels or named_labels(checkpoint.id2label or {})
    if config.labels is not None and len(config.labels) != outputs:
        raise UsageError(f"{key}.labels has {len(config.labels)} names and the checkpoint has {outputs} outputs")
    if config.new_head or names is None:
        _set_labels(checkpoint, labels)
    else:
        align(labels, names)
        _set_labels(checkpoint, names)

    # transformers reports missing weights as a table; what they mean is judged and said below.
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_no_load_report)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.location,
            revision=source.revision,
            config=checkpoint,
            dtype=torch.float32,  # master weights; mixed precision computes in less
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of another size is judged below, with a sentence
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(not_found(source, f"{key}.path", "weights for a classifier", error)) from error
    finally:
        report.removeFilter(_no_load_report)

    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    absent = sorted(set(info["missing_keys"]) | set(mismatched))
    body = f"{model.base_model_prefix}."
    lost_body = [name for name in absent if name.startswith(body) and ".pooler." not in name]
    if lost_body:
        raise UsageError(
            f"{key}.path: {source.name} lacks weights of {model.config.model_type} ({', '.join(lost_body[:3])}, "
            f"{len(lost_body)} in all); it is a checkpoint of another architecture or a part of one"
        )
    head = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    if config.new_head:
        _renew(model, head)
        absent = sorted({*absent, *head})
    elif names is None and (mismatched or not any(name in absent for name in head)):
        raise UsageError(
            f"{key}.path: {source.name} has a classification head of {outputs} outputs without label names; give "
            f"them in the order of its outputs with {key}.labels: [...], or start a new head with {key}.new_head: true"
        )
    if absent:
        logger.info("%s: %s has no %s; they start new", key, source.name, ", ".join(absent))
    final_names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return LoadedModel(model, source, align(labels, final_names), absent)


def _scratch_config(
    keys: dict[str, object], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, key: str
) -> PreTrainedConfig:
    given = dict(keys)
    model_type = str(given.pop("model_type"))
    try:
        known = AutoConfig.for_model(model_type)
        unknown = [name for name in given if not hasattr(known, name)]
        if unknown:
            raise UsageError(f"{key}.config.{unknown[0]} is not a setting of {model_type} models")
        config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **given})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UsageError(_not_buildable(key, error)) from error
    config.pad_token_id = tokenizer.pad_token_id
    _set_labels(config, labels)
    return config


def _not_buildable(key: str, error: Exception) -> str:
    return f"{key}.config: transformers cannot build a classifier from this ({' '.join(str(error).split())[:200]})"


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _set_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """Sets every dropout rate of the config; their names differ from model to model."""
    if rate is not None:
        for name, value in config.to_dict().items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, int | float | None):
                setattr(config, name, rate)


def _set_labels(config: PreTrainedConfig, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"


def _renew(model: PreTrainedModel, head: Sequence[str]) -> None:
    """Gives the head the weights that a model of its own config starts with."""
    fresh = AutoModelForSequenceClassification.from_config(model.config).state_dict()
    model.load_state_dict({name: fresh[name] for name in head}, strict=False)
