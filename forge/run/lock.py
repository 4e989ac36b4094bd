"""Gives a run one writer: a lock held for the life of an attempt, and a number that a later attempt outdates."""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any

from forge.errors import Superseded, UsageError
from forge.run.directory import RunDirectory
from forge.run.files import sync_folder, write_json
from forge.run.state import now

logger = logging.getLogger(__name__)

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems


class RunLock:
    """Two guards, since each has a hole. The lock keeps a second process out, but not where the file system keeps no
    locks, and not after a take-over. The number cannot keep anybody out, but whoever is outdated learns of it before
    he commits. It is never a job id of a scheduler: the same one can be given out twice.

    A POSIX lock and not flock's: a forked loader worker would hold the latter on after its parent has died.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self._descriptor: int | None = None
        self.attempt = 0

    def take(self, *, take_over: bool = False, after: int = 0) -> int:
        """Locks the run and gives this attempt's number, above `after` and that of every attempt before.

        Raises UsageError while another process holds the run, and where the run cannot be written.
        take_over: the other is known to be frozen, or its host to be dead: it is locked out, and its number outdated.
        """
        try:
            self._take(take_over, after)
        except OSError as error:
            raise UsageError(f"{error.filename or self._run.path} cannot be written ({error.strerror})") from None
        return self.attempt

    def _take(self, take_over: bool, after: int) -> None:
        if take_over:
            _replace(self._run.lock_file)
        while True:
            self._descriptor = _locked(self._run)
            self.attempt = _new_attempt(self._run, after)
            if _is_at(self._descriptor, self._run.lock_file):
                break
            self.release()  # another take-over came between: the run is its, unless it is done already
        holder = {"attempt": self.attempt, "pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def check(self) -> None:
        """Before every write into the run. Raises Superseded where a later attempt has taken over."""
        latest = _latest_attempt(self._run)
        if latest < self.attempt:  # whoever comes now could be given this attempt's own number
            raise Superseded(f"{self._run.attempts / f'{self.attempt}.json'} is gone; this attempt writes nothing more")
        if latest > self.attempt:
            raise Superseded(
                f"attempt {latest} has taken over {self._run.path}; this one, attempt {self.attempt}, ends and writes "
                f"nothing more into it"
            )

    def release(self) -> None:
        """Lets others take the run; the end of the process does the same."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(run: RunDirectory) -> int:
    while True:
        descriptor = os.open(run.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS_HERE:
                logger.warning(
                    "%s: no locks on this file system (%s); only the number of the attempt guards the run",
                    run.path,
                    error.strerror,
                )
                return descriptor
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UsageError(_held(run, holder)) from None
            raise
        if _is_at(descriptor, run.lock_file):
            return descriptor
        os.close(descriptor)  # a take-over put another file in its place meanwhile


def _held(run: RunDirectory, holder: bytes) -> str:
    try:
        values: dict[str, Any] = json.loads(holder)
        who = f"process {values['pid']} on {values['host']} (attempt {values['attempt']}, since {values['since']})"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock, and not yet said who it is
        who = "another process"
    return (
        f"the run {run.path} is being trained by {who}; wait for it, or end it first; if it is frozen, or its host "
        f"is dead, add --take-over"
    )


def _replace(lock_file: Path) -> None:
    """The holder keeps its lock, on a file that no longer has a name."""
    temporary = lock_file.with_name(f"{lock_file.name}-{secrets.token_hex(6)}")
    temporary.touch()
    os.replace(temporary, lock_file)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _new_attempt(run: RunDirectory, after: int) -> int:
    run.attempts.mkdir(exist_ok=True)
    while True:
        number = max(after, _latest_attempt(run)) + 1
        file = run.attempts / f"{number}.json"
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            continue
        write_json(file, {"attempt": number, "host": socket.gethostname(), "pid": os.getpid(), "started_at": now()})
        sync_folder(run.path)
        return number


def _latest_attempt(run: RunDirectory) -> int:
    try:
        names = os.listdir(run.attempts)
    except FileNotFoundError:
        return 0
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"([0-9]{1,18})\.json", name))), default=0)
