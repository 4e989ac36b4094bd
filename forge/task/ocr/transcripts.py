"""Transcripts: how they are normalised and checked, and the edits between two of them."""

import logging
import unicodedata
from collections.abc import Sequence

import jiwer
import torch
from datasets import Dataset
from jiwer.transforms import ReduceToListOfListOfChars
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forge.config.task_schema import ImageColumns, NormalizationConfig
from forge.errors import UsageError

logger = logging.getLogger(__name__)

EDIT_COUNTS = ("character_edits", "characters", "word_edits", "words", "exact", "rows", "empty")


def normalize(text: str, how: NormalizationConfig) -> str:
    """Return the text as it is learned and compared: Unicode form, then case, then white space. Idempotent."""
    text = _in_form(text, how)
    if how.case != "keep":
        text = _in_form(text.lower() if how.case == "lower" else text.upper(), how)  # upper() decomposes some letters
    if how.whitespace:
        text = " ".join(text.split())
    return text


def _in_form(text: str, how: NormalizationConfig) -> str:
    return text if how.unicode == "keep" else unicodedata.normalize("NFC" if how.unicode == "nfc" else "NFKC", text)


def describe_normalization(how: NormalizationConfig) -> str:
    """Return the normalisation in words, for readers of the metrics."""
    case = "case kept" if how.case == "keep" else f"{how.case} case"
    form = "Unicode as it is" if how.unicode == "keep" else f"Unicode {how.unicode.upper()}"
    spaces = "whitespace collapsed" if how.whitespace else "whitespace kept"
    return f"{case}, {form}, {spaces}; training transcripts, references and predictions alike"


def read_transcripts(rows: Dataset, columns: ImageColumns, how: NormalizationConfig, where: str) -> list[str]:
    """Return the normalised transcripts; a missing one is "". Raises UsageError for missing columns."""
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
    return [normalize(text or "", how) for text in rows[columns.text]]


def check_lossless(
    texts: Sequence[str],
    decoded: Sequence[str],
    tokens: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int],
    where: str,
) -> None:
    """Raise UsageError for the first text that its tokens do not reproduce, up to white space. rows: their numbers."""
    unknown = _unknown_token(tokenizer)
    for text, back, ids, row in zip(texts, decoded, tokens, rows, strict=True):
        if "".join(text.split()) == "".join(back.split()) and unknown not in ids:
            continue
        lost = _first_lost(text, tokenizer)
        raise UsageError(
            f"{where}: row {row} has {lost} in its transcript {text!r}, which the model's tokenizer cannot write; "
            "remove the row, change the character with task.normalization, or use a model whose tokenizer knows it"
        )


def warn_of_moved_spaces(
    texts: Sequence[str], decoded: Sequence[str], how: NormalizationConfig, rows: Sequence[int], where: str
) -> None:
    """Log how much the metrics lose if a tokenizer writes other white space than the texts have (`12 . 50`)."""
    written = [normalize(back, how) for back in decoded]
    moved = [place for place, (text, back) in enumerate(zip(texts, written, strict=True)) if text != back]
    if not moved:
        return
    edits = sum(int(edit_counts(texts[place], written[place])[0]) for place in moved)
    first = moved[0]
    logger.warning(
        "%s: the tokenizer reproduces %d of %d transcripts with other white space, such as %r for %r in row %d; "
        "without any other error the cer is %.4f",
        *(where, len(moved), len(texts), written[first], texts[first], rows[first]),
        edits / sum(map(len, texts)),
    )


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token for pieces that the tokenizer does not know; None if that token also has another meaning.

    GPT-2's tokenizer knows every byte, and its unknown token is its end token.
    """
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def _first_lost(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    unknown = _unknown_token(tokenizer)
    for character in text:
        ids = tokenizer(character, add_special_tokens=False).input_ids
        if unknown in ids or character.strip() not in tokenizer.decode(ids, skip_special_tokens=True):
            return f"the character {character!r} (U+{ord(character):04X})"
    return "a piece"


def edit_counts(reference: str, prediction: str) -> Tensor:
    """Return (7,) int64 in the order of EDIT_COUNTS, to be added up over rows and ranks.

    Whatever is predicted for an empty reference counts as insertions.
    """
    as_it_is = ReduceToListOfListOfChars()  # otherwise jiwer strips both
    characters = jiwer.process_characters(reference, prediction, as_it_is, as_it_is)
    words = jiwer.process_words(
        " ".join(reference.split()), " ".join(prediction.split())
    )  # jiwer splits at spaces only
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
