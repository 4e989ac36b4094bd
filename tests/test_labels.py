"""Labels of data and model meet by name, and never by position."""

import pytest

from forge.errors import UsageError
from forge.model.classifier import align, named_labels


def test_labels_are_matched_by_name_ignoring_case() -> None:
    assert align(["entailment", "neutral", "contradiction"], ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]) == [1, 2, 0]
    assert align(["not_entailment", "entailment"], ["entailment", "not entailment"]) == [1, 0]


@pytest.mark.parametrize("model", [["positive", "negative", "neutral"], ["entailment", "neutral"], ["a", "A", "b"]])
def test_other_names_are_refused_with_both_lists_and_a_way_out(model: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        align(["entailment", "neutral", "contradiction"], model)
    for part in ("entailment, neutral, contradiction", ", ".join(model), "task.labels", "model.new_head"):
        assert part in str(refused.value)


def test_default_names_of_transformers_do_not_count() -> None:
    assert named_labels({0: "LABEL_0", 1: "LABEL_1"}) is None
    assert named_labels({1: "no", 0: "yes"}) == ["yes", "no"]


def test_names_that_differ_by_case_alone_are_matched_where_they_are_written_alike() -> None:
    assert align(["A", "a"], ["a", "A"]) == [1, 0]
    assert align(["x ", "x"], ["x", "x "]) == [1, 0]
    for key in ("model", "teacher"):
        with pytest.raises(UsageError, match="'A' and 'a' differ only by case, white space, _ or -") as refused:
            align(["A", "a"], ["a", "A "], key)
        assert f"the data's labels (A, a) and the {key}'s (a, A )" in str(refused.value)
