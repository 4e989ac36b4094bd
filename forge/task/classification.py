"""The classification task: sentences or pairs with a label, their tokens, batches and metrics."""

import copy
import logging
import re
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
from forge.data.rows import describe, kept_rows, load_rows, row_numbers
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.classifier import load_classifier, plain_name
from forge.model.load import LoadedModel, check_fits, check_limit, load_own_tokenizer
from forge.task.probe import check_padding
from forge.task.task import Metrics, Task, task_section

logger = logging.getLogger(__name__)

NO_LABEL = "-1"  # what SNLI, GLUE's test rows and others write where a row has no label
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")  # with a leading zero it is a name
FLOAT = re.compile(r"-?[0-9]*\.[0-9]+(e-?[0-9]+)?|nan")
SHOWN_LABELS = 5


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
    left_out: dict[str, int]  # rows without a text or a label, by split
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
        check_limit(self.max_length, tokenizer, "the teacher's tokenizer")
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
            "left_out": self.left_out,
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
    raw = {"train": train, **validation}
    for split, rows in raw.items():
        _check_columns(config, split, rows)
    labels = Labels.of(config, train)
    splits: dict[str, Dataset] = {}
    left_out: dict[str, int] = {}
    for split, rows in raw.items():
        splits[split], left_out[split] = _with_labels(config, split, rows, labels)
    check_limit(config.max_length, tokenizer, "the tokenizer's model")
    backend = tokenizer_hash(tokenizer)
    tokenized: dict[str, Dataset] = {}
    truncated: dict[str, int] = {}
    counts: dict[str, Counter[int]] = {}
    for split, texts in splits.items():
        rows = tokenized[split] = _tokenize(texts, tokenizer, backend, config.max_length)
        truncated[split] = sum(rows["truncated"])
        _check_tokens(config, split, rows)
        counts[split] = Counter(rows["label"])
        by_label = ", ".join(f"{name} {counts[split][i]}" for i, name in enumerate(labels.names))
        logger.info(
            "%s: %d rows (%s), %.1f tokens a row, %d cut to %d tokens",
            *(split, len(rows), by_label, _mean(rows["length"]), truncated[split], config.max_length),
        )
    _warn_of_absent_labels(labels.names, counts)
    return Classification(
        processing=tokenizer,
        labels=labels.names,
        max_length=config.max_length,
        train=tokenized.pop("train"),
        validation=tokenized,
        fingerprint=text_hash(f"{rows_hash(splits)} {backend}"),
        truncated=truncated,
        left_out=left_out,
        description=describe(config.dataset),
        texts=splits,
        label_ids=list(range(len(labels.names))),
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


@dataclass(frozen=True)
class Labels:
    """The names of the data's labels, and how a value in the data becomes one of them."""

    names: list[str]  # task.labels, or the features' own, or the values that occur in train
    by_name: bool  # False: an integer is the place of a name
    no_label: bool  # True: -1 is no label

    @classmethod
    def of(cls, config: ClassificationTask, train: Dataset) -> "Labels":
        """Return the labels of a data set. Raises UsageError if they cannot be used."""
        feature = train.features[config.columns.label]
        own = feature.names if isinstance(feature, ClassLabel) else None
        values = {value for value in set(train[config.columns.label]) if not _is_missing(value)}
        others = {value for value in values if str(value).strip() != NO_LABEL}
        if config.labels is None and own is None:
            no_label = len(others) > 1  # of two labels, -1 is one
            return cls(_names_of(config, others if no_label else values), by_name=True, no_label=no_label)
        if config.labels is not None:
            _check_named(config.labels, own)
        names = list(config.labels or own or [])
        by_name = own is None and {str(value) for value in others} <= set(names)
        return cls(names, by_name, no_label=NO_LABEL not in names)

    def place(self, value: Any) -> int | None:
        """Return the index of a value of the data; None if it is not one of the labels."""
        text = str(value)
        if not self.by_name and INTEGER.fullmatch(text) and not isinstance(value, bool):
            return int(text) if 0 <= int(text) < len(self.names) else None
        return self.names.index(text) if text in self.names else None


def _check_named(names: Sequence[str], own: Sequence[str] | None) -> None:
    """Raise UsageError for labels in task.labels that do not fit those that the data set has itself."""
    if own is not None and sorted(own) == sorted(names) and own != names:
        raise UsageError(
            f"task.labels is {', '.join(names)}, but the data set itself numbers its labels as "
            f"{', '.join(own)}; remove task.labels, or put it in that order"
        )
    if len(set(names)) < len(names):
        raise UsageError("task.labels names a label twice")


def _names_of(config: ClassificationTask, values: set[Any]) -> list[str]:
    """Return the names of the labels that occur, in the order of numbers if all are integers, else of texts."""
    texts = {str(value) for value in values}
    floats = [text for text in texts if FLOAT.fullmatch(text)] or [
        str(value) for value in values if type(value) is float
    ]
    if floats and all(FLOAT.fullmatch(text) or INTEGER.fullmatch(text) or text in floats for text in texts):
        raise UsageError(
            f"the column {config.columns.label} holds {min(floats)}; a label is a name or an integer (if these are "
            "names, list them in task.labels)"
        )
    if len(values) < 2:
        raise UsageError(
            f"{describe(config.dataset)}, train: the only label is {', '.join(texts) or 'none'}; a classifier needs at "
            "least two"
        )
    names = sorted(texts, key=int) if all(map(INTEGER.fullmatch, texts)) else sorted(texts)
    plain: dict[str, str] = {}
    for name in names:
        other = plain.setdefault(plain_name(name), name)
        if other != name:
            logger.warning(
                "the labels %r and %r differ only by case, white space, _ or -, and are two classes; if that is not "
                "intended, write them alike in the data",
                *(other, name),
            )
    return names


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _with_labels(config: ClassificationTask, split: str, rows: Dataset, labels: Labels) -> tuple[Dataset, int]:
    """Return the columns text, text_pair and label (an index into labels), and how many rows are left out."""
    where = f"{describe(config.dataset)}, {split}"
    columns = {config.columns.text: "text", config.columns.text_pair: "text_pair"}
    values = rows[config.columns.label][:]
    missing = {}
    for place, value in enumerate(values):
        if _is_missing(value):
            missing[place] = f"no label in the column {config.columns.label}"
        elif labels.no_label and str(value).strip() == NO_LABEL:
            missing[place] = "the label -1, which usually means none (if it is a class, name all labels in task.labels)"
    for column in filter(None, columns):
        blank = (place for place, text in enumerate(rows[column]) if _is_missing(text))
        missing |= dict.fromkeys(blank, f"no text in the column {column}")
    kept = kept_rows(rows, missing, config.empty, where)
    indices = []
    for place in kept:
        if (index := labels.place(values[place])) is None:
            raise UsageError(
                f"{where}: row {row_numbers(rows)[place]} has the label {values[place]!r}, which is not one of "
                f"{', '.join(labels.names)}; remove the row, or name all labels with task.labels"
            )
        indices.append(index)
    texts = {name: plain for name, plain in columns.items() if name and name != plain}
    chosen = rows.select_columns([name for name in columns if name])
    chosen = chosen.rename_columns(texts) if texts else chosen
    return (chosen.select(kept) if missing else chosen).add_column("label", indices), len(missing)


def _warn_of_absent_labels(names: Sequence[str], counts: dict[str, Counter[int]]) -> None:
    """Log which labels a split has no row of: they cannot be learned, or their metrics say nothing."""
    for split, count in counts.items():
        absent = [name for i, name in enumerate(names) if not count[i]]
        if absent:
            shown = ", ".join(absent[:SHOWN_LABELS]) + (", …" if len(absent) > SHOWN_LABELS else "")
            effect = "it cannot be learned" if split == "train" else "whether it is learned is not measured"
            logger.warning("%s: no row has the label %s (%d in all): %s", split, shown, len(absent), effect)


def _check_tokens(config: ClassificationTask, split: str, rows: Dataset) -> None:
    """Raise UsageError for a text that gives no token at all."""
    lengths = rows["length"][:]
    if 0 in lengths:
        raise UsageError(
            f"{describe(config.dataset)}, {split}: {lengths.count(0)} rows have a text that gives no token; remove them"
        )


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
