"""Reads one YAML file, or one `--set`, into a layer: a tree of texts that remembers where each key was written."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forge.config.schema import PlainText

Path_ = tuple[str, ...]  # the keys that lead to a value, from the top of the config


@dataclass(frozen=True)
class Origin:
    """Where a key was set."""

    layer: str  # the file, or the command line
    line: int | None = None  # from 1; None on the command line

    def __str__(self) -> str:
        return self.layer if self.line is None else f"{self.layer}:{self.line}"


@dataclass
class Layer:
    """What one source sets. The tree's leaves are text, None, or lists of them; problems are whole sentences."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path_, Origin] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: Origin) -> None:
        """Sets a dotted key: the maps on the way to it are made."""
        path = tuple(key.split("."))
        node = self.tree
        for depth, name in enumerate(path[:-1], start=1):
            if not isinstance(node.setdefault(name, {}), dict):
                self.problems.append(
                    f"{origin}: {'.'.join(path[:depth])} is already set to a value and cannot hold {key}"
                )
                return
            node = node[name]
            self.origins.setdefault(path[:depth], origin)
        node[path[-1]] = value
        self.origins[path] = origin


def display(path: Path) -> str:
    """The path as a person here would write it: relative where it lies below the working directory."""
    path = Path(os.path.normpath(path.absolute()))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def read_file(path: Path) -> Layer:
    """One YAML file. Syntax errors, unreadable files, duplicate keys and merge keys become problems."""
    layer = Layer(display(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        layer.problems.append(f"{layer.name}: there is no such config file; check the path (you are in {Path.cwd()})")
        return layer
    except IsADirectoryError:
        found = ", ".join(sorted(p.name for p in path.glob("*.yaml"))[:5])
        hint = f"name a file in it: {found}" if found else "name a YAML file"
        layer.problems.append(f"{layer.name}: is a folder, not a config file; {hint}")
        return layer
    except (OSError, UnicodeDecodeError) as error:
        layer.problems.append(f"{layer.name}: cannot be read ({error}); it must be a text file in UTF-8")
        return layer
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(part for part in (error.problem, error.context) if part)
        layer.problems.append(f"{layer.name}:{line}: YAML syntax: {what}; check indentation, colons and brackets there")
        return layer
    except yaml.YAMLError as error:
        layer.problems.append(f"{layer.name}: YAML syntax: {str(error).splitlines()[0]}")
        return layer
    if node is None:
        layer.problems.append(f"{layer.name}: is empty; a config needs at least task and model, or inherits")
    elif not isinstance(node, yaml.MappingNode):
        layer.problems.append(f"{layer.name}:{node.start_mark.line + 1}: a config is a map of keys, such as `task:`")
    else:
        layer.tree = _read_map(node, (), layer, frozenset())
    return layer


def read_setting(setting: str) -> Layer:
    """One `--set key=value`; the value is YAML: a word, a number, null, [a, b] or {a: b}."""
    name = f"--set {setting}"
    layer = Layer(name)
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
        layer.problems.append(f"{name}: must have the form key=value with a dotted key, such as training.seed=1")
        return layer
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        layer.problems.append(f"{name}: the value is not valid YAML ({str(error).splitlines()[0]}); quote it")
        return layer
    if node is None:  # `--set key=` clears the key
        layer.put(key, None, Origin(name))
        return layer
    layer.put(key, _read_node(node, tuple(key.split(".")), layer, frozenset(), Origin(name)), Origin(name))
    return layer


def _read_node(node: yaml.Node, path: Path_, layer: Layer, open_nodes: frozenset[int], origin: Origin | None) -> Any:
    if isinstance(node, yaml.ScalarNode):
        if node.style is None:  # plain, neither quoted nor a block
            return None if node.tag == "tag:yaml.org,2002:null" else PlainText(node.value)
        return node.value
    if id(node) in open_nodes:
        layer.problems.append(
            f"{layer.name}:{node.start_mark.line + 1}: {'.'.join(path)} contains itself through an alias"
        )
        return None
    open_nodes |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, (*path, str(i)), layer, open_nodes, origin) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    return _read_map(node, path, layer, open_nodes, origin)


def _read_map(
    node: yaml.MappingNode, path: Path_, layer: Layer, open_nodes: frozenset[int], origin: Origin | None = None
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = origin or Origin(layer.name, key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            layer.problems.append(f"{here}: a key must be a word")
            continue
        key, key_path = key_node.value, (*path, key_node.value)
        dotted = ".".join(key_path)
        if key == "<<":
            layer.problems.append(
                f"{here}: the merge key << is not used in forge configs; use inherits, or repeat the keys"
            )
        elif key in tree:
            first = layer.origins[key_path]
            layer.problems.append(f"{here}: {dotted} is given twice in this file, first at {first}; keep one of them")
        else:
            layer.origins[key_path] = here
            tree[key] = _read_node(value_node, key_path, layer, open_nodes, origin)
    return tree
