"""Atomic writes and plain reads of the small files of a run: a crash leaves the old text or the new, never half."""

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forge.errors import UsageError

logger = logging.getLogger(__name__)


Guard = Callable[[], None]  # raises if this process may no longer write; called as late as possible


def unguarded() -> None: ...


def write_atomically(path: Path, text: str | bytes, guard: Guard = unguarded) -> None:
    """Replace the file in one step: a concurrent reader sees the old or the new text, even after a power cut."""
    data = text.encode() if isinstance(text, str) else text
    # The leading dot keeps it out of listings. Not tempfile.mkstemp: the group could not read the file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        guard()
        os.replace(temporary, path)
    except BaseException:  # including KeyboardInterrupt: no half-written file stays behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any, guard: Guard = unguarded) -> None:
    """Write JSON with two spaces of indent, keys in the given order and paths as text; ValueError for NaN and inf."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, default=path_as_text) + "\n", guard)


def sync_folder(folder: Path) -> None:
    """Make the names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
        # some network file systems cannot sync a folder; the files themselves are safe
    finally:
        os.close(descriptor)


def publish_folder(target: Path, write: Callable[[Path], None], guard: Guard = unguarded) -> None:
    """Let `write` fill a temporary folder and rename it to target, replacing what was there, once it is all on disk."""
    token = secrets.token_hex(6)  # a superseded attempt may be doing the same
    staging, aside = target.with_name(f".tmp-{target.name}-{token}"), target.with_name(f".trash-{target.name}-{token}")
    try:
        write(staging)
        open_to_others(staging)
        for path in staging.rglob("*"):
            if path.is_dir():
                sync_folder(path)
            else:
                sync_file(path)
        sync_folder(staging)
        guard()
        if target.exists():
            os.rename(target, aside)
        os.rename(staging, target)
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def sync_file(path: Path) -> None:
    """Make what was appended to a file survive a power cut; does nothing if there is no file."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def open_to_others(folder: Path) -> None:
    """Give every file in the folder the mode that the umask allows: safetensors writes for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file. Raises UsageError, which names the file, if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); is its folder a run directory?") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object; is its folder a run directory?")
    return value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one line in one write. JSON has no NaN, so non-finite floats become "nan", "inf" and "-inf"."""
    line = json.dumps(_finite(value), allow_nan=False, default=path_as_text).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a killed attempt left a torn line, which must not spoil this one
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; the disk may be full")
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return every object in the file; an empty list if there is no file yet.

    A torn last line (still being written, or cut short by a kill) is skipped. A broken line before it (torn by a kill,
    followed by a resume) is skipped with a warning.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        value = _parsed(line)
        if isinstance(value, dict):
            objects.append(value)
        elif number < len(lines):
            logger.warning("%s:%d is not a JSON object; skipping it", path, number)
    return objects


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the bytes that can be read from the file now, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_as_text(value: Any) -> str:
    """Convert a path for JSON; TypeError for any other value that JSON has no form for."""
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))  # float(): numpy's floats print differently
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # includes UnicodeDecodeError: a character torn in two
        return None
