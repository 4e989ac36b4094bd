"""Aligns the labels of a data set with the outputs of a model, by name: the order differs between checkpoints."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import UsageError


def named_labels(id2label: Mapping[Any, str]) -> list[str] | None:
    """The model's label names in the order of its outputs; None where they are transformers' LABEL_0, LABEL_1, …"""
    names = [str(id2label[i]) for i in sorted(id2label)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def align(data_labels: Sequence[str], model_labels: Sequence[str], key: str = "model") -> list[int]:
    """For each label of the data the index of the model's output of that name, whatever their case.

    key: the config's section of the model. Raises UsageError where the two sets of names differ: nobody knows then
    which output is which label.
    """
    positions = {_plain(name): i for i, name in enumerate(model_labels)}
    wanted = [_plain(name) for name in data_labels]
    if sorted(positions) != sorted(wanted) or len(positions) != len(model_labels):
        way_out = (
            f"the model's with {key}.labels, or start a new head with {key}.new_head: true"
            if key == "model"
            else f"or the {key}'s with {key}.labels; a {key} that has more or fewer labels is of no use"
        )
        raise UsageError(
            f"the data's labels ({', '.join(data_labels)}) and the {key}'s ({', '.join(model_labels)}) do not have the "
            f"same names; rename the data's with task.labels, {way_out}"
        )
    return [positions[name] for name in wanted]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")
