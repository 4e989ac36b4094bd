"""Starts forge's training as a child process, on one rank or on many, and brings back its own exit code."""

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

from forge.cluster.signals import PARENT_VARIABLE, STOP_SIGNALS
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, UsageError

ENTRY = Path(__file__).resolve().parents[1] / "train.py"
LAUNCHER = Path(__file__).resolve().with_name("launcher.py")
OUTCOME = "FORGE_OUTCOME"  # the file that takes forge's exit code: accelerate's launcher returns 1 for every failure
# What the surroundings may say of another start: a process alone would wait for ranks that nobody starts.
OF_ANOTHER_START = (
    OUTCOME,
    PARENT_VARIABLE,
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
)
HANDLED_BY_LAUNCHER = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # its own four, and those that would end it
SAVE_TIMEOUT_S = 120  # the launcher kills ranks that take longer to stop; its own 30 s is short for a large checkpoint
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def training_command(arguments: Sequence[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """The command line and the whole environment that train with forge on this machine.

    arguments: those of `forge train`. Raises UsageError where there are GPUs, but fewer than processes.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes cannot train")
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_START}
    environment[PARENT_VARIABLE] = str(os.getpid())
    on_cpu = _trains_on_cpu(environment)
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    if processes == 1:
        return [sys.executable, str(ENTRY), *arguments], environment
    if not on_cpu and (gpus := visible_gpus(environment)) < processes:
        raise UsageError(
            f"{processes} processes need as many GPUs, and {gpus} can be seen here; give --processes {gpus}"
        )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    environment.setdefault("PET_SIGNALS_TO_HANDLE", HANDLED_BY_LAUNCHER)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_TIMEOUT_S))
    launcher = [sys.executable, str(LAUNCHER), "--multi_gpu", "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]  # 0: a free one, sought as it is bound
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # only quiets it: the config says what counts
    return [*launcher, str(ENTRY), *arguments], environment


class SignalRelay:
    """While it is entered, TERM, INT, USR1 and USR2 are kept, and given to the child that runs.

    A second INT ends the child and all its processes at once: a launcher would make a TERM for its ranks of it, which
    means "save first". Only the main thread can enter a relay.
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
        """The child's return code. Signals that came before the child existed are its first."""
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
    """Trains in a child process to its end and returns forge's exit code.

    output: takes what the child prints; None: the console. relay: one that is entered already, for several
    trainings one after the other; one that has received a signal starts nothing more. If this process dies, by any
    signal, the child is told to stop.
    """
    if relay is None:
        with SignalRelay() as own:
            return run_training(arguments, processes, output, own)
    command, environment = training_command(arguments, processes)
    if processes > _cores() and environment.get("ACCELERATE_USE_CPU") == "true":
        print(f"warning: {processes} processes share {_cores()} CPU cores, and wait for each other", file=sys.stderr)
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
            # A group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once. A second
            # one means "leave at once", and must be the user's.
            process_group=0,
            preexec_fn=_EndWithParent(os.getpid()),
        )
        returned = relay.wait(child)
        written = read_outcome(outcome)
    if written is not None:
        return written
    # Nothing was written: forge did not come so far as to hear signals. Where one came, nothing was done, and nothing
    # lost; the launcher says 1 then. Else it failed, and the launcher's own code tells no more than that.
    if relay.received and (-returned in relay.received or (processes > 1 and returned == EXIT_FAILED)):
        return EXIT_STOPPED
    return returned if processes == 1 and returned >= 0 else EXIT_COMPLETE if returned == 0 else EXIT_FAILED


def write_outcome(code: int) -> None:
    """Leaves forge's exit code to the process that started it, if that wants to know.

    On rank 0, as its last act; and as the first after it hears signals, so that one that is killed has failed.
    """
    name = os.environ.get(OUTCOME)
    if name is None or not Path(name).parent.is_dir():  # whoever asked has ended
        return
    temporary = Path(f"{name}.tmp")
    temporary.write_text(str(code))
    temporary.replace(name)


def read_outcome(path: Path) -> int | None:
    """What write_outcome left there."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None


def visible_gpus(environment: dict[str, str]) -> int:
    """How many GPUs torch would find, as far as can be told without loading it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _trains_on_cpu(environment: dict[str, str]) -> bool:
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"):
        return True
    return "+cpu" in importlib.metadata.version("torch") or visible_gpus(environment) == 0


def _kill(pid: int) -> None:
    """The process and all below it, the ranks in sessions of their own too."""
    try:
        process = psutil.Process(pid)
        below = process.children(recursive=True)
        process.kill()  # first: a launcher would tell of its lost ranks
    except psutil.NoSuchProcess:
        return
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _EndWithParent:
    """Runs in the child before it becomes forge: the kernel sends it TERM when its parent ends."""

    def __init__(self, parent: int):
        self.parent = parent
        self.libc = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec little may be done

    def __call__(self) -> None:
        self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self.parent:  # it has ended already
            os._exit(EXIT_FAILED)
