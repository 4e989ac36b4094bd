"""What makes a checkpoint one to be trusted: size and hash of every file, taken from what was given to be written."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

from forge.config.former_names import current_config
from forge.errors import TrainingError
from forge.run.files import write_atomically

FORMAT = 3  # 1 knew of no adapters, and 2 of no shards; both are read as they were
MANIFEST_FILE = "manifest.json"
MODEL_FILES = ("model.safetensors", "config.json")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "base.json", "config.json")
PROJECTIONS_FILE = "projections.safetensors"  # what is trained beside the model, in distillation only
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"  # not training_state.json, which marks a run directory
READ_BYTES = 1 << 22


class BadCheckpoint(Exception):
    """A checkpoint that is not what its manifest says; the text is the reason, for the user."""


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """manifest.json: where the checkpoint stands, what made it, and its files."""

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
    base: str | None  # the hash of the model that an adapter is trained on; None: all weights are here
    git_commit: str | None
    versions: dict[str, str]
    created_at: str
    files: dict[str, StoredFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """The last file of a checkpoint, with a hash of its own."""
        values = asdict(self)
        write_atomically(folder / MANIFEST_FILE, json.dumps(values | {"digest": digest(values)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises BadCheckpoint for a manifest that is missing, broken, edited, or of another format."""
        try:
            values = json.loads((folder / MANIFEST_FILE).read_bytes())
        except FileNotFoundError:
            raise BadCheckpoint(f"it has no {MANIFEST_FILE}") from None
        except OSError as error:
            raise _unreadable(folder / MANIFEST_FILE, error) from None
        except (ValueError, RecursionError) as error:
            raise BadCheckpoint(f"its {MANIFEST_FILE} cannot be read ({error})") from None
        if not isinstance(values, dict) or values.pop("digest", None) != digest(values):
            raise BadCheckpoint(f"its {MANIFEST_FILE} is not as it was written: its own hash does not fit it")
        if values.get("format") == 1:
            values |= {"format": FORMAT, "base": None}
        if values.get("format") == 2:
            values["format"] = FORMAT
        if values.get("format") != FORMAT:
            raise TrainingError(
                f"{folder} is of format {values.get('format')}, and this forge reads format {FORMAT}; use the forge "
                f"that wrote it, or move it out of the run"
            )
        if set(values) != {field.name for field in fields(cls)}:
            raise BadCheckpoint(f"its {MANIFEST_FILE} has other keys than this forge knows")
        files = {name: StoredFile(**file) for name, file in values["files"].items()}
        return cls(**(values | {"files": files, "config": current_config(values["config"])}))


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Raises BadCheckpoint, or TrainingError as verify does, where the files are not those that the manifest lists."""
    weights, *beside = MODEL_FILES if manifest.base is None else ADAPTER_FILES
    ranks = range(manifest.ranks)
    states = {weights, OPTIMIZER_FILE}
    if model_shard(0) in manifest.files:
        states = {file(rank) for rank in ranks for file in (model_shard, optimizer_shard)}
    required = {*states, *beside, STATE_FILE, *map(rng_file, ranks)}
    if absent := sorted(required - set(manifest.files)):
        raise BadCheckpoint(f"its {MANIFEST_FILE} names no {', '.join(absent)}")
    for name, expected in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                raise BadCheckpoint(f"{name} has {size} bytes instead of {expected.bytes}")
            if hashes and sha256_of(folder / name) != expected.sha256:
                raise BadCheckpoint(f"{name} is not as it was written: its hash differs")
        except FileNotFoundError:
            raise BadCheckpoint(f"{name} is missing") from None
        except OSError as error:
            raise _unreadable(folder / name, error) from None


def model_shard(rank: int) -> str:
    """The file with one rank's parts of the weights."""
    return f"model-{rank:05d}.safetensors"


def optimizer_shard(rank: int) -> str:
    """The file with one rank's parts of the optimizer's moments."""
    return f"optimizer-{rank:05d}.safetensors"


def rng_file(rank: int) -> str:
    """The file with one rank's random numbers."""
    return f"rng-{rank:05d}.pt"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(folder: Path, run_id: str, *, hashes: bool = True) -> Manifest:
    """The manifest, if the checkpoint is whole, of this run and of the step in its name; else raises BadCheckpoint.

    hashes: reads every byte; without it only the sizes are compared. Raises TrainingError where nothing can be said of
    it: it was written in another format, or the file system refuses to read it now.
    """
    manifest = Manifest.read(folder)
    if manifest.run_id != run_id:
        raise BadCheckpoint(f"it belongs to another run, {manifest.run_id}")
    if folder.name != f"checkpoint-{manifest.step}":
        raise BadCheckpoint(f"it was written at step {manifest.step}")
    check_files(folder, manifest, hashes=hashes)
    return manifest


def _unreadable(path: Path, error: OSError) -> Exception:
    """A medium that has lost the bytes makes the checkpoint bad; a server that is away, or a permission, does not."""
    if error.errno in (errno.EIO, errno.ENOTDIR, errno.EISDIR):
        return BadCheckpoint(f"{path.name} cannot be read ({error.strerror})")
    return TrainingError(f"{path} cannot be read now ({error.strerror}); nothing was changed: resume again when it can")


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes as they can be read now."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


def store(path: Path, write: Callable[[IO[bytes]], None]) -> StoredFile:
    """Writes a new file through to the disk, and tells size and hash of what was given to be written.

    Not of what can be read back: a file system that lost bytes must not have its loss certified.
    """
    with open(path, "xb") as raw:
        file = _HashingFile(raw)
        try:
            write(file)  # type: ignore[arg-type]
        except RuntimeError:  # torch's writer hides what the disk said behind an error of its own
            if file.error is not None:
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())
    return StoredFile(file.size, file.hashed.hexdigest())


class _HashingFile:
    """As much of a binary file as the writers need."""

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
