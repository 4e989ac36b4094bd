"""Encoder-decoders that read a line (TrOCR and its kin): their inputs, their processor, and what fits them."""

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

# Mostly paper, some ink: a line's mean and deviation in grey, so that paper is near 0 and ink stands out.
PAPER_MEAN, PAPER_STD = 0.9, 0.25


@dataclass(frozen=True)
class LineReader:
    """Pads images to one size, and gives the decoder its own transcript, one token behind."""

    processing: TrOCRProcessor
    height: int
    width: int
    image: ImageConfig
    start: int  # the token that a transcript begins after
    end: int  # the token that it ends with

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing.tokenizer

    @property
    def channels(self) -> int:
        return len(self.processing.image_processor.image_mean)

    def facts(self) -> dict[str, Any]:
        return {"image_size": [self.height, self.width], "proportions_kept": not self.image.stretch}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens that the decoder is to give: those of the text alone, then the end token."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [[*ids, self.end] for ids in encoded]

    def collate(self, images: Sequence[Image.Image], tokens: Sequence[list[int]]) -> Batch:
        """pixel_values (B, C, height, width) float32; decoder_input_ids and labels (B, T) int64."""
        length = max(map(len, tokens))
        labels = torch.full((len(tokens), length), IGNORE)
        inputs = torch.full((len(tokens), length), self.tokenizer.pad_token_id)  # causal: no label sees the padding
        for row, ids in enumerate(tokens):
            labels[row, : len(ids)] = torch.tensor(ids)
            inputs[row, : len(ids)] = torch.tensor([self.start, *ids[:-1]])
        return {"pixel_values": self.pixels(images), "decoder_input_ids": inputs, "labels": labels}

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, height, width) float32: scaled, padded, and normalised as the processor does."""
        processor = self.processing.image_processor
        mode = "L" if self.channels == 1 else "RGB"
        scale = partial(fit, height=self.height, width=self.width, fill=self.image.fill, stretch=self.image.stretch)
        fitted = [np.asarray(scale(image.convert(mode))) for image in images]
        arrays = [array[..., None] if array.ndim == 2 else array for array in fitted]  # (height, width, C) uint8
        return processor(arrays, do_resize=False, input_data_format="channels_last", return_tensors="pt").pixel_values

    def generation_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What generate is asked with, of a batch."""
        return {"pixel_values": batch["pixel_values"]}

    def replies(self, generated: Tensor, inputs: dict[str, Tensor]) -> list[str]:
        """The texts in what generate gave, (B, T) int64."""
        return self.decode(generated.tolist())

    def decode(self, tokens: Sequence[list[int]]) -> list[str]:
        return [
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in tokens
        ]

    def in_code(self) -> tuple[list[str], str, str]:
        """For the model card: lines of Python before generate, what it is given, and what makes a text of `written`."""
        mode = "L" if self.channels == 1 else "RGB"
        lines = fit_in_code(self.height, self.width, mode=mode, fill=self.image.fill, stretch=self.image.stretch)
        pixels = 'pixels = processor(images=image, return_tensors="pt").pixel_values'
        text = "processor.tokenizer.decode(written[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)"
        return [*lines, pixels], "pixel_values=pixels", text

    def for_model(self, config: PreTrainedConfig) -> "LineReader":
        """The reader with the start token of a model."""
        return replace(self, start=config.decoder_start_token_id)


def line_reader(processing: TrOCRProcessor, image: ImageConfig) -> LineReader:
    """The reader with this processor, which is kept from scaling images by itself.

    It would stretch them: whoever gives it one of another size is to get an error from the model, not another text.
    """
    height, width = image_size(image, processing)
    processing.image_processor.do_resize = False
    processing.image_processor.size = {"height": height, "width": width}
    tokenizer = processing.tokenizer
    end = end_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    return LineReader(
        processing, height, width, image, start_token(None, tokenizer), end
    )  # for_model has its own start


def new_processor(tokenizer: PreTrainedTokenizerBase, keys: dict[str, Any]) -> TrOCRProcessor:
    """The processor of an encoder-decoder from scratch: a new image processor beside a tokenizer.

    keys: of model.config, whose encoder tells size and channels.
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
    """Height and width, from task.image or else from the model's processor."""
    size = getattr(processing.image_processor, "size", None) or {}
    height, width = image.height or size.get("height"), image.width or size.get("width")
    if not height or not width:
        raise UsageError(
            "the model's image processor does not say how high and wide images are; set task.image.height and "
            "task.image.width, or, for a chat-style model, task.prompt"
        )
    return height, width


def check_image_size(config: PreTrainedConfig, height: int, width: int, channels: int, key: str) -> None:
    """Raises UsageError for an encoder that takes images of another size."""
    own = _pair(getattr(config, "image_size", None))
    if own is not None and own != (height, width):
        raise UsageError(
            f"{key}: its encoder reads images of {own[0]} x {own[1]} (height x width), and task.image makes them "
            f"{height} x {width}; set task.image.height: {own[0]} and task.image.width: {own[1]}"
        )
    wanted = getattr(config, "num_channels", channels)
    if wanted != channels:
        raise UsageError(f"{key}: its encoder reads {wanted} channels, and its image processor gives {channels}")


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return int(pair[0]), int(pair[1])
