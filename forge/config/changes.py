"""Judges what differs between the config that a run was trained with and the one that it resumes with."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from forge.config.effects import Inert, inert_keys
from forge.config.explain import effective, inline, with_absolute_paths
from forge.config.fields import Section
from forge.config.hints import all_keys, key_hint, schema_path, sections_of, task_type_of
from forge.config.schema import Config
from forge.errors import ConfigError


class Kind(StrEnum):
    """What a change does to the run."""

    HARMLESS = "harmless"  # the next steps are those that the run would have taken
    MEANING = "meaning"  # they are not, or its metrics no longer measure the same thing


@dataclass(frozen=True)
class Change:
    """One key that differs. old and new are text for people, and may say why there is no value."""

    key: str
    old: str
    new: str
    kind: Kind
    reason: str  # why it is harmless, or what it does to the run

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


LENGTH = "the length of the run; the learning rate of the next steps follows the new length"
PIECES = "how many rows the loss computes at a time; its sums are the same up to rounding"
SPREAD = "how a step is split over devices and time; its rows stay the same"

# The longest key that matches decides, also for all keys in its section. Other keys change the meaning.
RULES: dict[str, tuple[Kind, str]] = {
    "training.max_steps": (Kind.HARMLESS, LENGTH),
    "training.epochs": (Kind.HARMLESS, LENGTH),
    "training.per_device_batch_size": (Kind.HARMLESS, SPREAD),
    "training.gradient_accumulation_steps": (Kind.HARMLESS, SPREAD),
    "training.batch_size": (Kind.HARMLESS, SPREAD),  # another step size is detected by its rows, not by this key
    "training.num_workers": (Kind.HARMLESS, "which processes prepare the batches; their content stays the same"),
    "training.gradient_checkpointing": (Kind.HARMLESS, "trades memory for time; the gradients stay the same"),
    "training.compile": (Kind.MEANING, "the next steps would be rounded differently"),
    "training.loss.memory_budget_gib": (Kind.HARMLESS, PIECES),
    "training.loss.low_memory": (Kind.HARMLESS, PIECES),
    "training.loss.precision": (Kind.MEANING, "the gradients of the next steps would be rounded differently"),
    "deepspeed": (Kind.HARMLESS, "how weights and moments are sharded over devices; their values stay the same"),
    "evaluation": (Kind.HARMLESS, "when the model is evaluated; the training steps stay the same"),
    "evaluation.max_rows": (
        Kind.MEANING,
        "metrics before and after the change would be about different rows, and the best checkpoint would be chosen "
        "from both",
    ),
    "checkpoint": (Kind.HARMLESS, "what is saved, and when"),
    "export": (Kind.HARMLESS, "what is written at the end"),
    "logging": (Kind.HARMLESS, "how often training reports"),
    "tracking": (Kind.HARMLESS, "where the metrics go"),
    "output_root": (Kind.HARMLESS, "the run stays in its directory"),
    # The fingerprint of the rows is compared as well, so another path means another place, not other data.
    "task.dataset.path": (Kind.HARMLESS, "where the data is; its rows must have the same fingerprint"),
    "task.chat_template": (Kind.HARMLESS, "where the template is; its text is part of the fingerprint of the rows"),
    # The weights come from the checkpoint, but the rest of the folder is not compared.
    "model.path": (
        Kind.MEANING,
        "the tokenizer and the shape of the model come from there; allow it if the same model has only moved",
    ),
    "model.adapter": (
        Kind.MEANING,
        "the trained weights build on it; allow it if the same adapter has only moved",
    ),
    "model.keep_layers": (Kind.MEANING, "the student would have other layers than the checkpoint"),
    "model.base": (Kind.HARMLESS, "where the base is; the base of an adapter must have the same hash"),
    "teacher.path": (
        Kind.MEANING,
        "the next steps would be matched to another teacher; allow it if the same one has only moved",
    ),
    "teacher.placement": (
        Kind.MEANING,
        "a cache holds rounded outputs of the teacher, and only the most probable of many tokens: the next steps would "
        "be matched to other numbers",
    ),
    "teacher.cache": (Kind.HARMLESS, "where the teacher's outputs are; they must be of the same teacher and rows"),
    "model.tokenizer": (
        Kind.MEANING,
        "the same text would become other tokens; allow it if the same tokenizer has only moved",
    ),
    "": (Kind.MEANING, "the next steps would not be those of the run so far"),
}

ROWS = "task.dataset"  # not a key: as --allow-change it allows other rows, and is judged when they are loaded
NO_EFFECT = "(no effect)"
UNKNOWN = "(unknown to this version)"
UNKNOWN_THEN = "(unknown to the version that saved it)"


def changes(old: dict[str, Any], new: Config, *, rows_per_step_old: int, rows_per_step_new: int) -> list[Change]:
    """Return every key that differs, in the order of the schema.

    Args:
        old: the effective config, with absolute paths, of the attempt that saved the checkpoint; perhaps written by an
            older or a newer version.
        new: the config to resume with.
        rows_per_step_old, rows_per_step_new: rows per optimizer step over all ranks, which no single key determines.
    """
    tree = effective(with_absolute_paths(new))
    inert_old, inert_new = _inert(old), inert_keys(new)
    found = []
    for key, before, after in _differences(old, tree):
        change = _change(key, before, after, inert_old, inert_new, new.task.type)
        if change is not None and not (key == "training.batch_size" and rows_per_step_old != rows_per_step_new):
            found.append(change)
    if rows_per_step_old != rows_per_step_new:
        found.append(_other_step(rows_per_step_old, rows_per_step_new))
    places = {key: place for place, key in enumerate(all_keys())}
    return sorted(found, key=lambda change: places.get(change.key, len(places)))


def check_changes(
    found: Sequence[Change], allowed: Sequence[str], before: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Return one line for each change, to be shown before training.

    Args:
        allowed: the keys of --allow-change.
        before: the allowances of earlier attempts. Each holds for the same value, until a checkpoint has that value.

    Raises ConfigError with one problem for each change of meaning that is not allowed, and for each allowed key that
    neither changes nor was allowed before (a script may repeat its command).
    """
    used = {ROWS, *before, *(change.key for change in found)}
    problems = [_unused(key, found) for key in dict.fromkeys(allowed) if key not in used]
    lines = []
    for change in found:
        if change.kind is Kind.HARMLESS:
            lines.append(f"{change} ({change.reason})")
        elif change.key in allowed:
            lines.append(f"{change} (allowed by --allow-change, although it changes the meaning: {change.reason})")
        elif before.get(change.key) == change.new:
            lines.append(f"{change} (allowed in an earlier attempt, although it changes the meaning: {change.reason})")
        else:
            problems.append(
                f"{change} changes the meaning of the run: {change.reason}; restore it, or add "
                f"--allow-change {change.key}"
            )
    if problems:
        raise ConfigError(problems)
    return lines


def allowances(found: Sequence[Change]) -> dict[str, str]:
    """Return the allowed changes of meaning, as an attempt records them for the next ones."""
    return {change.key: change.new for change in found if change.kind is Kind.MEANING}


class _Absent:
    """The type of the marker for a key that one side does not have."""


ABSENT = _Absent()


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return dotted keys with both values. A map is entered if the other side has a map too, or nothing at all."""
    maps = [side for side in (old, new) if isinstance(side, dict)]
    if not maps or not all(isinstance(side, dict | _Absent) for side in (old, new)):
        return [] if old == new else [(path, old, new)]
    a, b = (side if isinstance(side, dict) else {} for side in (old, new))
    found = []
    for key in dict.fromkeys([*a, *b]):
        found += _differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    return found


def _change(
    key: str, old: Any, new: Any, inert_old: dict[str, Inert], inert_new: dict[str, Inert], task_type: str
) -> Change | None:
    """Return the change, or None if only what the two versions write down differs."""
    kind, reason = _rule(key)
    if key == "teacher.placement" and all(side in ("replicated", "offload", "zero3") for side in (old, new)):
        kind, reason = (
            Kind.HARMLESS,
            "where the teacher's weights are between forward passes; its outputs stay the same",
        )
    before, after = (inline(old) if old is not ABSENT else "", inline(new) if new is not ABSENT else "")
    if new is ABSENT and key in inert_new:
        # Only another change can have caused that, and it is judged.
        return Change(key, before, NO_EFFECT, Kind.HARMLESS, f"because {inert_new[key].reason}")
    if new is ABSENT:
        return Change(key, before, UNKNOWN, kind, reason)
    if old is ABSENT and key in inert_old:
        if new == _default(key, task_type) and kind is Kind.MEANING:
            return Change(key, NO_EFFECT, after, Kind.HARMLESS, "its default, in effect because of another change")
        return Change(key, NO_EFFECT, after, kind, reason)
    if old is ABSENT:  # the default of a new key is what earlier versions did
        return None if new == _default(key, task_type) else Change(key, UNKNOWN_THEN, after, kind, reason)
    return Change(key, before, after, kind, reason)


def _other_step(old: int, new: int) -> Change:
    reason = (
        f"a step would have {new} rows instead of {old}, and each row another place in the epoch; keep the size with "
        f"`--set training.batch_size={old}`"
    )
    return Change("training.batch_size", f"{old} rows per step", f"{new} rows per step", Kind.MEANING, reason)


def _rule(key: str) -> tuple[Kind, str]:
    while key not in RULES:
        key = key.rpartition(".")[0]
    return RULES[key]


def _unused(key: str, found: Sequence[Change]) -> str:
    """Return why a key of --allow-change allows nothing."""
    flag = f"--allow-change {key}"
    below = [change.key for change in found if change.key.startswith(f"{key}.")]
    known = set(all_keys())
    if below:
        flags = " ".join(f"--allow-change {name}" for name in below)
        return f"{flag}: is a section, not a key; name each key: {flags}"
    if any(name.startswith(f"{key}.") for name in known):
        return f"{flag}: is a section, not a key, and none of its keys changes; remove it"
    if key in known or key.startswith("model.config."):
        return f"{flag}: the key does not change; remove it"
    return f"{flag}: is not a config key; {key_hint(key)}"


def _inert(tree: dict[str, Any]) -> dict[str, Inert]:
    """Return the keys without effect in a recorded config, as far as this version can read it."""
    tree = copy.deepcopy(tree)
    for _ in range(2):
        try:
            return inert_keys(Config.model_validate(tree))
        except ValidationError as error:  # keys and values of another version: removed, so that the rest can be read
            for item in error.errors(include_url=False):
                _remove(tree, schema_path(item["loc"]))
    return {}


def _remove(tree: dict[str, Any], path: Sequence[int | str]) -> None:
    node: Any = tree
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if path and isinstance(node, dict):
        node.pop(path[-1], None)


def _default(key: str, task_type: str) -> Any:
    """Return the default of a key as in the config's JSON; ABSENT for a key without one."""
    sections: list[type[Section]] = [Config]
    *parents, leaf = key.split(".")
    for name in parents:
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        sections = [found for info in fields for found in sections_of(info.annotation)]
        if name == "task":
            sections = [section for section in sections if task_type_of(section) == task_type]
    fields = [section.model_fields[leaf] for section in sections if leaf in section.model_fields]
    return ABSENT if not fields or fields[0].is_required() else fields[0].get_default(call_default_factory=True)
