"""Reads one YAML file, or one `--set`, into a layer: a tree of texts that records where each key was written."""

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from forge.config.fields import PlainText

KeyPath = tuple[str, ...]  # the keys that lead to a value, from the top of the config

MAX_DEPTH = 50  # of nested maps and lists: far more than any config has, and YAML and JSON writers fail at 255
MAX_VALUES = 100_000  # a few lines with aliases to aliases can expand to billions of values
SUFFIXES = (".yaml", ".yml")
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Origin:
    """Where a key was set."""

    layer: str  # the file, or the flag of the command line
    line: int | None = None  # from 1; None on the command line

    def __str__(self) -> str:
        return self.layer if self.line is None else f"{self.layer}:{self.line}"


@dataclass
class Layer:
    """What one source sets. Leaves of the tree are text, None, or lists of them; problems are whole sentences."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: bool = False  # what it sets is unknown, so no key can be reported as missing

    def put(self, key: str, value: Any, origin: Origin) -> None:
        """Set a dotted key of an empty layer, and create the maps on the way to it."""
        path = tuple(key.split("."))
        node = self.tree
        for depth, name in enumerate(path[:-1], start=1):
            node = node.setdefault(name, {})
            self.origins[path[:depth]] = origin
        node[path[-1]] = value
        self.origins[path] = origin


def display(path: Path) -> str:
    """Return the path as text: relative if it is inside the working directory."""
    path = Path(os.path.normpath(path.absolute()))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def read_file(path: Path) -> Layer:
    """Read a YAML file. An unreadable file, wrong syntax, duplicate keys and merge keys become problems."""
    layer = Layer(display(path))
    try:
        node = _compose(_read_text(path), "check indentation, colons and brackets there")
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise _Unreadable("is empty; give it keys, such as task and model")
        if not isinstance(node, yaml.MappingNode):
            raise _Unreadable("a config is a map of keys, such as `task:`", node.start_mark.line + 1)
    except _Unreadable as error:
        place = layer.name if error.line is None else f"{layer.name}:{error.line}"
        layer.problems.append(f"{place}: {error}")
        layer.unreadable = True
        return layer
    layer.tree = _read_map(node, (), layer)
    return layer


def read_setting(setting: str) -> Layer:
    """Read one `--set key=value`. The value is YAML: a word, a number, null, [a, b] or {a: b}."""
    layer = Layer(f"--set {' '.join(setting.splitlines())}")
    origin = Origin(layer.name)
    key, equals, text = setting.partition("=")
    try:
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
            raise _Unreadable("must have the form key=value with a dotted key, such as training.seed=1")
        node = _compose(text, f"put the value in quotes, such as {key}='\"…\"'")
    except _Unreadable as error:
        layer.problems.append(f"{layer.name}: {error}")
        layer.unreadable = True
        return layer
    # `--set key=` sets the key to null
    layer.put(key, None if node is None else _read_node(node, tuple(key.split(".")), layer, origin), origin)
    return layer


def near_name(path: Path, other_than: Path | None = None) -> str | None:
    """Return the name in the same folder that is most similar to that of a missing file."""
    try:
        beside = [p for p in path.parent.iterdir() if p.suffix in SUFFIXES]
        names = {p.stem: p.name for p in beside if other_than is None or p.resolve() != other_than.resolve()}
        found = get_close_matches(path.stem, names, n=1)
    except OSError:
        return None
    return names[found[0]] if found else None


class _Unreadable(Exception):
    """The reason why a file or a setting cannot be used at all, and its line."""

    def __init__(self, sentence: str, line: int | None = None):
        super().__init__(sentence)
        self.line = line


def _read_text(path: Path) -> str:
    try:
        contents = path.read_bytes()
    except FileNotFoundError:
        near = near_name(path)
        hint = f"did you mean {near}?" if near else f"check the path (you are in {Path.cwd()})"
        raise _Unreadable(f"there is no such config file; {hint}") from None
    except IsADirectoryError:
        found = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)[:5])
        hint = f"name a file in it: {found}" if found else "name a YAML file"
        raise _Unreadable(f"is a folder, not a config file; {hint}") from None
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        return contents.decode("utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise _Unreadable(f"byte 0x{contents[error.start]:02x} is not UTF-8; save the file as UTF-8", line) from None


def _compose(text: str, hint: str) -> yaml.Node | None:
    """Parse YAML text of bounded size and without tags; None if it is empty."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tag = next(
            (token for token in yaml.scan(text, Loader=yaml.SafeLoader) if isinstance(token, yaml.TagToken)), None
        )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Unreadable(_syntax(error, hint), mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Unreadable(f"YAML does not allow the character #x{error.character:04x}; remove it", line) from None
    except RecursionError:
        raise _Unreadable(f"maps and lists are nested more than {MAX_DEPTH} deep; make it flatter") from None
    if tag is not None:
        name = "".join(part for part in tag.value if part)
        what = f"the YAML tag {name} is not supported in forge configs; write only the value, in quotes if it is text"
        raise _Unreadable(what, tag.start_mark.line + 1)
    if node is not None:
        _measure(node, {})
    return node


def _syntax(error: yaml.MarkedYAMLError, hint: str) -> str:
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return "YAML syntax: there is a tab where only spaces are allowed; indent with spaces"
    if "another document" in problem:
        return "YAML syntax: a second document begins here; keep one document, and remove this `---`"
    return f"YAML syntax: {' '.join(filter(None, (problem, context)))}; {hint}"


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the number of values of a node, with aliases expanded, and their depth."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    line = node.start_mark.line + 1
    if id(node) in known:
        shape = known[id(node)]
        if shape is None:
            raise _Unreadable("this value contains itself through an alias; write out its keys", line)
        return shape
    known[id(node)] = None
    inside = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    shapes = [_measure(child, known) for child in inside]
    values, depth = 1 + sum(values for values, _ in shapes), 1 + max((depth for _, depth in shapes), default=0)
    if depth > MAX_DEPTH:
        raise _Unreadable(f"maps and lists are nested more than {MAX_DEPTH} deep; make it flatter", line)
    if values > MAX_VALUES:
        raise _Unreadable(f"this expands to more than {MAX_VALUES:,} values; use fewer aliases", line)
    known[id(node)] = values, depth
    return values, depth


def _read_node(node: yaml.Node, path: KeyPath, layer: Layer, origin: Origin | None = None) -> Any:
    """Return the node as texts. An origin, if given, holds for all of it; otherwise each key has its own line."""
    if isinstance(node, yaml.ScalarNode):
        if node.style is None:  # plain, neither quoted nor a block
            return None if node.tag == "tag:yaml.org,2002:null" else PlainText(node.value)
        return node.value
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            layer.origins[here] = origin or Origin(layer.name, item.start_mark.line + 1)
            items.append(_read_node(item, here, layer, origin))
        return items
    assert isinstance(node, yaml.MappingNode)
    return _read_map(node, path, layer, origin)


def _read_map(node: yaml.MappingNode, path: KeyPath, layer: Layer, origin: Origin | None = None) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = origin or Origin(layer.name, key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.value.strip():
            layer.problems.append(f"{here}: a key must be a word, such as `task:`")
            continue
        key, key_path = key_node.value, (*path, key_node.value)
        if key_node.tag == MERGE_TAG:
            layer.problems.append(
                f"{here}: the merge key << is not supported in forge configs; use inherits, or repeat the keys"
            )
        elif key in tree:
            first = "" if layer.origins[key_path] == here else f", first at {layer.origins[key_path]}"
            layer.problems.append(f"{here}: {'.'.join(key_path)} is given twice{first}; keep one of them")
        else:
            layer.origins[key_path] = here
            tree[key] = _read_node(value_node, key_path, layer, origin)
    return tree
