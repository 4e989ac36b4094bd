"""The demo NLI data: the same everywhere, balanced, logical, and with nothing to learn from the hypothesis alone."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from forge.data.demo import nli as module
from forge.data.demo.nli import (
    COUNTS,
    LABELS,
    PHENOMENA,
    SHARES,
    Draw,
    Triple,
    attempts,
    beliefs,
    conjunctions,
    converses,
    counts,
    demo_nli,
    details,
    identity,
    kinds,
    opposites,
    places,
    roles,
    shares,
)


def test_the_first_rows_are_the_same_on_every_machine() -> None:
    digests = {
        split: hashlib.sha256(json.dumps(demo_nli(split, 500)).encode()).hexdigest()
        for split in ("train", "validation")
    }
    assert digests == {
        "train": "0bd5b0e73ee75cd0b73a73e6f2b0804ce37245edd0c943b1a71c3c3083753c45",
        "validation": "97ea4029368cf7be35b51f070affbebb89006a7b9e4c8daeae66d9d1298ff3ea",
    }


def test_fewer_rows_are_the_beginning_of_more_rows_and_another_seed_gives_others() -> None:
    assert demo_nli("train", 100) == demo_nli("train", 1000)[:100]
    assert demo_nli("train", 100, seed=1) != demo_nli("train", 100, seed=0)
    assert demo_nli("train", 0) == []


@pytest.mark.parametrize("rows", [100, 101, 102, 3000])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_are_balanced_within_one_row(split: str, rows: int) -> None:
    label_counts = Counter(row["label"] for row in demo_nli(split, rows))
    assert set(label_counts) == set(LABELS)
    assert max(label_counts.values()) - min(label_counts.values()) <= 1


def test_no_pair_occurs_twice() -> None:
    assert len({pair_of(row) for row in demo_nli("train", 9000)}) == 9000
    assert len({pair_of(row) for row in demo_nli("validation", 3000)}) == 3000


def test_every_validation_pair_has_a_word_that_train_never_uses() -> None:
    held_out = starred_words("validation")
    assert {"fox", "cooks", "bordeaux", "yawned", "inspect", "stronger"} < held_out
    train_rows = demo_nli("train", 6000, seed=7)
    assert not any(held_out & words_of(row) for row in train_rows)
    validation_rows = demo_nli("validation", 3000)
    assert all(held_out & words_of(row) for row in validation_rows)
    assert not {pair_of(row) for row in train_rows} & {pair_of(row) for row in validation_rows}


def test_train_draws_no_starred_word() -> None:
    assert starred_words("train") == set()


def test_each_hypothesis_comes_equally_often_with_each_label_so_alone_it_reveals_nothing() -> None:
    for split in ("train", "validation"):
        labels_of: dict[str, Counter[str]] = defaultdict(Counter)
        for row in demo_nli(split, 3000):
            labels_of[row["hypothesis"]][row["label"]] += 1
        assert all(len({labels[label] for label in LABELS}) == 1 for labels in labels_of.values())


def test_negated_premises_and_negated_hypotheses_have_every_label() -> None:
    negation = re.compile(r"\b(no|not|none|neither|nothing|failed|refused|forgot|wrongly|falsely)\b", re.IGNORECASE)
    rows = demo_nli("train", 6000)
    for side, at_least in (("premise", 250), ("hypothesis", 450)):
        labels = Counter(row["label"] for row in rows if negation.search(row[side]))
        assert min(labels[label] for label in LABELS) > at_least, (side, labels)


def test_sentences_are_short_and_have_the_right_article() -> None:
    for row in demo_nli("train", 3000) + demo_nli("validation", 3000):
        for sentence in pair_of(row):
            assert re.fullmatch(r"[A-Z][A-Za-z, ]+\.", sentence), sentence
            assert 4 <= len(sentence.split()) <= 14, sentence
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", sentence, re.IGNORECASE), sentence


# One line for the hypothesis, then the premises that entail it, leave it open, contradict it.
EXAMPLES = [
    (kinds, 1, "the guard saw a flower",
        "the guard saw a rose",
        "the guard saw a dress",
        "the guard did not see a flower",
    ),
    (kinds, 0, "the actor did not see a tree",
        "the actor saw nothing",
        "the actor did not see an elm",
        "the actor saw an elm",
    ),
    (identity, 2, "The piece of furniture in the museum is a bed",
        "The piece of furniture in the museum is a black bed",
        "The piece of furniture in the museum is black",
        "The piece of furniture in the museum is black and not a bed",
    ),
    (identity, 8, "The musical instrument in the office is not a piano",
        "The musical instrument in the office is a green harp",
        "The musical instrument in the office is green",
        "The musical instrument in the office is a green piano",
    ),
    (places, 3, "Alice was not born in Paris",
        "Alice was born in Marseille",
        "Alice has a brother in Paris",
        "Alice was born in the centre of Paris",
    ),
    (converses, 3, "the doctor is shorter than the butcher",
        "the butcher is taller than the doctor",
        "the tailor is taller than the doctor",
        "the doctor is not shorter than the butcher",
    ),
    (converses, 2, "the mirror is not above the clock",
        "the mirror is below the clock",
        "the picture is below the mirror",
        "the clock is below the mirror",
    ),
    (roles, 0, "the tailor was blamed by the actor",
        "the actor blamed the tailor",
        "the actor was blamed by the tailor",
        "the actor did not blame the tailor",
    ),
    (opposites, 1, "the gate is closed",
        "the gate is really closed",
        "the window next to the gate is really closed",
        "the gate is really not closed",
    ),
    (opposites, 2, "the classroom is bright",
        "the classroom is really bright",
        "a week ago the classroom was dark",
        "the classroom is really dark",
    ),
    (opposites, 8, "the tea is not cold",
        "the tea is still hot",
        "the rice next to the tea is still hot",
        "the tea is still cold",
    ),
    (counts, 0, "at most two actors whistled in the market",
        "fewer than three actors whistled in the market",
        "at most four actors whistled in the market",
        "more than three actors whistled in the market",
    ),
    (shares, 0, "more than half of the actors whistled in the market",
        "most of the actors whistled in the market",
        "at least one of the actors whistled in the market",
        "at most half of the actors whistled in the market",
    ),
    (details, 0, "a butcher needed a yellow harp",
        "a friendly butcher needed a yellow harp last week",
        "a butcher needed a white harp",
        "no butcher needed a harp",
    ),
    (details, 2, "no clerk saw a white hat",
        "no clerk saw a hat",
        "no young clerk saw a white hat",
        "a young clerk saw a white hat in the morning",
    ),
    (conjunctions, 0, "the actor needed a birch",
        "the actor needed a birch and a maple",
        "the actor needed a birch or a maple",
        "the actor needed a maple but no birch",
    ),
    (conjunctions, 2, "the baker did not notice a harp",
        "the baker noticed neither a violin nor a harp",
        "the baker noticed a violin or a harp",
        "the baker noticed a violin and a harp",
    ),
    (conjunctions, 3, "the lawyer bought an orchid and a rose",
        "the lawyer bought a sunflower, a rose and an orchid",
        "the lawyer bought an orchid",
        "the lawyer bought an orchid but no rose",
    ),
    (attempts, 1, "the teacher answered the question",
        "the teacher took the time to answer the question",
        "the teacher did not promise to answer the question",
        "the teacher did not remember to answer the question",
    ),
    (beliefs, 0, "the lake is not clean",
        "the priest falsely claims that the lake is clean",
        "the priest was told that the lake is not clean",
        "the priest wrongly believes that the lake is not clean",
    ),
    (beliefs, 3, "the lawyer is not awake",
        "the butcher is wrong to think that the lawyer is awake",
        "the butcher was told that the lawyer is awake",
        "the butcher has proved that the lawyer is awake",
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example[0].__name__}-{example[1]}")
def test_the_premises_of_each_phenomenon(example: tuple[Callable[[Draw], Triple], int, str, str, str, str]) -> None:
    phenomenon, seed, *sentences = example
    assert phenomenon(Draw("train", seed)) == Triple(*sentences)


def test_every_phenomenon_has_an_example_and_an_equal_share() -> None:
    assert {example[0] for example in EXAMPLES} == set(PHENOMENA)
    one_round = demo_nli("train", 3 * len(PHENOMENA))
    assert len({row["hypothesis"] for row in one_round}) == len(PHENOMENA)


@pytest.mark.parametrize(("premise", "hypothesis", "label"), [
    ("exactly three", "at least two", "entailment"),
    ("at most four", "at least two", "neutral"),
    ("fewer than two", "at least two", "contradiction"),
    ("more than one", "at least two", "entailment"),
    ("at least one", "exactly one", "neutral"),
    ("no", "at most two", "entailment"),
    ("not one", "no", "entailment"),
    ("at most two", "no", "neutral"),
    ("all of the", "most of the", "entailment"),
    ("most of the", "some of the", "entailment"),
    ("at least one of the", "most of the", "neutral"),
    ("at most half of the", "more than half of the", "contradiction"),
    ("none of the", "fewer than half of the", "entailment"),
])  # fmt: skip
def test_quantities_are_compared_as_intervals(premise: str, hypothesis: str, label: str) -> None:
    quantities = {quantity.text: quantity for quantity in COUNTS + SHARES}
    assert quantities[premise].label_for(quantities[hypothesis]) == label


def test_no_neutral_label_rests_on_most_or_some_being_heard_as_not_all() -> None:
    draw = Draw("train", 0)
    assert not any(re.match("most|some", shares(draw).neutral) for _ in range(500))


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="split 'test' is not one of train, validation"):
        demo_nli("test", 1)


def test_more_rows_than_the_lexicon_has_are_an_error_not_an_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PHENOMENA", (only_one,))
    assert len(demo_nli("train", 3)) == 3
    with pytest.raises(ValueError, match="found no new pair of only_one"):
        demo_nli("train", 4)


def only_one(draw: Draw) -> Triple:
    return Triple("it rains", "it rains much", "it may rain", "it is dry")


def pair_of(row: dict[str, str]) -> tuple[str, str]:
    return row["premise"], row["hypothesis"]


def words_of(row: dict[str, str]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(pair_of(row)).lower()))


def starred_words(split: str) -> set[str]:
    """The held-out words, inflected as they stand in many unfinished sentences."""
    draw = Draw(split, seed=1)
    triples = (phenomenon(draw) for phenomenon in PHENOMENA for _ in range(600))
    return {word for triple in triples for word in re.findall(r"(\w+)\*", " ".join(vars(triple).values()).lower())}
