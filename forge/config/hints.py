"""Turns what pydantic found wrong into one sentence, with the nearest right key."""

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from forge.config.schema import Config, Section

# What the same thing is called elsewhere, where no spelling is near.
OTHER_NAMES = {
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "steps": "training.max_steps",
    "per_device_train_batch_size": "training.per_device_batch_size",
    "micro_batch_size": "training.per_device_batch_size",
    "per_device_eval_batch_size": "evaluation.per_device_batch_size",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "grad_clip": "training.max_grad_norm",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "evaluation.every_steps",
    "logging_steps": "logging.every_steps",
    "output_dir": "output_root",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "dataset_name": "task.dataset.name",
    "max_seq_length": "task.max_length",
    "report_to": "tracking.wandb",
    "wandb": "tracking.wandb",
}


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config, maps included, in the order of the schema."""
    for name, info in section.model_fields.items():
        yield prefix + name
        nested = _section_of(info.annotation)
        if nested is not None:
            yield from all_keys(nested, f"{prefix}{name}.")


def key_hint(dotted: str) -> str:
    """The nearest right key, or the keys that the map around it has."""
    keys = list(all_keys())
    leaf = dotted.rsplit(".", 1)[-1]
    if leaf in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[leaf]}?"
    parent = dotted.rsplit(".", 1)[0] + "." if "." in dotted else ""
    siblings = [key for key in keys if key.startswith(parent) and "." not in key[len(parent) :]]
    near = get_close_matches(leaf, [key[len(parent) :] for key in siblings], n=1, cutoff=0.6)
    if near:
        return f"did you mean {parent}{near[0]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}  # the first of equal leaves wins
    near = get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    if near:
        return f"did you mean {leaves[near[0]]}?"
    known = ", ".join(key[len(parent) :] for key in siblings)
    return f"{parent[:-1] or 'the config'} has: {known}" if known else "see `forge config schema`"


def value_problem(path: tuple[str, ...], error: Any) -> str:
    """One sentence for a value that is missing or wrong; `error` is one of pydantic's error dicts."""
    key, kind, given, context = ".".join(path), error["type"], error["input"], error.get("ctx", {})
    shown = "null" if given is None else f"`{given}`" if isinstance(given, str) else f"a {_kind(given)}"
    if kind == "missing":
        return f"{key} is missing; set it, here or in a parent"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = get_close_matches(str(given), choices, n=1)
        one_of = f"it must be one of {', '.join(choices)}" if len(choices) > 1 else f"forge knows {choices[0]}"
        return f"{key} is {shown}; {one_of}" + (f"; did you mean {near[0]}?" if near else "")
    wanted = {
        "float": "a number", "int": "a whole number", "bool": "true or false", "string": "text",
        "model": "a map of keys", "dict": "a map of keys", "list": "a list, such as [a, b]",
        "finite": "a finite number",
    }  # fmt: skip
    if kind in ("model_type", "dict_type", "model_attributes_type") and given is None:
        return f"{key} is empty; give it keys, or take the line out"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{key} is {shown}; it {reason}" if reason.startswith("must ") else f"{key} {reason}"
    bounds = {"greater_than": ("greater than", "gt"), "greater_than_equal": ("at least", "ge"),
              "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le")}  # fmt: skip
    if kind in bounds:
        words, name = bounds[kind]
        return f"{key} is {given}; it must be {words} {context[name]:g}"
    if kind in ("too_short", "string_too_short"):
        return f"{key} is too short; it needs at least {context['min_length']}"
    expected = wanted.get(kind.split("_")[0])
    return f"{key} is {shown}; it must be {expected}" if expected else f"{key} is {shown}: {error['msg']}"


def _kind(value: Any) -> str:
    return "map of keys" if isinstance(value, dict) else type(value).__name__


def _section_of(annotation: Any) -> type[Section] | None:
    """The nested section of a field's annotation, also behind `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
