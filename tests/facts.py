"""Compares messages by their facts: places, keys, flags, values and suggestions, whatever the words between them."""

import re
from collections.abc import Sequence

# `quoted`, "quoted", numbers, and words that are not plain English: a.key, file.yaml:3, --flag, snake_case, null, [x].
FACT = re.compile(
    r"`[^`]*`|\"[^\"]*\"|[^\s,;()]*[\w\]][._/:=\[{<>-]+[\w\[<>/.\-…][^\s,;()]*|--[\w-]+|\d[\d,.]*|\bnull\b"
)
SUGGESTION = re.compile(r"did you mean (\S+)\?|(?:one of(?! them)|has:|supports only) ([^;]+)")
DASHES = re.compile(r"^[a-z]+(-[a-z]+)+$")  # an English word of two parts


def facts(message: str) -> list[str]:
    """Return the facts of a message, sorted, each once."""
    found = {fact.strip(".,:;()'`\"") for fact in FACT.findall(message)}
    for match in SUGGESTION.finditer(message):
        found |= {word.strip("`'.?") for word in re.split(r",? or |, | and ", match[1] or match[2])}
    return sorted(fact for fact in found if fact and not DASHES.match(fact))


class about:
    """Equal to a message, or to a list of them, with the same facts: `problems(text) == about([...])`."""

    def __init__(self, expected: str | Sequence[str]):
        self._expected = expected

    def __eq__(self, other: object) -> bool:
        if isinstance(self._expected, str):
            return isinstance(other, str) and facts(other) == facts(self._expected)
        return isinstance(other, list) and [*map(facts, other)] == [*map(facts, self._expected)]

    def __repr__(self) -> str:
        expected = [self._expected] if isinstance(self._expected, str) else self._expected
        return f"about({expected}, by the facts {[facts(message) for message in expected]})"

    __hash__ = None  # type: ignore[assignment]


def tells(message: str, expected: str) -> bool:
    """True if the message has all facts of the expected words, and the words themselves if these have no facts."""
    return set(facts(expected)) <= set(facts(message)) if facts(expected) else expected in message
