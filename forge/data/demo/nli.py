"""A generated data set for natural-language inference: pairs whose label follows logically from how they were built.

It needs no download, and a small pretrained encoder learns most of it in a few hundred steps on a CPU. Equal arguments
give equal rows on every machine and Python version.

**Labels are logical**, for premise and hypothesis about one scene. Entailment: whenever the premise is true, so is the
hypothesis. Contradiction: they cannot both be true. Neutral: neither of these. What is only likely is neutral. "No
nurse" means none in the scene, "at most three" includes none, "most" is more than half, "or" allows both.

**The hypothesis alone reveals nothing.** Each builder chooses a hypothesis, mostly affirmative, and writes three
premises for it, one for each label; all three become rows. What makes an affirmative hypothesis true makes the negative
one false: a premise with "no" or "failed to" contradicts the one and entails the other.

**Validation measures generalisation.** The words with a star in `lexicon.py` (about a quarter) never occur in train,
and every validation pair contains one of them: no pair is in both splits, for any seeds and sizes.

The phenomena, equally often. E, N, C are the premises that entail, leave open, contradict the hypothesis H:

    kinds         H There was an animal in the barn.
                  E … a dog …   N … a hammer …   C There was no animal in the barn.
                  H There was no dog in the barn.
                  E … no animal …   N … no cat …   C … a black dog …
    identity      H The animal in the barn is a dog.                       (it is of one kind only)
                  E … a black dog.   N … black.   C … a black cat.
    places        H Anna was born in France.                               (once, and a city is in one country)
                  E … in Lyon.   N Anna has a cousin in Lyon.   C … in Berlin.
    converses     H The nurse is taller than the baker.
                  E The baker is shorter than the nurse.   N The pilot is shorter than the nurse.
                  C The baker is taller than the nurse.
    roles         H The nurse praised the baker.
                  E The baker was praised by the nurse.   N The baker praised the nurse (perhaps both did).
                  C The baker was not praised by the nurse.
    opposites     H The soup is not cold.
                  E The soup is still hot.   N The rice next to the soup is still hot.   C The soup is still cold.
    counts        H At least two nurses sang in the park.
                  E Exactly three …   N At most four …   C Fewer than two …
    shares        H Most of the nurses sang in the park.
                  E All of the nurses …   N At least one of the nurses …   C None of the nurses …
    details       H A nurse bought a red car.
                  E A tall nurse bought a red car on Monday.   N A nurse bought a car on Monday.
                  C No nurse bought a car.
    conjunctions  H The nurse bought a pear.
                  E … a pear and a plum.   N … a pear or a plum.   C … neither a pear nor a plum.
    attempts      H The nurse paid the bill.
                  E … did not forget to pay …   N … promised to pay …   C … failed to pay …
    beliefs       H The soup is hot.
                  E The nurse knows that …   N The nurse believes that …   C The nurse wrongly believes that …
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from forge.data.demo.lexicon import (
    ADVERBS,
    ALONE,
    CITIES,
    COLOURS,
    CONVERSES,
    DID,
    DID_NOT,
    FALSE_THAT,
    IRREGULAR_PAST,
    KINDS,
    MAYBE_DID,
    MAYBE_THAT,
    NAMES,
    OPPOSITES,
    PEOPLE,
    RELATIVES,
    ROOMS,
    TASKS,
    TO_PEOPLE,
    TO_THINGS,
    TRAITS,
    TRUE_THAT,
)

LABELS = ("entailment", "neutral", "contradiction")
SPLITS = ("train", "validation")
HELD_OUT = "*"  # stays on its word until the sentence is complete, to show which sentences are for validation
MAX_FAILED_DRAWS = 2000  # in a row: the lexicon has no more rows, and searching would never end

T = TypeVar("T")


def demo_nli(split: str, rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `rows` distinct pairs with the keys premise, hypothesis, label; fewer rows are a prefix of more rows."""
    data: list[dict[str, str]] = []
    pairs = _pairs(split, seed)
    while len(data) < rows:
        premise, hypothesis, label = next(pairs)
        data.append({"premise": premise, "hypothesis": hypothesis, "label": label})
    return data


@dataclass(frozen=True)
class Triple:
    """One hypothesis and a premise for each label."""

    hypothesis: str
    entailment: str
    neutral: str
    contradiction: str


class Draw:
    """Random choices and the words of one split."""

    def __init__(self, split: str, seed: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        self.split = split
        digest = hashlib.sha256(f"demo_nli {split} {seed}".encode()).digest()
        # The only method of random that is guaranteed to give the same numbers in every version of Python.
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def coin(self) -> bool:
        return self._random() < 0.5

    def affirmative(self) -> bool:
        """Return True for an affirmative hypothesis: three in four, since labels under negation are learned slowly."""
        return self._random() < 0.75

    def word(self, words: Sequence[str], *others: str) -> str:
        """Return a word that this split may use and that is not in `others`; an underscore becomes a space."""
        usable = [word for word in words if self.split == "validation" or HELD_OUT not in word]
        return self.one([word for word in (word.replace("_", " ") for word in usable) if word not in others])

    def either_way(self, pair: str) -> tuple[str, str]:
        first, second = pair.split("/")
        return (first, second) if self.coin() else (second, first)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return sorted(items, key=lambda _: self._random())


# --- the phenomena ----------------------------------------------------------------------------------------------------


def kinds(draw: Draw) -> Triple:
    """A dog is an animal, so a dog implies an animal, and no animal implies no dog; the converse does not hold."""
    kind = draw.word(tuple(KINDS))
    member = draw.word(KINDS[kind])
    sibling = draw.word(KINDS[kind], member)
    stranger = draw.word(KINDS[draw.word(tuple(KINDS), kind)])
    there_is, there_is_no, nothing = _existence(draw)
    detailed = f"{draw.word(COLOURS)} {member}"
    return draw.one(
        (
            Triple(there_is(kind), there_is(member), there_is(stranger), there_is_no(kind)),
            Triple(there_is(member), there_is(detailed), there_is(kind), there_is_no(kind)),
            Triple(there_is_no(kind), nothing, there_is_no(member), there_is(member)),
            Triple(there_is_no(member), there_is_no(kind), there_is_no(sibling), there_is(detailed)),
        )
    )


def identity(draw: Draw) -> Triple:
    """A thing has only one kind: a cat is not a dog. Its colour says nothing about its kind."""
    kind = draw.word(tuple(KINDS))
    member = draw.word(KINDS[kind])
    sibling = draw.word(KINDS[kind], member)
    colour = draw.word(COLOURS)
    thing = f"The {kind} in the {draw.word(ROOMS)}"
    is_so = f"{thing} is {_a(f'{colour} {member}')}"
    is_other = draw.one((f"{thing} is {_a(f'{colour} {sibling}')}", f"{thing} is {colour} and not {_a(member)}"))
    if draw.affirmative():
        return Triple(f"{thing} is {_a(member)}", is_so, f"{thing} is {colour}", is_other)
    return Triple(f"{thing} is not {_a(member)}", is_other, f"{thing} is {colour}", is_so)


def places(draw: Draw) -> Triple:
    """A city is in one country; nobody is in two cities at once or born twice. A cousin's home says nothing."""
    country = draw.word(tuple(CITIES))
    city = draw.word(CITIES[country])
    elsewhere = draw.word(CITIES[draw.word(tuple(CITIES), country)])
    next_town = draw.word(CITIES[country], city)
    name = draw.word(NAMES)
    was, was_not = draw.one((("is in", "is not in"), ("was born in", "was not born in")))
    relative = f"{name} has {_a(draw.word(RELATIVES))} in"
    if draw.coin():  # the hypothesis names the country
        here, there, open_place = city, elsewhere, draw.one((city, elsewhere))
        asked = country
    else:
        here, there, open_place = f"the centre of {city}", draw.one((elsewhere, next_town)), city
        asked = city
    is_so, is_other, is_open = f"{name} {was} {here}", f"{name} {was} {there}", f"{relative} {open_place}"
    if draw.affirmative():
        return Triple(f"{name} {was} {asked}", is_so, is_open, is_other)
    return Triple(f"{name} {was_not} {asked}", is_other, is_open, is_so)


def converses(draw: Draw) -> Triple:
    """Taller one way is shorter the other way, and never both ways. A third person decides nothing."""
    nouns, pairs = draw.one(CONVERSES)
    over, under = draw.either_way(draw.word(pairs))
    one = draw.word(nouns)
    two = draw.word(nouns, one)
    three = draw.word(nouns, one, two)
    verb, relation = over.split(" ", 1)
    so, denied = f"the {two} {under} the {one}", f"the {one} {verb} not {relation} the {two}"
    not_so = draw.one((f"the {two} {over} the {one}", f"the {one} {under} the {two}"))
    not_decided = draw.one((f"the {three} {under} the {one}", f"the {two} {under} the {three}"))
    if draw.affirmative():
        return Triple(f"the {one} {over} the {two}", so, not_decided, draw.one((not_so, denied)))
    return Triple(denied, not_so, not_decided, so)


def roles(draw: Draw) -> Triple:
    """The passive says the same. With the two exchanged it is another action, which may have happened too."""
    verb = draw.word(TO_PEOPLE)
    one = draw.word(PEOPLE)
    two = draw.word(PEOPLE, one)

    def statement(doer: str, other: str, done: bool, active: bool) -> str:
        if active:
            return f"the {doer} {_past(verb)} the {other}" if done else f"the {doer} did not {verb} the {other}"
        return f"the {other} {'was' if done else 'was not'} {_past(verb)} by the {doer}"

    done, active = draw.affirmative(), draw.coin()
    return Triple(
        statement(one, two, done, active),
        statement(one, two, done, not active),
        statement(two, one, done, draw.coin()),
        statement(one, two, not done, draw.coin()),
    )


def opposites(draw: Draw) -> Triple:
    """Hot is not cold, although not cold may be lukewarm. The thing's neighbour and its past decide nothing."""
    nouns, pairs = draw.one(OPPOSITES)
    quality, opposite = draw.either_way(draw.word(pairs))
    thing = draw.word(nouns)
    neighbour = draw.word(nouns, thing)
    adverb = draw.word(ADVERBS)
    either = draw.one((quality, opposite))
    has_it = f"the {thing} is {adverb} {quality}"
    lacks_it = f"the {thing} is {adverb} {draw.one((opposite, f'not {quality}'))}"
    not_decided = draw.one(
        (f"the {neighbour} next to the {thing} is {adverb} {either}", f"a week ago the {thing} was {either}")
    )
    if draw.affirmative():
        return Triple(f"the {thing} is {quality}", has_it, not_decided, lacks_it)
    return Triple(f"the {thing} is not {quality}", lacks_it, not_decided, has_it)


def counts(draw: Draw) -> Triple:
    """Each quantity is an interval of integers: inside the hypothesis's, overlapping it, or disjoint from it."""
    verb = draw.word(ALONE)
    return _quantified(draw, COUNTS, draw.word(PEOPLE), f"{_past(verb)} in the {draw.word(ROOMS)}")


def shares(draw: Draw) -> Triple:
    """Like counts, with shares of a group: all of it is more than half of it, which is at least one."""
    verb = draw.word(ALONE)
    return _quantified(draw, SHARES, draw.word(PEOPLE), f"{_past(verb)} in the {draw.word(ROOMS)}")


def details(draw: Draw) -> Triple:
    """More detail entails less detail, and the other way round under "no". A detail that is not given is open."""
    person, trait, verb = draw.word(PEOPLE), draw.word(TRAITS), _past(draw.word(TO_THINGS))
    thing, colour = draw.word(KINDS[draw.word(tuple(KINDS))]), draw.word(COLOURS)
    when = draw.one(("on Monday", "last week", "in the morning", "yesterday"))
    plain, coloured = f"{person} {verb} {_a(thing)}", f"{person} {verb} {_a(f'{colour} {thing}')}"
    other_colour = f"{person} {verb} {_a(f'{draw.word(COLOURS, colour)} {thing}')}"
    full = f"{_a(f'{trait} {coloured}')} {when}"
    if draw.affirmative():
        return Triple(_a(coloured), full, draw.one((f"{_a(plain)} {when}", _a(other_colour))), f"no {plain}")
    return Triple(f"no {coloured}", f"no {plain}", draw.one((f"no {trait} {coloured}", f"no {other_colour}")), full)


def conjunctions(draw: Draw) -> Triple:
    """ "And" means both, "or" means one without saying which, "neither … nor" means none."""
    verb, who = draw.word(TO_THINGS), f"the {draw.word(PEOPLE)}"
    members = KINDS[draw.word(tuple(KINDS))]
    this = draw.word(members)
    that = draw.word(members, this)
    third = draw.word(members, this, that)
    first, second = draw.shuffled((_a(this), _a(that)))
    did = f"{who} {_past(verb)}"
    both, one_of_them = f"{did} {first} and {second}", f"{did} {first} or {second}"
    neither, only_that = f"{did} neither {first} nor {second}", f"{did} {_a(that)} but no {this}"
    just_the_other = f"{did} {_a(that)}"
    return draw.one(
        (
            Triple(f"{did} {_a(this)}", both, one_of_them, draw.one((neither, only_that))),
            Triple(f"{who} did not {verb} {_a(this)}", draw.one((neither, only_that)), one_of_them, both),
            Triple(both, f"{did} {_a(third)}, {second} and {first}", just_the_other, draw.one((neither, only_that))),
        )
    )


def attempts(draw: Draw) -> Triple:
    """To manage to do something is to do it, to fail to is not to do it, and to hope to leaves it open."""
    task, who = draw.word(TASKS), f"the {draw.word(PEOPLE)}"
    verb, what = task.split(" ", 1)
    so, not_so, not_decided = (f"{who} {draw.word(verbs)} {task}" for verbs in (DID, DID_NOT, MAYBE_DID))
    if draw.affirmative():
        return Triple(f"{who} {_past(verb)} {what}", so, not_decided, not_so)
    return Triple(f"{who} did not {verb} {what}", not_so, not_decided, so)


def beliefs(draw: Draw) -> Triple:
    """What someone knows is true, what someone wrongly believes is false, what someone merely believes is open."""
    nouns, pairs = draw.one(OPPOSITES)
    thing, quality = draw.word(nouns), draw.either_way(draw.word(pairs))[0]
    who = f"the {draw.word(PEOPLE, thing)}"
    it_is, it_is_not = draw.shuffled((f"the {thing} is {quality}", f"the {thing} is not {quality}"))
    return Triple(
        it_is,
        draw.one((f"{who} {draw.word(TRUE_THAT)} {it_is}", f"{who} {draw.word(FALSE_THAT)} {it_is_not}")),
        f"{who} {draw.word(MAYBE_THAT)} {draw.one((it_is, it_is_not))}",
        draw.one((f"{who} {draw.word(TRUE_THAT)} {it_is_not}", f"{who} {draw.word(FALSE_THAT)} {it_is}")),
    )


PHENOMENA: tuple[Callable[[Draw], Triple], ...] = (
    kinds, identity, places, converses, roles, opposites, counts, shares, details, conjunctions, attempts, beliefs,
)  # fmt: skip


# --- quantities -------------------------------------------------------------------------------------------------------

MANY = 8  # any number above those used here; for shares the whole group, which has a half and so must be even


@dataclass(frozen=True)
class Quantity:
    """A phrase such as "at least two", which means a number from `low` to `high`."""

    text: str
    low: int
    high: int

    def label_for(self, hypothesis: "Quantity") -> str:
        """Return the label if this quantity is the premise, about the same people doing the same thing."""
        if hypothesis.low <= self.low and self.high <= hypothesis.high:
            return "entailment"
        if self.high < hypothesis.low or hypothesis.high < self.low:
            return "contradiction"
        return "neutral"


NO_COUNTS = ("fewer than one", "at most five", "more than five")  # no premise gives these all three labels
COUNTS = (
    Quantity("no", 0, 0),
    Quantity("not one", 0, 0),
    *(
        quantity
        for n, number in enumerate(("one", "two", "three", "four", "five"), start=1)
        for quantity in (
            Quantity(f"exactly {number}", n, n),
            Quantity(f"only {number}", n, n),
            Quantity(f"at least {number}", n, MANY),
            Quantity(f"at most {number}", 0, n),
            Quantity(f"more than {number}", n + 1, MANY),
            Quantity(f"fewer than {number}", 0, n - 1),
        )
        if quantity.text not in NO_COUNTS
    ),
)
SHARES = (
    Quantity("all of the", MANY, MANY),
    Quantity("every one of the", MANY, MANY),
    Quantity("most of the", MANY // 2 + 1, MANY),
    Quantity("more than half of the", MANY // 2 + 1, MANY),
    Quantity("at least half of the", MANY // 2, MANY),
    Quantity("fewer than half of the", 0, MANY // 2 - 1),
    Quantity("at most half of the", 0, MANY // 2),
    Quantity("some of the", 1, MANY),
    Quantity("at least one of the", 1, MANY),
    Quantity("none of the", 0, 0),
    Quantity("not one of the", 0, 0),
)


def _quantified(draw: Draw, quantities: Sequence[Quantity], noun: str, deed: str) -> Triple:
    asked = draw.one(quantities)

    def statement(quantity: Quantity) -> str:
        return f"{quantity.text} {noun if quantity.text.endswith(' one') else _plural(noun)} {deed}"

    def premise(label: str) -> str:
        # "Most" and "some" suggest "not all" without saying so, so they are not used as neutral premises.
        fitting = [given for given in quantities if given is not asked and given.label_for(asked) == label]
        if label == "neutral":
            fitting = [given for given in fitting if given.text not in ("most of the", "some of the")]
        return statement(draw.one(fitting))

    return Triple(statement(asked), *(premise(label) for label in LABELS))


# --- rows and words ---------------------------------------------------------------------------------------------------


def _pairs(split: str, seed: int) -> Iterator[tuple[str, str, str]]:
    draw = Draw(split, seed)
    given: set[tuple[str, str]] = set()
    while True:
        for phenomenon in PHENOMENA:
            yield from draw.shuffled(_new_pairs(draw, phenomenon, given))


def _new_pairs(
    draw: Draw, phenomenon: Callable[[Draw], Triple], given: set[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    for _ in range(MAX_FAILED_DRAWS):
        triple = phenomenon(draw)
        premises = [getattr(triple, label) for label in LABELS]
        if draw.split == "validation" and not all(HELD_OUT in premise + triple.hypothesis for premise in premises):
            continue
        hypothesis = _sentence(triple.hypothesis)
        pairs = {(_sentence(premise), hypothesis): label for premise, label in zip(premises, LABELS, strict=True)}
        if given.isdisjoint(pairs):
            given.update(pairs)
            return [(*pair, label) for pair, label in pairs.items()]
    raise ValueError(f"more rows than the lexicon can give: found no new pair of {phenomenon.__name__}")


def _existence(draw: Draw) -> tuple[Callable[[str], str], Callable[[str], str], str]:
    """Return sentences that there is such a thing (or someone bought it), that there is none, that there is nothing."""
    if draw.coin():
        place = f"in the {draw.word(ROOMS)}"
        there_is, there_is_no = f"there was {{}} {place}", f"there was no {{}} {place}"
        nothing = f"there was nothing {place}"
        return lambda noun: there_is.format(_a(noun)), there_is_no.format, nothing
    verb, who = draw.word(TO_THINGS), f"the {draw.word(PEOPLE)}"
    return (
        lambda noun: f"{who} {_past(verb)} {_a(noun)}",
        lambda noun: f"{who} did not {verb} {_a(noun)}",
        f"{who} {_past(verb)} nothing",
    )


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return _inflected(noun, lambda bare: f"{bare}es" if bare.endswith(("s", "x", "ch", "sh")) else f"{bare}s")


def _past(verb: str) -> str:
    def regular(bare: str) -> str:
        if bare.endswith("e"):
            return f"{bare}d"
        return f"{bare[:-1]}ied" if re.search("[^aeiou]y$", bare) else f"{bare}ed"

    return _inflected(verb, lambda bare: IRREGULAR_PAST.get(bare) or regular(bare))


def _inflected(word: str, inflect: Callable[[str], str]) -> str:
    """Return the inflected word, with its star if it had one."""
    bare = word.removesuffix(HELD_OUT)
    return inflect(bare) + word[len(bare) :]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}.".replace(HELD_OUT, "")
