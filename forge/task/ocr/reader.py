"""What the OCR task asks of a way to give images and transcripts to a model."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from forge.data.batches import Batch


class Reader(Protocol):
    """How one kind of model is given images and transcripts, and how its output becomes text."""

    @property
    def processing(self) -> ProcessorMixin: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def end(self) -> int:
        """The token that ends a transcript."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what run_metadata.json records; it is part of the data's fingerprint, so it must stay the same."""
        ...

    def key_parts(self) -> dict[str, Any]:
        """Return by name what a teacher's outputs depend on besides images, tokens and the image processor."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens that the model is to generate, up to the end token."""
        ...

    def collate(self, images: Sequence[Image.Image], tokens: Sequence[list[int]]) -> Batch:
        """Return the model's inputs and `labels` (B, T) int64."""
        ...

    def generation_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what generate is called with, made from a batch."""
        ...

    def replies(self, generated: Tensor, inputs: dict[str, Tensor]) -> list[str]:
        """Return the texts in the output of generate, (B, T) int64."""
        ...

    def decode(self, tokens: Sequence[list[int]]) -> list[str]:
        """Return the texts of tokens that `encode` gave or that a model generated."""
        ...

    def in_code(self) -> tuple[list[str], str, str]:
        """Return Python for the model card: lines before generate, its arguments, and the text of `written`."""
        ...

    def prompt_tokens(self, image: Image.Image) -> int:
        """Return how many tokens the decoder reads before a transcript, those of the image included."""
        ...

    def refusal(self, size: tuple[int, int]) -> str | None:
        """Return why an image of this width and height is not taken; None if it is."""
        ...

    def check_model(self, config: PreTrainedConfig, key: str) -> None:
        """Raise UsageError if the model of section `key` cannot read the images."""
        ...

    def for_model(self, config: PreTrainedConfig) -> Self:
        """Return the reader as this model needs it."""
        ...
