"""Turns signals, and the death of the launcher, into a wish to stop that the run grants where it can be resumed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

from forge.errors import EXIT_FAILED, Stopped

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PARENT_VARIABLE = "FORGE_PARENT"  # the pid that must live on; set by the commands of forge that start a training
# A launcher passes a Ctrl-C on to ranks that the terminal has sent it to already: within this time it is the same one.
SAME_INTERRUPT_S = 1.0
# What a rank without a launcher gets to commit a checkpoint: as long as the launcher itself gives before it kills.
ORPHAN_GRACE_S = 30.0
WATCH_EVERY_S = 0.5


class StopRequest:
    """What this process was asked; the handler only notes it, unless the work at hand may be broken off anywhere."""

    def __init__(self) -> None:
        self.reason: str | None = None  # such as SIGTERM; None: nothing asks for a stop
        self._interrupted_at: float | None = None
        self._breakable = False

    def listen(self) -> None:
        """Handles the stop signals from here on, and watches the launcher if there is one. On the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if watched := _watched_processes():
            threading.Thread(target=self._watch, args=(watched,), name="parent watch", daemon=True).start()

    def breaks(self, work: Callable[[], T]) -> T:
        """Does long work that leaves nothing half-made: within it, a signal raises Stopped at once.

        There must be no collective in it: the other ranks would be left waiting.
        """
        self._breakable = True
        try:
            result = None if self.reason is not None else work()
        finally:
            self._breakable = False
        if self.reason is not None:  # it came before, or a library took the exception for one of its own
            raise stopped_early(self.reason)
        return result  # type: ignore[return-value]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # No log and no print here: the signal may have come within one, and their locks and buffers are not re-entrant.
        if number == signal.SIGINT:
            moment = time.monotonic()
            if self._interrupted_at is not None and moment - self._interrupted_at > SAME_INTERRUPT_S:
                os.write(2, b"\nforge: a second Ctrl-C; left at once, without a checkpoint of this step\n")
                os._exit(EXIT_FAILED)
            self._interrupted_at = self._interrupted_at or moment
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if os.environ.get("RANK", "0") == "0":
                words = f"forge: {self.reason} received; stopping where the run can go on (a second Ctrl-C: at once)\n"
                with suppress(OSError):  # a closed console
                    os.write(2, words.encode())
        if self._breakable:
            self._breakable = False
            raise stopped_early(self.reason)

    def _watch(self, processes: dict[int, str]) -> None:
        while all(started and _start_of(pid) == started for pid, started in processes.items()):
            time.sleep(WATCH_EVERY_S)
        self.reason = self.reason or "the death of its launcher"
        os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread out of a wait, and breaks off what is breakable
        time.sleep(ORPHAN_GRACE_S)
        os.write(2, b"\nforge: the launcher is gone and no checkpoint could be committed in time; left\n")
        os._exit(EXIT_FAILED)


def stopped_early(reason: str) -> Stopped:
    """What to raise while data and model are prepared."""
    return Stopped(f"stopped by {reason} before the first stage; start it again with the same command")


def parent_command() -> str:
    """The command line of the parent process; empty where it cannot be read."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def in_loader_worker(_: int) -> None:
    """A loader's worker outlives no parent, and leaves the signals to it: one sent to the whole group must not take
    the rows away from a run that is about to commit. A TERM, by which multiprocessing ends what is left over, ends it
    too, but only after the time that a stop may take."""
    ends_at: list[float] = []
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: ends_at.append(time.monotonic() + ORPHAN_GRACE_S))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and not (ends_at and time.monotonic() > ends_at[0]):
            time.sleep(WATCH_EVERY_S)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _watched_processes() -> dict[int, str]:
    """pid and start of the processes whose death must end this one: the command or the launcher that started it.

    A shell is none: a run started with nohup lives on when its terminal is closed.
    """
    named = os.environ.get(PARENT_VARIABLE, "")
    pids = [int(named)] if named.isdigit() and int(named) != os.getpid() else []
    if "TORCHELASTIC_RUN_ID" in os.environ or "accelerate" in parent_command():
        pids.append(os.getppid())
    return {pid: _start_of(pid) for pid in pids}


def _start_of(pid: int) -> str:
    """The clock tick a process was started at, which tells it from a later one of its number; empty: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
