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
from forge.task.causal_lm import chat, forms
from forge.task.causal_lm.chat import BadRow, ChatTemplate, Message, Written, load_template, special_texts
from forge.task.causal_lm.forms import RowForm, clean, lacking, texts_of

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "learned": ListOf(Value("bool")),  # False: the token is only read
        "length": Value("int32"),
        "labels": Value("int32"),  # learned tokens, without the first of the row, which no token predicts
        "tokens_cut": Value("int32"),
        "row": Value("int64"),  # number in the data set
        "special": Value("string"),  # a special token of the tokenizer found in the row's own text, else ""
    }
)


@dataclass(frozen=True)
class Spelled:
    """A row as text and as tokens, before it is cut."""

    text: str
    spans: list[chat.Span]  # parts of the text that are learned
    ids: list[int]
    offsets: list[chat.Span]  # the part of the text that each token stands for; (0, 0): none of it
    learned: list[bool]
    special: str  # a special token found in the row's own text, else ""


@dataclass(frozen=True)
class Encoder:
    """How a row becomes tokens."""

    config: CausalLmTask
    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    template: ChatTemplate | None  # for messages
    specials: tuple[str, ...]

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
        return {**encoded, "row": list(numbers)}

    def spell(self, columns: dict[str, list[Any]], numbers: Sequence[int], where: str) -> list[Spelled]:
        """Return the whole rows, not cut. Raises UsageError that names `where` and the bad row's number."""
        written, special = [], []
        for number, *values in zip(numbers, *(columns[name] for name in self.form.columns), strict=True):
            try:
                cleaned = self._cleaned(values)
                written.append(self._write(cleaned) if cleaned else Written("", []))
            except BadRow as problem:
                raise UsageError(f"{where}: row {number} {problem}") from problem
            texts = texts_of(cleaned)
            special.append(next((token for token in self.specials if any(token in text for text in texts)), ""))
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
        config, code = self.config, source_hash(chat.__file__, forms.__file__, __file__)
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

    def _spelled(self, row: Written, ids: list[int], offsets: list[chat.Span], special: str) -> Spelled:
        learned = [any(start < to and first < end for first, to in row.spans) for start, end in offsets]
        if not self._templated and self.config.append_eos and row.spans:
            ids, learned = _ended(ids, learned, self.tokenizer.eos_token_id)
        offsets = [*offsets, *[(0, 0)] * (len(ids) - len(offsets))]
        return Spelled(row.text, row.spans, ids, offsets, learned, special)

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
    return Encoder(config, tokenizer, form, template, special_texts(tokenizer))


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
