"""Writes configs for people and for a run's own files: YAML with origins, differences, a JSON schema, a run's place."""

import json
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from forge.config.effects import inert_keys
from forge.config.fields import BOOLEANS, PlainText
from forge.config.loader import RUN_CONFIG, RUN_STATE, LoadedConfig
from forge.config.plans import is_file
from forge.config.schema import Config
from forge.config.task_schema import absolute_if_folder


def effective(config: Config) -> dict[str, Any]:
    """Return every key that has an effect, with defaults filled in: what a run records, and itself a valid config."""
    tree = config.model_dump(mode="json")
    for dotted in inert_keys(config):
        *parents, leaf = dotted.split(".")
        node = tree
        for key in parents:
            node = node[key]
        node.pop(leaf, None)
    return {key: value for key, value in tree.items() if value != {}}


def to_yaml(config: Config) -> str:
    """Return the effective config as YAML text, which load_config reads back to the same config."""
    return yaml.dump(effective(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def show(loaded: LoadedConfig, *, origin: bool) -> str:
    """Return the merged config as YAML; with origin, each line ends in the file and line, or the flag, that set it."""
    if not origin:
        return to_yaml(loaded.config)
    rows: list[tuple[str, str]] = []
    _rows(effective(loaded.config), (), loaded, rows)
    width = min(max(len(line) for line, _ in rows), 72)
    return "\n".join(f"{line:<{width}}  # {source}" if source else line for line, source in rows) + "\n"


def config_name(file: Path) -> Path:
    """Return the folder of a config's runs in the output root: its path below configs/, or its bare name elsewhere.

    The config.yaml of a run counts as the file that the run was started from: a repeated run is found next to it.
    """
    if file.name == RUN_CONFIG and (file.parent / RUN_STATE).is_file():
        with suppress(OSError, ValueError, KeyError, TypeError):
            started_from = Path(json.loads((file.parent / "run_metadata.json").read_bytes())["config_file"])
            return (
                config_name(started_from) if started_from.name != RUN_CONFIG else Path(file.resolve().parents[1].name)
            )
    path = file.resolve().with_suffix("")
    if "configs" in path.parts[:-1]:
        below = len(path.parts) - 1 - path.parts[::-1].index("configs")
        return Path(*path.parts[below + 1 :])
    return Path(path.name)


def with_absolute_paths(config: Config) -> Config:
    """Return the config with local folders and files as absolute paths, as a run records it."""
    named = ("path", "base", "adapter", "tokenizer")
    model = {name: absolute_if_folder(getattr(config.model, name)) for name in named}
    teacher = {name: absolute_if_folder(getattr(config.teacher, name)) for name in (*named, "cache")}
    plans = {name: plan and _absolute_plan(plan) for name, plan in config.deepspeed}
    return config.model_copy(
        update={
            "deepspeed": config.deepspeed.model_copy(update=plans),
            "task": config.task.with_absolute_paths(),
            "model": config.model.model_copy(update=model),
            "teacher": config.teacher.model_copy(update=teacher),
            "output_root": str(Path(config.output_root).absolute()),
        }
    )


def difference(left: Config, right: Config) -> list[str]:
    """Return one line for each key whose effective value differs: `key: left -> right`."""
    a, b = flattened(effective(left)), flattened(effective(right))
    inert_a, inert_b = inert_keys(left), inert_keys(right)

    def value(key: str, flat: dict[str, Any], inert: Container[str]) -> str:
        return inline(flat[key]) if key in flat else "(no effect)" if key in inert else "(not set)"

    return [
        f"{key}: {value(key, a, inert_a)} -> {value(key, b, inert_b)}"
        for key in [*a, *(key for key in b if key not in a)]
        if key not in a or key not in b or a[key] != b[key]
    ]


def json_schema() -> str:
    """Return the JSON schema of a config file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"] = {
        "inherits": {"type": "string", "description": "One parent config, relative to this file."},
        **schema["properties"],
    }
    schema["required"] = []  # a parent may set what a file leaves out
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    _as_written(schema)
    return json.dumps(schema, indent=2)


def _as_written(node: Any) -> None:
    """Let a schema accept what forge reads: it takes each scalar as text, and the type of the field decides.

    Editors see a label `0` as a number, `no` as false, and `1e-4` as text if they follow YAML 1.1. A section `task` of
    a parent may leave its type to its heirs, and then fits several kinds.
    """
    if isinstance(node, list):
        for item in node:
            _as_written(item)
    if not isinstance(node, dict):
        return
    for item in node.values():
        _as_written(item)
    if "oneOf" in node:
        node["anyOf"] = node.pop("oneOf")
        node.pop("discriminator", None)
    if isinstance(node.get("enum"), list):
        node["enum"] += [BOOLEANS[word] for word in node["enum"] if word in BOOLEANS]
        node.pop("type", None)
    elif node.get("type") == "boolean":
        node |= {"type": ["boolean", "string"], "pattern": f"^({'|'.join(BOOLEANS)})$"}
    elif node.get("type") in ("number", "integer"):
        node |= {"type": [node["type"], "string"], "pattern": r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"}
    elif node.get("type") == "string" and "const" not in node:
        node["type"] = ["string", "number", "boolean"]


def inline(value: Any) -> str:
    """Return the value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Quotes each text that would be read back as something else."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = '"' if len(text.splitlines()) > 1 else "'" if PlainText(text).value() != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def _absolute_plan(name: str) -> str:
    """Return the absolute path of a user's own plan; the name of a shipped one as it is."""
    return str(Path(name).expanduser().absolute()) if is_file(name) else name


def _rows(tree: dict[str, Any], path: tuple[str, ...], loaded: LoadedConfig, rows: list[tuple[str, str]]) -> None:
    for key, value in tree.items():
        here, indent = (*path, key), "  " * len(path)
        if isinstance(value, dict) and value:
            rows.append((f"{indent}{inline(key)}:", ""))
            _rows(value, here, loaded, rows)
        else:
            rows.append((f"{indent}{inline(key)}: {inline(value)}", str(loaded.origins.get(here, "default"))))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by dotted key; an empty map is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
