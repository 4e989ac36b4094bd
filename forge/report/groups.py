"""Sorts runs into groups that differ in nothing but the seed, and says in a few words what tells the groups apart."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from forge.config.changes import RULES, Kind
from forge.config.explain import inline
from forge.config.teacher_schema import DistillationConfig, TeacherConfig
from forge.errors import UsageError
from forge.report.figures import RunFigures

LENGTHS = ("training.max_steps", "training.epochs")  # two ways to say how many steps a run takes
# A resume may change these without harm, a comparison must tell them apart: they change the numbers, or the time.
COUNTED = (*LENGTHS, "teacher", "distillation")
_DEFAULTS = {
    f"{section}.{name}": value
    for section, config in (("teacher", TeacherConfig()), ("distillation", DistillationConfig()))
    for name, value in config.model_dump(mode="json").items()
}
LONGEST_LABEL = 48  # beyond it the configs' names stand for their keys, where they tell the groups apart


@dataclass(frozen=True)
class Group:
    """Runs whose configs are equal in all that counts, but for the seed; in the order of their seeds."""

    label: str
    differs: dict[str, Any]  # the counted keys in which it differs from another group, with its values
    runs: tuple[RunFigures, ...]

    @property
    def alpha(self) -> float:
        return self.runs[0].alpha

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


def group_runs(runs: Sequence[RunFigures]) -> tuple[list[Group], list[str]]:
    """The groups in the order of their first runs; and a line for each label that is a config's name.

    Raises UsageError for two runs of one group with the same seed: they are no two draws.
    """
    found: dict[str, list[RunFigures]] = {}
    for run in runs:
        found.setdefault(repr(sorted(counted_config(run).items())), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in found.values()]
    for group in members:
        for a, b in pairwise(group):
            if a.seed == b.seed:
                raise UsageError(
                    f"{a.run.path} and {b.run.path} have the same config and the same seed, {a.seed}: they do not "
                    f"count as two; name one of them, or train another with `--set training.seed=N`"
                )
    configs = [counted_config(group[0]) for group in members]
    varying = [key for key in _keys(configs) if len({repr(config.get(key, key)) for config in configs}) > 1]
    differs = [{key: config[key] for key in varying if key in config} for config in configs]
    labels, legend = _labels(differs, [group[0].config_name for group in members])
    unsaid = [key for key in varying if _goes_without_saying(key, differs)]
    groups = [
        Group(label, {key: diff[key] for key in diff if key not in unsaid}, tuple(group))
        for label, diff, group in zip(labels, differs, members, strict=True)
    ]
    return groups, legend


def counted_config(run: RunFigures) -> dict[str, Any]:
    """The keys that two runs of one group must have in common.

    Left out: the seed, and what a resume may change without harm, which is a matter of place, of reports and of
    memory. Steps, the rows of a step and the precision are those that the run had, whatever keys led to them.
    """
    config = {key: value for key, value in run.config.items() if counts(key) and key not in LENGTHS}
    config["training.max_steps"] = run.state.step
    config["training.batch_size"] = run.metadata.world.rows_per_step
    config["training.mixed_precision"] = run.metadata.world.mixed_precision
    return config


def counts(key: str) -> bool:
    """Can the key change the numbers of a run, other than by chance?"""
    if key == "training.seed":
        return False
    prefixes = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
    if any(prefix in COUNTED for prefix in prefixes):
        return True
    rule = next((RULES[prefix] for prefix in prefixes if prefix in RULES), RULES[""])
    return rule[0] is not Kind.HARMLESS


def only_distillation_differs(a: Group, b: Group) -> bool:
    """Is one the other's control, or its twin with another teacher?"""

    def rest(group: Group) -> dict[str, Any]:
        config = counted_config(group.runs[0])
        return {key: value for key, value in config.items() if key.split(".")[0] not in ("teacher", "distillation")}

    return rest(a) == rest(b)


def _goes_without_saying(key: str, differs: Sequence[dict[str, Any]]) -> bool:
    """Is it a default of the teacher's part, which groups without a teacher do not have?"""
    values = [diff[key] for diff in differs if key in diff]
    return len(values) < len(differs) and key in _DEFAULTS and all(value == _DEFAULTS[key] for value in values)


def _keys(maps: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for config in maps for key in config))


def _labels(differs: list[dict[str, Any]], names: list[Path]) -> tuple[list[str], list[str]]:
    if len(differs) == 1:
        return [str(names[0])], []
    keys = _telling_keys(differs)
    texts = {key: _texts(key, differs) for key in keys}
    labels = [_label(number, diff, keys, texts) for number, diff in enumerate(differs)]
    if max(map(len, labels)) <= LONGEST_LABEL or len(set(names)) < len(names):
        return labels, []
    short = _without_common_parent([str(name) for name in names])
    return short, [f"{name}: {label}" for name, label in zip(short, labels, strict=True)]


def _telling_keys(differs: list[dict[str, Any]]) -> list[str]:
    """Every key with two values; then as few as will do of those that only some groups have."""
    keys: list[str] = []
    present_in_some: list[str] = []
    for key in _keys(differs):
        values = {repr(diff[key]) for diff in differs if key in diff}
        (keys if len(values) > 1 else present_in_some).append(key)

    def told_apart(keys: list[str]) -> int:
        return len({repr([(key, diff[key]) for key in keys if key in diff]) for diff in differs})

    # A key whose one value is null says less than the keys of the others.
    for key in sorted(present_in_some, key=lambda key: all(diff.get(key) is None for diff in differs)):
        if told_apart([*keys, key]) > told_apart(keys):
            keys.append(key)
    return keys


def _label(number: int, diff: dict[str, Any], keys: list[str], texts: dict[str, list[str]]) -> str:
    parts = [f"{key} {texts[key][number]}" for key in keys if key in diff]
    if parts:
        return ", ".join(parts)
    key = keys[0]
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    return next((f"{parent} null" for parent in parents if parent in diff), f"no {key}")


def _texts(key: str, differs: list[dict[str, Any]]) -> list[str]:
    """The key's value in each group; of paths only what is not the same in all."""
    values = [diff.get(key) for diff in differs]
    if all(isinstance(value, str) and value.startswith("/") for value in values if value is not None):
        short = iter(_without_common_parent([str(value) for value in values if value is not None]))
        return [inline(value) if value is None else next(short) for value in values]
    return [inline(value) for value in values]


def _without_common_parent(paths: list[str]) -> list[str]:
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, parent) if parent else path for path in paths]
