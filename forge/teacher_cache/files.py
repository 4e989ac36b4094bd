"""The files of a teacher cache: shards of safetensors, each with its record, and a manifest that is written last."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from forge.data.batches import FILLER
from forge.errors import UsageError
from forge.run.files import sha256_of, sync_folder, write_atomically, write_json
from forge.run.lock import NO_LOCKS_HERE

FORMAT = 1
KEY, MANIFEST, VERIFIED = "key.json", "manifest.json", "verified.json"
SHARD_ROWS = 1000
SHARD_BYTES = 64 << 20  # a shard is held in memory once while it is written, and is what a kill can cost
IN_MEMORY_BYTES = 256 << 20  # of one split: below it a row costs 1 us to read, from the mapped file 7 us a tensor
LABEL_OFFSETS, TOKEN_OFFSETS = "offsets", "token_offsets"  # (R + 1,) int64: where each row's begin, in a shard
HIDDEN = "hidden_states."  # and the layer
TRAIN = "train"

Arrays = dict[str, np.ndarray]


def split_name(split: str | None) -> str:
    """In file names and in the manifest. split: of task.validation; None: the rows that are trained on."""
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
        return f"{self.split}-{self.number:05d}.safetensors"


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is written."""

    split: str
    number: int
    first: int
    rows: int
    labels: int
    bytes: int  # of the file
    hidden_bytes: int  # of them, those of hidden states
    sha256: str
    seconds: float
    sums: dict[str, float] = field(default_factory=dict)  # over its positions, of what the job reports

    @property
    def shard(self) -> Shard:
        return Shard(self.split, self.number, self.first, self.rows)


def plan_shards(split: str, row_bytes: np.ndarray) -> list[Shard]:
    """Up to SHARD_ROWS neighbouring rows and about SHARD_BYTES each. row_bytes: (R,), an estimate."""
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
) -> Record:
    """The file, then its record: a shard without one was not finished."""
    # One entry: safetensors writes several in an order that is drawn anew each time, and the bytes would differ.
    data = save(arrays, metadata={"forge": json.dumps({"key": digest, "rows": [shard.first, shard.rows]})})
    write_atomically(folder / shard.file, data)
    record = Record(
        **asdict(shard),
        labels=int(arrays[LABEL_OFFSETS][-1]),
        bytes=len(data),
        hidden_bytes=sum(array.nbytes for name, array in arrays.items() if name.startswith(HIDDEN)),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=seconds,
        sums=sums,
    )
    write_json(_record_file(folder, shard), asdict(record))
    return record


def finished(folder: Path, shard: Shard) -> Record | None:
    """Its record, where the shard was finished and still is as it was written. Reads all of it."""
    try:
        record = _read_record(folder, shard)
    except (OSError, ValueError, TypeError):
        return None
    return record if record.shard == shard and damage(folder, record) is None else None


def complete_manifest(folder: Path, shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The manifest, where it is of these shards as they are now; None: it must be written (anew)."""
    try:
        manifest = read_manifest(folder)
        records = [asdict(_read_record(folder, shard)) for shard in shards]
    except (UsageError, OSError, ValueError, TypeError):
        return None
    return manifest if manifest is not None and manifest.get("shards") == records else None


def reopen(folder: Path) -> None:
    """Takes the manifest away before shards are written: from here on the cache is not complete."""
    for name in (MANIFEST, VERIFIED):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def damage(folder: Path, record: Record, *, sizes_only: bool = False) -> str | None:
    """What is wrong with a shard's file; None: nothing. Reads all of it, unless sizes_only."""
    file = folder / record.shard.file
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return f"{file} is damaged: it has {size} bytes, and {record.bytes} were written"
        if not sizes_only and sha256_of(file) != record.sha256:
            return f"{file} is damaged: its bytes are not those that were written"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return None


def verify(folder: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong with the files of a complete cache; None: nothing.

    Sizes are looked at each time. Bytes are hashed once: a stamp beside the manifest keeps for which files, by their
    sizes and times, it was done. Where it cannot be written, they are hashed again.
    """
    records = [Record(**record) for record in manifest["shards"]]
    for record in records:
        if reason := damage(folder, record, sizes_only=True):
            return reason
    if _stamp(folder, records) == _read_stamp(folder):
        return None
    for record in records:
        if reason := damage(folder, record):
            return reason
    stamp(folder, manifest)
    return None


def stamp(folder: Path, manifest: dict[str, Any]) -> None:
    """Keeps that the bytes of all shards have just been hashed, or written."""
    with suppress(OSError):  # a folder that others own
        write_json(folder / VERIFIED, _stamp(folder, [Record(**record) for record in manifest["shards"]]))


def _stamp(folder: Path, records: Sequence[Record]) -> dict[str, Any]:
    """By file its hash, its size and when it was last written, in ns."""
    found = {record.shard.file: (folder / record.shard.file).stat() for record in records}
    return {
        record.shard.file: [record.sha256, found[record.shard.file].st_size, found[record.shard.file].st_mtime_ns]
        for record in records
    }


def _read_stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return None


def begin(folder: Path, digest: str, key: dict[str, Any], teacher: str) -> None:
    """Makes the folder, says whose outputs it is for, and clears what a killed job has left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            left.unlink()
    if not (folder / KEY).exists():
        write_json(folder / KEY, {"format": FORMAT, "digest": digest, "teacher": teacher, "key": key})


def complete(
    folder: Path, shards: Sequence[Shard], facts_of: Callable[[list[Record]], dict[str, Any]]
) -> dict[str, Any]:
    """Writes the manifest, which says that all are there, and returns it. Raises UsageError where one is not."""
    records = []
    for shard in shards:
        try:
            records.append(_read_record(folder, shard))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{folder / shard.file} is not there ({error}): all ranks must see the same folder, and nobody else "
                "may change it; run the same command again"
            ) from error
    manifest = {"format": FORMAT, **facts_of(records), "shards": [asdict(record) for record in records]}
    write_json(folder / MANIFEST, manifest)
    stamp(folder, manifest)  # each was hashed as this job found it, or written by it
    return manifest


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps a second job out while one fills the folder, where the file system has locks; elsewhere two do the same
    work, and write the same files. Raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise UsageError(f"{folder} is being filled by another process; wait for it, or end it first") from None
        yield
    finally:
        os.close(descriptor)


def read_key(folder: Path) -> dict[str, Any] | None:
    """key.json; None where the folder is no teacher cache. Raises UsageError where it is damaged or another forge's."""
    values = _read(folder / KEY)
    if values is not None and not (isinstance(values.get("key"), dict) and isinstance(values.get("teacher"), str)):
        raise UsageError(f"{folder / KEY} is damaged (it has no key); delete {folder}, and make the cache anew")
    return values


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where the cache is not complete. Raises UsageError where it is damaged or another forge's."""
    return _read(folder / MANIFEST)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        delete = f"delete {file.parent}, and make the cache anew"
        what_to_do = "`forge cache-teacher` writes it anew" if file.name == MANIFEST else delete
        raise UsageError(f"{file} is damaged ({error}); {what_to_do}") from error
    if values.get("format") != FORMAT:
        raise UsageError(
            f"{file} has the format {values.get('format')}, and this forge reads {FORMAT}; delete the folder, or name "
            "another with teacher.cache"
        )
    return values


class SplitReader:
    """The rows of one split: of a small one all in memory, else each from its place in the mapped files."""

    def __init__(self, folder: Path, records: Sequence[Record]):
        """records: of this split, in their order. Raises UsageError for a file that is no shard."""
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
        """The named arrays of these rows, one row's behind the other's, and how many each row has; a filler none."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        counts = []
        for row in ids:
            if row == FILLER:
                counts.append(0)
                continue
            which = int(np.searchsorted(self._first, row, side="right")) - 1
            place = row - int(self._first[which])
            start, end = map(int, self._offsets[which][offsets][place : place + 2])
            counts.append(end - start)
            for name in names:
                found[name].append(self._shards[which][name][start:end])
        empty = {name: self._shards[0][name][0:0] for name in names if not found[name]}
        return {name: empty[name] if name in empty else np.concatenate(found[name]) for name in names}, counts


def _read_record(folder: Path, shard: Shard) -> Record:
    """Raises OSError, ValueError, TypeError where there is none."""
    return Record(**json.loads(_record_file(folder, shard).read_bytes()))


def _record_file(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.file}.json"
