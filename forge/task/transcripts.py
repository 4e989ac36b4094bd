"""Transcripts: how they are normalised, what makes one unfit to be learned, and the edits between two of them."""

import unicodedata
from collections.abc import Sequence

import jiwer
import torch
from datasets import Dataset
from jiwer.transforms import ReduceToListOfListOfChars
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forge.config.schema import ImageColumns, NormalizationConfig
from forge.errors import UsageError

EDIT_COUNTS = ("character_edits", "characters", "word_edits", "words", "exact", "rows", "empty")


def normalize(text: str, how: NormalizationConfig) -> str:
    """The text as it is learned and compared: Unicode form, then case, then whitespace."""
    if how.unicode != "keep":
        text = unicodedata.normalize("NFC" if how.unicode == "nfc" else "NFKC", text)
    if how.case != "keep":
        text = text.lower() if how.case == "lower" else text.upper()
    if how.whitespace:
        text = " ".join(text.split())
    return text


def describe_normalization(how: NormalizationConfig) -> str:
    """The same in words, for whoever reads the metrics."""
    case = "case kept" if how.case == "keep" else f"{how.case} case"
    form = "Unicode as it is" if how.unicode == "keep" else f"Unicode {how.unicode.upper()}"
    spaces = "whitespace collapsed" if how.whitespace else "whitespace kept"
    return f"{case}, {form}, {spaces}; training transcripts, references and predictions alike"


def read_transcripts(rows: Dataset, columns: ImageColumns, how: NormalizationConfig, where: str) -> list[str]:
    """The normalised transcripts. Raises UsageError for missing columns and for rows without a text."""
    for key in ("image", "text"):
        column = getattr(columns, key)
        if column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise UsageError(
                f"{where}: there is no column {column}; it has: {has}. Name the right one with task.columns.{key}"
            )
    if getattr(rows.features[columns.text], "dtype", "") not in ("string", "large_string"):
        kind = rows.features[columns.text]
        raise UsageError(f"{where}: the column {columns.text} (task.columns.text) holds {kind}, not text")
    texts = [normalize(text or "", how) for text in rows[columns.text]]
    empty = next((row for row, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise UsageError(
            f"{where}: row {empty} has an empty transcript in the column {columns.text}; take the row out, or fill it"
        )
    return texts


def check_lossless(
    texts: Sequence[str],
    decoded: Sequence[str],
    tokens: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int],
    where: str,
) -> None:
    """Raises UsageError for the first text that its tokens do not give back, up to white space; rows names them."""
    for text, back, ids, row in zip(texts, decoded, tokens, rows, strict=True):
        if "".join(text.split()) == "".join(back.split()) and tokenizer.unk_token_id not in ids:
            continue
        lost = _first_lost(text, tokenizer)
        raise UsageError(
            f"{where}: row {row} has {lost} in its transcript {text!r}, which the model's tokenizer cannot write; take "
            "the row out, change the character with task.normalization, or use a model whose tokenizer knows it"
        )


def _first_lost(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for character in text:
        ids = tokenizer(character, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id in ids or character.strip() not in tokenizer.decode(ids, skip_special_tokens=True):
            return f"the character {character!r} (U+{ord(character):04X})"
    return "a piece"


def edit_counts(reference: str, prediction: str) -> Tensor:
    """(7,) int64 in the order of EDIT_COUNTS, which ranks and rows can add up.

    An empty reference has no characters to get wrong: what is predicted for it counts as insertions.
    """
    as_it_is = ReduceToListOfListOfChars()  # jiwer would strip both
    characters = jiwer.process_characters(reference, prediction, as_it_is, as_it_is)
    words = jiwer.process_words(reference, prediction)
    counts = [
        characters.substitutions + characters.deletions + characters.insertions,
        len(reference),
        words.substitutions + words.deletions + words.insertions,
        len(reference.split()),
        int(reference == prediction),
        1,
        int(prediction == ""),
    ]
    return torch.tensor(counts, dtype=torch.int64)
