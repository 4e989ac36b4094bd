"""Processes: which rank this one is, and a command with all the processes that it starts, which are killed at once."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from forge.errors import ForgeError, UsageError

OUTCOME = "FORGE_OUTCOME"  # the file for forge's exit code: accelerate's launcher returns 1 for every failure
PARENT_VARIABLE = "FORGE_PARENT"  # a pid; training ends when that process does. Set by commands that start a training.
# Marks the processes of one start: accelerate's launcher gives each rank its own session, and an orphan gets another
# parent, but both keep their environment.
MARK = "FORGE_STARTED_BY"
POLL_S = 0.05
KILL_TIMEOUT_S = 60.0
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # a launcher sets all of them
MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """Return the rank of this process, as its launcher set it; 0 without a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of ranks, as the launcher set it; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def check_launcher_variables() -> None:
    """Raise UsageError for variables of a launcher that no launcher has set: a notebook or a job script left them.

    With a part of them a library would fail, or wait for ranks that nobody starts.
    """
    found = [name for name in OF_A_RANK if name in os.environ]
    wrong = [name for name in found if not os.environ[name].isdecimal()]
    absent = [name for name in (*OF_A_RANK, *MEETING_PLACE) if name not in os.environ]
    if found and (wrong or absent):
        shown = ", ".join(f"{name}={os.environ[name]}" for name in wrong or found)
        why = ", which is not a number" if wrong else f" without {', '.join(absent)}, which a launcher sets too"
        raise UsageError(
            f"the environment has {shown}{why}: it is left from something else; `unset {' '.join(found)}`, or "
            "start several ranks with `forge launch`"
        )
    if found and int(os.environ["RANK"]) >= world_size():
        raise UsageError(f"RANK is {os.environ['RANK']}, but WORLD_SIZE is {world_size()}: `unset {' '.join(found)}`")


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default


class Processes:
    """A command in a session of its own, which a Ctrl-C at the terminal does not reach, with all that it starts."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self._mark = secrets.token_hex(8)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._known: list[psutil.Process] = []
        self._outcome = tempfile.TemporaryDirectory(prefix="forge-")
        marks = {MARK: self._mark, PARENT_VARIABLE: str(os.getpid()), OUTCOME: str(self._outcome_file)}
        self._leader = subprocess.Popen(
            command,
            env=environment | marks,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._output.close()
        self._outcome.cleanup()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the command itself; None while it runs."""
        return self._leader.poll()

    @property
    def forge_exit_code(self) -> int | None:
        """The exit code of forge itself, where a launcher returns 1 for every failure. None while the command runs."""
        if self.exit_code is not None and self._outcome_file.is_file():
            return int(self._outcome_file.read_text())
        return self.exit_code

    @property
    def _outcome_file(self) -> Path:
        return Path(self._outcome.name) / "outcome"

    def output(self) -> str:
        """Return all that the processes have printed so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def learn(self) -> None:
        """Find the processes now, so that a later kill needs no search. Takes milliseconds."""
        self._known = self._alive()

    def kill_rank(self, rank: int) -> bool:
        """Send SIGKILL to one rank only. False if learn() has not found it."""
        for process in self._known:
            with suppress(psutil.Error):
                if process.ppid() == self._leader.pid and process.environ().get("RANK") == str(rank):
                    process.kill()
                    return True
        return False

    def kill_launcher(self) -> None:
        """Send SIGKILL to the command only, and no signal to what it started."""
        self._leader.kill()

    def kill_all(self) -> None:
        """Send SIGKILL to every process and to those they start meanwhile; return when all are gone.

        Raises ForgeError if one does not end: it may be waiting for a disk or a network that is gone.
        """
        with suppress(ProcessLookupError):
            if self._leader.poll() is None:
                os.killpg(self._leader.pid, signal.SIGKILL)
        for process in self._known:
            with suppress(psutil.Error):
                process.kill()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while alive := self._alive():
            if time.monotonic() > deadline:
                raise ForgeError(
                    f"process {alive[0].pid} was killed but does not end; it may be waiting for a disk or a network"
                )
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(POLL_S)
        self._leader.wait()

    def ended_within(self, timeout_s: float) -> bool:
        """Wait until no process is left; False if some are left after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while self._leader.poll() is None or self._alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # other users' processes, or ended since; a zombie has no environment
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
