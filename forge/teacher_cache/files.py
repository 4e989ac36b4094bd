"""The files of a teacher cache: safetensors shards, each with its record, and a manifest that is written last."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from forge.data.batches import FILLER
from forge.errors import UsageError
from forge.run.files import sha256_of, sync_folder, write_atomically, write_json
from forge.run.lock import NO_LOCKS_HERE
from forge.teacher_cache.key import ContentKey

FORMAT = 1
KEY, MANIFEST, VERIFIED = "key.json", "manifest.json", "verified.json"
SHARD_ROWS = 1000
SHARD_BYTES = 64 << 20  # a shard is held in memory once while it is written, and is the most that a kill can cost
IN_MEMORY_BYTES = 256 << 20  # per split: a row of a smaller one takes 1 us to read, from mapped files 7 us a tensor
LABEL_OFFSETS, TOKEN_OFFSETS = "offsets", "token_offsets"  # (R + 1,) int64: where each row's entries start in a shard
HIDDEN = "hidden_states."  # followed by the layer
TRAIN = "train"

Arrays = dict[str, np.ndarray]


class CacheRecord(BaseModel):
    """A JSON file of a cache, or a part of one."""

    model_config = ConfigDict(frozen=True)


class ShardRecord(CacheRecord):
    """What is known of a shard that was written."""

    split: str
    number: int
    first: int
    rows: int
    labels: int
    bytes: int  # of the file
    hidden_bytes: int  # of those, the ones of hidden states
    sha256: str
    seconds: float
    sums: dict[str, float] = {}  # over the labels, of what the job reports

    @property
    def shard(self) -> "Shard":
        """The rows that the file holds."""
        return Shard(self.split, self.number, self.first, self.rows)


class SplitTotals(CacheRecord):
    """The size of one split in a cache."""

    rows: int
    labels: int
    bytes: int


class Truncation(CacheRecord):
    """What a top k loses, as means over the labels of validation rows, at the training's temperature."""

    truncation_kl: float  # KL(teacher || top k with the rest spread evenly), nats a label
    tail_mass: float  # the probability of all other tokens
    labels: int


class Totals(CacheRecord):
    """What a job reports of all shards together."""

    splits: dict[str, SplitTotals]
    labels_in_all: int
    bytes: int
    bytes_per_label: float  # without hidden states
    share_of_whole_logits: float  # of the bytes that float32 logits of all columns would take
    truncation: Truncation | None
    seconds: float


class CacheForm(CacheRecord):
    """How the teacher's outputs are kept."""

    kept: Literal["whole logits", "top k"]
    columns: int  # of the logits
    top_k: int | None  # None: whole logits
    temperature: float | None  # the one besides 1 at which a top k can be read; None: whole logits
    dtypes: dict[str, str]  # by the name of the array
    labels: tuple[str, ...]  # of a classifier, in the order of the teacher's outputs
    logit_scale: float
    softcap: float | None
    layers: tuple[int, ...]  # whose hidden states are kept; 0 is the embeddings' output
    hidden_widths: tuple[int, ...]  # of all layers, if any are kept


class Manifest(Totals, CacheForm):
    """The record of a complete cache."""

    format: int = FORMAT
    digest: str
    key: ContentKey
    teacher: dict[str, Any]  # the section `teacher` of run_metadata.json
    made_at: str  # UTC
    shards: tuple[ShardRecord, ...]


class KeyRecord(CacheRecord):
    """What a cache holds, complete or not."""

    format: int = FORMAT
    digest: str
    teacher: str  # as the config named it
    key: ContentKey


RecordType = TypeVar("RecordType", Manifest, KeyRecord)


def split_name(split: str | None) -> str:
    """Return the name of a split in files and in the manifest; None is the training rows."""
    return TRAIN if split is None else f"validation.{split}"


@dataclass(frozen=True)
class Shard:
    """The rows [first, first + rows) of a split, in one file."""

    split: str
    number: int
    first: int
    rows: int

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.split}-{self.number:05d}.safetensors"


def plan_shards(split: str, row_bytes: np.ndarray) -> list[Shard]:
    """Cut a split into shards of up to SHARD_ROWS consecutive rows and about SHARD_BYTES each.

    row_bytes is (R,), an estimate for each row.
    """
    shards: list[Shard] = []
    first, size = 0, 0.0
    for row, cost in enumerate(row_bytes.tolist()):
        if row > first and (row - first == SHARD_ROWS or size + cost > SHARD_BYTES):
            shards.append(Shard(split, len(shards), first, row - first))
            first, size = row, 0.0
        size += cost
    return [*shards, Shard(split, len(shards), first, len(row_bytes) - first)]


def write_shard(
    folder: Path, shard: Shard, arrays: Arrays, sums: dict[str, float], digest: str, seconds: float
) -> ShardRecord:
    """Write the file and then its record, without which a shard counts as unfinished."""
    # A single metadata entry: safetensors writes several in random order, so the bytes would differ each time.
    data = save(arrays, metadata={"forge": json.dumps({"key": digest, "rows": [shard.first, shard.rows]})})
    write_atomically(folder / shard.file, data)
    record = ShardRecord(
        **asdict(shard),
        labels=int(arrays[LABEL_OFFSETS][-1]),
        bytes=len(data),
        hidden_bytes=sum(array.nbytes for name, array in arrays.items() if name.startswith(HIDDEN)),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=seconds,
        sums=sums,
    )
    write_json(_record_file(folder, shard), record.model_dump())
    return record


def read_shard_record(folder: Path, shard: Shard) -> ShardRecord:
    """Return the record of a finished shard. Raises OSError or ValueError if there is none."""
    return ShardRecord.model_validate_json(_record_file(folder, shard).read_bytes())


def finished(folder: Path, shard: Shard) -> ShardRecord | None:
    """Return a shard's record if the shard was finished and its file is unchanged. Reads the whole file."""
    try:
        record = read_shard_record(folder, shard)
    except (OSError, ValueError):
        return None
    return record if record.shard == shard and damage(folder, record) is None else None


def start(folder: Path, digest: str, key: ContentKey, teacher: str) -> None:
    """Create the folder with its key, and remove what a killed job left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            left.unlink()
    if not (folder / KEY).exists():
        write_json(folder / KEY, KeyRecord(digest=digest, teacher=teacher, key=key).model_dump())


def reopen(folder: Path) -> None:
    """Remove the manifest before shards are written: from now on the cache is not complete."""
    for name in (MANIFEST, VERIFIED):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare the cache complete. Its shards have just been written, or hashed and found unchanged."""
    write_json(folder / MANIFEST, manifest.model_dump())
    stamp(folder, manifest)


def complete_manifest(folder: Path, shards: Sequence[Shard]) -> Manifest | None:
    """Return the manifest if it records these shards as they are now; None if it has to be written."""
    try:
        manifest = read_manifest(folder)
        records = tuple(read_shard_record(folder, shard) for shard in shards)
    except (UsageError, OSError, ValueError):
        return None
    return manifest if manifest is not None and manifest.shards == records else None


def damage(folder: Path, record: ShardRecord, *, sizes_only: bool = False) -> str | None:
    """Return what is wrong with a shard's file, or None. Reads the whole file unless sizes_only."""
    file = folder / record.shard.file
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return f"{file} is damaged: it has {size} bytes, but {record.bytes} were written"
        if not sizes_only and sha256_of(file) != record.sha256:
            return f"{file} is damaged: its bytes are not those that were written"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return None


def verify(folder: Path, manifest: Manifest) -> str | None:
    """Return what is wrong with the files of a complete cache, or None.

    Sizes are checked each time. Bytes are hashed once: a stamp next to the manifest records the files that were
    verified, by size and modification time. If the stamp cannot be written, they are hashed again next time.
    """
    for record in manifest.shards:
        if reason := damage(folder, record, sizes_only=True):
            return reason
    if _stamp(folder, manifest) == _read_stamp(folder):
        return None
    for record in manifest.shards:
        if reason := damage(folder, record):
            return reason
    stamp(folder, manifest)
    return None


def stamp(folder: Path, manifest: Manifest) -> None:
    """Record that the bytes of all shards have just been verified or written."""
    with suppress(OSError):  # the folder may belong to another user
        write_json(folder / VERIFIED, _stamp(folder, manifest))


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock the folder while a job fills it. Raises UsageError if another process holds the lock.

    On a file system without locks two jobs may run; they do the same work, and write the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise UsageError(
                    f"{folder} is being filled by another process; wait for it, or stop it first"
                ) from None
        yield
    finally:
        os.close(descriptor)


def read_key(folder: Path) -> KeyRecord | None:
    """Return the key record; None if the folder is not a teacher cache.

    Raises UsageError if it is damaged, or has the format of another version of forge.
    """
    return _read(folder / KEY, KeyRecord, f"delete {folder} and create the cache again")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest; None if the cache is not complete. Raises UsageError as read_key does."""
    return _read(folder / MANIFEST, Manifest, "run `forge cache-teacher` to write it again")


class SplitReader:
    """Reads the rows of one split: a small split from memory, a large one from mapped files."""

    def __init__(self, folder: Path, records: Sequence[ShardRecord]):
        """Open the shards of the split, in their order. Raises UsageError for a file that is not a shard."""
        self._first = np.array([record.first for record in records])  # (shards,)
        self.rows = records[-1].first + records[-1].rows
        in_memory = sum(record.bytes for record in records) <= IN_MEMORY_BYTES
        self._shards: list[dict[str, Any]] = []  # by name an array, or a slice of the file that reads like one
        self._offsets: list[Arrays] = []
        for record in records:
            try:
                opened = safe_open(folder / record.shard.file, "np")
                read = opened.get_tensor if in_memory else opened.get_slice
                names = sorted(opened.keys())
                offsets = {name: opened.get_tensor(name) for name in names if name in (LABEL_OFFSETS, TOKEN_OFFSETS)}
                self._shards.append({name: read(name) for name in names if name not in offsets})
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{folder / record.shard.file} is damaged ({error})") from error
            self._offsets.append(offsets)

    def read(self, ids: Sequence[int], names: Sequence[str], offsets: str = LABEL_OFFSETS) -> tuple[Arrays, list[int]]:
        """Return the named arrays of these rows, concatenated, and how many entries each row has; a filler has none."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        counts = []
        for row in ids:
            if row == FILLER:
                counts.append(0)
                continue
            which = int(np.searchsorted(self._first, row, side="right")) - 1
            place = row - int(self._first[which])
            first, end = map(int, self._offsets[which][offsets][place : place + 2])
            counts.append(end - first)
            for name in names:
                found[name].append(self._shards[which][name][first:end])
        empty = {name: self._shards[0][name][0:0] for name in names if not found[name]}
        return {name: empty[name] if name in empty else np.concatenate(found[name]) for name in names}, counts


def _read(file: Path, kind: type[RecordType], what_to_do: str) -> RecordType | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if (found := values.get("format")) == FORMAT:
            return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{file} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {what_to_do}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({error}); {what_to_do}") from error
    raise UsageError(
        f"{file} has format {found}, but this version of forge reads format {FORMAT}; delete the folder, or name "
        "another with teacher.cache"
    )


def _record_file(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.file}.json"


def _stamp(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return, by file name, its hash, its size, and when content and file were last changed, in ns.

    The first time can be set (rsync -t, cp -p) but not the second, so a file that is replaced is noticed.
    """
    found = {}
    for record in manifest.shards:
        status = (folder / record.shard.file).stat()
        found[record.shard.file] = [record.sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def _read_stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return None
