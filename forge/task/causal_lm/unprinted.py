"""Finds what the messages of a row hold and the text that a chat template writes of them does not.

Each part of a message gets a mark of its own, and the conversation is rendered again: a part without its mark in that
text is not printed, even if its words occur elsewhere. What an assistant says must also be in the text as a whole: a
template that drops thoughts from a reply prints the mark at its end.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives each to templates as the first
CALLS = ("tool_calls", "function_call")
SAID = ("content", *REASONING, *CALLS)  # the keys with what a message says
KNOWN = ("role", "weight", "train", *SAID)


@dataclass(frozen=True)
class Marked:
    """Messages with marks in their parts."""

    messages: list[Message]
    parts: dict[str, tuple[int, str]]  # by mark: the number of the message and its key

    def owner(self, text: str) -> int | None:
        """Return the number of the message that a text is of; None if it has marks of none, or of several."""
        found = {i for name, (i, _) in self.parts.items() if name in text}
        return found.pop() if len(found) == 1 else None


def mark(messages: Sequence[Message]) -> Marked:
    """Return the messages with a mark at the end of each part: a text, the name of a call, or its arguments."""
    parts: dict[str, tuple[int, str]] = {}

    def new(i: int, key: str) -> str:
        name = f"xq{len(parts):05d}qx"  # of equal length: none is a part of another; no filter of a template changes it
        parts[name] = (i, key)
        return name

    changed = []
    for i, message in enumerate(messages):
        copy = dict(message)
        thoughts: dict[str, str] = {}  # the mark of each
        for key in SAID:
            value = message.get(key)
            if not value or (isinstance(value, str) and not value.strip()):
                continue
            if key in CALLS:
                copy[key] = _with_marked_calls(value, partial(new, i, key))
            elif key in REASONING:  # one thought under two names is printed once
                thought = json.dumps(value, default=str)
                thoughts[thought] = thoughts.get(thought) or new(i, key)
                copy[key] = _with_mark(value, thoughts[thought])
            else:
                copy[key] = _with_mark(value, new(i, key))
        changed.append(copy)
    return Marked(changed, parts)


def unprinted(messages: Sequence[Message], text: str, marked: Marked, marked_text: str) -> str:
    """Return the first part of a message that is not in its text, such as "tool_calls of message 1 (assistant)"; or "".

    marked_text: what the template writes of the marked messages; "": it refuses them.
    """
    compact = "".join(text.split())
    for name, (i, key) in marked.parts.items():
        message = messages[i]
        printed = name in marked_text if marked_text else _holds(compact, message[key])
        if message["role"] == "assistant" and key not in CALLS:
            printed = printed and _holds(compact, message[key])
        if not printed:
            return f"{key} of message {i} ({message['role']})"
    return ""


def without_effect(messages: Sequence[Message], text: str, render: Callable[[list[Message]], str]) -> list[str]:
    """Return the keys of messages that forge does not know and the template does not print.

    text: what `render` gives for the messages; it raises a ValueError for messages that the template refuses.
    """
    unknown = sorted({key for message in messages for key in message} - {*KNOWN})

    def changes(*keys: str) -> bool:
        try:
            return render([{key: value for key, value in m.items() if key not in keys} for m in messages]) != text
        except ValueError:
            return True

    if not unknown or not changes(*unknown):
        return unknown
    return [key for key in unknown if not changes(key)]


def _with_mark(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {**value, name: name}
    return [*value, name] if isinstance(value, list) else f"{value}{name}"


def _with_marked_calls(calls: Any, new: Callable[[], str]) -> Any:
    """Return calls of tools, or one, with marks in their names and arguments, in OpenAI's form or flat."""
    if isinstance(calls, list):
        return [_with_marked_calls(call, new) for call in calls]
    if isinstance(calls, dict) and isinstance(calls.get("function"), dict):
        return {**calls, "function": _with_marked_calls(calls["function"], new)}
    if not isinstance(calls, dict) or not calls.get("name"):
        return _with_mark(calls, new())
    return {**calls, **{key: _with_mark(calls[key], new()) for key in ("name", "arguments") if calls.get(key)}}


def _holds(compact: str, value: Any) -> bool:
    """True if a text without white space holds all texts and numbers of a value, as they are or as JSON."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in ("id", "type", "index")}
        return all(_holds(compact, inner) for inner in kept.values())
    if isinstance(value, list):
        return all(_holds(compact, inner) for inner in value)
    written = [json.dumps(value, ensure_ascii=ascii, default=str) for ascii in (False, True)]
    forms = [value, *(text[1:-1] for text in written)] if isinstance(value, str) else [str(value), *written]
    return any("".join(form.split()) in compact for form in forms)
