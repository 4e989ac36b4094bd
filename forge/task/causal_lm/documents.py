"""Turns rows of any form into token ids, each marked as learned or only read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import tokenizers
import transformers
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from forge.config.task_schema import CausalLmTask
from forge.data.fingerprints import source_hash, text_hash, tokenizer_hash
from forge.errors import UsageError
from forge.task import fixed_date
from forge.task.causal_lm import chat, forms, unprinted
from forge.task.causal_lm.chat import BadRow, ChatTemplate, Written, load_template, special_texts
from forge.task.causal_lm.forms import RowForm, clean, lacking, texts_of
from forge.task.causal_lm.unprinted import Message

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "learned": ListOf(Value("bool")),  # False: the token is only read
        "length": Value("int32"),
        "labels": Value("int32"),  # learned tokens, without the first of the row, which no token predicts
        "tokens_cut": Value("int32"),
        "row": Value("int64"),  # number in the data set
        # Notes, which are reported and then removed.
        "special": ListOf(Value("string")),  # special tokens of the tokenizer found in the row's own text
        "repeated": Value("string"),  # a special token that the row has itself, where another would follow it, else ""
        "ends": ListOf(Value("int32")),  # the last token of each reply, before the row was cut
        "unprinted": Value("string"),  # a part of a message that the chat template does not write, else ""
        "without_effect": ListOf(Value("string")),  # keys of messages that change nothing
    }
)
NOTES = ("special", "repeated", "ends", "unprinted", "without_effect")


@dataclass(frozen=True)
class Spelled:
    """A row as text and as tokens, before it is cut."""

    written: Written
    ids: list[int]
    offsets: list[chat.Span]  # the part of the text that each token stands for; (0, 0): none of it
    learned: list[bool]
    repeated: str  # a special token that the row has itself, where another would follow it, else ""
    special: list[str]  # special tokens found in the row's own text

    @property
    def text(self) -> str:
        return self.written.text

    @property
    def spans(self) -> list[chat.Span]:
        """The parts of the text that are learned."""
        return self.written.spans

    @property
    def ends(self) -> list[int]:
        """The last token of each part that is learned."""
        learned = [*self.learned, False]
        return [token for i, token in enumerate(self.ids) if learned[i] and not learned[i + 1]]


@dataclass(frozen=True)
class Encoder:
    """How a row becomes tokens."""

    config: CausalLmTask
    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    template: ChatTemplate | None  # for messages
    specials: tuple[str, ...]
    special_ids: frozenset[int]  # without the unknown token, which stands for text

    def encode(self, columns: dict[str, list[Any]], numbers: Sequence[int], where: str) -> dict[str, list[Any]]:
        """Return the columns of FEATURES for some rows. Raises UsageError that names `where` and the bad row."""
        encoded: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for row in self.spell(columns, numbers, where):
            encoded["input_ids"].append(row.ids[: self.config.max_length])
            encoded["learned"].append(row.learned[: self.config.max_length])
            encoded["length"].append(len(encoded["input_ids"][-1]))
            encoded["labels"].append(sum(encoded["learned"][-1][1:]))
            encoded["tokens_cut"].append(max(0, len(row.ids) - self.config.max_length))
            encoded["special"].append(row.special)
            encoded["repeated"].append(row.repeated)
            encoded["ends"].append(row.ends)
            encoded["unprinted"].append(row.written.unprinted)
            encoded["without_effect"].append(row.written.without_effect)
        return {**encoded, "row": list(numbers)}

    def spell(self, columns: dict[str, list[Any]], numbers: Sequence[int], where: str) -> list[Spelled]:
        """Return the whole rows, not cut. Raises UsageError that names `where` and the bad row's number."""
        written: list[Written] = []
        special: list[list[str]] = []
        for number, *values in zip(numbers, *(columns[name] for name in self.form.columns), strict=True):
            try:
                cleaned = self._cleaned(values)
                written.append(self._write(cleaned) if cleaned else Written("", []))
            except BadRow as problem:
                raise UsageError(f"{where}: row {number} {problem}") from problem
            texts = self._without_own_ends(texts_of(cleaned))
            special.append([token for token in self.specials if any(token in text for text in texts)])
        batch = self.tokenizer(
            [row.text for row in written],
            add_special_tokens=not self._templated,
            return_offsets_mapping=True,
            verbose=False,
        )
        tokens = zip(written, batch["input_ids"], batch["offset_mapping"], special, strict=True)
        return [self._spelled(row, ids, offsets, token) for row, ids, offsets, token in tokens]

    @property
    def key(self) -> str:
        """What the tokens depend on besides the rows, as a text that is equal in every process."""
        code = source_hash(*(module.__file__ for module in (chat, forms, unprinted, fixed_date)), __file__)
        config = self.config
        parts = [
            *(transformers.__version__, tokenizers.__version__, jinja2.__version__, code),
            *(tokenizer_hash(self.tokenizer), self.form, self.template, self.specials),
            *(config.max_length, config.remove_text, config.append_eos, config.empty),
        ]
        return repr(parts)

    @property
    def _templated(self) -> bool:
        """True if a chat template writes the rows, with their first and last special tokens."""
        return self.form.name == "messages"

    def _spelled(self, row: Written, ids: list[int], offsets: list[chat.Span], special: list[str]) -> Spelled:
        learned = [any(start < to and first < end for first, to in row.spans) for start, end in offsets]
        if not self._templated and self.config.append_eos and row.spans:
            ids, learned = _ended(ids, learned, self.tokenizer.eos_token_id)
        offsets = [*offsets, *[(0, 0)] * (len(ids) - len(offsets))]
        again = self._repeated(ids, learned)
        repeated = str(self.tokenizer.convert_ids_to_tokens(ids[again[0]])) if again else ""
        ids, offsets, learned = (_without(again, column) for column in (ids, offsets, learned))
        return Spelled(row, ids, offsets, learned, repeated, special)

    def _without_own_ends(self, texts: list[str]) -> list[str]:
        """Return the texts of a row without a special token that begins or ends it rightly."""
        if self._templated or not texts:
            return texts
        texts = [texts[0].removeprefix(self.tokenizer.bos_token or ""), *texts[1:]]
        return [*texts[:-1], texts[-1].removesuffix(self.tokenizer.eos_token or "")]

    def _repeated(self, ids: list[int], learned: list[bool]) -> list[int]:
        """Return the positions of tokens that say again how a row begins, or how a reply ends.

        The row has such a token in its own text, and the tokenizer or the chat template writes another.
        """
        found = []
        for i in range(1, len(ids)):
            if ids[i] == ids[i - 1] and ids[i] in self.special_ids:
                last = i == len(ids) - 1
                ends = (
                    learned[i - 1] and (last or not learned[i + 1]) and (learned[i] or (last and not self._templated))
                )
                if ends or (i == 1 and ids[i] == self.tokenizer.bos_token_id):
                    found.append(i)
        return found

    def _cleaned(self, values: list[Any]) -> list[Any]:
        """Return the values without task.remove_text; none for a row that is left out, since it lacks its text."""
        lacks = lacking(self.form, values)
        cleaned = [] if lacks else [clean(self.config, self.form, value) for value in values]
        lacks = lacks or lacking(self.form, cleaned)
        if lacks and self.config.empty == "error":
            raise BadRow(f"has {lacks}; fill it in, remove the row, or leave out such rows with task.empty: leave_out")
        return [] if lacks else cleaned

    def _write(self, values: list[Any]) -> Written:
        if self.form.name == "messages":
            assert self.template is not None
            return self.template.write(values[0] if len(values) == 1 else _pair(*values))
        if self.form.name == "text":
            return Written(values[0], [(0, len(values[0]))])
        prompt, completion = values
        return Written(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def build_encoder(config: CausalLmTask, tokenizer: PreTrainedTokenizerBase, form: RowForm) -> Encoder:
    """Return the encoder for rows of this form. Raises UsageError if tokenizer, template and form do not fit."""
    if not tokenizer.is_fast:
        raise UsageError("forge needs a fast tokenizer (tokenizer.json), but this model has only a slow one")
    if form.name != "messages" and config.chat_template is not None:
        raise UsageError(
            f"task.chat_template writes messages, but the rows are read as {form.name}; remove it, or set "
            "task.format: messages"
        )
    if form.name != "messages" and config.append_eos and tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token to append; set task.append_eos: false, or use another")
    template = load_template(tokenizer, config.chat_template) if form.name == "messages" else None
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    specials = frozenset({*tokenizer.all_special_ids, *added} - unknown)
    return Encoder(config, tokenizer, form, template, special_texts(tokenizer), specials)


def map_rows(rows: Dataset, make: Callable[..., Any], key: str, features: Features, what: str) -> Dataset:
    """Replace the rows' columns by those that `make` gives, cached on disk by the rows and `key`.

    make: (columns, row numbers) -> columns. key: everything else that the new columns depend on.
    """
    # Named by content: datasets would pickle the tokenizer, whose bytes differ from process to process.
    name = text_hash(f"{rows._fingerprint} {key}")[:32]
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


def _pair(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _ended(ids: list[int], learned: list[bool], end: int | None) -> tuple[list[int], list[bool]]:
    """Return the row with an end token that is learned; the tokenizer may have appended one itself."""
    if ids and ids[-1] == end:
        return ids, [*learned[:-1], True]
    assert end is not None  # checked by build_encoder
    return [*ids, end], [*learned, True]


def _without(places: Sequence[int], values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if i not in places] if places else values
