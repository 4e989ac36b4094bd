"""The OCR task: images of text with their transcripts, read by an encoder-decoder or by a chat-style vision model."""

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from forge.config.schema import Config, ModelConfig, TrainingConfig
from forge.config.task_schema import OcrTask
from forge.data.batches import FILLER, Batch, Row, model_inputs
from forge.data.fingerprints import rows_hash, text_hash, tokenizer_hash
from forge.data.rows import describe, kept_rows, load_rows, row_numbers
from forge.errors import UsageError
from forge.model.generation import write
from forge.model.load import LoadedModel, check_fits, load_own_tokenizer, processing_source, scratch_config
from forge.model.recognizer import freeze_unused, load_recognizer, new_recognizer_config, reads_lines, writer
from forge.model.source import ModelSource, load_processor
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.image_chat import image_chat
from forge.task.ocr.images import check_images, open_image, png, refused_sizes
from forge.task.ocr.line_reader import line_reader, new_processor, planned_size
from forge.task.ocr.reader import Reader
from forge.task.ocr.transcripts import (
    EDIT_COUNTS,
    check_lossless,
    describe_normalization,
    edit_counts,
    normalize,
    read_transcripts,
    warn_of_moved_spaces,
)
from forge.task.task import Metrics, Sample, Task, task_section

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Ocr(Task):
    """Rows with the columns image (encoded), text (normalised), tokens (of the transcript) and length."""

    config: OcrTask
    reader: Reader
    train: Dataset
    validation: dict[str, Dataset]  # by short name
    fingerprint: str  # hash of images, transcripts, tokenizer and the reader's facts
    truncated: dict[str, int]  # transcripts cut to max_length, by split
    broken: dict[str, int]  # images left out, by split
    left_out: dict[str, int]  # rows without a transcript, by split
    largest: tuple[int, int]  # width and height of the largest image
    description: str
    shown_texts: int = 4  # rows of each split whose text is shown
    special_tokens: dict[str, Any] = field(default_factory=dict)  # those that the model's generate uses

    name: ClassVar[str] = "ocr"
    title: ClassVar[str] = "A model that reads text in images"
    pipeline_tag: ClassVar[str] = "image-to-text"
    auto_model: ClassVar[type[Any]] = AutoModelForImageTextToText
    main_metric: ClassVar[str] = "cer"
    headline: ClassVar[tuple[str, ...]] = ("ce", "cer", "wer", "exact_match")
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    inputs_need_model: ClassVar[bool] = True
    num_workers: ClassVar[int] = 2

    @classmethod
    def load(cls, config: Config) -> "Ocr":
        return load_ocr(config)

    @classmethod
    def scratch_config(cls, section: ModelConfig, key: str) -> PreTrainedConfig:
        """Return the transformers config of `section.config`; an encoder-decoder's is completed by its tokenizer."""
        assert section.config is not None
        if not reads_lines(section.config):
            return scratch_config(section.config, f"{key}.config")
        new = section.new_tokenizer
        tokenizer = load_own_tokenizer(section) if new is None else character_tokenizer([])
        return new_recognizer_config(section.config, tokenizer, key)

    @classmethod
    def planned_batch(
        cls, config: Config, section: ModelConfig, model: PreTrainedConfig, rows: int, longest: int | None = None
    ) -> Batch:
        """Return a batch of blank images, as large as task.image or the model says, with the longest transcripts."""
        task = task_section(config, OcrTask)
        tokens = task.max_length if longest is None else min(task.max_length, longest)
        if reads_lines(model):
            ids = torch.zeros((rows, tokens), dtype=torch.int64)
            height, width = planned_size(task.image, model.encoder)
            pixels = torch.zeros(rows, getattr(model.encoder, "num_channels", 3), height, width)
            return {"pixel_values": pixels, "decoder_input_ids": ids, "labels": ids}
        chat = image_chat(load_processor(*processing_source(section)), task.prompt or "", task.image)
        height, width = planned_size(task.image, getattr(model, "vision_config", model))
        return chat.collate([Image.new("RGB", (width, height))] * rows, [[chat.end] * tokens] * rows)

    @property
    def processing(self) -> ProcessorMixin:  # type: ignore[override]
        return self.reader.processing

    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """Return a model that reads these images and writes with this tokenizer; weights it never uses are frozen."""
        loaded = load_recognizer(config, self.reader.tokenizer, self.reader.end, key)
        model = loaded.model
        if reads_lines(model.config) != (self.config.prompt is None):
            unprompted = reads_lines(model.config)
            what = "takes no prompt: remove task.prompt" if unprompted else "needs a prompt: set task.prompt"
            raise UsageError(f"{key} is of type {model.config.model_type}, which {what}")
        self.reader.check_model(model.config, key)
        check_fits(writer(model), self._longest(), training)
        row = self.for_model(loaded).collate([self.train[0]])
        freeze_unused(model, {name: row[name] for name in row if name not in ("labels", "tokens")})
        return loaded

    def for_model(self, loaded: LoadedModel) -> "Ocr":
        generation = loaded.model.generation_config
        assert generation is not None
        special = {name: getattr(generation, name) for name in SPECIAL_TOKENS if getattr(generation, name) is not None}
        return replace(self, reader=self.reader.for_model(loaded.model.config), special_tokens=special)

    def load_processing(self, source: ModelSource, key: str) -> ProcessorMixin:
        return load_processor(source, key)

    def key_parts(self) -> dict[str, Any]:
        images = {"the image processor": text_hash(self.processing.image_processor.to_json_string())}
        return images | self.reader.key_parts()

    def without_shown_texts(self) -> "Ocr":
        return replace(self, shown_texts=0)

    def collate(self, rows: list[Row]) -> Batch:
        """Return a batch; images are decoded in the calling process."""
        images = [open_image(row["image"]) for row in rows]
        tokens = [row["tokens"] for row in rows]
        return {**self.reader.collate(images, tokens), "tokens": torch.tensor(sum(map(len, tokens)))}

    def metrics(self, split: str, model: PreTrainedModel) -> "OcrMetrics":
        return OcrMetrics(self, self.validation[split], model)

    def generation(self) -> dict[str, Any]:
        """Return the options with which a text is generated from an image."""
        config = self.config
        search = {"max_new_tokens": config.max_length, "num_beams": config.num_beams, "do_sample": False}
        return {**search, "use_cache": True, **self.special_tokens}

    def about(self) -> dict[str, Any]:
        """Add `usage`: lines of Python that read one image as an evaluation does, before task.normalization."""
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
            "left_out": self.left_out,
            "normalization": describe_normalization(self.config.normalization),
            "num_beams": self.config.num_beams,
            **self.reader.facts(),
        }

    def _longest(self) -> int:
        """Return the tokens that the decoder reads of the largest image with a transcript of max_length tokens."""
        return self.reader.prompt_tokens(Image.new("RGB", self.largest)) + self.config.max_length


class OcrMetrics(Metrics):
    """Counts the edits between transcripts and what the model generates for each batch."""

    def __init__(self, task: Ocr, rows: Dataset, model: PreTrainedModel):
        self.counts = torch.zeros(len(EDIT_COUNTS), dtype=torch.int64)
        self.samples: list[Sample] = []
        self._task, self._rows, self._model = task, rows, model

    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Generate texts for the images, also of a filler, since the ranks of a sharded model generate together."""
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
        """Keep the rows with the lowest numbers, in any order of batches."""
        if len(self.samples) < self._task.shown_texts or (self.samples and row < self.samples[-1].row):
            image = png(open_image(self._rows[row]["image"]))
            sample = Sample(row, reference, prediction, self._task.config.prompt, image)
            self.samples = sorted([*self.samples, sample], key=lambda shown: shown.row)[: self._task.shown_texts]

    def compute(self) -> dict[str, Any]:
        """Return cer and wer, edits per character and word of all references, exact_match as a share, and counts."""
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
    """Return the task with its images and transcripts, loaded and checked.

    Raises UsageError for the first image or transcript that is missing, broken or unfit.
    """
    config = task_section(whole, OcrTask)
    if config.dataset.streaming:
        raise UsageError("task.dataset.streaming is for causal LMs; an OCR data set is checked before training")
    train, validation = load_rows(config.dataset)
    name = describe(config.dataset)
    splits, broken, left_out = {}, {}, {}
    for split, rows in {"train": train, **validation}.items():
        splits[split], broken[split], left_out[split] = _checked_rows(config, rows, f"{name}, {split}")
    reader = _reader(whole, splits["train"]["text"])
    truncated: dict[str, int] = {}
    largest = (1, 1)
    for split, checked in splits.items():
        rows, refused = _taken(config, reader, checked, f"{name}, {split}")
        broken[split] += refused
        largest = max([largest, *map(tuple, rows["image_size"])], key=math.prod)
        splits[split], truncated[split] = _tokenized(config, reader, rows, f"{name}, {split}")
        lengths = splits[split]["length"]
        logger.info(
            "%s: %d images, %.1f tokens a transcript, %d cut to %d tokens",
            *(split, len(rows), sum(lengths) / len(lengths), truncated[split], config.max_length),
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
        left_out=left_out,
        largest=largest,
        description=name,
        shown_texts=whole.evaluation.shown_texts,
    )


def _checked_rows(config: OcrTask, rows: Dataset, where: str) -> tuple[Dataset, int, int]:
    """Return the columns image, text, row, image_hash and image_size of a split, and how many rows were left out.

    These are those with broken images, and those without a transcript.
    """
    transcripts = read_transcripts(rows, config.columns, config.normalization, where)
    rows = rows.select_columns([config.columns.image, config.columns.text])
    blank = [place for place, text in enumerate(transcripts) if not text.strip()]
    kept_rows(
        rows, dict.fromkeys(blank, f"an empty transcript in the column {config.columns.text}"), config.empty, where
    )
    texts = dict(zip(row_numbers(rows), transcripts, strict=True))
    checked, faults = check_images(rows, config.columns.image, where, config.skip_broken)
    kept = [place for place, row in enumerate(checked["row"]) if texts[row].strip()]
    if not kept:
        raise UsageError(f"{where}: no row is left that has both an image and a transcript")
    checked = checked.select(kept) if len(kept) < len(checked) else checked
    columns = {name: checked[name][:] for name in ("row", "image_hash", "image_size")}
    images = checked.select_columns([config.columns.image]).rename_columns({config.columns.image: "image"})
    return _with_columns(images, {"text": [texts[row] for row in columns["row"]], **columns}), len(faults), len(blank)


def _taken(config: OcrTask, reader: Reader, rows: Dataset, where: str) -> tuple[Dataset, int]:
    """Return the rows whose image the model's processor takes, and how many it does not.

    Raises UsageError for the first of them, unless task.skip_broken, and if none is left.
    """
    sizes = [(width, height) for width, height in rows["image_size"]]
    refused = refused_sizes(reader.refusal, sizes)
    bad = [place for place, size in enumerate(sizes) if size in refused]
    if not bad:
        return rows, 0
    width, height = sizes[bad[0]]
    what = (
        f"the model's processor does not take the image of row {rows[bad[0]]['row']}, of {width} x {height} pixels "
        f"({refused[width, height]})"
    )
    if not config.skip_broken or len(bad) == len(rows):
        raise UsageError(
            f"{where}: {what}; {len(bad)} of {len(rows)} images are refused. Replace them, set task.image.height and "
            "task.image.width, or leave out such rows with task.skip_broken: true"
        )
    logger.warning("%s: %d of %d images are left out, the first because %s", where, len(bad), len(rows), what)
    return rows.select([place for place in range(len(rows)) if sizes[place] not in refused]), len(bad)


def _tokenized(config: OcrTask, reader: Reader, rows: Dataset, where: str) -> tuple[Dataset, int]:
    """Return the rows with the columns tokens and length, and how many transcripts were cut to max_length."""
    tokens = reader.encode(rows["text"])
    texts, numbers, decoded = rows["text"][:], rows["row"][:], reader.decode(tokens)
    check_lossless(texts, decoded, tokens, reader.tokenizer, numbers, where)
    warn_of_moved_spaces(texts, decoded, config.normalization, numbers, where)
    truncated = sum(len(ids) > config.max_length for ids in tokens)
    tokens = [ids[: config.max_length] for ids in tokens]
    rows = rows.remove_columns("image_size")
    return _with_columns(rows, {"tokens": tokens, "length": [len(ids) for ids in tokens]}), truncated


def _reader(whole: Config, texts: list[str]) -> Reader:
    """Return how the model is given images and transcripts, which is known before the model is loaded."""
    config, model = task_section(whole, OcrTask), whole.model
    if model.config is not None and reads_lines(model.config):
        return line_reader(new_processor(_new_tokenizer(model, texts), model.config), config.image)
    if model.config is not None and model.new_tokenizer is not None:
        raise UsageError("model.new_tokenizer is for encoder-decoders from scratch; name one with model.tokenizer")
    processing: Any = load_processor(*processing_source(model))
    if config.prompt is not None:
        return image_chat(processing, config.prompt, config.image)
    return line_reader(processing, config.image)


def _new_tokenizer(model: ModelConfig, texts: list[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an encoder-decoder from scratch."""
    if model.new_tokenizer is None:
        return load_own_tokenizer(model)
    if model.new_tokenizer.kind != "characters":
        raise UsageError("model.new_tokenizer.kind is bpe, but OCR builds tokenizers of kind characters")
    return character_tokenizer(texts)


def _fingerprint(read: dict[str, Dataset], reader: Reader) -> str:
    return text_hash(f"{rows_hash(read)} {tokenizer_hash(reader.tokenizer)} {reader.facts()}")


def _with_columns(rows: Dataset, columns: dict[str, list[Any]]) -> Dataset:
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows
