"""Applies task.truncation: cuts rows to task.max_length or leaves them out, and reports what was lost."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from forge.config.task_schema import CausalLmTask
from forge.data.batches import Row
from forge.errors import UsageError
from forge.task.causal_lm.documents import FEATURES, Encoder, map_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """What one split lost to task.max_length."""

    rows: int = 0  # that were cut to max_length
    tokens: int = 0  # lost with them
    left_out: int = 0  # rows with no learned token left, or too long for truncation: leave_out
    first_left_out: int | None = None  # its number


def encode_split(encoder: Encoder, rows: Dataset, where: str, split: str) -> tuple[Dataset, Cut]:
    """Return the tokens of a split, without the rows that carry no label. Raises UsageError if no row is left."""
    place = f"{where}, {split}"

    def encode(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        return encoder.encode(columns, numbers, place)

    encoded = map_rows(rows, encode, f"{encoder.key} {place}", FEATURES, "tokenizing")
    kept, cut = select_rows(encoder.config, encoded, place)
    lengths = kept["length"][:]
    labels = sum(kept["labels"][:])
    logger.info(
        "%s: %d rows as %s, %.1f tokens a row, %.1f of them learned",
        *(split, len(kept), encoder.form.name, sum(lengths) / len(kept), labels / len(kept)),
    )
    _warn_of_cuts(encoder.config, split, cut)
    _warn_of_specials(encoder, kept, split)
    return kept, cut


def prepare_rows(encoder: Encoder, rows: Sequence[Row], numbers: Sequence[int], where: str) -> tuple[list[Row], int]:
    """Return rows of a stream as tokens, after task.truncation, and how many were cut or left out.

    If none is left, the first one's first token comes back as a row without labels.
    """
    config = encoder.config
    for row, number in zip(rows, numbers, strict=True):
        if lacking := [name for name in encoder.form.columns if name not in row]:
            raise UsageError(f"{where}: row {number} has no column {lacking[0]}; it has: {', '.join(row)}")
    columns = encoder.encode({name: [row[name] for row in rows] for name in encoder.form.columns}, numbers, where)
    encoded = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lost = [row for row in encoded if row["tokens_cut"]]
    if lost and config.truncation == "refuse":
        raise UsageError(_too_long(config, where, lost[0]))
    kept = [row for row in encoded if row["labels"]]
    if config.truncation == "leave_out":
        kept = [row for row in kept if not row["tokens_cut"]]
    ids = {row["row"] for row in kept}
    truncated = sum(bool(row["tokens_cut"]) or row["row"] not in ids for row in encoded)
    if not kept:
        first = encoded[0]
        kept = [{**first, "input_ids": first["input_ids"][:1], "learned": [False], "length": 1}]
    return kept, truncated


def select_rows(config: CausalLmTask, encoded: Dataset, place: str) -> tuple[Dataset, Cut]:
    """Return the rows to learn from, after task.truncation, and what was lost. Raises UsageError if none is left."""
    lost = encoded["tokens_cut"][:]
    too_long = [i for i, tokens in enumerate(lost) if tokens]
    if too_long and config.truncation == "refuse":
        longest = max(lost) + config.max_length
        raise UsageError(
            f"{_too_long(config, place, encoded[too_long[0]])} ({len(too_long)} such rows, the longest of {longest})"
        )
    out = {i for i, labels in enumerate(encoded["labels"][:]) if not labels}
    if config.truncation == "leave_out":
        out |= set(too_long)
    cut = [i for i in too_long if i not in out]
    kept = [i for i in range(len(encoded)) if i not in out]
    if not kept:
        raise UsageError(
            f"{place}: no row has a reply within task.max_length {config.max_length} tokens; raise it (the longest row "
            f"has {max(lost) + config.max_length if too_long else max(encoded['length'][:])})"
        )
    facts = Cut(len(cut), sum(lost[i] for i in cut), len(out), encoded[min(out)]["row"] if out else None)
    return (encoded.select(kept) if out else encoded), facts


def _too_long(config: CausalLmTask, place: str, row: Row) -> str:
    return (
        f"{place}: row {row['row']} has {row['tokens_cut'] + config.max_length} tokens, more than task.max_length "
        f"{config.max_length}; raise it, or set task.truncation: cut or leave_out"
    )


def _warn_of_cuts(config: CausalLmTask, split: str, cut: Cut) -> None:
    if cut.rows:
        logger.warning(
            "%s: %d rows are cut to task.max_length %d and lose %d tokens in all",
            *(split, cut.rows, config.max_length, cut.tokens),
        )
    if cut.left_out:
        logger.warning(
            "%s: %d rows are left out, the first is row %d: %s",
            *(split, cut.left_out, cut.first_left_out),
            "they are longer than task.max_length, or have nothing to learn"
            if config.truncation == "leave_out"
            else f"they have nothing to learn, or not within task.max_length {config.max_length}",
        )


def _warn_of_specials(encoder: Encoder, rows: Dataset, split: str) -> None:
    special = [(token, row) for token, row in zip(rows["special"], rows["row"], strict=True) if token]
    if special:
        token, row = special[0]
        logger.warning(
            "%s: %d rows contain a special token of the tokenizer in their own text, such as %s in row %d, which the "
            "model reads as such; if that is not intended, remove it with task.remove_text: [%r]",
            *(split, len(special), token, row, token),
        )
