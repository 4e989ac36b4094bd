"""Starts the attempts of a trial as forks of the warm process, and waits for them as the launcher would.

What a trial does to an attempt (an injector, another clock) is named as `module:function` with keyword arguments, and
is done in the fork before forge starts.
"""

import contextlib
import ctypes
import itertools
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warm import REPOSITORY, Program, warm_python

Setup = list[tuple[str, dict[str, Any]]]  # calls of "module:function"
TIMEOUT_S = 60.0  # ten times what the slowest attempt of a trial takes
# From the first dead rank until the others are killed. The launcher gives 30 s, and a rank that waits in native code
# for one that died before it joined hears no signal, and takes them all.
AGENT_GRACE_S = 5.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below the range from which the kernel gives ports to connections: only another of these can take one meanwhile.
_ports = itertools.cycle(random.SystemRandom().sample(range(18000, 30000), 12000))
_ports_lock = threading.Lock()


@dataclass
class Child:
    """One forked attempt, or one rank of it."""

    pid: int
    output: Path
    rank: int = 0
    code: int | None = None  # the exit code, or minus the signal that killed it; None while it runs
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: int = -1  # a pidfd, readable once it has ended

    def __post_init__(self) -> None:
        self._ended = os.pidfd_open(self.pid)

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """Wait for its end, and return the exit code; None if it still runs."""
        with self._lock:
            if self.code is None and select.select([self._ended], [], [], timeout_s)[0]:
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                os.close(self._ended)
            return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def start(
    arguments: list[str],
    output: Path,
    *,
    environment: dict[str, str] | None = None,
    setup: Setup | None = None,
) -> Child:
    """Start `python forge.py ARGUMENTS` in one process."""
    values = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    values |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    program = Program(
        [sys.executable, "forge.py", *arguments],
        cwd=str(REPOSITORY),
        environment=values | (environment or {}),
        before=[("faults.attempts:end_with_parent", {"parent": os.getpid()}), *(setup or [])],
    )
    with open(os.devnull, "rb") as nothing, open(output, "ab") as file:
        return Child(warm_python().start(program, (nothing.fileno(), file.fileno(), file.fileno())), output)


def start_ranks(ranks: int, arguments: list[str], output: Path, setup: list[Setup] | None = None) -> list[Child]:
    """Start one process for each rank, which find each other by a port, as `accelerate launch` does."""
    if ranks == 1:
        return [start(arguments, output, setup=setup[0] if setup else None)]
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(ranks):
        environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        file = output.with_name(f"{output.name}.{rank}") if rank else output
        children.append(start(arguments, file, environment=environment, setup=setup[rank] if setup else None))
        children[-1].rank = rank
    return children


def end_with_parent(*, parent: int) -> None:
    """In the fork: no attempt outlives the trials, however they are broken off."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: every rank's exit code, and what had to be done for it."""

    codes: list[int]
    hung: bool  # no rank had failed, and none ended
    forced: bool  # a rank had to be killed after another one's end, as the launcher does
    text: str  # what the ranks said

    @property
    def code(self) -> int:
        """The first rank's; of a failure the first one that is not 0."""
        return next((code for code in self.codes if code), 0)

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes


def wait(children: list[Child], timeout_s: float = TIMEOUT_S) -> Ended:
    """Waits as the launcher's agent does: when one rank has failed, the others get a TERM, and then no long grace."""
    deadline, hung, forced, told = time.monotonic() + timeout_s, False, False, False
    while None in [child.poll(0.01) for child in children]:  # a list: each is asked
        failed = any(child.code for child in children)
        if failed and not told:
            told, deadline = True, min(deadline, time.monotonic() + AGENT_GRACE_S)
            for child in children:
                child.kill(signal.SIGTERM)
        if time.monotonic() > deadline:
            hung, forced = hung or not failed, True
            for child in children:
                child.kill()
    codes = [child.code for child in children]
    return Ended([code for code in codes if code is not None], hung, forced, "".join(child.text for child in children))


def free_port() -> int:
    while True:
        with _ports_lock:
            port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
