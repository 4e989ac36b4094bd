"""The classification task: sentences or pairs with a label, their tokens, batches and metrics."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forge.config.schema import Config, ModelConfig, TrainingConfig
from forge.config.task_schema import ClassificationTask
from forge.data.batches import TEACHER_PREFIX, Batch, Row
from forge.data.fingerprints import rows_hash, source_hash, text_hash, tokenizer_hash
from forge.data.rows import describe, load_rows
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.classifier import load_classifier
from forge.model.load import LoadedModel, check_fits, load_own_tokenizer
from forge.task.probe import check_padding
from forge.task.task import Metrics, Task, task_section

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classification(Task):
    """Tokenized rows with the columns input_ids, …, label (an index into labels) and length.

    If the teacher reads its own tokens, also teacher_input_ids, ….
    """

    processing: PreTrainedTokenizerBase
    labels: list[str]  # in the order of the data
    max_length: int
    train: Dataset
    validation: dict[str, Dataset]  # by short name
    fingerprint: str  # hash of texts, labels and tokenizer
    truncated: dict[str, int]  # rows cut to max_length, by split
    description: str
    texts: dict[str, Dataset]  # by split, train included: the columns text, text_pair and label
    label_ids: list[int] = field(default_factory=list)  # the model's output for each of labels
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    teacher_truncated: dict[str, int] = field(default_factory=dict)  # rows cut as its own tokens, by split
    same_tokens: bool = True

    name: ClassVar[str] = "classification"
    title: ClassVar[str] = "A sequence classifier"
    pipeline_tag: ClassVar[str] = "text-classification"
    auto_model: ClassVar[type[Any]] = AutoModelForSequenceClassification
    main_metric: ClassVar[str] = "accuracy"
    headline: ClassVar[tuple[str, ...]] = ("ce", "accuracy", "macro_f1")
    one_label_per_row: ClassVar[bool] = True

    @classmethod
    def load(cls, config: Config) -> "Classification":
        return prepare(task_section(config, ClassificationTask), load_own_tokenizer(config.model))

    @classmethod
    def adapted_config(cls, config: Config, section: ModelConfig, model: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config with the number of labels, where task.labels gives it and the head starts new."""
        labels = task_section(config, ClassificationTask).labels
        if labels is not None and _head_is_new(section, model):
            model.num_labels = len(labels)
        return model

    @classmethod
    def new_weights(cls, section: ModelConfig, checkpoint: PreTrainedConfig, model: PreTrainedModel) -> list[str]:
        """Return the names of the head's weights, where the head starts new."""
        if not _head_is_new(section, checkpoint):
            return []
        body = f"{model.base_model_prefix}."
        return [name for name, _ in model.named_parameters() if not name.startswith(body)]

    @property
    def label_names(self) -> list[str]:
        return self.labels

    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """Return a classifier whose outputs are named like the labels of the data."""
        loaded = load_classifier(config, self.labels, self.tokenizer_of(key), key)
        check_fits(loaded.model, self.max_length, training)
        check_padding(self, loaded.model, key)
        return loaded

    def for_model(self, loaded: LoadedModel) -> "Classification":
        """Return the task with labels in the order of the model's outputs."""
        return replace(self, label_ids=loaded.label_ids)

    def for_teacher(self, tokenizer: PreTrainedTokenizerBase) -> "Classification":
        """Return the task with the rows also as the teacher's tokenizer writes them; unchanged if its inputs are equal.

        Where the tokens are the same and only the inputs differ, both are padded on the same side.
        """
        _check_limit(self.max_length, tokenizer, "the teacher's tokenizer")
        backend = tokenizer_hash(tokenizer)
        read = {split: _tokenize(rows, tokenizer, backend, self.max_length) for split, rows in self.texts.items()}
        splits = {"train": self.train, **self.validation}
        inputs = _inputs(read["train"])
        same_tokens = all(_equal(splits[split], rows, ["input_ids"]) for split, rows in read.items())
        same_inputs = same_tokens and inputs == _inputs(self.train)
        if same_inputs and all(_equal(splits[split], rows, inputs) for split, rows in read.items()):
            return self
        if same_tokens and tokenizer.padding_side != self.processing.padding_side:
            tokenizer = copy.deepcopy(tokenizer)  # hidden states are compared at the same positions of a batch
            tokenizer.padding_side = self.processing.padding_side
        truncated = {split: sum(rows["truncated"]) for split, rows in read.items()}
        what = f"the same tokens with inputs of its own ({', '.join(inputs)})" if same_tokens else "its own tokens"
        for split, rows in read.items():
            logger.info(
                "%s: the teacher reads %s, %.1f tokens a row, %d cut to %d tokens",
                *(split, what, _mean(rows["length"]), truncated[split], self.max_length),
            )
            named = rows.select_columns(inputs).rename_columns({name: f"{TEACHER_PREFIX}{name}" for name in inputs})
            splits[split] = concatenate_datasets([splits[split], named], axis=1)
        return replace(
            self,
            train=splits.pop("train"),
            validation=splits,
            teacher_tokenizer=tokenizer,
            teacher_truncated=truncated,
            same_tokens=same_tokens,
        )

    def collate(self, rows: list[Row]) -> Batch:
        """Pad rows to the longest: input_ids, attention_mask (B, T), …, labels (B,) int64 in the model's order."""
        names = [name for name in rows[0] if name in self.processing.model_input_names]
        batch = DataCollatorWithPadding(self.processing)([{name: row[name] for name in names} for row in rows])
        labels = torch.tensor([self.label_ids[row["label"]] for row in rows])
        return {**batch, **self._teacher_batch(rows), "labels": labels, "tokens": batch["attention_mask"].sum()}

    def _teacher_batch(self, rows: list[Row]) -> Batch:
        """Return teacher_input_ids, teacher_attention_mask (B, Tt), …; nothing if the teacher reads the model's."""
        if self.teacher_tokenizer is None:
            return {}
        names = [name for name in rows[0] if name.startswith(TEACHER_PREFIX)]
        own = [{name.removeprefix(TEACHER_PREFIX): row[name] for name in names} for row in rows]
        padded = DataCollatorWithPadding(self.teacher_tokenizer)(own)
        return {f"{TEACHER_PREFIX}{name}": tensor for name, tensor in padded.items()}

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "truncated": self.truncated,
            **({"teacher_truncated": self.teacher_truncated} if self.teacher_tokenizer is not None else {}),
            "labels": self.labels,
        }

    def metrics(self, split: str, model: PreTrainedModel) -> "ClassificationMetrics":
        names = [self.labels[self.label_ids.index(i)] for i in range(len(self.labels))]
        return ClassificationMetrics(names)

    def save_processing(self, folder: Path) -> None:
        # Tokenizing leaves its truncation and padding in the tokenizer, which would otherwise be saved with it.
        self.processing.backend_tokenizer.no_truncation()
        self.processing.backend_tokenizer.no_padding()
        super().save_processing(folder)


class ClassificationMetrics(Metrics):
    """A confusion matrix of labels and predictions, which ranks can add up."""

    def __init__(self, names: list[str]):
        self.names = names  # in the order of the model's outputs
        self.counts = torch.zeros(len(names), len(names), dtype=torch.int64)  # (label, prediction)
        self.samples = []

    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Count predictions (B,) int64 against labels (B,), except where they are IGNORE. No wait for the GPU."""
        labels, predictions = batch["labels"], outputs["predictions"]
        width = len(self.names)
        counted = labels != IGNORE
        cells = labels.clamp(min=0) * width + predictions
        self.counts = self.counts.to(labels.device)
        self.counts += torch.zeros_like(self.counts).view(-1).index_add_(0, cells, counted.long()).view(width, width)

    def compute(self) -> dict[str, float]:
        """Return accuracy, macro_f1 over the labels that occur as label or prediction, and the counts of each label."""
        counts = self.counts.cpu().double()  # waits for the GPU
        right, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        occurs = (labelled + predicted) > 0
        f1 = 2 * right[occurs] / (labelled + predicted)[occurs]
        metrics = {"accuracy": (right.sum() / counts.sum()).item(), "macro_f1": f1.mean().item()}
        for i, name in enumerate(self.names):
            metrics[f"labelled/{name}"] = int(labelled[i])
            metrics[f"predicted/{name}"] = int(predicted[i])
            metrics[f"correct/{name}"] = int(right[i])
        return metrics


def prepare(config: ClassificationTask, tokenizer: PreTrainedTokenizerBase) -> Classification:
    """Return the task of a config section and a tokenizer.

    Raises UsageError for missing columns, bad labels and empty splits.
    """
    train, validation = load_rows(config.dataset)
    splits = {"train": train, **validation}
    for split, rows in splits.items():
        _check_columns(config, split, rows)
    labels = _label_names(config, train)
    splits = {split: _index_labels(config, split, rows, labels) for split, rows in splits.items()}
    _check_limit(config.max_length, tokenizer, "the tokenizer's model")
    backend = tokenizer_hash(tokenizer)
    tokenized: dict[str, Dataset] = {}
    truncated: dict[str, int] = {}
    for split, texts in splits.items():
        rows = tokenized[split] = _tokenize(texts, tokenizer, backend, config.max_length)
        truncated[split] = sum(rows["truncated"])
        counts = Counter(rows["label"])
        by_label = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(labels))
        logger.info(
            "%s: %d rows (%s), %.1f tokens a row, %d cut to %d tokens",
            *(split, len(rows), by_label, _mean(rows["length"]), truncated[split], config.max_length),
        )
    return Classification(
        processing=tokenizer,
        labels=labels,
        max_length=config.max_length,
        train=tokenized.pop("train"),
        validation=tokenized,
        fingerprint=text_hash(f"{rows_hash(splits)} {backend}"),
        truncated=truncated,
        description=describe(config.dataset),
        texts=splits,
        label_ids=list(range(len(labels))),
    )


def _head_is_new(section: ModelConfig, checkpoint: PreTrainedConfig) -> bool:
    """Return True unless the config of the checkpoint says that it is a classifier whose head is kept."""
    architectures = checkpoint.architectures or []
    return section.new_head or not any("ForSequenceClassification" in name for name in architectures)


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)


def _check_columns(config: ClassificationTask, split: str, rows: Dataset) -> None:
    """Raise UsageError for columns that are missing, named twice or of a type that cannot be used."""
    where = f"{describe(config.dataset)}, {split}"
    keys = {key: getattr(config.columns, key) for key in ("text", "text_pair", "label")}
    columns = {key: column for key, column in keys.items() if column is not None}
    if len(set(columns.values())) < len(columns):
        named = ", ".join(columns.values())
        raise UsageError(f"task.columns names the same column twice ({named}); text, text_pair and label differ")
    for key, column in columns.items():
        if column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise UsageError(
                f"{where}: there is no column {column}; it has: {has}. Name the right one with task.columns.{key}"
            )
        place, kind = f"{where}: the column {column} (task.columns.{key})", rows.features[column]
        if key == "label":
            if not isinstance(kind, ClassLabel | Value):
                raise UsageError(f"{place} holds {kind}, not names or integers")
            continue
        if getattr(kind, "dtype", "") not in ("string", "large_string"):
            raise UsageError(f"{place} holds {kind}, not text")
        empty = next((i for i, text in enumerate(rows[column]) if text is None), None)
        if empty is not None:
            raise UsageError(f"{where}: row {empty} has no text in the column {column}; remove the row or fill it in")


def _label_names(config: ClassificationTask, train: Dataset) -> list[str]:
    """Return the names of the data's labels: task.labels, or the features' own, or the values that occur in train."""
    feature = train.features[config.columns.label]
    own = feature.names if isinstance(feature, ClassLabel) else None
    if config.labels is not None:
        if own is not None and sorted(own) == sorted(config.labels) and own != config.labels:
            raise UsageError(
                f"task.labels is {', '.join(config.labels)}, but the data set itself numbers its labels as "
                f"{', '.join(own)}; remove task.labels, or put it in that order"
            )
        if len(set(config.labels)) < len(config.labels):
            raise UsageError("task.labels names a label twice")
        return list(config.labels)
    if own is not None:
        return list(own)
    values = set(train[config.columns.label])
    if any(not isinstance(value, str | int) for value in values):
        odd = next(value for value in values if not isinstance(value, str | int))
        raise UsageError(f"the column {config.columns.label} holds {odd!r}; a label is a name or an integer")
    if len(values) < 2:
        raise UsageError(
            f"{describe(config.dataset)}, train: the only label is {values.pop()}; a classifier needs at least two"
        )
    return [str(value) for value in sorted(values)]


def _index_labels(config: ClassificationTask, split: str, rows: Dataset, labels: list[str]) -> Dataset:
    """Return the columns text, text_pair and label (an index into labels), whatever their names in the data."""
    column = config.columns.label
    numbered = isinstance(rows.features[column], ClassLabel) or config.labels is not None
    positions: dict[Any, int] = {name: i for i, name in enumerate(labels)}
    indices = []
    for row, value in enumerate(rows[column]):
        if isinstance(value, int) and numbered:
            index = value if 0 <= value < len(labels) else None
        else:
            index = positions.get(str(value))
        if index is None:
            raise UsageError(
                f"{describe(config.dataset)}, {split}: row {row} has the label {value!r}, which is not one of "
                f"{', '.join(labels)}; remove the row, or name all labels with task.labels"
            )
        indices.append(index)
    columns = {config.columns.text: "text", config.columns.text_pair: "text_pair"}
    texts = {name: plain for name, plain in columns.items() if name and name != plain}
    kept = rows.select_columns([name for name in columns if name])
    kept = kept.rename_columns(texts) if texts else kept
    return kept.add_column("label", indices)


def _check_limit(max_length: int, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    if max_length > tokenizer.model_max_length:
        raise UsageError(f"task.max_length is {max_length}, but {whose} takes at most {tokenizer.model_max_length}")


def _tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, backend: str, max_length: int) -> Dataset:
    """Return the tokens of rows that have the columns text, label and perhaps text_pair."""
    pair = "text_pair" in rows.column_names

    def encode(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            columns["text"],
            columns["text_pair"] if pair else None,
            truncation="longest_first",
            max_length=max_length,
        )
        names = [name for name in encoded if name != "attention_mask"]  # all ones until rows are padded
        return {
            **{name: encoded[name] for name in names},
            "length": [len(ids) for ids in encoded["input_ids"]],
            "truncated": [bool(row.overflowing) for row in encoded.encodings],
            "label": columns["label"],
        }

    # BERT and DistilBERT share the backend but have different inputs.
    how = f"{backend} {tokenizer.model_input_names} {tokenizer.truncation_side} {tokenizers.__version__}"
    key = f"{rows._fingerprint} {how} {max_length} {pair} {source_hash(__file__)}"
    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        # Named by content: datasets would pickle the tokenizer, whose bytes differ from process to process.
        new_fingerprint=text_hash(key)[:32],
        desc="tokenizing",
    )


def _inputs(tokenized: Dataset) -> list[str]:
    """Return the columns that a model reads."""
    return sorted({*tokenized.column_names} - {"length", "truncated", "label"})


def _equal(one: Dataset, other: Dataset, columns: list[str]) -> bool:
    return all(one.data.column(name).equals(other.data.column(name)) for name in columns)
