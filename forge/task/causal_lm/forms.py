"""Recognises what a row of a causal LM's data is: messages, a prompt with its completion, or plain text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from forge.config.task_schema import CausalLmTask
from forge.errors import UsageError
from forge.task.causal_lm.chat import BadRow
from forge.task.causal_lm.unprinted import SAID, Message


@dataclass(frozen=True)
class RowForm:
    """What a row is, and the columns that it is read from."""

    name: str  # messages, prompt_completion or text
    columns: tuple[str, ...]


def choose_form(config: CausalLmTask, columns: Sequence[str], where: str) -> RowForm:
    """Return what a row with these columns is. Raises UsageError if they are not those of task.format.

    prompt_completion is the concatenation of both and an end token, without the tokenizer's chat template.
    task.format: messages with the columns prompt and completion turns each row into a user's message and its reply.
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
    """Return a text, or messages, without the pieces of task.remove_text. Raises BadRow for anything else."""
    if form.name == "messages" and isinstance(value, list):
        return [_cleaned(config, message) if isinstance(message, dict) else message for message in value]
    if isinstance(value, list) and any(isinstance(message, dict) and "role" in message for message in value):
        raise BadRow(
            f"has messages in its columns {' and '.join(form.columns)}, where forge reads texts; join them into one "
            "column of messages (messages = prompt + completion)"
        )
    if not isinstance(value, str):
        raise BadRow(f"has {type(value).__name__} where a text belongs ({', '.join(form.columns)})")
    return _without_pieces(config, value)


def lacking(form: RowForm, values: Sequence[Any]) -> str | None:
    """Return in words what a row lacks that is learned from, such as a reply; None if nothing."""
    learned = values[-1]
    if form.name == "messages" and len(values) == 1:
        if not learned:
            return f"no messages in the column {form.columns[0]}"
        replies = ((i, message) for i, message in enumerate(learned) if _is_reply(message))
        silent = next((i for i, message in replies if not _says_something(message)), None)
        return None if silent is None else f"an empty reply (message {silent})"
    if values[0] is None:
        return f"no text in the column {form.columns[0]}"
    if learned is None or (isinstance(learned, str) and not learned.strip()):
        return f"no text in the column {form.columns[-1]}"
    return None


def _is_reply(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _says_something(message: dict[str, Any]) -> bool:
    """True if a reply has any content, such as a text, a tool call or a thought."""
    values = (value for name, value in message.items() if name not in ("role", "weight", "train", "name"))
    return any(value.strip() if isinstance(value, str) else value for value in values)


def texts_of(values: Sequence[Any]) -> list[str]:
    """Return every text in the cleaned columns of a row."""
    messages = [message for value in values if isinstance(value, list) for message in value]
    said = [message.get(key) for message in messages if isinstance(message, dict) for key in SAID]
    return _texts_in([*(value for value in values if isinstance(value, str)), *said])


def training_texts(config: CausalLmTask, form: RowForm, rows: Dataset, where: str) -> Iterator[str]:
    """Yield every text that a new tokenizer is trained on."""
    for number, row in enumerate(rows.select_columns(list(form.columns))):
        values = [row.get(name) for name in form.columns]
        if config.empty == "leave_out" and lacking(form, values):
            continue
        try:
            yield from texts_of([clean(config, form, value) for value in values])
        except BadRow as problem:
            raise UsageError(f"{where}, train: row {number} {problem}") from problem


def _cleaned(config: CausalLmTask, message: Message) -> Message:
    return {key: _without_pieces(config, value) if key in SAID else value for key, value in message.items()}


def _without_pieces(config: CausalLmTask, value: Any) -> Any:
    """Return a text, or all texts in lists and mappings, without the pieces of task.remove_text."""
    if isinstance(value, dict):
        return {key: _without_pieces(config, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_pieces(config, inner) for inner in value]
    if isinstance(value, str):
        for piece in config.remove_text:
            value = value.replace(piece, "")
    return value


def _texts_in(value: Any) -> list[str]:
    """Return the texts in nested lists and mappings."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for inner in inside for text in _texts_in(inner)]
