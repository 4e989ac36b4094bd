"""The section `task` of a config: one class for each task.type, which also answers what its kind of task supports."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from forge.config.fields import Bool, Place, Positive, Section, Text


class DatasetConfig(Section):
    """Where the rows come from: exactly one of name, path and demo."""

    name: Text | None = None
    """A data set on the hub, such as nyu-mll/glue."""
    config: Text | None = None
    """The configuration of the hub data set, such as mnli."""
    revision: Text | None = None
    """The revision of the hub data set: a commit, a branch or a tag."""
    path: Place | None = None
    """A local folder with train.{jsonl,parquet,csv} and validation*.{jsonl,parquet,csv}, relative to the working
    directory."""
    demo: Literal["nli", "lines", "chat"] | None = None
    """A data set that forge generates itself. nli: sentence pairs with entailment, neutral or contradiction. lines:
    rendered lines of text for OCR. chat: short conversations for causal LMs."""
    streaming: Bool = False
    """Read the training rows during training, for data too large to be prepared first. Needs training.max_steps."""
    shuffle_buffer: Annotated[int, Field(ge=0)] = 0
    """Size of the buffer from which the rows of a stream are drawn at random (with the seed). 0: keep their order."""
    train_split: Text = "train"
    """The split to train on."""
    validation_splits: Annotated[list[Text], Field(min_length=1)] | None = None
    """The splits to evaluate on. null: every split whose name begins with `validation`."""
    max_rows: Positive | None = None
    """Use at most this many evenly spaced rows of each split, for a quick look. null: all rows."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not (self.name or self.path or self.demo):
            raise ValueError("has no source: set one of task.dataset.name, task.dataset.path and task.dataset.demo")
        return self

    @model_validator(mode="after")
    def _separate_splits(self) -> Self:
        evaluated = self.validation_splits or []
        if self.train_split in evaluated:
            raise ValueError(
                f"trains on the split {self.train_split}, and task.dataset.validation_splits names it too: an "
                "evaluation on the rows that are learned says nothing about new ones; name another split"
            )
        if twice := [name for name in evaluated if evaluated.count(name) > 1]:
            raise ValueError(f"has the split {twice[0]} twice in task.dataset.validation_splits; name it once")
        return self


class TaskSection(Section):
    """What all kinds of task have, and the questions that the rest of the config asks of a kind."""

    own_demo: ClassVar[str]  # the demo data set that is made for this kind
    loss_from_hidden_states: ClassVar[bool] = False  # the keys of training.loss apply
    can_align_tokens: ClassVar[bool] = False  # ULD can match the tokens of two tokenizers
    can_stream: ClassVar[bool] = False
    caches_only_top_k: ClassVar[bool] = False  # a teacher's cache never holds whole rows of logits
    has_labels: ClassVar[bool] = False  # its model gives one of a list of named labels
    has_relations: ClassVar[bool] = False  # self-attention relations of its models can be compared

    type: str
    dataset: DatasetConfig
    empty: Literal["error", "leave_out"] = "error"
    """How rows are handled that lack what is learned from: a text, a label, a transcript or a reply. error: the first
    one is an error. leave_out: they are left out, counted and reported."""

    @property
    def packs_rows(self) -> bool:
        """True if several training rows share one sequence."""
        return False

    @property
    def label_count(self) -> int | None:
        """The number of labels, or None if the config does not name them."""
        return None

    def with_absolute_paths(self) -> Self:
        """Return the section with the paths of local folders and files made absolute."""
        dataset = self.dataset.model_copy(update={"path": absolute_if_folder(self.dataset.path)})
        return self.model_copy(update={"dataset": dataset})

    @model_validator(mode="after")
    def _own_demo_data(self) -> Self:
        if self.dataset.demo not in (None, self.own_demo):
            raise ValueError(
                f"uses the demo data {self.dataset.demo}, but a task of type {self.type} can only use {self.own_demo}"
            )
        return self


def absolute_if_folder(name: str | None) -> str | None:
    """Return the absolute path of a local folder; any other name, such as a hub id, as it is."""
    return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().is_dir() else name


class LabelColumns(Section):
    """Which columns of the data set hold the text and the label."""

    text: Text = "text"
    """The column with the text, or with the first sentence of a pair."""
    text_pair: Text | None = None
    """The column with the second sentence of a pair. null: single sentences."""
    label: Text = "label"
    """The column with the label: its name, or an integer."""


class ClassificationTask(TaskSection):
    """Sequence classification: a label for a sentence or a pair of sentences."""

    own_demo: ClassVar[str] = "nli"
    has_labels: ClassVar[bool] = True
    has_relations: ClassVar[bool] = True

    type: Literal["classification"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: LabelColumns = LabelColumns()
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names; for integers in the data that are not themselves names, in their order from 0. null: taken from
    the data set's features or rows."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Maximum tokens per row. Longer rows are cut at the end of the longer sentence, counted and reported."""

    @property
    def label_count(self) -> int | None:
        """The number of labels, or None if the config does not name them."""
        return None if self.labels is None else len(self.labels)


class ImageColumns(Section):
    """Which columns of the data set hold the image and its transcript."""

    image: Text = "image"
    """The column with the image. In a folder of images: file_name of its metadata."""
    text: Text = "text"
    """The column with the transcript."""


class NormalizationConfig(Section):
    """How transcripts are normalised before training, and both sides before they are compared."""

    case: Literal["keep", "lower", "upper"] = "keep"
    """The case of letters."""
    unicode: Literal["keep", "nfc", "nfkc"] = "nfc"
    """The Unicode form of composed characters. nfkc also replaces full-width letters, ligatures and the like."""
    whitespace: Bool = True
    """Replace each run of white space by one space, and strip both ends."""


class ImageConfig(Section):
    """The size that images are brought to: scaled with their proportions kept, then padded on the right and below."""

    height: Positive | None = None
    """Pixels. null: as the model's image processor says."""
    width: Positive | None = None
    """Pixels. null: as the model's image processor says."""
    fill: Annotated[int, Field(ge=0, le=255)] = 255
    """The grey level of the padding, from 0 (black) to 255 (white)."""
    stretch: Bool = False
    """Scale to height and width without keeping the proportions, and without padding, as TrOCR checkpoints expect."""


class OcrTask(TaskSection):
    """Text recognition: an image of one or more lines, and its transcript."""

    own_demo: ClassVar[str] = "lines"

    type: Literal["ocr"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: ImageColumns = ImageColumns()
    max_length: Annotated[int, Field(ge=2)] = 64
    """Maximum tokens per transcript. Longer transcripts are cut, counted and reported."""
    normalization: NormalizationConfig = NormalizationConfig()
    image: ImageConfig = ImageConfig()
    prompt: Text | None = None
    """The prompt that a chat-style vision-language model gets with each image. null for encoder-decoders."""
    num_beams: Positive = 1
    """Beams of the search that generates text in evaluation. 1: greedy decoding."""
    skip_broken: Bool = False
    """Skip and count images that are missing or cannot be decoded. false: the first one is an error."""


class TextColumns(Section):
    """Which columns of the data set hold the text of a causal LM. task.format says which of them are used."""

    messages: Text = "messages"
    """The column with conversations: lists of {role, content}."""
    prompt: Text = "prompt"
    """The column with the prompt, which is not learned."""
    completion: Text = "completion"
    """The column with the completion of the prompt, which is learned."""
    text: Text = "text"
    """The column with plain text, all of which is learned."""


class CausalLmTask(TaskSection):
    """Causal language modelling: conversations, prompts with completions, or plain text."""

    own_demo: ClassVar[str] = "chat"
    loss_from_hidden_states: ClassVar[bool] = True
    can_align_tokens: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    caches_only_top_k: ClassVar[bool] = True

    type: Literal["causal_lm"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: TextColumns = TextColumns()
    format: Literal["auto", "messages", "prompt_completion", "text"] = "auto"
    """The form of the rows. auto: decided by their columns."""
    chat_template: Place | None = None
    """A file with the chat template (Jinja). null: the tokenizer's own."""
    max_length: Annotated[int, Field(ge=4)] = 1024
    """Maximum tokens per row."""
    truncation: Literal["cut", "leave_out", "refuse"] = "cut"
    """How longer rows are handled: cut at the end, left out, or refused as an error. Counted and reported."""
    unprinted: Literal["refuse", "leave_out", "accept"] = "refuse"
    """How rows are handled of which the chat template does not write a part (tool calls, thoughts, a turn): refused as
    an error, left out, or learned without that part. Counted and reported."""
    packing: Bool = False
    """Pack several training rows into one sequence of max_length. No row attends to another."""
    append_eos: Bool = True
    """Append the end token to completions and plain text."""
    remove_text: list[Text] = []
    """Strings to remove from every text, such as end tokens that a data set carries as text."""

    @property
    def packs_rows(self) -> bool:
        """True if several training rows share one sequence."""
        return self.packing

    def with_absolute_paths(self) -> Self:
        """Return the section with the paths of local folders and files made absolute."""
        section = super().with_absolute_paths()
        if not self.chat_template:
            return section
        return section.model_copy(update={"chat_template": str(Path(self.chat_template).expanduser().absolute())})


AnyTask = ClassificationTask | OcrTask | CausalLmTask
