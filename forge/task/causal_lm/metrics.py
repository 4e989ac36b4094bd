"""Metrics of a causal LM: counts over labels, and a few replies that the model generates itself."""

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forge.data.batches import Batch, Row
from forge.losses.cross_entropy import IGNORE
from forge.model.generation import write
from forge.task.task import Metrics, Sample

SHOWN_TOKENS = 256  # of a shown text at most: every evaluation waits until the texts are generated
SPARE_TOKENS = 16  # that a generated reply may be longer than the longest reference


class CausalLmMetrics(Metrics):
    """Counts labels, right predictions and cross-entropy; then lets the model reply to a few rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shown: list[Row],
        *,
        plain_text: bool,
    ):
        """shown: rows that the model replies to; plain_text: they have no replies, so it continues them."""
        self.counts = torch.zeros(3, dtype=torch.float64)  # labels, right predictions, cross-entropy in nats
        self.samples = []
        self._model, self._tokenizer, self._shown, self._plain_text = model, tokenizer, shown, plain_text

    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """Count ce_sum () and predictions (B, T) int64, aligned with the labels. Does not wait for the GPU."""
        labels = batch["labels"]
        counted = labels != IGNORE
        right = counted & (outputs["predictions"] == labels)
        sums = torch.stack([counted.sum().double(), right.sum().double(), outputs["ce_sum"].double()])
        self.counts = self.counts.to(labels.device) + sums

    def compute(self) -> dict[str, float | int]:
        """Return perplexity, token_accuracy and the number of labels; fills samples on the first rank.

        perplexity: the exponential of ce. token_accuracy: the share of labels that are the argmax, after the true text.
        """
        labels, right, ce_sum = self.counts.cpu()  # waits for the GPU
        if self._shown:
            # On all ranks, since weights may be sharded.
            replies = generate_replies(self._model, self._tokenizer, self._shown, plain_text=self._plain_text)
            self.samples = replies if PartialState().is_main_process else []
        return {
            "perplexity": (ce_sum / labels).exp().item(),
            "token_accuracy": (right / labels).item(),
            "labels": int(labels),
        }


def generate_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], *, plain_text: bool = False
) -> list[Sample]:
    """Return what the model generates greedily in place of the last reply of each row.

    plain_text: in place of the second half of each row.
    """
    spans = [(max(1, row["length"] // 2), row["length"]) if plain_text else _last_reply(row) for row in rows]
    prompts = [row["input_ids"][:start] for row, (start, _) in zip(rows, spans, strict=True)]
    references = [row["input_ids"][start:end] for row, (start, end) in zip(rows, spans, strict=True)]
    inputs = _left_padded(prompts, int(tokenizer.pad_token_id))
    width = inputs["input_ids"].shape[1]
    new_tokens = min(SHOWN_TOKENS, max(map(len, references)) + SPARE_TOKENS)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        new_tokens = min(new_tokens, positions - width)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    generated = write(model, inputs, max(1, new_tokens))[:, width:].tolist()  # waits for the GPU

    def plain(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    return [
        Sample(row["row"], plain(reference[:SHOWN_TOKENS]), plain(reply), str(tokenizer.decode(prompt)))
        for row, prompt, reference, reply in zip(rows, prompts, references, generated, strict=True)
    ]


def _last_reply(row: Row) -> tuple[int, int]:
    """Return where the last run of learned tokens begins, after at least one token, and where it ends."""
    learned = row["learned"]
    last = max(i for i, wanted in enumerate(learned) if wanted)
    start = max((i for i in range(last) if not learned[i]), default=-1) + 1
    return max(1, start), last + 1


def _left_padded(prompts: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (B, T) int64 of prompts that all end at the last position."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        mask[b, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
