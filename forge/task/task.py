"""What every task gives to the loop: its rows, its batches, its model and its metrics."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from forge.config.schema import ModelConfig, TrainingConfig
from forge.data.batches import Batch
from forge.errors import UsageError
from forge.model.load import LoadedModel


@dataclass(frozen=True)
class Sample:
    """One row of an evaluation with the text that the model itself gives."""

    row: int
    reference: str
    prediction: str
    prompt: str | None = None
    image: bytes | None = None  # PNG


class Metrics(ABC):
    """What is counted over one split on one rank."""

    counts: Tensor  # of any shape, int64 or float64: the ranks' are added up before compute
    samples: list[Sample]

    @abstractmethod
    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Counts one batch: outputs of the student in eval mode, without gradients. Need not wait for the device."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The metrics from counts; waits for the device. The evaluation itself adds the loss and the rows."""


class Task(ABC):
    """A kind of training on one data set; each lies in one module, and forge.task.load names it."""

    name: ClassVar[str]  # as in task.type
    title: ClassVar[str]  # what is trained, for the model card
    pipeline_tag: ClassVar[str]  # of the hub
    auto_model: ClassVar[type[Any]]  # the class of transformers that loads the model
    main_metric: ClassVar[str]  # what is best, where the config does not say
    headline: ClassVar[tuple[str, ...]]  # the metrics of the table before and after
    forward_options: ClassVar[dict[str, Any]] = {}  # given to the model with every batch
    has_language_head: ClassVar[bool] = False  # the loss may be computed from hidden states, where the head allows it
    shown_texts: int | None = None  # of a split at most; None: as many as the ranks keep
    num_workers: ClassVar[int] = 0  # processes that prepare batches, where the config does not say

    train: Dataset  # a row has at least the column `length`, by which rows are grouped
    validation: dict[str, Dataset]  # by short name
    processing: PreTrainedTokenizerBase | ProcessorMixin
    fingerprint: str  # of what the model learns from
    description: str  # the data set in a few words
    teacher_tokenizer: PreTrainedTokenizerBase | None = None  # of a teacher that is given inputs of its own
    same_tokens: bool = True  # teacher and student read the same tokens in the same places

    @abstractmethod
    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """The model of the config's section `key`, in float32. Raises UsageError where it does not fit the data."""

    def for_model(self, loaded: LoadedModel) -> "Task":
        """The task as this model needs it."""
        return self

    def without_shown_texts(self) -> "Task":
        """The task with metrics that show no rows."""
        return self

    def for_teacher(self, tokenizer: PreTrainedTokenizerBase) -> "Task":
        """The task with the rows also as tokens of the teacher's own tokenizer: batches have its inputs under names
        that begin with teacher_. Raises UsageError where that cannot be."""
        raise UsageError(f"a task of type {self.name} has one tokenizer for student and teacher")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in processing."""
        tokenizer: PreTrainedTokenizerBase = getattr(self.processing, "tokenizer", self.processing)  # type: ignore[arg-type]
        return tokenizer

    def tokenizer_of(self, key: str) -> PreTrainedTokenizerBase:
        """Whose tokens the model of the section `key` reads."""
        own = self.teacher_tokenizer if key == "teacher" else None
        return self.tokenizer if own is None else own

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch: the model's inputs, `labels` and `tokens`.

        labels: int64, of the shape of the logits without their last dimension and aligned with them, so that targets
        of a causal model are already shifted; IGNORE where nothing is counted. tokens: int64 scalar, those read.
        """

    @abstractmethod
    def metrics(self, split: str, model: PreTrainedModel) -> Metrics:
        """An empty count for one validation split; model is the bare one, for texts that it is to generate."""

    def facts(self) -> dict[str, Any]:
        """What run_metadata.json tells of the data; a task adds what it has cut or left out."""
        return {
            "description": self.description,
            "fingerprint": self.fingerprint,
            "rows": {"train": len(self.train), **{name: len(rows) for name, rows in self.validation.items()}},
        }

    def about(self) -> dict[str, Any]:
        """What run_metadata.json tells of the kind of task, for the model card."""
        return {
            "type": self.name,
            "title": self.title,
            "pipeline_tag": self.pipeline_tag,
            "auto_model": self.auto_model.__name__,
            "auto_processing": "AutoProcessor" if isinstance(self.processing, ProcessorMixin) else "AutoTokenizer",
            "headline": list(self.headline),
        }

    def save_processing(self, folder: Path) -> None:
        """Writes the tokenizer or processor beside the model."""
        self.processing.save_pretrained(folder)
