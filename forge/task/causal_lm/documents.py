"""Turns rows of messages, prompt and completion, or plain text into token ids, each marked as learned or only read."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import tokenizers
import transformers
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from forge.config.task_schema import CausalLmTask
from forge.data.fingerprints import source_hash, tokenizer_hash
from forge.errors import UsageError
from forge.task.causal_lm import chat
from forge.task.causal_lm.chat import BadRow, ChatTemplate, Message, Written, load_template, special_texts

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "learned": ListOf(Value("bool")),  # False: the model only reads the token
        "length": Value("int32"),
        "labels": Value("int32"),  # learned tokens that another one comes before
        "tokens_cut": Value("int32"),
        "row": Value("int64"),  # of the data set
        "special": Value("string"),  # a special token of the tokenizer that stands in the row's own text, else ""
    }
)


@dataclass(frozen=True)
class Cut:
    """What task.max_length did to one split."""

    rows: int = 0  # cut to max_length
    tokens: int = 0  # lost with them
    left_out: int = 0  # rows whose learned tokens were all lost, or that were too long to be taken
    first_left_out: int | None = None


@dataclass(frozen=True)
class RowForm:
    """What a row is, and the columns that say it."""

    name: str  # messages, prompt_completion or text
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Spelled:
    """A row as text and as tokens, before it is cut."""

    text: str
    spans: list[chat.Span]  # of the text, that are learned
    ids: list[int]
    offsets: list[chat.Span]  # of the text, that each token stands for; (0, 0) where it stands for none of it
    learned: list[bool]
    special: str  # a special token that stands in the row's own text, else ""


@dataclass(frozen=True)
class Encoder:
    """How a row becomes tokens."""

    config: CausalLmTask
    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    template: ChatTemplate | None  # of messages
    specials: tuple[str, ...]

    def encode(self, columns: dict[str, list[Any]], numbers: Sequence[int], where: str) -> dict[str, list[Any]]:
        """The columns of FEATURES for some rows. Raises UsageError that names `where` and the bad row's number."""
        encoded: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for row in self.spell(columns, numbers, where):
            encoded["input_ids"].append(row.ids[: self.config.max_length])
            encoded["learned"].append(row.learned[: self.config.max_length])
            encoded["length"].append(len(encoded["input_ids"][-1]))
            encoded["labels"].append(sum(encoded["learned"][-1][1:]))
            encoded["tokens_cut"].append(max(0, len(row.ids) - self.config.max_length))
            encoded["special"].append(row.special)
        return {**encoded, "row": list(numbers)}

    def spell(self, columns: dict[str, list[Any]], numbers: Sequence[int], where: str) -> list[Spelled]:
        """The rows whole. Raises UsageError that names `where` and the bad row's number."""
        written, special = [], []
        for number, *values in zip(numbers, *(columns[name] for name in self.form.columns), strict=True):
            try:
                cleaned = [clean(self.config, self.form, value) for value in values]
                written.append(self._write(cleaned))
            except BadRow as problem:
                raise UsageError(f"{where}: row {number} {problem}") from problem
            texts = texts_of(cleaned)
            special.append(next((token for token in self.specials if any(token in text for text in texts)), ""))
        plain = self.form.name != "messages"  # a template writes its own first and last token
        batch = self.tokenizer(
            [row.text for row in written], add_special_tokens=plain, return_offsets_mapping=True, verbose=False
        )
        spelled = []
        for row, ids, offsets, token in zip(written, batch["input_ids"], batch["offset_mapping"], special, strict=True):
            learned = [any(start < to and first < end for first, to in row.spans) for start, end in offsets]
            if plain and self.config.append_eos and row.spans:
                ids, learned = _ended(ids, learned, self.tokenizer.eos_token_id)
            offsets = [*offsets, *[(0, 0)] * (len(ids) - len(offsets))]
            spelled.append(Spelled(row.text, row.spans, ids, offsets, learned, token))
        return spelled

    @property
    def key(self) -> str:
        """Names what the tokens depend on, besides the rows: equal in every process."""
        config = self.config
        parts = [
            *(
                transformers.__version__,
                tokenizers.__version__,
                jinja2.__version__,
                source_hash(chat.__file__, __file__),
            ),
            *(tokenizer_hash(self.tokenizer), self.form, self.template, self.specials),
            *(config.max_length, config.remove_text, config.append_eos),
        ]
        return repr(parts)

    def _write(self, values: list[Any]) -> Written:
        if self.form.name == "messages":
            assert self.template is not None
            return self.template.write(values[0] if len(values) == 1 else _pair(*values))
        if self.form.name == "text":
            return Written(values[0], [(0, len(values[0]))] if values[0] else [])  # of an empty one nothing is learned
        prompt, completion = values
        if not completion:
            raise BadRow("has an empty completion")
        return Written(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def build_encoder(config: CausalLmTask, tokenizer: PreTrainedTokenizerBase, form: RowForm) -> Encoder:
    """The encoder for rows of this form. Raises UsageError where tokenizer, template and form do not fit each other."""
    if not tokenizer.is_fast:
        raise UsageError("forge needs a fast tokenizer (tokenizer.json), and this model has only a slow one")
    if form.name != "messages" and config.chat_template is not None:
        raise UsageError(
            f"task.chat_template writes messages, and the rows are read as {form.name}; take it out, or set "
            "task.format: messages"
        )
    if form.name != "messages" and config.append_eos and tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token to append; set task.append_eos: false, or use another")
    template = load_template(tokenizer, config.chat_template) if form.name == "messages" else None
    return Encoder(config, tokenizer, form, template, special_texts(tokenizer))


def choose_form(config: CausalLmTask, columns: Sequence[str], where: str) -> RowForm:
    """What a row with these columns is. Raises UsageError where they are not the ones of task.format.

    prompt_completion is the plain concatenation of both and an end token, whatever the tokenizer's chat template;
    task.format: messages on the columns prompt and completion writes each row as a user's message and its reply.
    """
    names = config.columns
    read = {
        "messages": (names.messages,),
        "prompt_completion": (names.prompt, names.completion),
        "text": (names.text,),
    }
    has = ", ".join(columns)
    if config.format == "auto":
        for name, wanted in read.items():
            if all(column in columns for column in wanted):
                return RowForm(name, wanted)
        raise UsageError(
            f"{where}: there is no column {names.messages}, nor {names.prompt} with {names.completion}, nor "
            f"{names.text}; it has: {has}. Name the right ones with task.columns"
        )
    wanted = read[config.format]
    pair = read["prompt_completion"]
    if config.format == "messages" and names.messages not in columns and all(name in columns for name in pair):
        wanted = pair
    for column in wanted:
        if column not in columns:
            raise UsageError(
                f"{where}: there is no column {column}, which task.format {config.format} reads; it has: {has}. Name "
                "the right one with task.columns"
            )
    return RowForm(config.format, wanted)


def clean(config: CausalLmTask, form: RowForm, value: Any) -> Any:
    """A text, or the messages, without the pieces of task.remove_text. Raises BadRow for what is neither."""
    if form.name == "messages" and isinstance(value, list):
        return [
            {**message, "content": clean(config, form, message["content"])}
            if isinstance(message, dict) and isinstance(message.get("content"), str)
            else message
            for message in value
        ]
    if not isinstance(value, str):
        raise BadRow(f"has {type(value).__name__} where a text belongs ({', '.join(form.columns)})")
    for piece in config.remove_text:
        value = value.replace(piece, "")
    return value


def texts_of(values: Sequence[Any]) -> list[str]:
    """Every text in the cleaned columns of a row."""
    messages = [message for value in values if isinstance(value, list) for message in value]
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return [text for text in [*values, *contents] if isinstance(text, str)]


def training_texts(config: CausalLmTask, form: RowForm, rows: Dataset, where: str) -> Iterator[str]:
    """Every text that a new tokenizer is made from."""
    for number, row in enumerate(rows.select_columns(list(form.columns))):
        try:
            yield from texts_of([clean(config, form, row[name]) for name in form.columns])
        except BadRow as problem:
            raise UsageError(f"{where}, train: row {number} {problem}") from problem


def prepare_rows(
    encoder: Encoder, rows: Sequence[dict[str, Any]], numbers: Sequence[int], where: str
) -> tuple[list[dict[str, Any]], int]:
    """Rows of a stream as tokens, by task.truncation, and how many were cut or left out.

    Where none is left, the first comes back as a row without labels, of its first token.
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


def encode_split(encoder: Encoder, rows: Dataset, where: str, split: str) -> tuple[Dataset, Cut]:
    """The tokens of a split, without the rows that carry no label. Raises UsageError if none is left."""
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
    _tell_of_cuts(encoder.config, split, cut)
    _tell_of_specials(encoder, kept, split)
    return kept, cut


def map_rows(rows: Dataset, make: Callable[..., Any], key: str, features: Features, what: str) -> Dataset:
    """New columns in place of the rows' own, kept on disk under rows and `key`: all that they depend on.

    make: (columns, row numbers) -> columns.
    """
    # Named by content: datasets would pickle the tokenizer, whose bytes differ from process to process.
    name = hashlib.sha256(f"{rows._fingerprint} {key}".encode()).hexdigest()[:32]
    return rows.map(
        make,
        batched=True,
        batch_size=200,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        new_fingerprint=name,
        desc=what,
    )


def select_rows(config: CausalLmTask, encoded: Dataset, place: str) -> tuple[Dataset, Cut]:
    """The rows that can be learned from, by task.truncation, and what was lost. Raises UsageError if none is left."""
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


def _too_long(config: CausalLmTask, place: str, row: dict[str, Any]) -> str:
    return (
        f"{place}: row {row['row']} has {row['tokens_cut'] + config.max_length} tokens, more than task.max_length "
        f"{config.max_length}; raise it, or set task.truncation: cut or leave_out"
    )


def _tell_of_cuts(config: CausalLmTask, split: str, cut: Cut) -> None:
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
            else f"nothing to learn is left of them within task.max_length {config.max_length}",
        )


def _tell_of_specials(encoder: Encoder, rows: Dataset, split: str) -> None:
    special = [(token, row) for token, row in zip(rows["special"], rows["row"], strict=True) if token]
    if special:
        token, row = special[0]
        logger.warning(
            "%s: %d rows hold a special token of the tokenizer in their own text, such as %s in row %d, and the model "
            "reads it as such; where that is not meant, take it out with task.remove_text: [%r]",
            *(split, len(special), token, row, token),
        )


def _pair(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _ended(ids: list[int], learned: list[bool], end: int | None) -> tuple[list[int], list[bool]]:
    """With an end token that is learned; a tokenizer may have appended one itself."""
    if ids and ids[-1] == end:
        return ids, [*learned[:-1], True]
    assert end is not None  # build_encoder has seen to it
    return [*ids, end], [*learned, True]
