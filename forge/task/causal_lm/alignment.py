"""Finds the places in a row where two tokenizers have written the same text: there two models predict the same.

Each tokenizer writes a row in its own words: its own template, its own tokens, its own end of a reply. Before each
learned token stands how much of the reply its model has read, in bytes; where that is the same in both rows, the two
distributions over the next token are about the same continuation, whatever tokens they are over.
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
from forge.task.causal_lm.chat import Span
from forge.task.causal_lm.documents import Encoder, Spelled, map_rows

FEATURES = Features(
    {
        "teacher_input_ids": ListOf(Value("int32")),
        "aligned": ListOf(Value("int32")),  # places of the student's logits in its row, ascending
        "teacher_aligned": ListOf(Value("int32")),  # those of the teacher's in its own
        "teacher_cut": Value("int32"),  # tokens that the teacher does not read
    }
)
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names a token of one byte
Read = tuple[int, int]  # bytes of a reply's text, and tokens behind it that end the reply


@dataclass(frozen=True)
class Reply:
    """What is learned of one reply, in one tokenizer's tokens."""

    text: bytes  # without what ends it
    tokens: list[int]  # places in the row
    read: list[Read | None]  # of the reply before each of them; None: within a character, or nobody knows


def align_split(student: Encoder, teacher: Encoder, rows: Dataset, where: str) -> Dataset:
    """The columns of FEATURES for every row of a split, in its order. Raises UsageError for a row that the teacher's
    template refuses."""

    def align(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        ours = student.spell(columns, numbers, where)
        theirs = teacher.spell(columns, numbers, f"{where}, as the teacher's tokenizer writes it")
        found: dict[str, list[Any]] = {name: [] for name in FEATURES}
        longest = student.config.max_length
        for one, other in zip(ours, theirs, strict=True):
            pairs = [
                (mine - 1, its - 1)  # logits at a place predict the token behind it
                for mine, its in align_rows(replies(one, student.tokenizer), replies(other, teacher.tokenizer))
                if 0 < mine < longest and 0 < its <= longest  # behind its last token the teacher still predicts one
            ]
            found["teacher_input_ids"].append(other.ids[:longest])
            found["aligned"].append([mine for mine, _ in pairs])
            found["teacher_aligned"].append([its for _, its in pairs])
            found["teacher_cut"].append(max(0, len(other.ids) - longest))
        return found

    key = f"{student.key} {teacher.key} {where} {source_hash(__file__)}"
    return map_rows(rows, align, key, FEATURES, "aligning")


def align_rows(student: Sequence[Reply], teacher: Sequence[Reply]) -> list[tuple[int, int]]:
    """Places of learned tokens, of the student's row and of the teacher's, before which both have read the same.

    None where the rows have another number of replies.
    """
    if len(student) != len(teacher):
        return []
    return [pair for one, other in zip(student, teacher, strict=True) for pair in align_replies(one, other)]


def align_replies(student: Reply, teacher: Reply) -> list[tuple[int, int]]:
    """The same of one reply, as far as its text is the same.

    Where only one of two templates writes white space before the reply, both count from behind it.
    """
    shifts = [len(reply.text) - len(reply.text.lstrip()) for reply in (student, teacher)]
    if student.text[: shifts[0]] == teacher.text[: shifts[1]]:
        shifts = [0, 0]
    text, other = student.text[shifts[0] :], teacher.text[shifts[1] :]
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    whole = text == other

    def places(reply: Reply, shift: int) -> dict[Read, int]:
        found: dict[Read, int] = {}
        for number, (token, read) in enumerate(zip(reply.tokens, reply.read, strict=True)):
            if read is None:
                continue
            length, ends = max(0, read[0] - shift) if number == 0 else read[0] - shift, read[1]
            if 0 <= length < same or (whole and length == same):
                found[length, ends] = token  # of several tokens behind the same text the last one: it goes on
        return found

    ours, theirs = places(student, shifts[0]), places(teacher, shifts[1])
    return [(token, theirs[read]) for read, token in ours.items() if read in theirs]


def replies(row: Spelled, tokenizer: PreTrainedTokenizerBase) -> list[Reply]:
    """The replies of a row; the last one has the end token that was appended to it."""
    tokens: list[list[int]] = [[] for _ in row.spans]
    for place, (learned, (start, end)) in enumerate(zip(row.learned, row.offsets, strict=True)):
        if learned:
            inside = (i for i, (first, to) in enumerate(row.spans) if start < to and first < end)
            tokens[next(inside, -1)].append(place)
    return [_reply(row, span, places, tokenizer) for span, places in zip(row.spans, tokens, strict=True)]


def _reply(row: Spelled, span: Span, places: list[int], tokenizer: PreTrainedTokenizerBase) -> Reply:
    special = _ends(tokenizer)
    ends = next((n for n, place in enumerate(reversed(places)) if row.ids[place] not in special), len(places))
    body = places[: len(places) - ends]
    first, to = span
    if ends and row.offsets[places[len(body)]] > (first, first):  # what ends it stands in the text
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
    """Bytes of the text before each piece, and behind the last; None unless the pieces spell the text.

    The first may begin before the text, with a space of the template's or of the tokenizer's; the last may end behind.
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
    """The same from the characters that each token stands for, of a tokenizer that changes a text before it cuts it."""
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
    """Special tokens, which may end a reply; the unknown one stands for text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id})


@cache
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, str], dict[int, str], dict[str, int] | None]:
    """Tokens by id; those among them that were added, as they stand in a text; of byte-level tokens the byte that each
    character means."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    return tokens, added, _bytes_of_characters() if byte_level else None


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token says it stands for: right for byte-level BPE and for SentencePiece, and for others a guess, which
    the text of the row confirms or not."""
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
    """GPT-2's alphabet: a byte that can be seen is its own character, each other one a character from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
