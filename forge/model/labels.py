"""Aligns the labels of a data set with the outputs of a model, by name: the order differs between checkpoints."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import UsageError


def named_labels(id2label: Mapping[Any, str]) -> list[str] | None:
    """The model's label names in the order of its outputs; None where they are transformers' LABEL_0, LABEL_1, …"""
    names = [str(id2label[i]) for i in sorted(id2label)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def align(data_labels: Sequence[str], model_labels: Sequence[str]) -> list[int]:
    """For each label of the data the index of the model's output of that name, whatever their case.

    Raises UsageError where the two sets of names differ: nobody knows then which output is which label.
    """
    positions = {_plain(name): i for i, name in enumerate(model_labels)}
    wanted = [_plain(name) for name in data_labels]
    if sorted(positions) != sorted(wanted) or len(positions) != len(model_labels):
        raise UsageError(
            f"the data's labels ({', '.join(data_labels)}) and the model's ({', '.join(model_labels)}) do not have the "
            "same names; rename the data's with task.labels, the model's with model.labels, or start a new head with "
            "model.new_head: true"
        )
    return [positions[name] for name in wanted]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")
