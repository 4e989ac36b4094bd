"""Loads a sequence classifier, from a checkpoint or from scratch, and matches its outputs to the data's labels."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from forge.config.schema import ModelConfig
from forge.errors import UsageError
from forge.model.layers import keep_layers
from forge.model.load import (
    LoadedModel,
    build_model,
    check_embeddings,
    kept_layers,
    read_checkpoint,
    refuse_missing,
    scratch_config,
    set_dropout,
)
from forge.model.source import ModelSource, load_model_config, model_source

logger = logging.getLogger(__name__)


def load_classifier(
    config: ModelConfig, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, key: str = "model"
) -> LoadedModel:
    """Return the sequence classifier of `config` for the data's labels.

    A head that the checkpoint lacks is initialised, in the order of the data's labels. A head that it has keeps the
    checkpoint's order, and the data's labels are mapped to it by name: the order differs between checkpoints.

    Raises:
        UsageError: the checkpoint does not fit the labels or the tokenizer.
    """
    if config.config is not None:
        scratch = scratch_config(config.config, f"{key}.config", vocab_size=len(tokenizer))
        scratch.pad_token_id = tokenizer.pad_token_id
        _set_labels(scratch, labels)
        set_dropout(scratch, config.dropout)
        model = build_model(AutoModelForSequenceClassification, scratch, key)
        loaded = LoadedModel(model, None, [name for name, _ in model.named_parameters()], list(range(len(labels))))
    else:
        loaded = _load_checkpoint(model_source(config, key), config, labels, key)
    check_embeddings(loaded.model.get_input_embeddings(), tokenizer, key)
    if tokenizer.pad_token_id is not None and not _counts_from_padding(loaded.model):
        # decoders read a row's last token, which they find by the padding after it
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
    return loaded


def _counts_from_padding(model: PreTrainedModel) -> bool:
    """Return True for a model whose positions begin after the padding token's number, such as RoBERTa.

    Such a model is built with that number, so with another one in its config it would be another model when it is
    loaded again.
    """
    return any(hasattr(module, "padding_idx") and hasattr(module, "position_embeddings") for module in model.modules())


def named_labels(id2label: Mapping[Any, str]) -> list[str] | None:
    """Return a model's label names in the order of its outputs; None if they are transformers' LABEL_0, LABEL_1, …"""
    names = [str(id2label[i]) for i in sorted(id2label)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def align(data_labels: Sequence[str], model_labels: Sequence[str], key: str = "model") -> list[int]:
    """Return for each label of the data the index of the model's output with that name.

    Case, white space, _ and - are ignored, unless the names are the same with them.

    Args:
        key: the model's section of the config, for the message.

    Raises:
        UsageError: the two have different names, so nobody can tell which output is which label.
    """
    if sorted(data_labels) == sorted(model_labels):
        return [list(model_labels).index(name) for name in data_labels]
    positions = {plain_name(name): i for i, name in enumerate(model_labels)}
    wanted = [plain_name(name) for name in data_labels]
    alike = _written_alike(data_labels) or _written_alike(model_labels)
    if alike and set(positions) == set(wanted):
        raise UsageError(
            f"the data's labels ({', '.join(data_labels)}) and the {key}'s ({', '.join(model_labels)}) are not written "
            f"alike, and {alike[0]!r} and {alike[1]!r} differ only by case, white space, _ or -, so it is not clear "
            "which is which; write the data's, or task.labels, exactly as the model has them"
        )
    if sorted(positions) != sorted(wanted) or len(positions) != len(model_labels):
        way_out = (
            f"the model's with {key}.labels, or start a new head with {key}.new_head: true"
            if key == "model"
            else f"or the {key}'s with {key}.labels; a {key} with more or fewer labels cannot be used"
        )
        raise UsageError(
            f"the data's labels ({', '.join(data_labels)}) and the {key}'s ({', '.join(model_labels)}) do not have the "
            f"same names; rename the data's with task.labels, {way_out}"
        )
    return [positions[name] for name in wanted]


def _load_checkpoint(source: ModelSource, config: ModelConfig, labels: Sequence[str], key: str) -> LoadedModel:
    checkpoint = load_model_config(source, f"{key}.path")
    set_dropout(checkpoint, config.dropout)
    kept = kept_layers(config, source, checkpoint, key)
    outputs = checkpoint.num_labels
    names = config.labels or named_labels(checkpoint.id2label or {})
    if config.labels is not None and len(config.labels) != outputs:
        raise UsageError(f"{key}.labels has {len(config.labels)} names, but the checkpoint has {outputs} outputs")
    if config.new_head or names is None:
        _set_labels(checkpoint, labels)
    else:
        align(labels, names, key)
        _set_labels(checkpoint, names)

    read = read_checkpoint(AutoModelForSequenceClassification, source, checkpoint, key, "weights for a classifier")
    model, absent = read.model, read.missing
    body = f"{model.base_model_prefix}."
    refuse_missing(source, model, [name for name in absent if name.startswith(body) and ".pooler." not in name], key)
    head = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    if config.new_head:
        _reset_head(model, head)
        absent = sorted({*absent, *head})
    elif names is None and (read.mismatched or not any(name in absent for name in head)):
        new_head = f", or start a new head with {key}.new_head: true" if key == "model" else ""
        raise UsageError(
            f"{key}.path: {source.name} has a classification head of {outputs} outputs without label names; give "
            f"them with {key}.labels: [...], in the order of the outputs{new_head}"
        )
    if absent:
        logger.info("%s: not in %s, so initialised at random: %s", key, source.name, ", ".join(absent))
    model = keep_layers(model, kept, source.name, key)
    final_names = cast(dict[int, str], model.config.id2label)
    label_ids = align(labels, [final_names[i] for i in sorted(final_names)], key)
    return LoadedModel(model, source, absent, label_ids, layers=kept)


def _set_labels(config: PreTrainedConfig, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"


def _reset_head(model: PreTrainedModel, head: Sequence[str]) -> None:
    """Initialise the head again, as a new model of its config would be."""
    fresh = AutoModelForSequenceClassification.from_config(model.config).state_dict()
    model.load_state_dict({name: fresh[name] for name in head}, strict=False)


def _written_alike(names: Sequence[str]) -> list[str]:
    """Return the first names that are the same without what people write in several ways."""
    groups = ([other for other in names if plain_name(other) == plain_name(name)] for name in names)
    return next((group for group in groups if len(group) > 1), [])


def plain_name(name: str) -> str:
    """Return a label's name without what people write in several ways."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
