"""Starts forge without its six seconds of imports: one process imports everything, and each attempt is a fork of it.

The forked child is the true program from `forge.train.main` on: its arguments, environment, descriptors, exit code and
interpreter shutdown are its own. What a trial does to it (an injector, another clock) is named in the request, as
`module:function` with keyword arguments, and is done in the child before forge starts.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import queue
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0  # no attempt of a trial takes a tenth of it
# From the first dead rank until the others are ended by force. The launcher gives 30 s; a rank that waits in native
# code for one that died before it came hears no signal, and takes them all.
AGENT_GRACE_S = 5.0
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below the range from which the kernel gives ports to connections, so that only another of these takes one.
_ports = itertools.cycle(random.SystemRandom().sample(range(18000, 30000), 12000))
_ports_lock = threading.Lock()


@dataclass
class Child:
    """One forked attempt, or one rank of it."""

    ticket: int
    output: Path
    rank: int = 0
    pid: int = 0
    answers: "queue.SimpleQueue[dict[str, int]]" = field(default_factory=queue.SimpleQueue)
    code: int | None = None

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """The exit code, minus the signal where one killed it; None while it runs."""
        if self.code is None:
            try:
                self.code = self.answers.get(timeout=max(timeout_s, 1e-3))["exit"]
            except queue.Empty:
                return None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The server has not reaped it while no exit was told, so the pid is still its own."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class ForkServer:
    """The client's end. Safe to use from several threads."""

    def __init__(self, python: str = sys.executable):
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        }
        self._process = subprocess.Popen(
            [python, "-m", "faults.forkserver"],
            **{"cwd": REPOSITORY, "env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )
        self._tickets = itertools.count(1)
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def start(
        self,
        arguments: list[str],
        output: Path,
        *,
        environment: dict[str, str] | None = None,
        setup: list[tuple[str, dict[str, Any]]] | None = None,
    ) -> Child:
        """Forks one process that runs `forge.train.main(arguments)`."""
        with self._lock:
            child = Child(next(self._tickets), output)
            self._children[child.ticket] = child
            request = {"ticket": child.ticket, "arguments": arguments, "output": str(output)}
            request |= {"environment": environment or {}, "setup": setup or []}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        child.pid = child.answers.get(timeout=TIMEOUT_S)["pid"]
        return child

    def start_ranks(
        self,
        ranks: int,
        arguments: list[str],
        output: Path,
        setup: list[list[tuple[str, dict[str, Any]]]] | None = None,
    ) -> list[Child]:
        """As `accelerate launch` does: one process for each rank, which find each other by a port."""
        if ranks == 1:
            return [self.start(arguments, output, setup=setup[0] if setup else None)]
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = []
        for rank in range(ranks):
            environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            file = output.with_name(f"{output.name}.{rank}") if rank else output
            children.append(self.start(arguments, file, environment=environment, setup=setup[rank] if setup else None))
            children[-1].rank = rank
        return children

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._children[answer["ticket"]].answers.put(answer)


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


def main() -> int:
    """The server's end: requests on stdin, answers on stdout, until stdin is closed."""
    answers = os.dup(1)
    os.dup2(2, 1)  # nobody else speaks to the client
    _import_everything()
    gc.collect()
    gc.freeze()
    request = _serve(answers)
    if request is None:
        return 0
    os.close(answers)
    code = _become(request)
    # All that an interpreter does at its end but for taking its modules apart, which takes a quarter of a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_everything() -> None:
    import accelerate.utils  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert  # noqa: F401
    from transformers import conversion_mapping

    import forge.attempt.opening
    import forge.pipeline
    import forge.train

    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # builds its tables, 0.2 s
    forge.attempt.opening.package_freeze = functools.cache(forge.attempt.opening.package_freeze)  # 0.2 s for one text
    forge.attempt.opening.package_freeze()


def _serve(answers: int) -> dict[str, Any] | None:
    """Forks for each request. Returns in the child, with its request; in the server only at the end, with None."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    unread, open_requests = b"", True

    def tell(**answer: int) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    while open_requests or len(selector.get_map()):
        for key, _ in selector.select():
            if key.fd != 0:
                pid, ticket = key.data
                _, status = os.waitpid(pid, 0)
                selector.unregister(key.fd)
                os.close(key.fd)
                tell(ticket=ticket, exit=os.waitstatus_to_exitcode(status))
                continue
            data = os.read(0, 1 << 16)
            if not data:
                open_requests = False
                selector.unregister(0)
                for other in list(selector.get_map().values()):
                    os.kill(other.data[0], signal.SIGKILL)
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    for other in list(selector.get_map().values()):
                        if other.fd:
                            os.close(other.fd)
                    selector.close()
                    return request
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, request["ticket"]))
                tell(ticket=request["ticket"], pid=pid)
    return None


def _become(request: dict[str, Any]) -> int:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # no rank is left when the tests are broken off
    random.seed()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for descriptor in (null, output):
        os.close(descriptor)
    os.environ.update(request["environment"])
    command = ["python", "forge.py", *request["arguments"]]
    sys.argv, sys.orig_argv = command[1:], command
    for name, options in request["setup"]:
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)(**options)
    return importlib.import_module("forge.train").main(request["arguments"])


if __name__ == "__main__":
    sys.exit(main())
