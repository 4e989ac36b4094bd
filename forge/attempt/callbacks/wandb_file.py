"""Reads the files of Weights & Biases in a run directory, which know what earlier attempts have logged."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

# The format of LevelDB's log: blocks of 32 KiB, in which each piece of a record has a header of checksum, length, kind.
FILE_HEADER, BLOCK, HEADER = 7, 32768, struct.Struct("<IHB")
PADDING, WHOLE, LAST = 0, 1, 4


def records(file: Path) -> Iterator[Any]:
    """Yield the protobuf records of a .wandb file; what a kill has torn at its end is left out."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), FILE_HEADER, b""
    while place + HEADER.size <= len(data):
        left = BLOCK - place % BLOCK
        _, length, kind = HEADER.unpack_from(data, place)
        if left < HEADER.size or kind == PADDING:
            place += left
            continue
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = cast(Any, wandb_internal_pb2).Record()  # a module that is generated when it is imported
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            yield record
            parts = b""


def items_of(section: Any) -> dict[str, str]:
    """Return the keys of a history, a summary or a config with their values as JSON."""
    return {item.key or "/".join(item.nested_key): item.value_json for item in section}


def logged_steps(folder: Path) -> set[tuple[str, int]]:
    """Return what the files below a folder have logged: the part of the names before the first `/`, and the step."""
    found = set()
    for file in folder.glob("*run-*/*.wandb"):
        for record in records(file):
            row = items_of(record.history.item) if record.HasField("history") else {}
            if "step" in row:
                found |= {(name.split("/")[0], int(float(row["step"]))) for name in row if "/" in name}
    return found
