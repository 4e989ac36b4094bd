"""Applies task.truncation and task.unprinted: cuts rows, leaves them out or refuses them, and reports what was lost."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from forge.config.task_schema import CausalLmTask
from forge.data.batches import Row
from forge.errors import UsageError
from forge.task.causal_lm.documents import FEATURES, Encoder, map_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """What one split lost to task.max_length and its chat template."""

    rows: int = 0  # that were cut to max_length
    tokens: int = 0  # lost with them
    left_out: int = 0  # rows with no learned token left, or too long for truncation: leave_out
    first_left_out: int | None = None  # its number
    unprinted: int = 0  # rows with a part that the chat template does not write; with leave_out they are left out too


def encode_split(encoder: Encoder, rows: Dataset, where: str, split: str) -> tuple[Dataset, Cut]:
    """Return the tokens of a split, without the rows that carry no label. Raises UsageError if no row is left."""
    place = f"{where}, {split}"

    def encode(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        return encoder.encode(columns, numbers, place)

    encoded = map_rows(rows, encode, f"{encoder.key} {place}", FEATURES, "tokenizing")
    printed, lacking = select_printed(encoder.config, encoded, place)
    kept, cut = select_rows(encoder.config, printed, place)
    cut = replace(cut, unprinted=lacking)
    lengths = kept["length"][:]
    labels = sum(kept["labels"][:])
    logger.info(
        "%s: %d rows as %s, %.1f tokens a row, %.1f of them learned",
        *(split, len(kept), encoder.form.name, sum(lengths) / len(kept), labels / len(kept)),
    )
    _warn_of_cuts(encoder.config, split, cut)
    _warn_of_specials(kept, split)
    _warn_of_keys(kept, split)
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
    unprinted = [row for row in encoded if row["unprinted"]]
    if unprinted and config.unprinted == "refuse":
        raise UsageError(_unprinted(where, unprinted[0]))
    lost = [row for row in encoded if row["tokens_cut"]]
    if lost and config.truncation == "refuse":
        raise UsageError(_too_long(config, where, lost[0]))
    kept = [row for row in encoded if row["labels"]]
    if config.truncation == "leave_out":
        kept = [row for row in kept if not row["tokens_cut"]]
    if config.unprinted == "leave_out":
        kept = [row for row in kept if not row["unprinted"]]
    ids = {row["row"] for row in kept}
    truncated = sum(bool(row["tokens_cut"]) or row["row"] not in ids for row in encoded)
    if not kept:
        first = encoded[0]
        kept = [{**first, "input_ids": first["input_ids"][:1], "learned": [False], "length": 1}]
    return kept, truncated


def select_printed(config: CausalLmTask, encoded: Dataset, place: str) -> tuple[Dataset, int]:
    """Return the rows to learn from, after task.unprinted, and how many have a part that no text holds.

    Raises UsageError for such a row if they are refused, and if no row is left.
    """
    lacking = [i for i, part in enumerate(encoded["unprinted"][:]) if part]
    if not lacking:
        return encoded, 0
    first = _unprinted(place, encoded[lacking[0]])
    if config.unprinted == "refuse" or (config.unprinted == "leave_out" and len(lacking) == len(encoded)):
        raise UsageError(f"{first} ({len(lacking)} of {len(encoded)} rows)")
    what = {"leave_out": "are left out", "accept": "are learned without a part of their messages"}[config.unprinted]
    logger.warning("%s: %d of %d rows %s (task.unprinted): %s", place, len(lacking), len(encoded), what, first)
    if config.unprinted == "accept":
        return encoded, len(lacking)
    return encoded.select(sorted({*range(len(encoded))} - {*lacking})), len(lacking)


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


def _unprinted(place: str, row: Row) -> str:
    return (
        f"{place}: row {row['row']} has {row['unprinted']}, which the chat template does not write as it is; give a "
        "template that does with task.chat_template, remove it from the rows, or set task.unprinted: leave_out (such "
        "rows) or accept (they are learned without it)"
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


def _warn_of_specials(rows: Dataset, split: str) -> None:
    numbers = rows["row"][:]
    repeated = [(token, row) for token, row in zip(rows["repeated"][:], numbers, strict=True) if token]
    if repeated:
        logger.warning(
            "%s: %d rows have themselves the special token that begins the row or ends a reply, such as %s in row %d; "
            "forge adds no second one",
            *(split, len(repeated), *repeated[0]),
        )
    special = [(tokens, row) for tokens, row in zip(rows["special"][:], numbers, strict=True) if tokens]
    if special:
        found = sorted({token for tokens, _ in special for token in tokens})
        logger.warning(
            "%s: %d rows contain a special token of the tokenizer in their own text, such as %s in row %d, which the "
            "model reads as such; if that is not intended, remove it with task.remove_text: %r",
            *(split, len(special), special[0][0][0], special[0][1], found),
        )


def _warn_of_keys(rows: Dataset, split: str) -> None:
    counts = Counter(key for keys in rows["without_effect"][:] for key in keys)
    if counts:
        logger.warning(
            "%s: keys of messages that change nothing, since neither forge nor the chat template reads them: %s",
            *(split, ", ".join(f"{key} ({count} rows)" for key, count in sorted(counts.items()))),
        )
