"""Finds folders and files that a config names and that do not exist, before anything is imported to read them."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from forge.config.explain import effective, flattened
from forge.config.loader import LoadedConfig

FOLDERS = ("task.dataset.path",)  # always a folder of this machine
FILES = ("task.chat_template",)
MODELS = tuple(  # a folder, or a name: of a run, or on the hub
    f"{section}.{name}" for section in ("model", "teacher") for name in ("path", "base", "adapter", "tokenizer")
)


def missing_places(loaded: LoadedConfig) -> list[str]:
    """Return a sentence for each place that does not exist, with the file and line that name it, and the nearest."""
    flat = flattened(effective(loaded.config))
    found = []
    for key, name in _named(flat):
        place = Path(name)
        if os.path.exists(place):
            continue
        origin = loaded.origins.get(tuple(key.split(".")))
        near = _nearest(place)
        hint = f"did you mean {near}?" if near else "check the path"
        here = "" if place.is_absolute() else f" in {Path.cwd()}"
        found.append(f"{origin or loaded.file}: {key} is {name}, which does not exist{here}; {hint}")
    return found


def _named(flat: dict[str, object]) -> Iterator[tuple[str, str]]:
    for key in (*FOLDERS, *FILES, *MODELS):
        name = flat.get(key)
        if isinstance(name, str) and (key not in MODELS or _is_path(name)):
            yield key, name


def _is_path(name: str) -> bool:
    """True if it cannot be a name of a run, of the hub or in a package."""
    deep = name.count("/") > 1 and not name.startswith("package:")
    return deep or name.startswith((".", "/")) or name.endswith("/")


def _nearest(place: Path) -> str | None:
    try:
        siblings = [entry.name for entry in place.parent.iterdir()]
    except OSError:
        return None
    near = get_close_matches(place.name, siblings, n=1)
    return str(place.with_name(near[0])) if near else None
