"""Injects a fault at the k-th disk access or collective of forge: kills a rank, or makes the call fail.

`install` wraps the calls themselves, in the process under test, and only for paths below one folder; so forge needs no
hooks, and whatever it does in future is hurt as well. A file opened by Python is a FileIO of our own: its events are
the writes that reach the operating system, not those into a buffer.
"""

import builtins
import errno
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed

KINDS_WITH_CONTENT = ("write", "torch.save", "safetensors")  # a kill can leave half of these
COLLECTIVES = ("barrier", "monitored_barrier", "all_gather_object", "gather_object", "broadcast_object_list")
NEEDS_SPACE = ("create", "write", "mkdir", "torch.save", "safetensors", "fsync", "replace", "rename", "link", "sync")
RUNNING_NAMES = re.compile(r"[0-9a-f]{8,}(-[0-9a-f]+)*|(?<=\.tmp-)\d+-\d+")

_open, _close, _write, _kill, _readlink = os.open, os.close, os.write, os.kill, os.readlink
_active: "Injector | None" = None


def install(
    *,
    below: str,
    rank: int = 0,
    record: str | None = None,
    pids: str | None = None,
    at: int | None = None,
    when: str = "before",
    action: str = "kill",
    victims: tuple[int, ...] = (),
    lasting: bool = False,
    only: str | None = None,
) -> None:
    """Counts this process's events in a folder, and injects the fault at event number `at`.

    when: before, after, or torn (in the middle of what is written, else before). action: kill, freeze (SIGSTOP) or an
    errno's name. victims: the ranks that are killed, whose pids stand in the folder `pids`. lasting: from that event on
    every call that needs space fails. only: a pattern of the events that count.
    """
    global _active
    _active = Injector(Path(below), rank, record, pids, at, when, action, victims, lasting, only)
    _active.wrap()


class Injector:
    def __init__(
        self,
        below: Path,
        rank: int,
        record: str | None,
        pids: str | None,
        at: int | None,
        when: str,
        action: str,
        victims: tuple[int, ...],
        lasting: bool,
        only: str | None,
    ):
        self.below, self.rank, self.at, self.when, self.action = str(below), rank, at, when, action
        self.victims, self.lasting = victims or (rank,), lasting
        self.only = re.compile(only) if only else None
        self.count = 0
        self.failing = False
        self.lock = threading.RLock()
        self.quiet = threading.local()  # an event inside another event is not counted
        self.record = _open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if record else None
        self.pids = Path(pids) if pids else None
        if self.pids is not None:
            file = _open(self.pids / f"{rank}", os.O_WRONLY | os.O_CREAT, 0o666)
            _write(file, str(os.getpid()).encode())
            _close(file)

    def event(self, kind: str, path: Any, call: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        """Make one call that is an event. half: writes the first half of what the call would write."""
        name = self.name(path)
        if name is None or getattr(self.quiet, "on", False) or (self.only and not self.only.search(f"{kind} {name}")):
            return call()
        with self.lock:
            number, self.count = self.count, self.count + 1
        if self.record is not None:
            _write(self.record, (json.dumps([number, kind, name]) + "\n").encode())
        if number != self.at:
            if self.failing and kind in NEEDS_SPACE:
                self.fail(path)
            return call()
        if self.when == "after":
            self.quiet.on = True
            try:
                result = call()
            finally:
                self.quiet.on = False
            self.act(path)
            return result
        if self.when == "torn" and half is not None:
            half()
        self.act(path)
        return call()

    def act(self, path: Any) -> None:
        if self.action == "freeze":
            _kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "kill":
            for rank in sorted(self.victims, key=lambda rank: rank == self.rank):  # this process last
                _kill(os.getpid() if rank == self.rank else self.pid_of(rank), signal.SIGKILL)
            if self.rank in self.victims:
                signal.pause()
        else:
            self.failing = self.lasting
            self.fail(path)

    def pid_of(self, rank: int) -> int:
        assert self.pids is not None
        file = self.pids / f"{rank}"
        while not (file.exists() and file.stat().st_size):  # it has just been forked
            time.sleep(0.001)
        return int(file.read_text())

    def fail(self, path: Any) -> None:
        number = getattr(errno, self.action)
        raise OSError(number, os.strerror(number), self.text(path))

    def name(self, path: Any) -> str | None:
        """Return the path relative to the folder; None outside of it. A collective has no path."""
        if path is None:
            return ""
        text = self.text(path)
        if not text.startswith(self.below + "/") or text.endswith("/output.log"):
            return None
        return RUNNING_NAMES.sub("*", text[len(self.below) + 1 :])

    def text(self, path: Any, folder: int | None = None) -> str:
        try:
            if isinstance(path, int):
                return _readlink(f"/proc/self/fd/{path}")
            text = os.fsdecode(os.fspath(path))
            if folder is not None and not os.path.isabs(text):
                return os.path.join(_readlink(f"/proc/self/fd/{folder}"), text)
            return os.path.abspath(text)
        except (OSError, TypeError, ValueError):
            return ""

    def wrap(self) -> None:
        self._wrap_descriptors()
        self._wrap_names()
        self._wrap_open()
        self._wrap_libraries()
        for name in COLLECTIVES:
            original = getattr(torch.distributed, name)
            setattr(torch.distributed, name, self._collective(name, original))

    def _wrap_descriptors(self) -> None:
        fsync, fdatasync, ftruncate = os.fsync, os.fdatasync, os.ftruncate
        event = self.event

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            def call() -> int:
                return _open(path, flags, mode, dir_fd=dir_fd)

            changes = flags & (os.O_CREAT | os.O_TRUNC)
            return event("create", self.text(path, dir_fd), call) if changes else call()

        def write(descriptor: int, data: Any) -> int:
            def half() -> None:
                view = memoryview(data).cast("B")
                _write(descriptor, view[: len(view) // 2])

            return event("write", descriptor, lambda: _write(descriptor, data), half)

        os.open, os.write = open_, write
        os.fsync = lambda file: event("fsync", _number(file), lambda: fsync(file))
        os.fdatasync = lambda file: event("fsync", _number(file), lambda: fdatasync(file))
        os.ftruncate = lambda file, length: event("truncate", file, lambda: ftruncate(file, length))
        for name in ("pwrite", "writev", "sendfile", "copy_file_range"):
            original = getattr(os, name)
            place = 1 if name == "copy_file_range" else 0  # the index of the argument that is written to
            setattr(os, name, self._descriptor_call(original, place))

    def _descriptor_call(self, original: Callable[..., Any], place: int) -> Callable[..., Any]:
        return lambda *values, **options: self.event("write", values[place], lambda: original(*values, **options))

    def _wrap_names(self) -> None:
        for name in ("mkdir", "unlink", "remove", "rmdir", "truncate", "chmod"):
            setattr(os, name, self._one_path(name, getattr(os, name)))
        for name in ("replace", "rename", "link", "symlink"):
            setattr(os, name, self._two_paths(name, getattr(os, name)))

    def _one_path(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *values: Any, **options: Any) -> Any:
            full = path if isinstance(path, int) else self.text(path, options.get("dir_fd"))
            return self.event(name, full, lambda: original(path, *values, **options))

        return wrapped

    def _two_paths(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, target: Any, **options: Any) -> Any:
            return self.event(name, target, lambda: original(source, target, **options))

        return wrapped

    def _wrap_open(self) -> None:
        original = builtins.open

        def open_(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wxa+") or self.name(file) is None:
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw_mode = "".join(sorted(set(mode) - set("bt")))

            def call() -> _File:
                return _File(file, raw_mode, closefd, opener)

            raw = call() if isinstance(file, int) else self.event("create", file, call)
            if buffering == 0:
                return raw
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        builtins.open = io.open = open_  # type: ignore[assignment]

    def _wrap_libraries(self) -> None:
        """Patch what writes files in native code: half of the file is cut off after it was written."""
        save, serialize = torch.save, safetensors.torch.serialize_file

        def save_(obj: Any, f: Any, *values: Any, **options: Any) -> Any:
            if not isinstance(f, str | os.PathLike):
                return save(obj, f, *values, **options)

            def whole() -> None:
                save(obj, f, *values, **options)

            return self.event("torch.save", f, whole, lambda: half(whole, f))

        def serialize_(tensors: Any, filename: Any, *values: Any, **options: Any) -> Any:
            def whole() -> None:
                serialize(tensors, filename, *values, **options)

            return self.event("safetensors", filename, whole, lambda: half(whole, filename))

        def half(whole: Callable[[], None], file: Any) -> None:
            self.quiet.on = True
            whole()
            self.quiet.on = False
            with open(file, "rb+") as written:
                written.truncate(os.path.getsize(file) // 2)

        torch.save = save_
        safetensors.torch.serialize_file = serialize_

    def _collective(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values, **options: self.event(name, None, lambda: original(*values, **options))


class _File(io.FileIO):
    """A file in which each write to the operating system is an event."""

    def write(self, data: Any, /) -> int:
        def half() -> None:
            view = memoryview(data).cast("B")
            io.FileIO.write(self, view[: len(view) // 2])

        assert _active is not None
        return _active.event("write", self.fileno(), lambda: io.FileIO.write(self, data), half)

    def truncate(self, size: int | None = None, /) -> int:
        assert _active is not None
        return _active.event("truncate", self.fileno(), lambda: io.FileIO.truncate(self, size))


def _number(file: Any) -> int:
    return file if isinstance(file, int) else file.fileno()
