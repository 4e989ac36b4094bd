"""Sorts runs into groups that differ only in the seed, and labels each group by what sets it apart."""

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

LENGTHS = ("training.max_steps", "training.epochs")  # two ways to set the number of steps
# A resumed run may change these, but a comparison must distinguish them: they change the numbers, or the time.
COUNTED = (*LENGTHS, "teacher", "distillation")
_DEFAULTS = {
    f"{section}.{name}": value
    for section, config in (("teacher", TeacherConfig()), ("distillation", DistillationConfig()))
    for name, value in config.model_dump(mode="json").items()
}
LONGEST_LABEL = 48  # groups with longer labels are named by their configs, if those differ


@dataclass(frozen=True)
class Group:
    """Runs whose configs differ only in the seed and in keys that do not count, sorted by seed."""

    label: str
    differs: dict[str, Any]  # the counted keys that differ between groups, with the values of this one
    runs: tuple[RunFigures, ...]

    @property
    def alpha(self) -> float:
        return self.runs[0].alpha

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


def group_runs(runs: Sequence[RunFigures]) -> tuple[list[Group], list[str]]:
    """Return the groups in the order of their first runs, and a legend of the labels that are names of configs.

    Raises:
        UsageError: two runs of one group have the same seed, so they are not independent.
    """
    found: dict[str, list[RunFigures]] = {}
    for run in runs:
        found.setdefault(repr(sorted(counted_config(run).items())), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in found.values()]
    for group in members:
        for a, b in pairwise(group):
            if a.seed == b.seed:
                raise UsageError(
                    f"{a.run.path} and {b.run.path} have the same config and the same seed ({a.seed}), so they "
                    f"count only once; leave one of them out, or train another with `--set training.seed=N`"
                )
    configs = [counted_config(group[0]) for group in members]
    varying = [key for key in _keys(configs) if len({repr(config.get(key, key)) for config in configs}) > 1]
    differs = [{key: config[key] for key in varying if key in config} for config in configs]
    labels, legend = _labels(differs, [group[0].config_name for group in members])
    implied = [key for key in varying if _is_implied(key, differs)]
    groups = [
        Group(label, {key: diff[key] for key in diff if key not in implied}, tuple(group))
        for label, diff, group in zip(labels, differs, members, strict=True)
    ]
    return groups, legend


def counted_config(run: RunFigures) -> dict[str, Any]:
    """Return the keys, with their values, that all runs of one group have in common.

    Left out are the seed and what a resumed run may change without harm: paths, reports, and memory. The steps, the
    rows per step and the precision are those that the run had, whichever keys set them.
    """
    config = {key: value for key, value in run.config.items() if counts(key) and key not in LENGTHS}
    config["training.max_steps"] = run.state.step
    config["training.batch_size"] = run.metadata.world.rows_per_step
    config["training.mixed_precision"] = run.metadata.world.mixed_precision
    return config


def counts(key: str) -> bool:
    """True if the key can change the numbers of a run, other than by chance."""
    if key == "training.seed":
        return False
    prefixes = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
    if any(prefix in COUNTED for prefix in prefixes):
        return True
    rule = next((RULES[prefix] for prefix in prefixes if prefix in RULES), RULES[""])
    return rule[0] is not Kind.HARMLESS


def only_distillation_differs(a: Group, b: Group) -> bool:
    """True if one group is the other's control, or its twin with another teacher."""

    def rest(group: Group) -> dict[str, Any]:
        config = counted_config(group.runs[0])
        return {key: value for key, value in config.items() if key.split(".")[0] not in ("teacher", "distillation")}

    return rest(a) == rest(b)


def _is_implied(key: str, differs: Sequence[dict[str, Any]]) -> bool:
    """True for defaults of the teacher's sections, which groups without a teacher do not have."""
    values = [diff[key] for diff in differs if key in diff]
    return len(values) < len(differs) and key in _DEFAULTS and all(value == _DEFAULTS[key] for value in values)


def _keys(maps: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for config in maps for key in config))


def _labels(differs: list[dict[str, Any]], names: list[Path]) -> tuple[list[str], list[str]]:
    if len(differs) == 1:
        return [str(names[0])], []
    keys = _distinguishing_keys(differs)
    texts = {key: _texts(key, differs) for key in keys}
    labels = [_label(number, diff, keys, texts) for number, diff in enumerate(differs)]
    if max(map(len, labels)) <= LONGEST_LABEL or len(set(names)) < len(names):
        return labels, []
    short = _without_common_parent([str(name) for name in names])
    return short, [f"{name}: {label}" for name, label in zip(short, labels, strict=True)]


def _distinguishing_keys(differs: list[dict[str, Any]]) -> list[str]:
    """Return every key with several values, and as few as necessary of those that only some groups have."""
    keys: list[str] = []
    present_in_some: list[str] = []
    for key in _keys(differs):
        values = {repr(diff[key]) for diff in differs if key in diff}
        (keys if len(values) > 1 else present_in_some).append(key)

    def distinguished(keys: list[str]) -> int:
        return len({repr([(key, diff[key]) for key in keys if key in diff]) for diff in differs})

    # A key whose only value is null says less than other keys.
    for key in sorted(present_in_some, key=lambda key: all(diff.get(key) is None for diff in differs)):
        if distinguished([*keys, key]) > distinguished(keys):
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
    """Return the key's value in each group; paths without their common parent."""
    values = [diff.get(key) for diff in differs]
    if all(isinstance(value, str) and value.startswith("/") for value in values if value is not None):
        short = iter(_without_common_parent([str(value) for value in values if value is not None]))
        return [inline(value) if value is None else next(short) for value in values]
    return [inline(value) for value in values]


def _without_common_parent(paths: list[str]) -> list[str]:
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, parent) if parent else path for path in paths]
