"""Loads a config: one parent per file, then the command line; every problem is collected before any is reported."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge.config.effects import Inert, inert_keys, unsupported
from forge.config.hints import key_hint, value_problem
from forge.config.schema import ALTERNATIVES, Config
from forge.config.source import Layer, Origin, Path_, display, read_file, read_setting
from forge.errors import ConfigError

COMMAND_LINE = "the command line"

# What --debug means: every stage runs, in seconds, and nothing leaves the machine.
DEBUG_SETTINGS = (
    "training.max_steps=2",
    "task.dataset.max_rows=64",
    "evaluation.max_samples=16",
    "logging.every_steps=1",
    "checkpoint.every_steps=1",
    "tracking.wandb=null",
)


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, and where each of its keys was set."""

    config: Config
    file: Path
    origins: dict[Path_, Origin] = field(default_factory=dict)  # keys that are not here have their default
    inert: dict[str, Inert] = field(default_factory=dict)  # keys without effect in this config's mode
    notices: list[str] = field(default_factory=list)  # one line each, to be shown before training


def load_config(
    file: Path,
    settings: Sequence[str] = (),
    *,
    debug: bool = False,
    max_steps: str | None = None,
    epochs: str | None = None,
    output_root: str | None = None,
) -> LoadedConfig:
    """Reads file, its parents and the command line's settings. Raises ConfigError with every problem found."""
    layers, problems = read_chain(file)
    named = {"training.max_steps": max_steps, "training.epochs": epochs, "output_root": output_root}
    flags = [f"{key}={value}" for key, value in named.items() if value is not None]
    command_line = [
        *(_setting(text, f"--set {text}") for text in settings),
        *(_setting(text, "--debug") for text in DEBUG_SETTINGS if debug),
        *(_setting(text, f"--{text.split('=')[0].split('.')[-1]}") for text in flags),
    ]
    if max_steps is not None and epochs is not None:
        problems.append(
            "--max_steps and --epochs are both given; keep one, max_steps would leave epochs without effect"
        )

    merged = Layer("merged")
    for layer in [*layers, *command_line]:
        problems += layer.problems
        problems += _apply(layer, merged)
    if any(layer.problems and not layer.tree for layer in layers):
        raise ConfigError(_in_order(problems, layers))  # a file could not be read: what it sets is unknown

    config, more = _build(merged, layers[-1].name)
    problems += more
    inert: dict[str, Inert] = {}
    notices: list[str] = []
    if config is not None:
        inert = {key: why for key, why in inert_keys(config).items() if tuple(key.split(".")) in merged.origins}
        clashes, notices = _sort_inert(inert, merged.origins)
        problems += clashes
        problems += [
            f"{_origin(merged.origins, tuple(key.split('.')))}: {why}" for key, why in unsupported(config).items()
        ]
    if problems or config is None:
        raise ConfigError(_in_order(problems, layers))
    return LoadedConfig(config, file, merged.origins, inert_keys(config), notices)


def read_chain(file: Path) -> tuple[list[Layer], list[str]]:
    """The file's layers, the oldest ancestor first, and what is wrong with `inherits` itself."""
    layers: list[Layer] = []
    problems: list[str] = []
    seen: list[Path] = []
    current: Path | None = file
    while current is not None:
        resolved = current.resolve()
        if resolved in seen:
            ring = " -> ".join(display(p) for p in [*seen[seen.index(resolved) :], resolved])
            problems.append(f"{layers[-1].name}: inherits forms a ring: {ring}; take one `inherits` out")
            break
        seen.append(resolved)
        layer = read_file(current)
        if layers and not current.exists():
            line = layers[-1].origins.get(("inherits",), Origin(layers[-1].name))
            layer.problems = [
                f"{line}: inherits {layer.name}, which does not exist; the path is relative to the file it stands in"
            ]
        layers.append(layer)
        parent = layer.tree.pop("inherits", None)
        origin = layer.origins.get(("inherits",))
        if isinstance(parent, list | dict):
            problems.append(f"{origin}: inherits takes one file, not a {'list' if isinstance(parent, list) else 'map'}")
            parent = None
        current = current.parent / parent if parent else None
    return layers[::-1], problems


def _in_order(problems: list[str], layers: list[Layer]) -> list[str]:
    """Sorted by file and line, the named file first; a problem in a parent says who inherits it."""
    names = [layer.name for layer in reversed(layers)]

    def place(problem: str) -> tuple[int, int]:
        for index, name in enumerate(names):
            if found := re.match(rf"{re.escape(name)}(:(\d+))?:", problem):
                return index, int(found[2] or 0)
        return len(names), 0  # the command line

    def with_heirs(problem: str) -> str:
        heirs = names[: place(problem)[0]][::-1]
        return (
            f"{problem} [inherited by {', by '.join(heirs)}]" if heirs and place(problem)[0] < len(names) else problem
        )

    return [with_heirs(problem) for problem in sorted(problems, key=place)]


def _setting(text: str, name: str) -> Layer:
    """A setting of the command line, called by the flag that the user wrote."""
    layer = read_setting(text)
    layer.problems = [problem.replace(f"--set {text}", name, 1) for problem in layer.problems]
    layer.origins = {path: Origin(name) for path in layer.origins}
    layer.name = COMMAND_LINE
    return layer


def _apply(layer: Layer, merged: Layer) -> list[str]:
    """Lays a layer over the merged tree: maps merge key by key, lists and scalars are replaced."""
    problems = []
    for group in ALTERNATIVES:
        chosen = [key for key in group if _get(layer.tree, key) is not None]
        if len(chosen) > 1:
            origin = layer.origins[tuple(chosen[1].split("."))]
            problems.append(f"{origin}: {' and '.join(chosen)} are both set; they are alternatives, keep one")
        elif chosen:
            for other in set(group) - set(chosen):
                _remove(merged, tuple(other.split(".")))
    _merge(layer.tree, merged.tree, (), layer, merged)
    return problems


def _merge(new: dict[str, Any], old: dict[str, Any], path: Path_, layer: Layer, merged: Layer) -> None:
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


def _build(merged: Layer, leaf: str) -> tuple[Config | None, list[str]]:
    """The config, or None; and the problems. A second build without the faulty keys lets later checks run too."""
    problems: list[str] = []
    for _ in range(2):
        try:
            return Config.model_validate(merged.tree), problems
        except ValidationError as error:
            if problems:
                return None, problems
            for item in error.errors(include_url=False):
                path = tuple(str(part) for part in item["loc"])
                origin = _origin(merged.origins, path) or Origin(leaf)
                if item["type"] == "extra_forbidden":
                    problems.append(f"{origin}: {'.'.join(path)} is not a config key; {key_hint('.'.join(path))}")
                else:
                    problems.append(f"{origin}: {value_problem(path, item)}")
                _remove(merged, path)
    return None, problems


def _sort_inert(inert: dict[str, Inert], origins: dict[Path_, Origin]) -> tuple[list[str], list[str]]:
    """A key without effect is an error where one author wrote both it and the mode, else a notice."""
    clashes, left_out = [], []
    for key, why in inert.items():
        origin, mode = origins[tuple(key.split("."))], origins.get(tuple(why.mode_key.split(".")))
        if mode is not None and _author(origin) == _author(mode):
            clashes.append(f"{origin}: {key} has no effect, since {why.reason} ({mode}); take one of them out")
        else:
            left_out.append(f"{key} ({origin}: {why.reason})")
    return clashes, [f"without effect in this run: {', '.join(left_out)}"] if left_out else []


def _author(origin: Origin) -> str:
    return COMMAND_LINE if origin.line is None else origin.layer


def _origin(origins: dict[Path_, Origin], path: Path_) -> Origin | None:
    """Where the key, or the nearest map around it, was written."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


def _get(tree: dict[str, Any], dotted: str) -> Any:
    node: Any = tree
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _remove(merged: Layer, path: Path_) -> None:
    node: Any = merged.tree
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(path[-1], None)
    for known in _below(merged.origins, path):
        del merged.origins[known]


def _below(origins: dict[Path_, Origin], path: Path_) -> Iterator[Path_]:
    return iter([known for known in origins if known[: len(path)] == path])
