"""The reader for chat-style vision-language models: a prompt with an image, and the reply that is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from forge.config.task_schema import ImageConfig
from forge.data.batches import Batch
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.recognizer import end_token
from forge.task.fixed_date import fixed_date
from forge.task.ocr.images import fit, fit_in_code

PROBE = "transcript"  # a reply that is looked for in what the chat template writes


@dataclass(frozen=True)
class ImageChat:
    """One turn: the user shows an image with `prompt`, and the model replies with the transcript."""

    processing: ProcessorMixin
    prompt: str
    image: ImageConfig
    opening: str  # the user's turn as the chat template writes it, up to where generation begins
    lead: str  # what the template writes before a reply, such as a space
    closing: str  # what it writes after the reply, up to the end of the turn
    remainder: str  # what is left of closing without special tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing.tokenizer

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return int(self.encode([""])[0][-1])

    def facts(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "chat": f"{self.opening}{self.lead}{{transcript}}{self.closing}"}

    def key_parts(self) -> dict[str, Any]:
        return {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of the replies, up to the end of the turn."""
        replies = [self.lead + text + self.closing for text in texts]
        return self.tokenizer(replies, add_special_tokens=False, verbose=False).input_ids  # long ones are cut later

    def collate(self, images: Sequence[Image.Image], tokens: Sequence[list[int]]) -> Batch:
        """Return the processor's output for the prompts, with the replies after them and padding on the right.

        input_ids, attention_mask, labels: (B, T) int64. labels[:, t] is the token t + 1 if that belongs to the reply.
        """
        inputs = self._prompts(images)
        asked = inputs.pop("attention_mask").bool()
        shape = inputs["input_ids"].shape
        # Tensors with one number for each token (input_ids, token types of some models) grow by the reply.
        per_token = [name for name, tensor in inputs.items() if tensor.shape == shape]
        lengths = asked.sum(dim=1).tolist()
        whole = max(length + len(ids) for length, ids in zip(lengths, tokens, strict=True))
        batch = {name: tensor for name, tensor in inputs.items() if name not in per_token}
        for name in per_token:
            filled = self.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = torch.full((len(tokens), whole), filled)
            for row, length in enumerate(lengths):
                batch[name][row, :length] = inputs[name][row, asked[row]]
        batch["attention_mask"] = torch.zeros((len(tokens), whole), dtype=torch.int64)
        batch["labels"] = torch.full((len(tokens), whole), IGNORE)
        for row, (length, ids) in enumerate(zip(lengths, tokens, strict=True)):
            reply = slice(length, length + len(ids))
            batch["input_ids"][row, reply] = torch.tensor(ids)
            batch["attention_mask"][row, : reply.stop] = 1
            batch["labels"][row, reply.start - 1 : reply.stop - 1] = torch.tensor(ids)
        return batch

    def generation_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the prompts of a batch, padded on the left so that generate continues them."""
        labels, shape = batch["labels"], batch["input_ids"].shape
        width = torch.arange(shape[1], device=labels.device)
        # A filler has no labels: its whole row is taken as a prompt.
        lengths = torch.where((labels != IGNORE).any(dim=1), (labels != IGNORE).int().argmax(dim=1) + 1, shape[1])
        columns = (width - (shape[1] - lengths)[:, None]).clamp(min=0)  # (B, T): the row moved to the right end
        asked = width >= (shape[1] - lengths)[:, None]
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "attention_mask")}
        for name, tensor in inputs.items():
            if tensor.shape == shape:
                filled = self.tokenizer.pad_token_id if name == "input_ids" else 0
                inputs[name] = tensor.gather(1, columns).where(asked, filled)
        return {**inputs, "attention_mask": asked.long()}

    def replies(self, generated: Tensor, inputs: dict[str, Tensor]) -> list[str]:
        """Return the texts that generate put after the prompts, which its output repeats."""
        return self.decode(generated[:, inputs["input_ids"].shape[1] :].tolist())

    def decode(self, tokens: Sequence[list[int]]) -> list[str]:
        return [
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            .removesuffix(self.remainder)
            .strip()
            for ids in tokens
        ]

    def in_code(self) -> tuple[list[str], str, str]:
        height, width = self.image.height, self.image.width
        lines = ['image = ImageOps.exif_transpose(Image.open("PATH OF AN IMAGE")).convert("RGB")']
        if height and width:
            lines = fit_in_code(height, width, mode="RGB", fill=self.image.fill, stretch=self.image.stretch)
        asked = [
            f"prompt = {self.opening!r}",
            'inputs = processor(images=[[image]], text=[prompt], return_tensors="pt", add_special_tokens=False)',
            'reply = slice(inputs["input_ids"].shape[1], None)',
        ]
        shown = "written[0, reply], skip_special_tokens=True, clean_up_tokenization_spaces=False"
        text = f"processor.tokenizer.decode({shown}).removesuffix({self.remainder!r}).strip()"
        return [*lines, *asked], "**inputs", text

    def prompt_tokens(self, image: Image.Image) -> int:
        return int(self._prompts([image])["attention_mask"].sum())

    def refusal(self, size: tuple[int, int]) -> str | None:
        try:
            self._prompts([Image.new("RGB", size)])
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:  # each has its own way
            return " ".join(str(error).split())[:200] or type(error).__name__
        return None

    def check_model(self, config: PreTrainedConfig, key: str) -> None:
        """Accept every model: its processor brings images to the size that it reads."""

    def for_model(self, config: PreTrainedConfig) -> "ImageChat":
        return self

    def _prompts(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        height, width = self.image.height, self.image.width
        shown = [image.convert("RGB") for image in images]
        if height and width:
            shown = [fit(image, height, width, fill=self.image.fill, stretch=self.image.stretch) for image in shown]
        return dict(
            self.processing(
                images=[[image] for image in shown],
                text=[self.opening] * len(shown),
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,  # the chat template has written them
            )
        )


def image_chat(processing: Any, prompt: str, image: ImageConfig) -> ImageChat:
    """Return the chat in the processor's own template. Raises UsageError if a reply cannot be located in it."""
    if (image.height is None) != (image.width is None):
        raise UsageError("task.image has only one of height and width; a vision-language model needs both or neither")
    if not getattr(processing, "chat_template", None):
        raise UsageError("task.prompt is set, but the model's processor has no chat template; use a chat model")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
    template = processing.chat_template
    with fixed_date(template.get("default", "") if isinstance(template, dict) else template):
        opening = processing.apply_chat_template([question], add_generation_prompt=True)
        whole = processing.apply_chat_template([question, reply])
    if not whole.startswith(opening) or PROBE not in whole[len(opening) :]:
        raise UsageError(
            "the model's chat template does not write a reply right after the prompt that asks for it, so forge cannot "
            "tell where replies begin; use another model"
        )
    lead, _, closing = whole[len(opening) :].partition(PROBE)
    tokenizer = processing.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [token for token in special if token in closing]
    if ends:  # generation stops at the end of the turn, so what a template writes after it is never read
        first = min(ends, key=closing.index)
        closing = closing[: closing.index(first) + len(first)]
    else:
        closing += tokenizer.convert_ids_to_tokens(end_token(tokenizer))
    remainder = closing
    for token in special:
        remainder = remainder.replace(token, "")
    return ImageChat(processing, prompt, image, opening, lead, closing, remainder)
