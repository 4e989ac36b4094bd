"""Loads a config: a file, its parents and the command line. All problems are collected before any is reported."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge.config.effects import Inert, inert_keys, unsupported
from forge.config.fields import PlainText
from forge.config.former_names import KEYS, current_config, current_key
from forge.config.hints import schema_path, unknown_key, value_problem
from forge.config.schema import ALTERNATIVES, Config
from forge.config.shipped import find_config
from forge.config.source import KeyPath, Layer, Origin, display, near_name, read_file, read_setting
from forge.errors import BaseConfigError, ConfigError

COMMAND_LINE = "the command line"
RUN_CONFIG, RUN_STATE = "config.yaml", "training_state.json"  # together they make a run directory

# What --debug sets: every stage runs, within seconds, and nothing leaves the machine.
DEBUG_SETTINGS = (
    "training.max_steps=2",
    "task.dataset.max_rows=64",
    "evaluation.max_rows=16",
    "logging.every_steps=1",
    "checkpoint.every_steps=1",
    "tracking.wandb=null",
    "export.push_to_hub=null",
)


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, and where each of its keys was set."""

    config: Config
    file: Path
    origins: dict[KeyPath, Origin] = field(default_factory=dict)  # keys that are missing here have their default
    notices: list[str] = field(default_factory=list)  # one line each, shown before training


def load_config(
    file: Path,
    settings: Sequence[str] = (),
    *,
    debug: bool = False,
    max_steps: str | None = None,
    epochs: str | None = None,
    output_root: str | None = None,
) -> LoadedConfig:
    """Load a file, its parents and the settings of the command line. Raises ConfigError with every problem found.

    Former names of keys are an error, except in a run's own config.yaml, which an earlier version may have written.
    """
    found = find_config(file)
    files, problems = read_chain(found)
    if found.name == RUN_CONFIG and (found.parent / RUN_STATE).is_file():
        for layer in files:
            _with_current_names(layer)
    named = {"training.max_steps": max_steps, "training.epochs": epochs, "output_root": output_root}
    given = [read_setting(text) for text in settings]
    flags = [_flag(key, value) for key, value in named.items() if value is not None]
    layers = [*files, *given, *(_debug_layers() if debug else []), *flags]
    incomplete = bool(problems) or any(layer.unreadable for layer in layers)

    command_line, merged = Layer(COMMAND_LINE), Layer("merged")
    for layer in [*given, *flags]:
        _merge(layer.tree, command_line.tree, (), layer, command_line)
    for layer in [*files, command_line]:
        problems += layer.problems + _both_set(layer)
    for layer in [*given, *flags]:
        problems += layer.problems
    for layer in layers:
        _merge(layer.tree, merged.tree, (), layer, merged)
    _drop_alternatives(layers, merged)

    leaf = files[-1].name
    config, more = _build(merged, leaf, incomplete)
    problems += more
    inert: dict[str, Inert] = {}
    notices: list[str] = []
    if config is not None:
        inert = {key: why for key, why in inert_keys(config).items() if _get(merged.tree, key) is not None}
        clashes, notices = _sort_inert(inert, merged.origins)
        problems += clashes
        problems += [
            f"{_origin(merged.origins, tuple(key.split('.')))}: {why}" for key, why in unsupported(config).items()
        ]
    if problems == [_base(leaf)]:
        raise BaseConfigError(problems)
    if problems or config is None:
        raise ConfigError(_in_order(problems, files, [layer.name for layer in [*given, *flags]]))
    if found != file:
        notices.insert(0, f"{file} is not in this folder; using the one that comes with forge, {found}")
    return LoadedConfig(config, found, merged.origins, notices)


def read_chain(file: Path) -> tuple[list[Layer], list[str]]:
    """Return the layers of a file and its parents, the oldest first, and what is wrong with `inherits` itself."""
    layers: list[Layer] = []
    problems: list[str] = []
    seen: list[Path] = []
    current: Path | None = file
    while current is not None:
        seen.append(current.resolve())
        layer = read_file(current)
        layers.append(layer)
        current, problem = _parent(layer, current, seen)
        problems += [f"{layer.origins[('inherits',)]}: {problem}"] if problem else []
    return layers[::-1], problems


def _parent(layer: Layer, file: Path, seen: list[Path]) -> tuple[Path | None, str | None]:
    """Return the file that this one inherits, if any, or what is wrong with its `inherits`."""
    if "inherits" not in layer.tree:
        return None, None
    name = layer.tree.pop("inherits")
    if isinstance(name, list | dict):
        return None, f"inherits must be one file, not a {'list' if isinstance(name, list) else 'map'}"
    if not name:
        return None, "inherits is empty; name the parent file, or remove the line"
    parent = file.parent / os.path.expanduser(name)
    if os.path.isdir(parent):
        return None, f"inherits {display(parent)}, which is a folder; name a file in it"
    if not os.path.exists(parent):  # unlike Path.exists, also for names that no file can have
        near = near_name(parent, other_than=file) if "\0" not in name else None
        hint = "check the path" if Path(name).is_absolute() else "the path is relative to the file that contains it"
        hint = f"did you mean {near}?" if near else hint
        return None, f"inherits {display(parent)}, which does not exist; {hint}"
    if parent.resolve() in seen:
        ring = " -> ".join(display(p) for p in [*seen[seen.index(parent.resolve()) :], parent])
        return None, f"inherits forms a cycle: {ring}; remove one `inherits`"
    return parent, None


def _with_current_names(layer: Layer) -> None:
    """Translate the keys that an earlier version wrote; of a key with both names it is unknown which one counts."""
    for former, current in KEYS.items():
        if _get(layer.tree, former) is not None and _get(layer.tree, current) is not None:
            origin = layer.origins[tuple(former.split("."))]
            layer.problems.append(
                f"{origin}: {former} is now called {current}, which is set too; keep only one of them"
            )
    layer.tree = current_config(layer.tree)
    layer.origins = {tuple(current_key(".".join(path)).split(".")): at for path, at in layer.origins.items()}


def _in_order(problems: list[str], files: list[Layer], settings: list[str]) -> list[str]:
    """Sort problems by file and line, the named file first, the command line last; add who inherits a parent."""
    names = [layer.name for layer in reversed(files)]

    def place(problem: str) -> tuple[int, int]:
        for index, name in enumerate(names):
            if found := re.match(rf"{re.escape(name)}(:(\d+))?:", problem):
                return index, int(found[2] or 0)
        on_command_line = (index for index, name in enumerate(settings) if problem.startswith(f"{name}: "))
        return len(names), next(on_command_line, len(settings))

    def whole(problem: str) -> str:
        file = place(problem)[0]
        heirs = names[:file][::-1] if file < len(names) else []
        return _one_line(problem) + (f" [inherited by {', by '.join(heirs)}]" if heirs else "")

    return list(dict.fromkeys(whole(problem) for problem in sorted(problems, key=place)))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _debug_layers() -> list[Layer]:
    layers = [read_setting(text) for text in DEBUG_SETTINGS]
    for layer in layers:
        layer.name = "--debug"
        layer.origins = {path: Origin("--debug") for path in layer.origins}
    return layers


def _flag(key: str, value: str) -> Layer:
    """Return the layer of a flag such as --max_steps, whose value is plain text, not YAML."""
    layer = Layer(f"--{key.split('.')[-1]}")
    layer.put(key, PlainText(value), Origin(layer.name))
    return layer


def _both_set(layer: Layer) -> list[str]:
    """Return a problem for each group of alternatives of which one author set several."""
    problems = []
    for group in ALTERNATIVES:
        origins = {key: layer.origins[tuple(key.split("."))] for key in group if _get(layer.tree, key) is not None}
        if len(origins) > 1:
            *first, last = sorted(origins, key=lambda key: origins[key].line or 0)
            others = " and ".join(f"{key} ({origins[key]})" for key in first)
            problems.append(f"{origins[last]}: {last} is an alternative to {others}; keep only one of them")
    return problems


def _drop_alternatives(layers: list[Layer], merged: Layer) -> None:
    """Keep of each group of alternatives the one that the latest layer sets."""
    for group in ALTERNATIVES:
        present = [key for key in group if _get(merged.tree, key) is not None]
        latest = next((key for layer in layers[::-1] for key in present if _get(layer.tree, key) is not None), None)
        for key in present:
            if key != latest:
                _remove(merged, tuple(key.split(".")))


def _merge(new: dict[str, Any], old: dict[str, Any], path: KeyPath, layer: Layer, merged: Layer) -> None:
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            merged.origins[here] = layer.origins[here]
            _merge(value, old[key], here, layer, merged)
        else:
            _remove(merged, here)
            old[key] = value if not isinstance(value, dict) else {}
            merged.origins[here] = layer.origins[here]
            if isinstance(value, dict):
                _merge(value, old[key], here, layer, merged)
            elif isinstance(value, list):
                merged.origins |= {below: layer.origins[below] for below in _below(layer.origins, here)}


def _base(leaf: str) -> str:
    return f"{leaf}: sets neither task nor model, so it is only a base for other configs; inherit it, or set both"


def _build(merged: Layer, leaf: str, incomplete: bool) -> tuple[Config | None, list[str]]:
    """Build the config, or None, and its problems. A second build without the faulty keys lets later checks run too.

    If the tree is incomplete because something could not be read, no key is reported as missing.
    """
    problems: list[str] = []
    for attempt in (1, 2):
        try:
            return Config.model_validate(merged.tree), problems
        except ValidationError as error:
            if attempt == 2:
                return None, problems
            missing = []
            for item in error.errors(include_url=False):
                path = schema_path(item["loc"])
                if item["type"] == "union_tag_invalid":
                    path = (*path, "type")
                origin = _origin(merged.origins, path) or Origin(leaf)
                if item["type"] in ("missing", "union_tag_not_found") or (
                    item["type"] == "value_error" and isinstance(item["input"], dict)
                ):
                    missing.append((path, f"{origin}: {value_problem(path, item)}"))
                elif item["type"] == "extra_forbidden":
                    problems.append(f"{origin}: {unknown_key(path, _get(merged.tree, 'task.type'))}")
                else:
                    problems.append(f"{origin}: {value_problem(path, item)}")
                _remove(merged, path)
            if incomplete:
                continue
            if not problems and [path for path, _ in missing] == [("task",), ("model",)]:
                return None, [_base(leaf)]
            meant = {path for path, _ in missing if any(f"did you mean {'.'.join(path)}?" in text for text in problems)}
            problems += [text for path, text in missing if path not in meant]
    return None, problems


def _sort_inert(inert: dict[str, Inert], origins: dict[KeyPath, Origin]) -> tuple[list[str], list[str]]:
    """Return errors and notices about keys without effect: an error if one author set both the key and the mode."""
    clashes, left_out = [], []
    for key, why in inert.items():
        origin, mode = origins[tuple(key.split("."))], origins.get(tuple(why.mode_key.split(".")))
        if mode is not None and _author(origin) == _author(mode):
            clashes.append(f"{origin}: {key} has no effect because {why.reason} ({mode}); remove one of them")
        else:
            left_out.append(f"{key} ({origin}: {why.reason})")
    return clashes, [f"without effect in this run: {', '.join(left_out)}"] if left_out else []


def _author(origin: Origin) -> str:
    return COMMAND_LINE if origin.line is None else origin.layer


def _origin(origins: dict[KeyPath, Origin], path: KeyPath) -> Origin | None:
    """Return where the key, or the nearest map around it, was written."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


def _get(tree: dict[str, Any], dotted: str) -> Any:
    node: Any = tree
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _remove(merged: Layer, path: KeyPath) -> None:
    node: Any = merged.tree
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(path[-1], None)
    for known in _below(merged.origins, path):
        del merged.origins[known]


def _below(origins: dict[KeyPath, Origin], path: KeyPath) -> Iterator[KeyPath]:
    return iter([known for known in origins if known[: len(path)] == path])
