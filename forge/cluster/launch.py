"""Launch: starts a training as a child process, on one rank or many, and returns forge's own exit code."""

import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

import psutil

from forge.cluster.processes import OUTCOME, PARENT_VARIABLE
from forge.cluster.signals import STOP_SIGNALS
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, UsageError

ENTRY = Path(__file__).resolve().parents[1] / "train.py"
LAUNCHER = Path(__file__).resolve().with_name("launcher.py")
# Variables that may be left from another start: with them a single process would wait for ranks that nobody starts.
FROM_ANOTHER_START = (
    OUTCOME,
    PARENT_VARIABLE,
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
)
HANDLED_BY_LAUNCHER = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # its own four, and two that would kill it
SAVE_TIMEOUT_S = 120  # then the launcher kills the ranks; its default of 30 s is short for a large checkpoint
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
HYPHENATED = ("allow_change", "take_over")  # the other flags of forge are written with underscores


def training_command(arguments: Sequence[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the whole environment that train with forge on this machine.

    arguments: those of `forge train`. Raises UsageError if there are GPUs, but fewer than processes.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes cannot train")
    environment = {name: value for name, value in os.environ.items() if name not in FROM_ANOTHER_START}
    environment[PARENT_VARIABLE] = str(os.getpid())
    on_cpu = _trains_on_cpu(environment)
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    if processes == 1:
        return [sys.executable, str(ENTRY), *arguments], environment
    if not on_cpu and (gpus := visible_gpus(environment)) < processes:
        raise UsageError(
            f"{processes} processes need as many GPUs, but only {gpus} are visible here; give --processes {gpus}"
        )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    environment.setdefault("PET_SIGNALS_TO_HANDLE", HANDLED_BY_LAUNCHER)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_TIMEOUT_S))
    launcher = [sys.executable, str(LAUNCHER), "--multi_gpu", "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]  # 0: any free one
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # only silences its warnings: the config decides
    return [*launcher, str(ENTRY), *arguments], environment


class SignalRelay:
    """A context in which TERM, INT, USR1 and USR2 are passed on to the child that runs, or kept for the next one.

    A second INT kills the child and all its processes: a launcher would turn it into a TERM for its ranks, which means
    "save first". Only the main thread can enter a relay.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the child and return its code. A signal that came before the child existed is passed on first."""
        self._child = child
        if self.received:
            child.send_signal(self.received[-1])
        try:
            return child.wait()
        finally:
            self._child = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child is None:
            return
        if self.received.count(signal.SIGINT) > 1 and number == signal.SIGINT:
            _kill(self._child.pid)
        else:
            self._child.send_signal(number)


def run_training(
    arguments: Sequence[str], processes: int, output: IO[bytes] | None = None, relay: SignalRelay | None = None
) -> int:
    """Train in a child process and return forge's exit code.

    output: a file for what the child prints; None: the console. relay: one that is entered already, for several
    trainings in a row; after a signal no more are started. If this process dies, by any signal, the child is stopped.
    """
    if relay is None:
        with SignalRelay() as own:
            return run_training(arguments, processes, output, own)
    command, environment = training_command(arguments, processes)
    if processes > _cores() and environment.get("ACCELERATE_USE_CPU") == "true":
        print(f"warning: {processes} processes share {_cores()} CPU cores and slow each other down", file=sys.stderr)
    if relay.received:
        return EXIT_STOPPED
    with tempfile.TemporaryDirectory(prefix="forge-") as folder:
        outcome = Path(folder) / "outcome"
        child = subprocess.Popen(
            command,
            env=environment | {OUTCOME: str(outcome)},
            stdin=subprocess.DEVNULL,  # outside the terminal's foreground group, a read would suspend it
            stdout=output,
            stderr=output,
            # A group of its own: a Ctrl-C in the terminal reaches only this process, which passes it on once. A second
            # one means "exit now" and must come from the user.
            process_group=0,
            preexec_fn=_EndWithParent(os.getpid()),
        )
        returned = relay.wait(child)
        written = read_outcome(outcome)
    if written is not None:
        return written
    # Nothing was written, so forge did not get far enough to handle signals. If one came, nothing was done and nothing
    # is lost, though the launcher returns 1. Otherwise it failed, and a launcher's code says no more than that.
    if relay.received and (-returned in relay.received or (processes > 1 and returned == EXIT_FAILED)):
        return EXIT_STOPPED
    return returned if processes == 1 and returned >= 0 else EXIT_COMPLETE if returned == 0 else EXIT_FAILED


def write_outcome(code: int) -> None:
    """Write forge's exit code for the process that started it, if that asked for it.

    On rank 0: at the end, and before that once signals are handled, so that a process that is killed counts as failed.
    """
    name = os.environ.get(OUTCOME)
    if name is None or not Path(name).parent.is_dir():  # the process that asked has ended
        return
    temporary = Path(f"{name}.tmp")
    temporary.write_text(str(code))
    temporary.replace(name)


def read_outcome(path: Path) -> int | None:
    """Return what write_outcome wrote there; None if nothing."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None


def option_words(**options: object) -> list[str]:
    """Return the words of a command line: `--name=value`, repeated for a list; a bare flag for True; none for None."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-') if name in HYPHENATED else name}"
        values = value if isinstance(value, list | tuple) else [] if value is None or value is False else [value]
        words += [flag if item is True else f"{flag}={item}" for item in values]
    return words


def visible_gpus(environment: dict[str, str]) -> int:
    """Count the GPUs that torch would find, as far as possible without importing it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def default_processes() -> int:
    """Return one process per visible GPU, or one on the CPU."""
    return 1 if _trains_on_cpu(dict(os.environ)) else visible_gpus(dict(os.environ))


def _trains_on_cpu(environment: dict[str, str]) -> bool:
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"):
        return True
    return "+cpu" in importlib.metadata.version("torch") or visible_gpus(environment) == 0


def _kill(pid: int) -> None:
    """Kill the process and all its descendants, including ranks in sessions of their own."""
    try:
        process = psutil.Process(pid)
        descendants = process.children(recursive=True)
        process.kill()  # first, or a launcher would report its lost ranks
    except psutil.NoSuchProcess:
        return
    for child in descendants:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _EndWithParent:
    """Called in the child before it becomes forge: makes the kernel send it TERM when its parent ends."""

    def __init__(self, parent: int):
        self.parent = parent
        self.libc = ctypes.CDLL(None, use_errno=True)  # loaded here: little is allowed between fork and exec

    def __call__(self) -> None:
        self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self.parent:  # it has ended already
            os._exit(EXIT_FAILED)
