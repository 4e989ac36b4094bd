"""Tells which files a model's weights came from, and their hash: a base, and the adapters that were merged into it."""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from huggingface_hub import try_to_load_from_cache
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from forge.errors import UsageError
from forge.run.files import read_json, sha256_of

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"  # its folder is an adapter
BASE_FILE = "base.json"  # beside an adapter: what it was trained on
FORMAT = 1
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Weights:
    """One folder with weights, or one model of the hub."""

    name: str  # as a config had it
    location: str  # an absolute folder, or a hub id
    revision: str | None = None
    commit: str | None = None  # of a hub model, whatever revision said
    sha256: str | None = None  # None: not known

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Of base.json. Raises TypeError for other keys, and for values that are no text."""
        weights = cls(**values)
        for name, value in values.items():
            if not isinstance(value, str) and (value is not None or name in ("name", "location")):
                raise TypeError(f"{name} is {value!r} and no text")
        return weights


@dataclass(frozen=True)
class Origin:
    """What a model starts from, and what base.json tells of an adapter: merge these in order and the adapter fits."""

    base: Weights
    adapters: tuple[Weights, ...] = ()  # merged into the base one after the other, the oldest first

    @property
    def weights_sha256(self) -> str | None:
        """The base's hash; with adapters, one of all hashes in their order."""
        hashes = [part.sha256 for part in (self.base, *self.adapters)]
        if None in hashes or len(hashes) == 1:
            return None if None in hashes else hashes[0]
        return hashlib.sha256("\n".join(str(item) for item in hashes).encode()).hexdigest()

    def without_last(self) -> "Origin":
        """What lies below the newest adapter."""
        return replace(self, adapters=self.adapters[:-1])

    def text(self) -> str:
        """base.json."""
        parts = {"base": asdict(self.base), "adapters": [asdict(adapter) for adapter in self.adapters]}
        return json.dumps({"format": FORMAT, **parts}, indent=2) + "\n"

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises UsageError for a base.json that forge did not write, or not this forge."""
        values = read_file(file)
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']} instead of {FORMAT}")
            return cls(Weights.of(values["base"]), tuple(Weights.of(adapter) for adapter in values["adapters"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file} is not as forge writes it ({error}); restore it, or name model.base") from error


def read_file(file: Path) -> dict[str, Any]:
    """A small file of an adapter or a model. Raises UsageError where it is broken."""
    try:
        return read_json(file)
    except UsageError as error:
        raise UsageError(f"{file} is broken; restore it, or name another adapter or model") from error


def hashed(weights: Weights) -> Weights:
    """With the commit and the hash of its files. Reads every byte of a local folder; the hub's cache knows its own."""
    folder = Path(weights.location)
    commit = None
    if not folder.is_dir():
        found = try_to_load_from_cache(weights.location, "config.json", revision=weights.revision)
        if not isinstance(found, str):
            return weights
        folder = Path(found).parent
        commit = folder.name
    files = weight_files(folder)
    return replace(weights, commit=commit, sha256=hash_of_files(files) if files else None)


def short(sha256: str | None) -> str:
    """The digits of a hash that stand in a message."""
    return "unknown" if sha256 is None else sha256[:12]


def weight_files(folder: Path) -> list[Path]:
    """Those that from_pretrained reads, of a model or of an adapter; none where the folder holds neither."""
    for name in ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else (SAFE_WEIGHTS_NAME,):
        if (folder / name).is_file():
            return [folder / name]
    for single, index in ((None, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if single is not None and (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in sorted(set(read_file(folder / index)["weight_map"].values()))]
    return []


def hash_of_files(files: list[Path]) -> str:
    """SHA-256 over names and hashes, in the order of the names."""
    lines = sorted(f"{file.name} {_sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names a large file by its SHA-256
    return sha256_of(file)
