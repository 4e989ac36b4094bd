"""Renders a conversation with a chat template, and finds the characters of the replies, which are what is learned.

A template with `{% generation %}` markers marks the replies itself. With any other template they are found by prefixes:
the conversation before a reply, rendered with the opening of the assistant's turn (add_generation_prompt), must be a
prefix of the whole text, and so must the conversation up to the end of that reply. The text between the two is the
reply with the token that ends the turn.

Some templates render an earlier turn differently once a later one follows (Qwen3 drops its <think>). They fail this
test and are refused: in use the model never sees the text that it would learn.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from forge.errors import UsageError
from forge.task.causal_lm.unprinted import CALLS, Message, mark, unprinted, without_effect
from forge.task.fixed_date import DATE, NOW, fixed_date

logger = logging.getLogger(__name__)

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATED = re.compile(rf"""{NOW}\(\s*(['"])(.*?)\1\s*\)""")
MARKED = "give a template that marks the replies with {% generation %} and {% endgeneration %} by task.chat_template"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # for a tokenizer that forge trains

WEIGHTS = ("weight", "train")  # keys of a message, as in OpenAI's and Mistral's files; 0 or false: it is not learned

# What rendering may raise: the template's own errors, and Python's for its expressions.
RENDERING = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

_render_template: Any = render_jinja_template  # returns (texts, spans), unlike its annotation
Span = tuple[int, int]  # characters from, up to but not including


class BadRow(ValueError):
    """An unusable row. The message continues a sentence that begins with the row's place: "… row 3" + message."""


@dataclass(frozen=True)
class Written:
    """A text and the parts of it that are learned."""

    text: str
    spans: list[Span]
    unprinted: str = ""  # the first part of a message that the text does not hold
    without_effect: tuple[str, ...] = ()  # keys of messages that change nothing


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write."""

    text: str
    special_tokens: dict[str, Any]
    ends: tuple[str, ...]  # special tokens as text, with one of which a reply ends

    def write(self, messages: Sequence[Message]) -> Written:
        """Return the whole conversation and its replies. Raises BadRow if roles or template do not allow it."""
        check_roles(messages)
        messages = [_filled(message) for message in messages]
        text, spans = self._render(messages)
        marked = mark(messages)
        try:
            marked_text, marked_spans = self._render(marked.messages)
        except BadRow:  # the template checks what a message says
            marked_text, marked_spans = "", []
        if MARKER.search(self.text):
            owners = [marked.owner(marked_text[start:end]) for start, end in marked_spans]
            learned = _learned_spans(messages, spans, owners)
        else:
            learned = [self._reply(messages, i, text) for i, message in enumerate(messages) if _is_learned(message)]
        lost = unprinted(messages, text, marked, marked_text)
        useless = without_effect(messages, text, lambda changed: self._render(changed)[0])
        return Written(text, learned, lost, (*_useless_weights(messages), *useless))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that asks for the next reply."""
        return self._render([_filled(message) for message in messages], opened=True)[0]

    def _reply(self, messages: list[Message], i: int, text: str) -> Span:
        """Return the span of message i, a reply, in the text of all messages."""
        before, _ = self._render(messages[:i], opened=True)
        if not text.startswith(before):
            raise BadRow(
                f"is not rendered consistently: the chat template writes another text before message {i} than in the "
                f"prompt for it; {MARKED}"
            )
        through, _ = self._render(messages[: i + 1])
        if not text.startswith(through):
            raise BadRow(
                f"cannot be masked: the chat template writes message {i} differently once a later one follows (some "
                f"templates drop earlier thoughts); {MARKED}, or end each conversation at the one reply to learn"
            )
        reply = through[len(before) :]
        closed = reply.rstrip()
        if closed.endswith(self.ends):  # white space after the turn's end is the template's, and never generated
            reply = closed
        return len(before), len(before) + len(reply)

    def _render(self, messages: list[Message], *, opened: bool = False) -> tuple[str, list[Span]]:
        """Return the text of the messages and the spans between its markers. opened: ends where a reply begins."""
        try:
            with fixed_date(self.text):
                texts, spans = _render_template(
                    [messages],
                    chat_template=self.text,
                    return_assistant_tokens_mask=bool(MARKER.search(self.text)),
                    add_generation_prompt=opened,
                    **self.special_tokens,
                )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja: {_short(error)}, in its line {error.lineno}; fix the file of "
                "task.chat_template, or set that key"
            ) from error
        except RENDERING as error:
            raise BadRow(
                f"is refused by the chat template ({_short(error)}); its roles are {_roles(messages)}"
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def load_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> ChatTemplate:
    """Return the template of `file` (task.chat_template) or else the tokenizer's own. Raises UsageError for neither.

    A template that writes today's date gets a fixed date, so that a resumed run reads the same text.
    """
    if file is not None:
        text = load_text(file)
    else:
        own = tokenizer.chat_template
        text = own.get("default", "") if isinstance(own, dict) else own or ""
        if not text:
            raise UsageError(
                "the data are messages, but the tokenizer has no chat template; set task.chat_template to a file with "
                "one, or use the tokenizer of an instruct model"
            )
    text = text.removeprefix("\ufeff")  # the mark that some editors put first, in a tokenizer's own file too
    dated = DATED.sub(lambda found: repr(DATE.strftime(found[2])), text)  # dates in variables: fixed_date
    if NOW in text:
        logger.info("the chat template writes today's date; forge always writes %s instead", DATE)
    return ChatTemplate(dated, dict(tokenizer.special_tokens_map), special_texts(tokenizer))


def load_text(file: str) -> str:
    """Return the content of the file task.chat_template. Raises UsageError if it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"task.chat_template is {file}, which cannot be read ({_short(error)})") from error


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return every special token as text, the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token)))


def check_roles(messages: Sequence[Message]) -> None:
    """Raise BadRow for roles in a wrong order.

    Right are: system (or developer) only as the first message, user and assistant in turn, and assistant as the last
    one. Messages of the role tool may come between two of the assistant.
    """
    if not messages:
        raise BadRow("has no messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not message.get("role"):
            raise BadRow(f"has no role in message {i}; each message is a mapping with role and content")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and any(message.get(key) for key in CALLS)):
            raise BadRow(f"has no text as the content of message {i} ({message['role']})")
        for key in WEIGHTS:
            if message.get(key) not in (None, 0, 1):
                raise BadRow(
                    f"has the {key} {message[key]!r} in message {i}; it must be 0 or false (the reply is not learned), "
                    "or 1 or true"
                )
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        allowed = {
            "": ("system", "developer", "user"),
            "system": ("user",),
            "developer": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            what = f"after {before}" if before else "at the beginning"
            raise BadRow(
                f"has the role {role} {what} (message {i}) where {' or '.join(allowed)} belongs; "
                f"its roles are {_roles(messages)}"
            )
        before = role
    if before != "assistant":
        raise BadRow(f"ends with the role {before} and not with a reply; its roles are {_roles(messages)}")


def _is_learned(message: Message) -> bool:
    """True for a reply, unless its weight is 0 or its train is false."""
    return message["role"] == "assistant" and all(message.get(key, 1) for key in WEIGHTS)


def _learned_spans(messages: list[Message], spans: list[Span], owners: list[int | None]) -> list[Span]:
    """Return those spans between a template's markers that are learned; owners: the message that each is of."""
    if not any(end > start for start, end in spans):
        raise BadRow(f"has no reply between the template's own markers; {MARKED} around each reply")
    silent = {i for i, message in enumerate(messages) if message["role"] == "assistant" and not _is_learned(message)}
    if not silent:
        return spans
    if len(owners) != len(spans) or None in owners:
        raise BadRow(
            f"has a reply that is not to be learned (message {min(silent)}), but forge cannot tell which of the "
            f"template's {len(spans)} marked parts is this reply; end the conversation before it, or remove its weight"
        )
    return [span for span, owner in zip(spans, owners, strict=True) if owner not in silent]


def _useless_weights(messages: Sequence[Message]) -> list[str]:
    """Return what asks to learn a message that is not a reply."""
    asked = {(key, m["role"]) for m in messages for key in WEIGHTS if m["role"] != "assistant" and m.get(key)}
    return [f"{key} of {role} messages" for key, role in sorted(asked)]


def _filled(value: Any) -> Any:
    """Return a message without keys that are None: a table gives every mapping the keys of those in other rows."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _roles(messages: Sequence[Message]) -> str:
    roles = [str(message.get("role")) for message in messages]
    return ", ".join(roles if len(roles) <= 12 else [*roles[:11], f"… ({len(roles)} in all)"])


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
