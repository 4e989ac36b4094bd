"""The reader for encoder-decoders that read a line, such as TrOCR: their inputs and their processor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrOCRProcessor, ViTImageProcessorPil

from forge.config.task_schema import ImageConfig
from forge.data.batches import Batch
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.recognizer import end_token, start_token
from forge.task.ocr.images import fit, fit_in_code

# Mean and standard deviation of a line's grey values, from 0 to 1: mostly paper, some ink.
PAPER_MEAN, PAPER_STD = 0.9, 0.25


@dataclass(frozen=True)
class LineReader:
    """Brings images to one size, and gives the decoder its own transcript, shifted by one token."""

    processing: TrOCRProcessor
    height: int
    width: int
    image: ImageConfig
    start: int  # the token before a transcript
    end: int  # the token that ends it

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing.tokenizer

    @property
    def channels(self) -> int:
        return len(self.processing.image_processor.image_mean)

    def facts(self) -> dict[str, Any]:
        return {"image_size": [self.height, self.width], "proportions_kept": not self.image.stretch}

    def key_parts(self) -> dict[str, Any]:
        return {"the token that a transcript begins after": self.start}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [[*ids, self.end] for ids in encoded]

    def collate(self, images: Sequence[Image.Image], tokens: Sequence[list[int]]) -> Batch:
        """Return pixel_values (B, C, height, width) float32; decoder_input_ids and labels (B, T) int64."""
        length = max(map(len, tokens))
        labels = torch.full((len(tokens), length), IGNORE)
        inputs = torch.full((len(tokens), length), self.tokenizer.pad_token_id)  # causal: no label sees the padding
        for row, ids in enumerate(tokens):
            labels[row, : len(ids)] = torch.tensor(ids)
            inputs[row, : len(ids)] = torch.tensor([self.start, *ids[:-1]])
        return {"pixel_values": self.pixels(images), "decoder_input_ids": inputs, "labels": labels}

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return (B, C, height, width) float32: scaled, padded, and normalised by the processor."""
        processor = self.processing.image_processor
        mode = "L" if self.channels == 1 else "RGB"
        scale = partial(fit, height=self.height, width=self.width, fill=self.image.fill, stretch=self.image.stretch)
        fitted = [np.asarray(scale(image.convert(mode))) for image in images]
        arrays = [array[..., None] if array.ndim == 2 else array for array in fitted]  # (height, width, C) uint8
        return processor(arrays, do_resize=False, input_data_format="channels_last", return_tensors="pt").pixel_values

    def generation_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {"pixel_values": batch["pixel_values"]}

    def replies(self, generated: Tensor, inputs: dict[str, Tensor]) -> list[str]:
        return self.decode(generated.tolist())

    def decode(self, tokens: Sequence[list[int]]) -> list[str]:
        return [
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in tokens
        ]

    def in_code(self) -> tuple[list[str], str, str]:
        mode = "L" if self.channels == 1 else "RGB"
        lines = fit_in_code(self.height, self.width, mode=mode, fill=self.image.fill, stretch=self.image.stretch)
        pixels = 'pixels = processor(images=image, return_tensors="pt").pixel_values'
        text = "processor.tokenizer.decode(written[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)"
        return [*lines, pixels], "pixel_values=pixels", text

    def prompt_tokens(self, image: Image.Image) -> int:
        return 0

    def refusal(self, size: tuple[int, int]) -> str | None:
        return None  # every image is brought to one size

    def check_model(self, config: PreTrainedConfig, key: str) -> None:
        """Raise UsageError for an encoder that reads images of another size."""
        check_image_size(config.encoder, self.height, self.width, self.channels, key)

    def for_model(self, config: PreTrainedConfig) -> "LineReader":
        """Return the reader with the start token of a model."""
        return replace(self, start=config.decoder_start_token_id)


def line_reader(processing: TrOCRProcessor, image: ImageConfig) -> LineReader:
    """Return the reader with this processor, which no longer scales images itself.

    The processor would stretch images of another size, and the model would silently read other text. Now it raises an
    error for them.
    """
    height, width = image_size(image, processing)
    processing.image_processor.do_resize = False
    processing.image_processor.size = {"height": height, "width": width}
    tokenizer = processing.tokenizer
    end = end_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    start = start_token(None, tokenizer)  # until for_model knows the model's own
    return LineReader(processing, height, width, image, start, end)


def new_processor(tokenizer: PreTrainedTokenizerBase, keys: dict[str, Any]) -> TrOCRProcessor:
    """Return the processor of an encoder-decoder from scratch: a tokenizer and a new image processor.

    keys: model.config, whose encoder says the size and channels of images.
    """
    encoder = keys.get("encoder") or {}
    channels = int(encoder.get("num_channels", 3))
    size = _pair(encoder.get("image_size"))
    images = ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]} if size else None,
        image_mean=[PAPER_MEAN] * channels,
        image_std=[PAPER_STD] * channels,
    )
    return TrOCRProcessor(images, tokenizer)


def image_size(image: ImageConfig, processing: TrOCRProcessor) -> tuple[int, int]:
    """Return height and width from task.image, or else from the model's processor."""
    size = getattr(processing.image_processor, "size", None) or {}
    height, width = image.height or size.get("height"), image.width or size.get("width")
    if not height or not width:
        raise UsageError(
            "the model's image processor has no image size; set task.image.height and "
            "task.image.width, or, for a chat-style model, task.prompt"
        )
    return height, width


def planned_size(image: ImageConfig, encoder: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width of an image from task.image, or else from the config of the encoder that reads it."""
    height, width = _pair(getattr(encoder, "image_size", None)) or (None, None)
    height, width = image.height or height, image.width or width
    if not height or not width:
        raise UsageError("the model does not say how large its images are; set task.image.height and task.image.width")
    return height, width


def check_image_size(config: PreTrainedConfig, height: int, width: int, channels: int, key: str) -> None:
    """Raise UsageError for an encoder that reads images of another size."""
    own = _pair(getattr(config, "image_size", None))
    if own is not None and own != (height, width):
        raise UsageError(
            f"{key}: its encoder reads images of {own[0]} x {own[1]} (height x width), but task.image makes them "
            f"{height} x {width}; set task.image.height: {own[0]} and task.image.width: {own[1]}"
        )
    wanted = getattr(config, "num_channels", channels)
    if wanted != channels:
        raise UsageError(f"{key}: its encoder reads {wanted} channels, but its image processor gives {channels}")


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return int(pair[0]), int(pair[1])
