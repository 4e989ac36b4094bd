"""StopRequest: turns signals, and the death of the launcher, into a request to stop where the run can be resumed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

from forge.cluster.processes import PARENT_VARIABLE, rank
from forge.errors import EXIT_FAILED, Stopped

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A launcher passes a Ctrl-C on to ranks that got it from the terminal already: within this time it is the same one.
SAME_INTERRUPT_S = 1.0
# The time to commit a checkpoint after the launcher has died; as long as it would wait itself before it kills.
ORPHAN_GRACE_S = 30.0
WATCH_EVERY_S = 0.5


class StopRequest:
    """What this process was asked to do. The handler only records it, unless the current work may be interrupted."""

    def __init__(self) -> None:
        self.reason: str | None = None  # such as SIGTERM; None: no stop was requested
        self._interrupted_at: float | None = None
        self._interruptible = False

    def listen(self) -> None:
        """Handle the stop signals from now on, and watch the launcher if there is one. On the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if watched := _watched_processes():
            threading.Thread(target=self._watch, args=(watched,), name="parent watch", daemon=True).start()

    def breaks(self, work: Callable[[], T]) -> T:
        """Run long work, during which a signal raises Stopped immediately.

        The work must leave nothing half done, and contain no collective: the other ranks would be left waiting.
        """
        self._interruptible = True
        try:
            result = None if self.reason is not None else work()
        finally:
            self._interruptible = False
        if self.reason is not None:  # it came before, or a library swallowed the exception
            raise stopped_early(self.reason)
        return result  # type: ignore[return-value]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # No logging or print here: the signal may have come during one, and their locks and buffers are not re-entrant.
        if number == signal.SIGINT:
            moment = time.monotonic()
            if self._interrupted_at is not None and moment - self._interrupted_at > SAME_INTERRUPT_S:
                os.write(2, b"\nforge: second Ctrl-C; exiting immediately, without a checkpoint of this step\n")
                os._exit(EXIT_FAILED)
            self._interrupted_at = self._interrupted_at or moment
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if rank() == 0:
                words = f"forge: {self.reason} received; stopping at the next checkpoint (Ctrl-C again to exit now)\n"
                with suppress(OSError):  # a closed console
                    os.write(2, words.encode())
        if self._interruptible:
            self._interruptible = False
            raise stopped_early(self.reason)

    def _watch(self, processes: dict[int, str]) -> None:
        while all(started and _start_of(pid) == started for pid, started in processes.items()):
            time.sleep(WATCH_EVERY_S)
        self.reason = self.reason or "the death of its launcher"
        os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread from a wait, and interrupts interruptible work
        time.sleep(ORPHAN_GRACE_S)
        os.write(2, b"\nforge: the launcher is gone and no checkpoint was committed in time; exiting\n")
        os._exit(EXIT_FAILED)


def stopped_early(reason: str) -> Stopped:
    """Return what to raise while data and model are prepared."""
    return Stopped(f"stopped by {reason} before the first stage; start it again with the same command")


def parent_command() -> str:
    """Return the command line of the parent process; empty if it cannot be read."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def in_loader_worker(_: int) -> None:
    """Prepare a worker of a data loader: it ignores signals and ends with its parent.

    A signal to the whole process group must not take the rows away from a run that is about to commit. A TERM, with
    which multiprocessing ends its children, ends the worker only after the time that a stop may take.
    """
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
    """Return pid and start of the processes whose death must end this one: the command or launcher that started it.

    A shell is not one of them: a run started with nohup keeps running when its terminal is closed.
    """
    named = os.environ.get(PARENT_VARIABLE, "")
    pids = [int(named)] if named.isdigit() and int(named) != os.getpid() else []
    if "TORCHELASTIC_RUN_ID" in os.environ or "accelerate" in parent_command():
        pids.append(os.getppid())
    return {pid: _start_of(pid) for pid in pids}


def _start_of(pid: int) -> str:
    """Return the clock tick at which a process started, in case its pid is reused; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
