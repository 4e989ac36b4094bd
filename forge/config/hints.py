"""Turns pydantic's errors into sentences that name the nearest valid key."""

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from forge.config.fields import Section
from forge.config.former_names import KEYS
from forge.config.schema import Config

# Names from other toolkits that are not spelled like the keys of forge.
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
    "sequence_len": "task.max_length",
    "r": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target",
    "target_modules": "model.lora.target",
    "micro_batch_size_per_gpu": "training.per_device_batch_size",
    "gradient_checkpointing_enable": "training.gradient_checkpointing",
    "sample_packing": "task.packing",
    "load_best_model_at_end": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.best_metric",
    "hub_model_id": "export.push_to_hub",
    "wandb_project": "tracking.wandb.project",
}


def all_keys(task_type: str | None = None) -> Iterator[str]:
    """Yield every dotted key of the config, including maps, in schema order; or only those of one task type."""
    yield from dict.fromkeys(_keys(Config, "", task_type))


def schema_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the path of a key from a pydantic error location, which also names the chosen member of a union."""
    parts = [str(part) for part in location]
    if parts[0] == "task" and len(parts) > 1 and parts[1] in task_types():
        del parts[1]
    return tuple(parts)


def task_types() -> list[str]:
    """Return the values of task.type."""
    return [task_type_of(section) for section in sections_of(Config.model_fields["task"].annotation)]


def task_type_of(section: type[Section]) -> str:
    """Return the value of task.type that selects a section."""
    return str(get_args(section.model_fields["type"].annotation)[0])


# What users of other toolkits look for, and why forge does not have it.
ABSENT = {
    "fsdp": "forge shards only with DeepSpeed, since FSDP2 changes a model's parameters and would need its own code "
    "for checkpoints and the gathered head; set deepspeed.student: zero3, which shards the same tensors",
    **dict.fromkeys(
        ("optim", "optimizer"),
        "forge trains with AdamW: training.weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    ),
    "adapter": "an adapter is trained by model.lora, such as `model: {lora: {rank: 16}}`",
}


# What users write where forge has a map, and what they mean.
IN_A_MAP = {
    "deepspeed": "deepspeed: {{student: {}}}",
    "task.dataset": "dataset: {{name: {0}}} for one of the hub, or {{path: {0}}} for a folder",
    "model": "model: {{path: {}}}",
    "teacher": "teacher: {{path: {}}}",
    "model.lora": "lora: {{rank: 16}}",
    "tracking.wandb": "wandb: {{project: forge}}",
}


def unknown_key(path: tuple[str, ...], task_type: str | None = None) -> str:
    """Return a sentence about a key that forge does not know, or that belongs to another task type."""
    dotted = ".".join(path)
    if dotted in KEYS:
        return f"{dotted} is now called {KEYS[dotted]}; rename it"
    owners = [name for name in task_types() if dotted in all_keys(name)]
    if path[0] == "task" and owners:
        return f"{dotted} is a key of task.type {' and '.join(owners)}, but this task is of type {task_type}"
    if absent := ABSENT.get(path[0]) or ABSENT.get(path[-1]):
        return f"{dotted} is not a config key: {absent}"
    if "." in path[-1]:
        first, rest = path[-1].split(".", 1)
        return f"{dotted} is written as one key, but in a file it is a key in a map: `{first}: {{{rest}: …}}`"
    return f"{dotted} is not a config key; {key_hint(dotted, task_type)}"


def key_named(leaf: str) -> str | None:
    """Return the dotted key that ends in `leaf`, or that another toolkit calls so; None if no key matches."""
    if leaf in OTHER_NAMES:
        return OTHER_NAMES[leaf]
    return next((key for key in all_keys() if key.rsplit(".", 1)[-1] == leaf), None)


def key_hint(dotted: str, task_type: str | None = None) -> str:
    """Return a hint with the nearest valid key, or with the keys of the section."""
    keys = list(all_keys(task_type))
    leaf = dotted.rsplit(".", 1)[-1]
    if dotted in KEYS:
        return f"it is now called {KEYS[dotted]}"
    if leaf == "inherits":
        return "inherits is only allowed at the top level of a file"
    if leaf in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[leaf]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}  # of equal leaves the first is used
    if leaf in leaves:
        return f"did you mean {leaves[leaf]}?"
    parent = dotted.rsplit(".", 1)[0] + "." if "." in dotted else ""
    siblings = [key for key in keys if key.startswith(parent) and "." not in key[len(parent) :]]
    near = get_close_matches(leaf, [key[len(parent) :] for key in siblings], n=1, cutoff=0.6)
    if near:
        return f"did you mean {parent}{near[0]}?"
    near = get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    if near:
        return f"did you mean {leaves[near[0]]}?"
    known = ", ".join(key[len(parent) :] for key in siblings)
    return f"{parent[:-1] or 'the config'} has: {known}" if known else "see `forge config schema`"


def value_problem(path: tuple[str, ...], error: Any) -> str:
    """Return a sentence about a value that is missing or wrong; `error` is one of pydantic's error dicts."""
    key, kind, given, context = ".".join(path), error["type"], error["input"], error.get("ctx", {})
    shown = "null" if given is None else f"`{_short(given)}`" if isinstance(given, str) else f"a {_kind(given)}"
    or_null = ", or null" if _nullable(path) else ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_type(given)
    if kind == "missing":
        return f"{key} is missing; set it here or in a parent"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = get_close_matches(str(given).lower(), choices, n=1) if len(choices) > 1 else []
        one_of = f"it must be one of {', '.join(choices)}" if len(choices) > 1 else f"forge supports only {choices[0]}"
        return f"{key} is {shown}; {one_of}{or_null}" + (f"; did you mean {near[0]}?" if near else "")
    wanted = {
        "float": "a number", "int": "a whole number", "bool": "true or false", "string": "text",
        "model": "a map of keys", "dict": "a map of keys", "list": "a list, such as [a, b]",
        "finite": "a finite number",
    }  # fmt: skip
    if kind in ("model_type", "dict_type", "model_attributes_type") and given is None:
        return f"{key} is empty; give it keys, or remove it"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{key} is {shown}; it {reason}" if reason.startswith("must ") else f"{key} {reason}"
    bounds = {"greater_than": ("greater than", "gt"), "greater_than_equal": ("at least", "ge"),
              "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le")}  # fmt: skip
    if kind in bounds:
        words, name = bounds[kind]
        bound = f"{context[name]:g}" if isinstance(context[name], float) else context[name]
        return f"{key} is {_short(given)}; it must be {words} {bound}{or_null}"
    if kind == "string_too_short":
        return f"{key} is empty; it must be text{or_null}"
    if kind == "too_short":
        length = {0: "no entries", 1: "one entry"}.get(context["actual_length"], f"{context['actual_length']} entries")
        return f"{key} has {length}; it needs at least {context['min_length']}"
    expected = wanted.get(kind.split("_")[0])
    if expected == "a map of keys" and key in IN_A_MAP:
        expected = f"a map of keys, such as {IN_A_MAP[key].format(_short(given))}"
    if expected == "text" and isinstance(given, list | dict):
        expected = "text, in quotes if it contains brackets, braces, a dash or a colon"
    return f"{key} is {shown}; it must be {expected}{or_null}" if expected else f"{key} is {shown}: {error['msg']}"


def _wrong_type(task: Any) -> str:
    """Return a sentence about a task without a type, or with one that forge does not know."""
    one_of = f"it must be one of {', '.join(task_types())}"
    if not isinstance(task, dict) or task.get("type") is None:
        unknown = [key for key in task if f"task.{key}" not in all_keys()] if isinstance(task, dict) else []
        if near := get_close_matches("type", unknown, n=1):
            return f"task.{near[0]} is not a config key; did you mean task.type?"
        return f"task.type is missing; {one_of}"
    near = get_close_matches(str(task["type"]).lower(), task_types(), n=1)
    return f"task.type is `{_short(task['type'])}`; {one_of}" + (f"; did you mean {near[0]}?" if near else "")


def _short(value: Any) -> str:
    """Return the value on one line, cut after 60 characters."""
    text = " ".join(str(value).splitlines())
    return text if len(text) <= 60 else f"{text[:60]}…"


def _kind(value: Any) -> str:
    return "map of keys" if isinstance(value, dict) else type(value).__name__


def _nullable(path: tuple[str, ...]) -> bool:
    """True if the key may be null."""
    sections: list[type[Section]] = [Config]
    for name in path[:-1]:
        sections = [found for info in _fields(sections, name) for found in sections_of(info.annotation)]
    return any(type(None) in get_args(info.annotation) for info in _fields(sections, path[-1]))


def _fields(sections: list[type[Section]], name: str) -> list[FieldInfo]:
    return [section.model_fields[name] for section in sections if name in section.model_fields]


def _keys(section: type[Section], prefix: str, task_type: str | None) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        for nested in sections_of(info.annotation):
            if task_type is None or prefix + name != "task" or task_type_of(nested) == task_type:
                yield from _keys(nested, f"{prefix}{name}.", task_type)


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections in a field's annotation, also in `X | None`; several where task.type selects one."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for arg in get_args(annotation) for found in sections_of(arg)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []
