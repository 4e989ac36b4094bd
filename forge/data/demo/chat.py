"""A generated data set of short conversations, whose replies follow from the questions.

It needs no download, and a tiny model from scratch learns most of it in minutes on a CPU. Equal arguments give equal
rows on every machine and Python version.

A conversation has one to three questions, sometimes after a system message. The kinds of question, equally often:

    next       What number comes after 59?                                       60.
    larger     Which is larger, 52 or 37?                                        52 is larger.
    sums       What is 30 + 7?                                                   30 + 7 = 37.
    backwards  Write s t o n e backwards.                                        e n o t s
    holdings   Anna has 3 pens. Ben has 8 cups. How many cups does Ben have?     Ben has 8 cups.
    places     The key is in the box. The coin is in the jar. Where is the coin? The coin is in the jar.
    capitals   Which city is the capital of Peru?                                The capital of Peru is Lima.

**Validation measures generalisation.** A hash of a question's text decides whether it belongs to train or validation
(one in eight is held out), so no question is in both. Every kind can be answered without having seen the question: a
fact is asked for in several ways, numbers are written digit by digit, and everything else is in the question itself.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

HELD_OUT = 8  # one question in eight is for validation

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas"]
THINGS = ["pens", "cups", "books", "coins", "keys", "pears", "plums", "stamps"]
OBJECTS = ["key", "coin", "ring", "pen", "stamp", "button", "ticket", "letter"]
PLACES = ["box", "jar", "drawer", "bag", "cup", "book", "hat", "basket"]
CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Peru": "Lima", "Japan": "Tokyo"},
    **{"Egypt": "Cairo", "Kenya": "Nairobi", "Cuba": "Havana", "Greece": "Athens", "Poland": "Warsaw"},
    **{"Austria": "Vienna", "Ireland": "Dublin", "Portugal": "Lisbon", "Chile": "Santiago", "Canada": "Ottawa"},
}
SYSTEM = "Answer in one short sentence."

T = TypeVar("T")
Question = tuple[str, str]  # with its reply


def demo_chat(split: str, count: int, seed: int = 0) -> list[dict[str, object]]:
    """Return `count` conversations of one split (train or validation), as rows with the column messages."""
    draw = Draw(f"demo_chat {split} {seed}")
    return [{"messages": _conversation(draw, held_out=split != "train")} for _ in range(count)]


def is_held_out(question: str) -> bool:
    """Return True if a question belongs to validation."""
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT == 0


class Draw:
    """Random choices, seeded by a text."""

    def __init__(self, seed: str):
        digest = hashlib.sha256(seed.encode()).digest()
        # The only method of random that is guaranteed to give the same numbers in every version of Python.
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def number(self, low: int, high: int) -> int:
        """Return a number from low to high - 1."""
        return low + int(self._random() * (high - low))

    def one(self, items: Sequence[T]) -> T:
        return items[self.number(0, len(items))]

    def two(self, items: Sequence[T]) -> tuple[T, T]:
        """Return two different items."""
        first, second = self.number(0, len(items)), self.number(0, len(items) - 1)
        return items[first], items[second + (second >= first)]


def _conversation(draw: Draw, *, held_out: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}] if draw.number(0, 5) == 0 else []
    for _ in range(draw.one([1, 1, 2, 3])):
        # The kind is drawn once, so that all are equally frequent although some have more questions held out.
        kind = draw.one(KINDS)
        question, reply = kind(draw)
        while is_held_out(question) != held_out:
            question, reply = kind(draw)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def _next(draw: Draw) -> Question:
    number = draw.number(10, 998)
    asked = draw.one(["What number comes after {}?", "Which number follows {}?", "Count on from {}."])
    return asked.format(number), f"{number + 1}."


def _larger(draw: Draw) -> Question:
    a, b = draw.two(range(10, 100))
    asked = draw.one(["Which is larger", "Which is more", "Which number is larger"])
    return f"{asked}, {a} or {b}?", f"{max(a, b)} is larger."


def _sums(draw: Draw) -> Question:
    a, b = draw.number(1, 10) * 10, draw.number(0, 10)
    a, b = draw.one([(a, b), (b, a)])
    asked = draw.one(["What is {} + {}?", "Add {} and {}.", "How much is {} + {}?"])
    return asked.format(a, b), f"{a} + {b} = {a + b}."


def _backwards(draw: Draw) -> Question:
    letters = [draw.one("abcdefghiklmnoprstuw") for _ in range(draw.one([3, 4, 5]))]
    return f"Write {' '.join(letters)} backwards.", " ".join(reversed(letters))


def _holdings(draw: Draw) -> Question:
    names, things = draw.two(NAMES), draw.two(THINGS)
    counts = [draw.number(2, 10) for _ in names]
    facts = [f"{name} has {n} {thing}." for name, n, thing in zip(names, counts, things, strict=True)]
    i = draw.number(0, 2)
    return f"{' '.join(facts)} How many {things[i]} does {names[i]} have?", facts[i]


def _places(draw: Draw) -> Question:
    objects, places = draw.two(OBJECTS), draw.two(PLACES)
    facts = [f"The {thing} is in the {place}." for thing, place in zip(objects, places, strict=True)]
    i = draw.number(0, 2)
    return f"{' '.join(facts)} Where is the {objects[i]}?", facts[i]


def _capitals(draw: Draw) -> Question:
    country = draw.one(sorted(CAPITALS))
    asked = draw.one(
        [
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}.",
            "Do you know the capital of {}?",
            "What is the capital city of {}?",
        ]
    )
    return asked.format(country), f"The capital of {country} is {CAPITALS[country]}."


KINDS: list[Callable[[Draw], Question]] = [_next, _larger, _sums, _backwards, _holdings, _places, _capitals]
