"""Packs several documents into one row of max_length tokens, so that none of them sees another.

Only the position ids mark where a document begins: they restart at 0. Without an attention mask, transformers reads
such position ids as packed documents and masks each from all others (masking_utils, find_packed_sequence_indices). The
padding at the end of a row restarts at 0 too, so it counts as another document. check_packing finds out whether a given
model does this.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from torch import Tensor
from transformers import PreTrainedModel

from forge.data.batches import Batch, Row
from forge.data.fingerprints import source_hash
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "learned": ListOf(Value("bool")),
        "lengths": ListOf(Value("int32")),  # of the documents, in order
        "length": Value("int32"),  # of the row
    }
)
# If one document leaks into another, logits change by at least a few thousandths of their standard deviation, even in a
# model with new weights; the rounding of float32 is a few millionths of it.
TOLERANCE = 1e-4


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of at most `capacity` tokens, each a list of document indices.

    Best-fit decreasing: each document, the longest first, goes to the fullest bin with enough room. That takes at most
    11/9 of the smallest possible number of bins, plus one.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by their free tokens
    spaces = 0  # bit s is set if by_space[s] has a bin, so the fullest bin that fits is found without a search
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        by_space[space - length].append(chosen)
        spaces |= 1 << (space - length)
    return bins


def pack(rows: Dataset, capacity: int) -> Dataset:
    """Return the documents packed into rows of at most `capacity` tokens, with the columns of FEATURES."""
    bins = best_fit(rows["length"][:], capacity)

    def join(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for documents in columns["documents"]:
            found = rows[documents]
            for name in ("input_ids", "learned"):
                joined[name].append([value for values in found[name] for value in values])
            joined["lengths"].append(found["length"])
            joined["length"].append(sum(found["length"]))
        return joined

    key = f"{rows._fingerprint} packed {capacity} {source_hash(__file__)}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    on_disk = rows.cache_files
    return Dataset.from_dict({"documents": bins}).map(
        join,
        batched=True,
        batch_size=100,
        remove_columns=["documents"],
        features=FEATURES,
        new_fingerprint=fingerprint,
        cache_file_name=str(Path(on_disk[0]["filename"]).parent / f"cache-{fingerprint}.arrow") if on_disk else None,
        desc="packing",
    )


def shifted_labels(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """Return for each position of one document the next token, or IGNORE if that is not learned or does not exist."""
    return [token if wanted else IGNORE for token, wanted in zip(ids[1:], learned[1:], strict=True)] + [IGNORE]


def collate_packed(rows: list[Row], pad: int) -> Batch:
    """Return input_ids, position_ids, labels (B, T) int64 and tokens () int64 without padding; no attention_mask."""
    width = max(row["length"] for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORE)
    positions = torch.empty((len(rows), width), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : row["length"]] = torch.tensor(row["input_ids"])
        start = 0
        for length in row["lengths"]:
            end = start + length
            labels[b, start:end] = torch.tensor(shifted_labels(row["input_ids"][start:end], row["learned"][start:end]))
            positions[b, start:end] = torch.arange(length)
            start = end
        positions[b, start:] = torch.arange(width - start)
    tokens = torch.tensor(sum(row["length"] for row in rows))
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "tokens": tokens}


@torch.no_grad()
def check_packing(model: PreTrainedModel, forward_options: dict[str, Any]) -> None:
    """Raise UsageError unless a document's logits are the same alone and after any other document in its row.

    The model reads two short documents alone and packed, in a batch of two rows of which one has padding.
    """
    ids = torch.randint(model.config.get_text_config().vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))
    first, other, second = ids.to(model.device)  # (6,) int64 each
    training = model.training
    model.eval()
    try:
        alone = model(input_ids=second[None], **forward_options).logits[0].float()  # (6, V)
        packed = [_logits_after(model, before, second, forward_options) for before in (first, other)]  # (6, V) each
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(
            f"{type(model).__name__} does not take packed rows ({reason}); set task.packing: false"
        ) from error
    finally:
        model.train(training)
    spread = alone.std()
    leak = max((alone - logits).abs().max() for logits in packed)
    leak = max(leak, (packed[0] - packed[1]).abs().max())
    if not leak < TOLERANCE * spread:  # also if it is not a number
        raise UsageError(
            f"{type(model).__name__} mixes packed rows: a document's logits change by {float(leak / spread):.1g} of "
            "their standard deviation with what precedes it in the row; set task.packing: false"
        )


def _logits_after(model: PreTrainedModel, first: Tensor, second: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the logits (6, V) float32 of `second` after `first`, in a batch whose other row is shorter."""
    rows = [[*first.tolist(), *second.tolist()], second.tolist()]
    documents = [
        {"input_ids": row, "learned": [True] * len(row), "lengths": lengths, "length": len(row)}
        for row, lengths in zip(rows, ([len(first), len(second)], [len(second)]), strict=True)
    ]
    batch = collate_packed(documents, pad=0)
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**inputs, **options).logits.float()
    return logits[0, len(first) :]
