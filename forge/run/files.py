"""Writes the small files of a run so that a crash leaves the old or the new text, never half of one, and reads them."""

import errno
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


Guard = Callable[[], None]  # raises where this process may no longer write; asked as late as can be


def unguarded() -> None: ...


def write_atomically(path: Path, text: str | bytes, guard: Guard = unguarded) -> None:
    """Replaces the file in one step: whoever reads meanwhile sees the old or the new text, also after a power cut."""
    data = text.encode() if isinstance(text, str) else text
    # A dot in front: no listing takes it for a result. Not tempfile.mkstemp: its files are closed to the group.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        guard()
        os.replace(temporary, path)
    except BaseException:  # a KeyboardInterrupt too leaves no half file behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any, guard: Guard = unguarded) -> None:
    """Two spaces of indent, keys in the order given, a Path as its text; NaN and infinity are a ValueError."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, default=_path_as_text) + "\n", guard)


def sync_folder(folder: Path) -> None:
    """Makes the names in folder last through a power cut."""
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
    """Lets `write` fill a folder beside target and gives it the name of target, in place of what was there, only when
    all of it is on the disk."""
    token = secrets.token_hex(6)  # an attempt that was outdated may be at the same work
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
    """Makes what was appended to a file last through a power cut; no file, nothing to do."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def open_to_others(folder: Path) -> None:
    """Gives every file below folder the mode that the umask allows: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def read_json(path: Path) -> dict[str, Any]:
    """The file's object. Raises UsageError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); is its folder a run directory?") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object; is its folder a run directory?")
    return value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Adds one whole line in one write. JSON has no NaN: non-finite floats become "nan", "inf" and "-inf"."""
    line = json.dumps(_finite(value), allow_nan=False, default=_path_as_text).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # the attempt before ended within a line: the torn one must not spoil this one
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; the disk may be full")
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every object of the file, none if there is no file yet. A torn last line is one that is still being written, or
    the last of a killed run: it is left out. A broken line further up (a torn one, then a resume) is warned of."""
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
            logger.warning("%s:%d is not a JSON object and is left out", path, number)
    return objects


def _path_as_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))  # float(): the text of numpy's own floats differs
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too: a character torn in two
        return None
