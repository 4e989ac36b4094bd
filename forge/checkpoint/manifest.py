"""Manifest: the size and hash of every file of a checkpoint, taken of the bytes that were handed to the disk."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from pydantic import ValidationError, field_validator

from forge.config.former_names import current_config
from forge.errors import TrainingError
from forge.run.files import sha256_of, write_atomically
from forge.run.records import Record, reason, record_of, unknown_keys

FORMAT = 3
MANIFEST_FILE = "manifest.json"
MODEL_FILES = ("model.safetensors", "config.json")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "base.json", "config.json")
PROJECTIONS_FILE = "projections.safetensors"  # what distillation trains in addition to the model
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"  # not training_state.json, which marks a run directory


class BadCheckpoint(Exception):
    """A checkpoint that does not match its manifest; the text is the reason, for the user."""


class StoredFile(Record):
    bytes: int
    sha256: str  # hexadecimal


class Manifest(Record):
    """What manifest.json says: where in the run the checkpoint is, what wrote it, and its files."""

    format: int
    run_id: str
    attempt: int
    step: int  # optimizer steps taken
    epoch: float
    samples: int  # rows trained on, over all ranks and epochs: the position in the data
    tokens: int  # likewise
    ranks: int
    rows_per_step: int
    mixed_precision: str  # what auto came to
    config: dict[str, Any]  # the effective one
    config_hash: str
    data_fingerprint: str
    base: str | None  # the hash of the model that an adapter is trained on; None: the checkpoint has all weights
    git_commit: str | None
    versions: dict[str, str]
    created_at: str
    files: dict[str, StoredFile]

    @field_validator("config")
    @classmethod
    def _current_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        return current_config(config)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write the manifest, which is the last file of a checkpoint, with a hash of its own."""
        values = self.model_dump()
        write_atomically(folder / MANIFEST_FILE, json.dumps(values | {"digest": digest(values)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest. Raises BadCheckpoint if it is missing, broken or edited, TrainingError if it is of
        another format or cannot be read now."""
        try:
            values = json.loads((folder / MANIFEST_FILE).read_bytes())
        except FileNotFoundError:
            raise BadCheckpoint(f"it has no {MANIFEST_FILE}") from None
        except OSError as error:
            raise _unreadable(folder / MANIFEST_FILE, error) from None
        except (ValueError, RecursionError) as error:
            raise BadCheckpoint(f"its {MANIFEST_FILE} cannot be read ({error})") from None
        if not isinstance(values, dict) or values.pop("digest", None) != digest(values):
            raise BadCheckpoint(f"its {MANIFEST_FILE} was changed after it was written: its checksum does not match")
        if values.get("format") != FORMAT:
            raise TrainingError(
                f"{folder} has format {values.get('format')}, but this forge reads only format {FORMAT}; use the forge "
                "that wrote it, or move it out of the run"
            )
        try:
            return record_of(cls, values)
        except ValidationError as error:
            if unknown := unknown_keys(error):
                raise TrainingError(
                    f"{folder} was written by a newer forge: this version does not know {', '.join(unknown)} of its "
                    f"{MANIFEST_FILE}; update forge to use this run"
                ) from None
            raise BadCheckpoint(f"its {MANIFEST_FILE} is broken: {reason(error)}") from None


def verify(folder: Path, run_id: str, *, hashes: bool = True) -> Manifest:
    """Return the manifest of a checkpoint that is complete, of this run, and of the step in its name.

    hashes: read every byte; otherwise only compare sizes. Raises BadCheckpoint if it is not; TrainingError if that
    cannot be decided: it has another format, or the file system does not let it be read now.
    """
    manifest = Manifest.read(folder)
    if manifest.run_id != run_id:
        raise BadCheckpoint(f"it belongs to another run, {manifest.run_id}")
    if folder.name != f"checkpoint-{manifest.step}":
        raise BadCheckpoint(f"it was written at step {manifest.step}")
    check_files(folder, manifest, hashes=hashes)
    return manifest


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Raise BadCheckpoint if the files do not match the manifest, and TrainingError as verify does."""
    if absent := sorted(_required(manifest) - set(manifest.files)):
        raise BadCheckpoint(f"its {MANIFEST_FILE} does not list {', '.join(absent)}")
    for name, expected in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                raise BadCheckpoint(f"{name} has {size} bytes instead of {expected.bytes}")
            if hashes and sha256_of(folder / name) != expected.sha256:
                raise BadCheckpoint(f"{name} was changed after it was written: its hash does not match")
        except FileNotFoundError:
            raise BadCheckpoint(f"{name} is missing") from None
        except OSError as error:
            raise _unreadable(folder / name, error) from None


def model_shard(rank: int) -> str:
    """Name the file with one rank's parts of the weights."""
    return f"model-{rank:05d}.safetensors"


def optimizer_shard(rank: int) -> str:
    """Name the file with one rank's parts of the optimizer's moments."""
    return f"optimizer-{rank:05d}.safetensors"


def rng_file(rank: int) -> str:
    """Name the file with the state of one rank's random number generators."""
    return f"rng-{rank:05d}.pt"


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def store(path: Path, write: Callable[[IO[bytes]], None]) -> StoredFile:
    """Write a new file through to the disk; return the size and hash of what was handed to be written.

    Not of what can be read back: a file system that lost bytes must not have the loss certified.
    """
    with open(path, "xb") as raw:
        file = _HashingFile(raw)
        try:
            write(file)  # type: ignore[arg-type]
        except RuntimeError:  # torch's writer hides the disk's error behind its own
            if file.error is not None:
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())
    return StoredFile(bytes=file.size, sha256=file.hashed.hexdigest())


def _required(manifest: Manifest) -> set[str]:
    weights, *small = MODEL_FILES if manifest.base is None else ADAPTER_FILES
    ranks = range(manifest.ranks)
    tensors = {weights, OPTIMIZER_FILE}
    if model_shard(0) in manifest.files:
        tensors = {file(rank) for rank in ranks for file in (model_shard, optimizer_shard)}
    return {*tensors, *small, STATE_FILE, *map(rng_file, ranks)}


def _unreadable(path: Path, error: OSError) -> Exception:
    """Blame the checkpoint if the medium has lost the bytes, but not if a server is down or permission is denied."""
    if error.errno in (errno.EIO, errno.ENOTDIR, errno.EISDIR):
        return BadCheckpoint(f"{path.name} cannot be read ({error.strerror})")
    return TrainingError(
        f"{path} cannot be read now ({error.strerror}); nothing was changed, so resume again once it can be read"
    )


class _HashingFile:
    """As much of a binary file as safetensors and torch need to write."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.size, self.hashed = raw, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self.raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self.hashed.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self.raw.flush()
