"""Transcripts: how they are normalised, what makes one unfit to be learned, and the edits between two of them."""

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
from forge.data.rows import row_numbers
from forge.errors import UsageError

logger = logging.getLogger(__name__)

EDIT_COUNTS = ("character_edits", "characters", "word_edits", "words", "exact", "rows", "empty")


def normalize(text: str, how: NormalizationConfig) -> str:
    """The text as it is learned and compared: Unicode form, then case, then whitespace. Twice is the same as once."""
    text = _in_form(text, how)
    if how.case != "keep":
        text = _in_form(text.lower() if how.case == "lower" else text.upper(), how)  # upper takes some letters apart
    if how.whitespace:
        text = " ".join(text.split())
    return text


def _in_form(text: str, how: NormalizationConfig) -> str:
    return text if how.unicode == "keep" else unicodedata.normalize("NFC" if how.unicode == "nfc" else "NFKC", text)


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
            f"{where}: row {row_numbers(rows)[empty]} has an empty transcript in the column {columns.text}; take the "
            "row out, or fill it"
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
    unknown = _unknown_token(tokenizer)
    for text, back, ids, row in zip(texts, decoded, tokens, rows, strict=True):
        if "".join(text.split()) == "".join(back.split()) and unknown not in ids:
            continue
        lost = _first_lost(text, tokenizer)
        raise UsageError(
            f"{where}: row {row} has {lost} in its transcript {text!r}, which the model's tokenizer cannot write; take "
            "the row out, change the character with task.normalization, or use a model whose tokenizer knows it"
        )


def warn_of_moved_spaces(
    texts: Sequence[str], decoded: Sequence[str], how: NormalizationConfig, rows: Sequence[int], where: str
) -> None:
    """Says what the metrics lose where a tokenizer writes other white space than the texts have (`12 . 50`)."""
    written = [normalize(back, how) for back in decoded]
    moved = [place for place, (text, back) in enumerate(zip(texts, written, strict=True)) if text != back]
    if not moved:
        return
    edits = sum(int(edit_counts(texts[place], written[place])[0]) for place in moved)
    first = moved[0]
    logger.warning(
        "%s: the tokenizer gives back %d of %d transcripts with other white space, such as %r for %r in row %d; "
        "without any other error the cer is %.4f",
        *(where, len(moved), len(texts), written[first], texts[first], rows[first]),
        edits / sum(map(len, texts)),
    )


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What stands for a piece that the tokenizer does not know; None where that token has another meaning as well.

    GPT-2's vocabulary of bytes knows everything, and its unknown token is its end token.
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
    """(7,) int64 in the order of EDIT_COUNTS, which ranks and rows can add up.

    An empty reference has no characters to get wrong: what is predicted for it counts as insertions.
    """
    as_it_is = ReduceToListOfListOfChars()  # jiwer would strip both
    characters = jiwer.process_characters(reference, prediction, as_it_is, as_it_is)
    words = jiwer.process_words(" ".join(reference.split()), " ".join(prediction.split()))  # it splits at blanks alone
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
