"""What every kind of task provides: its rows, batches, models and metrics, and answers about them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from forge.config.schema import Config, ModelConfig, TrainingConfig
from forge.config.task_schema import AnyTask
from forge.data.batches import Batch, Row
from forge.errors import UsageError
from forge.model.load import LoadedModel, load_own_tokenizer, scratch_config
from forge.model.source import ModelSource, load_tokenizer

Section = TypeVar("Section", bound=AnyTask)


@dataclass(frozen=True)
class Sample:
    """A row of an evaluation with the text that the model generated for it."""

    row: int
    reference: str
    prediction: str
    prompt: str | None = None
    image: bytes | None = None  # PNG


class Metrics(ABC):
    """What one rank counts over its part of a split."""

    counts: Tensor  # any shape, int64 or float64; summed over the ranks before compute
    samples: list[Sample]

    @abstractmethod
    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Count one batch. outputs: the student's, in eval mode and without gradients. Should not wait for the GPU."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """Return the metrics from `counts`; waits for the GPU. The evaluation adds cross-entropy and rows itself."""


class Task(ABC):
    """One kind of training on one data set.

    The rest of forge asks a task what it needs to know and never looks at its class. A new kind of task is a module of
    its own and a line in forge.task.load.
    """

    # Of the kind of task, and so known before any data are read.
    name: ClassVar[str]  # as in task.type
    title: ClassVar[str]  # what is trained, for the model card
    pipeline_tag: ClassVar[str]  # on the hub
    auto_model: ClassVar[type[Any]]  # the class of transformers that loads the model
    main_metric: ClassVar[str]  # picks the best checkpoint unless the config names another
    headline: ClassVar[tuple[str, ...]]  # the metrics of the table that compares before and after
    forward_options: ClassVar[dict[str, Any]] = {}  # passed to the model with every batch
    has_language_head: ClassVar[bool] = False  # True: the loss may be computed from hidden states and the head
    one_label_per_row: ClassVar[bool] = False  # False: a label for each token that is learned
    aligns_labels: ClassVar[bool] = False  # True: for_teacher can align labels over two vocabularies (uld)
    inputs_need_model: ClassVar[bool] = False  # True: batches are right only after for_model
    num_workers: ClassVar[int] = 0  # processes that prepare batches unless the config says how many

    # Of the data set.
    train: Dataset  # has at least the column `length`, by which rows are grouped
    validation: dict[str, Dataset]  # by short name
    processing: PreTrainedTokenizerBase | ProcessorMixin
    fingerprint: str  # of everything that the model learns from
    description: str  # the data set in a few words
    shown_texts: int | None = None  # texts shown of each split at most; None: as many as the ranks keep
    teacher_tokenizer: PreTrainedTokenizerBase | None = None  # of a teacher that is given inputs of its own
    same_tokens: bool = True  # teacher and student read the same tokens at the same positions

    # --- before the data are read -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load(cls, config: Config) -> Self:
        """Return the task with its data, checked and tokenized. Raises UsageError for data that cannot be used."""

    @classmethod
    def scratch_config(cls, section: ModelConfig, key: str) -> PreTrainedConfig:
        """Return the transformers config of `section.config`, with a new tokenizer as large as it can become.

        key: the section's name in the config.
        """
        assert section.config is not None
        return scratch_config(section.config, f"{key}.config", vocab_size=cls._vocabulary_size(section))

    @classmethod
    def adapted_config(cls, config: Config, section: ModelConfig, model: PreTrainedConfig) -> PreTrainedConfig:
        """Return a model's config as the model will have it for these data, as far as forge's config says."""
        return model

    @classmethod
    def new_weights(cls, section: ModelConfig, checkpoint: PreTrainedConfig, model: PreTrainedModel) -> list[str]:
        """Return the names of the weights that start new because the checkpoint lacks them."""
        return []

    @classmethod
    def planned_batch(
        cls, config: Config, section: ModelConfig, model: PreTrainedConfig, rows: int, longest: int | None = None
    ) -> Batch:
        """Return a batch of the longest rows that task.max_length allows, for `forge plan`; its content means nothing.

        model: the config of the model that reads it, which `section` describes. longest: tokens of the longest row,
        where the data are known.
        """
        tokens = config.task.max_length if longest is None else min(config.task.max_length, longest)
        ids = torch.zeros((rows, tokens), dtype=torch.int64)
        labels = ids[:, 0] if cls.one_label_per_row else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    @classmethod
    def _vocabulary_size(cls, section: ModelConfig) -> int:
        """Return the number of tokens of the section's tokenizer, or the most that a new one may have."""
        if section.new_tokenizer is None:
            return len(load_own_tokenizer(section))
        return section.new_tokenizer.vocab_size

    # --- models -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """Return the model of the config's section `key`, in float32. Raises UsageError if it does not fit the data."""

    def for_model(self, loaded: LoadedModel) -> Self:
        """Return the task as this model needs it."""
        return self

    def for_teacher(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return the task with its rows also as tokens of the teacher's own tokenizer.

        Batches then have the teacher's inputs under names that begin with teacher_. Raises UsageError where that is
        not possible.
        """
        raise UsageError(f"a task of type {self.name} has one tokenizer for student and teacher")

    def load_processing(self, source: ModelSource, key: str) -> PreTrainedTokenizerBase | ProcessorMixin:
        """Return the tokenizer or processor of another model, of the kind that this task uses."""
        return load_tokenizer(source, key)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in processing."""
        tokenizer: PreTrainedTokenizerBase = getattr(self.processing, "tokenizer", self.processing)  # type: ignore[arg-type]
        return tokenizer

    def tokenizer_of(self, key: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer whose tokens the model of the section `key` reads."""
        own = self.teacher_tokenizer if key == "teacher" else None
        return self.tokenizer if own is None else own

    @property
    def label_names(self) -> Sequence[str]:
        """The labels that a row chooses from; empty where labels are tokens."""
        return ()

    @property
    def logit_columns(self) -> int:
        """How many values a label can have: the columns of the logits without padding.

        Token ids may have gaps, so the highest id counts and not the number of tokens.
        """
        return len(self.label_names) or max(self.tokenizer.get_vocab().values()) + 1

    def key_parts(self) -> dict[str, Any]:
        """Return by name what a teacher's outputs depend on besides rows, tokens and tokenizers, as JSON values."""
        return {}

    # --- batches and metrics ------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, rows: list[Row]) -> Batch:
        """Return one batch: the model's inputs, `labels` and `tokens`.

        labels: int64, shaped like the logits without their last dimension and aligned with them, so the targets of a
        causal model are already shifted; IGNORE where nothing is counted. tokens: () int64, how many are read.
        """

    @abstractmethod
    def metrics(self, split: str, model: PreTrainedModel) -> Metrics:
        """Return an empty count for one validation split; model: the bare one, which may be asked to generate texts."""

    def without_shown_texts(self) -> Self:
        """Return the task with metrics that show no generated texts."""
        return self

    # --- records ------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return what run_metadata.json records of the data; a task adds what it has cut or left out."""
        return {
            "description": self.description,
            "fingerprint": self.fingerprint,
            "rows": {"train": len(self.train), **{name: len(rows) for name, rows in self.validation.items()}},
        }

    def about(self) -> dict[str, Any]:
        """Return what run_metadata.json records of the kind of task, for the model card."""
        return {
            "type": self.name,
            "title": self.title,
            "pipeline_tag": self.pipeline_tag,
            "auto_model": self.auto_model.__name__,
            "auto_processing": "AutoProcessor" if isinstance(self.processing, ProcessorMixin) else "AutoTokenizer",
            "headline": list(self.headline),
        }

    def save_processing(self, folder: Path) -> None:
        """Write the tokenizer or processor next to the model."""
        self.processing.save_pretrained(folder)


def task_section(config: Config, kind: type[Section]) -> Section:
    """Return the section `task`, typed as the section of one kind of task."""
    if not isinstance(config.task, kind):
        raise TypeError(f"task.type is {config.task.type}, which has no {kind.__name__}")
    return config.task
