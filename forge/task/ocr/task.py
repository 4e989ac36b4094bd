"""The OCR task: images of text with their transcripts, read by an encoder-decoder or by a chat-style vision model."""

import hashlib
import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from forge.config.schema import Config, ModelConfig, TrainingConfig
from forge.config.task_schema import OcrTask
from forge.data.batches import FILLER, Batch, model_inputs
from forge.data.fingerprints import tokenizer_hash
from forge.data.rows import describe, fingerprint, load_rows, row_numbers
from forge.errors import UsageError
from forge.model.generation import write
from forge.model.load import LoadedModel, check_fits, load_own_tokenizer, processing_source
from forge.model.recognizer import freeze_unused, load_recognizer, reads_lines, writer
from forge.model.source import load_processor
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.image_chat import ImageChat, image_chat
from forge.task.ocr.images import check_images, open_image, png
from forge.task.ocr.line_reader import LineReader, check_image_size, line_reader, new_processor
from forge.task.ocr.transcripts import (
    EDIT_COUNTS,
    check_lossless,
    describe_normalization,
    edit_counts,
    normalize,
    read_transcripts,
    warn_of_moved_spaces,
)
from forge.task.task import Metrics, Sample, Task

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Ocr(Task):
    """Rows with the columns image (encoded), text (normalised), tokens (of the transcript) and length."""

    config: OcrTask
    reader: LineReader | ImageChat
    train: Dataset
    validation: dict[str, Dataset]  # by short name
    fingerprint: str  # of images, transcripts and tokenizer, and of the chat that they stand in
    truncated: dict[str, int]  # transcripts cut to max_length, by split
    broken: dict[str, int]  # images left out, by split
    description: str
    shown_texts: int = 4  # rows of each split that are shown
    special_tokens: dict[str, Any] = field(default_factory=dict)  # those that the model's generate goes by

    name: ClassVar[str] = "ocr"
    title: ClassVar[str] = "A model that reads text in images"
    pipeline_tag: ClassVar[str] = "image-to-text"
    auto_model: ClassVar[type[Any]] = AutoModelForImageTextToText
    main_metric: ClassVar[str] = "cer"
    headline: ClassVar[tuple[str, ...]] = ("loss", "cer", "wer", "exact_match")
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    num_workers: ClassVar[int] = 2

    @property
    def processing(self) -> ProcessorMixin:  # type: ignore[override]
        return self.reader.processing

    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """A model that reads images of this size and writes with this tokenizer; what it never uses is frozen."""
        loaded = load_recognizer(config, self.reader.tokenizer, self.reader.end, key)
        model = loaded.model
        if reads_lines(model.config) != (self.config.prompt is None):
            asked = "which is asked for the text: set task.prompt"
            untold = "which is asked nothing: take task.prompt out"
            kind = model.config.model_type
            raise UsageError(f"{key} is of type {kind}, {untold if reads_lines(model.config) else asked}")
        if isinstance(self.reader, LineReader):
            check_image_size(model.config.encoder, self.reader.height, self.reader.width, self.reader.channels, key)
        check_fits(writer(model), self._longest(), training)
        row = self.for_model(loaded).collate([self.train[0]])
        freeze_unused(model, {name: row[name] for name in row if name not in ("labels", "tokens")})
        return loaded

    def for_model(self, loaded: LoadedModel) -> "Ocr":
        generation = loaded.model.generation_config
        assert generation is not None
        special = {name: getattr(generation, name) for name in SPECIAL_TOKENS if getattr(generation, name) is not None}
        return replace(self, reader=self.reader.for_model(loaded.model.config), special_tokens=special)

    def without_shown_texts(self) -> "Ocr":
        return replace(self, shown_texts=0)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Decodes the images, in the process that calls it."""
        images = [open_image(row["image"]) for row in rows]
        tokens = [row["tokens"] for row in rows]
        return {**self.reader.collate(images, tokens), "tokens": torch.tensor(sum(map(len, tokens)))}

    def metrics(self, split: str, model: PreTrainedModel) -> "OcrMetrics":
        return OcrMetrics(self, self.validation[split], model)

    def generation(self) -> dict[str, Any]:
        """How a text is generated from an image."""
        config = self.config
        ways = {"max_new_tokens": config.max_length, "num_beams": config.num_beams, "do_sample": False}
        return {**ways, "use_cache": True, **self.special_tokens}

    def about(self) -> dict[str, Any]:
        """Also `usage`: lines of Python that read one image as an evaluation does, before task.normalization."""
        before, given, text = self.reader.in_code()
        ways = ", ".join(f"{name}={value!r}" for name, value in self.generation().items())
        generate = [f"ways = dict({ways})", f"written = model.generate({given}, **ways)"]
        usage = ["from PIL import Image, ImageOps", "", *before, *generate, f"text = {text}", "print(text)"]
        return {**super().about(), "usage": usage}

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "truncated": self.truncated,
            "broken_images": self.broken,
            "normalization": describe_normalization(self.config.normalization),
            "num_beams": self.config.num_beams,
            **self.reader.facts(),
        }

    def _longest(self) -> int:
        """Tokens that the decoder reads for the longest transcript, an image's own among them."""
        if isinstance(self.reader, LineReader):
            return self.config.max_length
        longest = max(range(len(self.train)), key=self.train["length"].__getitem__)
        batch = self.collate([self.train[longest]])
        return batch["input_ids"].shape[1] + self.config.max_length - len(self.train[longest]["tokens"])


class OcrMetrics(Metrics):
    """Counts the edits between transcripts and what the model writes, which it is asked for batch by batch."""

    def __init__(self, task: Ocr, rows: Dataset, model: PreTrainedModel):
        self.counts = torch.zeros(len(EDIT_COUNTS), dtype=torch.int64)
        self.samples: list[Sample] = []
        self._task, self._rows, self._model = task, rows, model

    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Reads the batch's images; a filler's too, since the ranks of a sharded model read together."""
        reader, config = self._task.reader, self._task.config
        inputs = reader.generation_inputs({**model_inputs(batch), "labels": batch["labels"]})
        generated = write(self._model, inputs, config.max_length, config.num_beams)
        predictions = [normalize(text, config.normalization) for text in reader.replies(generated, inputs)]
        for row, prediction in zip(batch["ids"].tolist(), predictions, strict=True):
            if row == FILLER:
                continue
            reference = self._rows[row]["text"]
            self.counts += edit_counts(reference, prediction).to(self.counts.device)
            self._show(row, reference, prediction)

    def _show(self, row: int, reference: str, prediction: str) -> None:
        """Keeps the first rows of the data, in whatever order they come."""
        if len(self.samples) < self._task.shown_texts or (self.samples and row < self.samples[-1].row):
            image = png(open_image(self._rows[row]["image"]))
            sample = Sample(row, reference, prediction, self._task.config.prompt, image)
            self.samples = sorted([*self.samples, sample], key=lambda shown: shown.row)[: self._task.shown_texts]

    def compute(self) -> dict[str, Any]:
        """cer and wer: edits over the characters and words of all references; exact_match and empty: shares of rows."""
        counts = dict(zip(EDIT_COUNTS, self.counts.tolist(), strict=True))  # waits for the GPU
        return {
            "cer": counts["character_edits"] / max(1, counts["characters"]),
            "wer": counts["word_edits"] / max(1, counts["words"]),
            "exact_match": counts["exact"] / max(1, counts["rows"]),
            "empty_predictions": counts["empty"],
            "characters": counts["characters"],
            "words": counts["words"],
        }


def load_ocr(whole: Config) -> Ocr:
    """Loads and checks images and transcripts. Raises UsageError for the first that is missing, broken or unfit."""
    config = whole.task
    assert isinstance(config, OcrTask)
    if config.dataset.streaming:
        raise UsageError("task.dataset.streaming is for causal LMs; an OCR data set is checked before training")
    train, validation = load_rows(config.dataset)
    splits, broken = {}, {}
    for split, rows in {"train": train, **validation}.items():
        where = f"{describe(config.dataset)}, {split}"
        texts = dict(
            zip(row_numbers(rows), read_transcripts(rows, config.columns, config.normalization, where), strict=True)
        )
        checked, faults = check_images(rows, config.columns.image, where, config.skip_broken)
        kept = [int(row) for row in checked["row"]]
        columns = {"text": [texts[row] for row in kept], "row": kept, "image_hash": checked["image_hash"]}
        images = checked.select_columns([config.columns.image]).rename_columns({config.columns.image: "image"})
        splits[split], broken[split] = _with_columns(images, columns), len(faults)

    reader = _reader(whole, splits["train"]["text"])
    truncated: dict[str, int] = {}
    for split, rows in splits.items():
        where = f"{describe(config.dataset)}, {split}"
        tokens = reader.encode(rows["text"])
        texts, numbers, decoded = rows["text"][:], rows["row"][:], reader.decode(tokens)
        check_lossless(texts, decoded, tokens, reader.tokenizer, numbers, where)
        warn_of_moved_spaces(texts, decoded, config.normalization, numbers, where)
        truncated[split] = sum(len(ids) > config.max_length for ids in tokens)
        tokens = [ids[: config.max_length] for ids in tokens]
        lengths = [len(ids) for ids in tokens]
        splits[split] = _with_columns(rows, {"tokens": tokens, "length": lengths})
        logger.info(
            "%s: %d images, %.1f tokens a transcript, %d cut to %d tokens",
            split,
            len(rows),
            sum(lengths) / len(lengths),
            truncated[split],
            config.max_length,
        )
    logger.info("transcripts: %s", describe_normalization(config.normalization))
    read = {split: rows.select_columns(["image_hash", "text"]) for split, rows in splits.items()}
    return Ocr(
        config=config,
        reader=reader,
        train=splits.pop("train"),
        validation=splits,
        fingerprint=_fingerprint(read, reader),
        truncated=truncated,
        broken=broken,
        description=describe(config.dataset),
        shown_texts=whole.evaluation.shown_texts,
    )


def _reader(whole: Config, texts: list[str]) -> LineReader | ImageChat:
    """How the model is given images and transcripts: it is known before the model is loaded."""
    config, model = whole.task, whole.model
    assert isinstance(config, OcrTask)
    if model.config is not None and reads_lines(model.config):
        if model.new_tokenizer is None:
            tokenizer = load_own_tokenizer(model)
        elif model.new_tokenizer.kind == "characters":
            tokenizer = character_tokenizer(texts)
        else:
            raise UsageError("model.new_tokenizer.kind is bpe, and OCR builds tokenizers of kind characters")
        processing: Any = new_processor(tokenizer, model.config)
    else:
        if model.config is not None and model.new_tokenizer is not None:
            raise UsageError("model.new_tokenizer is for encoder-decoders from scratch; name one with model.tokenizer")
        source, key = processing_source(model)
        processing = load_processor(source, key)
        if config.prompt is not None:
            return image_chat(processing, config.prompt, config.image)
    return line_reader(processing, config.image)


def _fingerprint(read: dict[str, Dataset], reader: LineReader | ImageChat) -> str:
    parts = f"{fingerprint(read)} {tokenizer_hash(reader.tokenizer)} {reader.facts()}"
    return hashlib.sha256(parts.encode()).hexdigest()


def _with_columns(rows: Dataset, columns: dict[str, list[Any]]) -> Dataset:
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows
