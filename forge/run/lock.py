"""RunLock: makes sure that a run has one writer, by a file lock and by a number that grows with each attempt."""

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
from pathlib import Path

from pydantic import ValidationError

from forge.errors import Superseded, UsageError
from forge.run.directory import RunDirectory
from forge.run.files import sync_folder, write_json
from forge.run.records import OpenRecord
from forge.run.state import now

logger = logging.getLogger(__name__)

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems


class Holder(OpenRecord):
    """What the lock file says of the process that holds the run."""

    attempt: int
    pid: int
    host: str
    since: str


class AttemptFile(OpenRecord):
    """What attempts/N.json says of an attempt; the name alone decides which one is the latest."""

    attempt: int
    host: str
    pid: int
    started_at: str


class RunLock:
    """Two guards, since neither is enough alone.

    The lock keeps a second process out, but not if the file system has no locks, and not after a take-over. The number
    keeps nobody out, but a stale writer finds out before it commits. It is not the job id of a scheduler, which can be
    reused.

    The lock is POSIX, not flock: a forked loader worker would keep the latter after its parent has died.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self._descriptor: int | None = None
        self.attempt = 0

    def take(self, *, take_over: bool = False, after: int = 0) -> int:
        """Lock the run and return the number of this attempt, above `after` and that of every earlier attempt.

        take_over: lock the present holder out, which is known to be frozen, or on a dead host. Raises UsageError if
        another process holds the run, or if the run cannot be written.
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
            self.release()  # another take-over came first and has the run, unless it has ended by now
        holder = Holder(attempt=self.attempt, pid=os.getpid(), host=socket.gethostname(), since=now())
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder.model_dump_json().encode() + b"\n", 0)

    def check(self) -> None:
        """Call before every write into the run. Raises Superseded if a later attempt has taken over."""
        latest = _latest_attempt(self._run)
        if latest < self.attempt:  # the next attempt could be given this one's number
            raise Superseded(
                f"{self._run.attempts / f'{self.attempt}.json'} is gone, so another attempt may have started; this one "
                "stops without writing anything more"
            )
        if latest > self.attempt:
            raise Superseded(
                f"attempt {latest} has taken over {self._run.path}; attempt {self.attempt} stops without writing "
                "anything more"
            )

    def release(self) -> None:
        """Let others take the run; the end of the process does the same."""
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
                    "%s: no locks on this file system (%s); only the number of the attempt keeps a second writer out",
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
        os.close(descriptor)  # a take-over has replaced the file


def _held(run: RunDirectory, holder: bytes) -> str:
    try:
        known = Holder.model_validate_json(holder)
        who = f"process {known.pid} on {known.host} (attempt {known.attempt}, since {known.since})"
    except ValidationError:  # it has only just taken the lock
        who = "another process"
    return (
        f"the run {run.path} is being trained by {who}; wait for it or end it; if it is frozen, or its host is dead, "
        "add --take-over"
    )


def _replace(lock_file: Path) -> None:
    """Put a new lock file in place; the holder keeps its lock on a file that no longer has a name."""
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
        facts = AttemptFile(attempt=number, host=socket.gethostname(), pid=os.getpid(), started_at=now())
        write_json(file, facts.model_dump())
        sync_folder(run.path)
        return number


def _latest_attempt(run: RunDirectory) -> int:
    try:
        names = os.listdir(run.attempts)
    except FileNotFoundError:
        return 0
    return max(
        (int(found[1]) for name in names if (found := re.fullmatch(r"([1-9][0-9]{0,8})\.json", name))), default=0
    )
