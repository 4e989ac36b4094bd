"""Finds the positions where two models with different tokenizers have read the same text, and so predict the same.

Each tokenizer writes a row with its own template, its own tokens and its own end of a reply. For each learned token it
is known how many bytes of the reply the model has read before it. Where that number is the same in both rows, the two
distributions over the next token describe the same continuation, although over different tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from forge.data.fingerprints import source_hash
from forge.errors import UsageError
from forge.task.causal_lm.chat import Span
from forge.task.causal_lm.documents import Encoder, Spelled, map_rows

FEATURES = Features(
    {
        "teacher_input_ids": ListOf(Value("int32")),
        "aligned": ListOf(Value("int32")),  # positions of the student's logits in its row, ascending
        "teacher_aligned": ListOf(Value("int32")),  # positions of the teacher's logits in its row
        "teacher_cut": Value("int32"),  # tokens of the row that the teacher does not read
        "teacher_unprinted": Value("bool"),  # its chat template does not write a part of the row
    }
)
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a token of one byte
Read = tuple[int, int]  # bytes read of a reply's text, and tokens read of its end


@dataclass(frozen=True)
class Reply:
    """The learned part of one reply, in one tokenizer's tokens."""

    text: bytes  # without its end token
    tokens: list[int]  # positions in the row
    read: list[Read | None]  # of the reply before each of them; None: inside a character, or unknown


def align_split(student: Encoder, teacher: Encoder, rows: Dataset, where: str) -> Dataset:
    """Return the columns of FEATURES for every row of a split, in order.

    Of a row with a part that the teacher's template does not write, nothing is aligned unless task.unprinted accepts
    it. Raises UsageError for such a row if they are refused, and for one that the template itself refuses.
    """
    unprinted = student.config.unprinted

    def align(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        ours = student.spell(columns, numbers, where)
        theirs = teacher.spell(columns, numbers, f"{where}, as the teacher's tokenizer writes it")
        found: dict[str, list[Any]] = {name: [] for name in FEATURES}
        longest = student.config.max_length
        for number, one, other in zip(numbers, ours, theirs, strict=True):
            lacking = other.written.unprinted
            if lacking and unprinted == "refuse":
                raise UsageError(
                    f"{where}: row {number} has {lacking}, which the teacher's chat template does not write as it is; "
                    "use another teacher, remove it from the rows, or set task.unprinted: leave_out (the teacher "
                    "says nothing about such rows) or accept (it reads them without it)"
                )
            pairs = [
                (mine - 1, its - 1)  # logits at a position predict the next token
                for mine, its in align_rows(replies(one, student.tokenizer), replies(other, teacher.tokenizer))
                if 0 < mine < longest
                and 0 < its <= longest  # after its last token the teacher still predicts one
                and not (lacking and unprinted == "leave_out")
            ]
            found["teacher_input_ids"].append(other.ids[:longest])
            found["aligned"].append([mine for mine, _ in pairs])
            found["teacher_aligned"].append([its for _, its in pairs])
            found["teacher_cut"].append(max(0, len(other.ids) - longest))
            found["teacher_unprinted"].append(bool(lacking))
        return found

    key = f"{student.key} {teacher.key} {where} {unprinted} {source_hash(__file__)}"
    return map_rows(rows, align, key, FEATURES, "aligning")


def align_rows(student: Sequence[Reply], teacher: Sequence[Reply]) -> list[tuple[int, int]]:
    """Return pairs of learned positions, in the student's and the teacher's row, before which both have read the same.

    There are none if the two rows have different numbers of replies.
    """
    if len(student) != len(teacher):
        return []
    return [pair for one, other in zip(student, teacher, strict=True) for pair in align_replies(one, other)]


def align_replies(student: Reply, teacher: Reply) -> list[tuple[int, int]]:
    """Return such pairs for one reply, as far as its text is the same in both rows.

    If only one of the two templates writes white space before the reply, both are counted from the first character
    after it.
    """
    shifts = [len(reply.text) - len(reply.text.lstrip()) for reply in (student, teacher)]
    if student.text[: shifts[0]] == teacher.text[: shifts[1]]:
        shifts = [0, 0]
    text, other = student.text[shifts[0] :], teacher.text[shifts[1] :]
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    whole = text == other

    def positions(reply: Reply, shift: int) -> dict[Read, int]:
        found: dict[Read, int] = {}
        for number, (token, read) in enumerate(zip(reply.tokens, reply.read, strict=True)):
            if read is None:
                continue
            length, ends = max(0, read[0] - shift) if number == 0 else read[0] - shift, read[1]
            if 0 <= length < same or (whole and length == same):
                found[length, ends] = token  # the last of several tokens after the same text continues it
        return found

    ours, theirs = positions(student, shifts[0]), positions(teacher, shifts[1])
    return [(token, theirs[read]) for read, token in ours.items() if read in theirs]


def replies(row: Spelled, tokenizer: PreTrainedTokenizerBase) -> list[Reply]:
    """Return the replies of a row; the last one includes the end token that was appended to the row."""
    tokens: list[list[int]] = [[] for _ in row.spans]
    for place, (learned, (start, end)) in enumerate(zip(row.learned, row.offsets, strict=True)):
        if learned:
            inside = (i for i, (first, to) in enumerate(row.spans) if start < to and first < end)
            tokens[next(inside, -1)].append(place)
    return [_reply(row, span, places, tokenizer) for span, places in zip(row.spans, tokens, strict=True)]


def _reply(row: Spelled, span: Span, places: list[int], tokenizer: PreTrainedTokenizerBase) -> Reply:
    """Return the reply in a span of the row's text, whose learned tokens are at `places`."""
    special = _ends(tokenizer)
    ends = next((n for n, place in enumerate(reversed(places)) if row.ids[place] not in special), len(places))
    body = places[: len(places) - ends]
    first, to = span
    if ends and row.offsets[places[len(body)]] > (first, first):  # its end token is part of the text
        to = row.offsets[places[len(body)]][0]
    text = row.text[first:to]
    pieces = [token_bytes(tokenizer, row.ids[place]) for place in body]
    lengths = _by_bytes(text.encode(), pieces)
    if lengths is None:
        lengths = _by_offsets(row.text, (first, to), [row.offsets[place] for place in body])
    read: list[Read | None] = [None if length is None else (length, 0) for length in lengths]
    full = len(text.encode())
    return Reply(text.encode(), places, [*read, *((full, n) for n in range(1, ends))][: len(places)])


def _by_bytes(text: bytes, pieces: list[bytes]) -> list[int | None] | None:
    """Return the bytes of the text before each piece and after the last; None unless the pieces spell the text.

    The first piece may begin before the text, with a space from the template or the tokenizer, and the last piece may
    end after it.
    """
    if not pieces:
        return [0] if not text else None
    joined = b"".join(pieces)
    for before in range(len(pieces[0]) + 1):
        beyond = len(joined) - before - len(text)
        if 0 <= beyond < len(pieces[-1]) and joined[before:].startswith(text):
            lengths: list[int | None] = [-before]
            for piece in pieces:
                lengths.append(int(lengths[-1] or 0) + len(piece))
            lengths[0] = 0 if not joined[:before].strip() else None
            return lengths
    return None


def _by_offsets(text: str, span: Span, offsets: list[Span]) -> list[int | None]:
    """Return the same from each token's characters, for a tokenizer that changes a text before it splits it."""
    first, to = span
    if not offsets:
        return [0]
    ends = [first, *(min(end, to) for _, end in offsets)]
    starts = [*(start for start, _ in offsets), to]
    clean = [start >= end or not text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    if not text[ends[-1] : to].strip():
        ends[-1] = to
    return [len(text[first:end].encode()) if ok else None for ok, end in zip(clean, ends, strict=True)]


@cache
def _ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special tokens, which may end a reply; the unknown token stands for text and is not one of them."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id})


@cache
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, str], dict[int, str], dict[str, int] | None]:
    """Return tokens by id, the text of added tokens by id, and of byte-level tokenizers the byte of each character."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    return tokens, added, _bytes_of_characters() if byte_level else None


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes that a token stands for, by its name.

    That is right for byte-level BPE and SentencePiece. For other tokenizers it is a guess, which is checked against the
    text of the row.
    """
    tokens, added, characters = _vocabulary(tokenizer)
    text = tokens[token]
    if token in added:
        return added[token].encode()
    if characters is not None:
        return bytes(characters[c] for c in text) if all(c in characters for c in text) else text.encode()
    if found := BYTE.fullmatch(text):
        return bytes([int(found[1], 16)])
    return text.replace("▁", " ").encode()


def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable byte is its own character, any other a character from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
