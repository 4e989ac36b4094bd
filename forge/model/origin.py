"""Where a model's weights came from: the files and their hashes, base.json, and the runs that they descend from."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from huggingface_hub import try_to_load_from_cache
from pydantic import ValidationError
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from forge.config.explain import config_name
from forge.errors import UsageError
from forge.run.directory import RunDirectory
from forge.run.files import read_json, sha256_of
from forge.run.metadata import Ancestor, WeightFiles, read_metadata
from forge.run.records import OpenRecord, reason, record_of
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"  # a folder with this file is an adapter
BASE_CONFIG = "base_config.json"  # of an exported adapter: as config.json, transformers would take it for a whole model
BASE_FILE = "base.json"  # next to an adapter: what it was trained on
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RUN_DEPTH = 3  # the deepest model of a run is in RUN/final/merged


class BaseRecord(OpenRecord):
    """The content of base.json: merge the adapters into the base in this order, and the adapter next to it fits."""

    format: Literal[1]
    base: WeightFiles
    adapters: list[WeightFiles]


@dataclass(frozen=True)
class Origin:
    """The files that a model starts from: a base, and the adapters that are merged into it."""

    base: WeightFiles
    adapters: tuple[WeightFiles, ...] = ()  # merged into the base one after the other, the oldest first

    @property
    def weights_sha256(self) -> str | None:
        """The hash of the base; with adapters, one hash of all hashes in their order."""
        hashes = [part.sha256 for part in (self.base, *self.adapters)]
        if None in hashes or len(hashes) == 1:
            return None if None in hashes else hashes[0]
        return hashlib.sha256("\n".join(str(item) for item in hashes).encode()).hexdigest()

    def without_last(self) -> "Origin":
        """Return the origin of what the newest adapter is applied to."""
        return replace(self, adapters=self.adapters[:-1])

    def text(self) -> str:
        """Return the content of base.json."""
        record = BaseRecord(format=1, base=self.base, adapters=list(self.adapters))
        return json.dumps(record.model_dump(), indent=2) + "\n"

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read base.json. Raises UsageError if it is broken, or was not written by this version of forge."""
        try:
            record = record_of(BaseRecord, read_file(file))
        except ValidationError as error:
            raise UsageError(
                f"{file} is not a record of forge ({reason(error)}); restore it, or set model.base"
            ) from error
        return cls(record.base, tuple(record.adapters))


def read_file(file: Path) -> dict[str, Any]:
    """Return the content of a small JSON file of an adapter or a model. Raises UsageError if it is broken."""
    try:
        return read_json(file)
    except UsageError as error:
        raise UsageError(f"{file} is broken; restore it, or name another adapter or model") from error


def hashed(weights: WeightFiles) -> WeightFiles:
    """Return the record with the commit and the hash of its files; unchanged for a hub model that is not cached.

    Reads every byte of a local folder; the hub's cache knows the hashes of its files.
    """
    folder = Path(weights.location)
    commit = None
    if not folder.is_dir():
        found = try_to_load_from_cache(weights.location, "config.json", revision=weights.revision)
        if not isinstance(found, str):
            return weights
        folder = Path(found).parent
        commit = folder.name
    files = weight_files(folder)
    return weights.model_copy(update={"commit": commit, "sha256": hash_of_files(files) if files else None})


def short(sha256: str | None) -> str:
    """Return the first digits of a hash, for a message."""
    return "unknown" if sha256 is None else sha256[:12]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that from_pretrained reads, of a model or an adapter; none if the folder has neither."""
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
    """Return the SHA-256 of the files' names and hashes, sorted by name."""
    lines = sorted(f"{file.name} {_sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def lineage(origin: Origin | None, role: str = "model") -> list[Ancestor]:
    """Return the runs that the model descends from, the oldest first and each once; none if no run of forge made it.

    Args:
        role: what the model is in the new run. If it has adapters, its base has the role `base` and each adapter
            `adapter`.
    """
    if origin is None:
        return []
    parts = [("base" if origin.adapters else role, origin.base), *(("adapter", part) for part in origin.adapters)]
    found: dict[str, Ancestor] = {}
    for part_role, weights in parts:
        for ancestor in _line_of(part_role, weights):
            found.setdefault(ancestor.run_id, ancestor)
    return list(found.values())


def _line_of(role: str, weights: WeightFiles) -> list[Ancestor]:
    """Return the run that holds these weights, after its own ancestors."""
    folder = Path(weights.location)
    run = _enclosing_run(folder) if folder.is_absolute() else None  # a hub id is not a path here
    if run is None:
        return []
    try:
        metadata, state = read_metadata(run), TrainingState.load(run.state_file)
        own = Ancestor(
            role=role,
            run_id=metadata.run_id,
            name=run.name,
            path=str(run.path.absolute()),
            config=str(config_name(metadata.config_file)),
            weights_sha256=weights.sha256,
            steps=_steps(folder, state),
        )
        return [*metadata.lineage, own]
    except UsageError as error:  # a run that was copied in part can still be trained on
        logger.warning("the ancestors of the run %s are unknown (%s)", run.path, error)
        return []


def _enclosing_run(folder: Path) -> RunDirectory | None:
    for path in (folder, *folder.parents)[:RUN_DEPTH]:
        if (run := RunDirectory(path)).state_file.is_file():
            return run
    return None


def _steps(folder: Path, state: TrainingState) -> int:
    """Return the steps of a checkpoint, or of the whole run for its final model."""
    name, _, step = folder.name.partition("-")
    return int(step) if name == "checkpoint" and step.isdigit() else state.step


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names a large file by its SHA-256
    return sha256_of(file)
