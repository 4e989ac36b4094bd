"""Starts Python programs as forks of one process that has done the imports: six to ten CPU-seconds less a start.

    with warm.starts():
        subprocess.run([sys.executable, "forge.py", "--config", file], cwd=folder, env=environment)

Within `starts()`, a Popen of this interpreter with a script, `-m module` or `-c code` is served by a fork: of the warm
process where a test starts it, of the starting program itself where a warm program does (accelerate's launcher starts
its ranks so, `forge launch` its training, `prove-resume` its runs). Everything else that is started is left alone.

To the one who starts it and to the kernel, such a fork is an ordinary child: its own pid, whose parent is the one who
started it; session, process group, directory, descriptors, environment, arguments (also in /proc/PID/cmdline and
environ), signal dispositions, exit code, and what an interpreter does at its end (threads, atexit, flushed streams).
The program's file is executed as `__main__`, as the interpreter does it.

What it does not test, and where a fresh interpreter does:
- that the modules import, in the program's own order and with its own sys.path: test_cli.py, test_layout.py
- the command from another folder, and `python -m forge.cli`: test_cli.py
- a library that reads the environment as it is imported: not served here, see READ_AT_IMPORT
- descriptors that are closed at the start: test_pipeline.py
- ranks that come from `accelerate launch` itself: test_launch_command.py, which compares the weights with warm ones
- the hash seed of strings, which all forks of a warm process share
- the memory that a run predicts, half a CPU-second each: only where PREDICTS_MEMORY is set, as in test_pipeline.py
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# A program that wants another value of these than the warm process has gets a fresh interpreter. None of them is set by
# a library as it is imported (as TORCHINDUCTOR_CACHE_DIR is): then all that follows would start fresh, unnoticed.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "DATASETS_", "TRITON_INTERPRET", "ARROW_", "USE_", "LD_", "PYTHON")
NOT_AT_IMPORT = ("PYTHONPATH", "PYTHONUNBUFFERED")
# No thread may have started before a fork: a pool would be lost in the child.
WITHOUT_POOLS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WITHOUT_POOLS |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
PREDICTS_MEMORY = "WARM_PREDICTS_MEMORY"  # set to anything for a program that shall predict its memory
# The kernel shows arguments and environment from where they were when the process started: room for longer ones.
PAD_VARIABLE, ARGUMENTS_ROOM, ENVIRONMENT_ROOM = "WARM_PAD", 32_000, 64_000
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_path: list[str] = []  # sys.path without a program's own entry and without PYTHONPATH
_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Program:
    """What a fork becomes."""

    arguments: list[str]  # with the interpreter first
    cwd: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    new_session: bool = False
    process_group: int = -1
    # Calls of "module:function" in the fork, before the program.
    before: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class WarmPython:
    """The warm process, from outside. Safe to use from several threads."""

    def __init__(self) -> None:
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | WITHOUT_POOLS
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), " " * ARGUMENTS_ROOM],
            cwd=REPOSITORY,
            env=self._environment | {PAD_VARIABLE: " " * ENVIRONMENT_ROOM},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._socket, self._lock = ours, threading.Lock()

    def close(self) -> None:
        """Ends the warm process. What was started lives on."""
        self._socket.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold it open
        self._socket.close()
        self._process.wait(30)

    def threads(self) -> int:
        """How many it has: none but the first one would be in a fork."""
        return len(os.listdir(f"/proc/{self._process.pid}/task"))

    def serves(self, environment: dict[str, str]) -> bool:
        """False for a program whose imports could come out differently."""
        return _read_at_import(environment) == _read_at_import(self._environment)

    def start(self, program: Program, descriptors: tuple[int, int, int]) -> int:
        """The pid of a new child of this process. descriptors: its stdin, stdout and stderr."""
        request = json.dumps(asdict(program)).encode()
        with self._lock, _adopting_orphans():
            socket.send_fds(self._socket, [len(request).to_bytes(8, "big")], list(descriptors))
            self._socket.sendall(request)
            answer = self._socket.recv(8)
        if len(answer) != 8:
            raise RuntimeError("the warm process has ended; what it printed to stderr says why")
        return int.from_bytes(answer, "big")


@functools.cache
def warm_python() -> WarmPython:
    """The one of this process, started when it is first asked for."""
    found = WarmPython()
    atexit.register(found.close)
    return found


@contextlib.contextmanager
def starts(fresh: bool = False) -> Iterator[None]:
    """Within it, programs of this interpreter are started warm; or fresh, also where they would be warm."""
    before = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    subprocess.Popen._execute_child = _execute_child if fresh else _start_warm  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess.Popen._execute_child = before  # type: ignore[attr-defined]


def _start_warm(popen: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
    """In place of subprocess.Popen._execute_child, in a process that is not warm."""
    program, descriptors, pipes = _request(args, executable, close_fds, rest)
    if program is None or preexec_fn is not None or not warm_python().serves(program.environment):
        _execute_child(popen, args, executable, preexec_fn, close_fds, *rest)
        return
    popen.pid = warm_python().start(program, descriptors)
    popen._child_created = True
    popen._close_pipe_fds(*pipes)


def _fork_warm(popen: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
    """The same in a warm program: a fork of the program itself, which is its parent."""
    program, descriptors, pipes = _request(args, executable, close_fds, rest)
    if program is None or _read_at_import(program.environment) != _read_at_import(dict(os.environ)):
        _execute_child(popen, args, executable, preexec_fn, close_fds, *rest)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()  # garbage that holds a descriptor would close another one of its number in the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from Python 3.12 on
        popen.pid = os.fork()
    if popen.pid == 0:
        atexit._clear()
        gc.freeze()
        _become(program, descriptors, preexec_fn)
    popen._child_created = True
    popen._close_pipe_fds(*pipes)


def _request(
    args: Any, executable: Any, close_fds: Any, rest: tuple[Any, ...]
) -> tuple[Program | None, tuple[int, int, int], list[int]]:
    """What a Popen asks for: the program, None if it cannot be a fork; its stdin, stdout and stderr; all its pipes."""
    pass_fds, cwd, env, _, _, shell, *pipes, _, gid, gids, uid, umask, new_session, group = rest
    given = (pipes[0], pipes[3], pipes[5])  # -1: the starting process's own
    stdin, stdout, stderr = (number if number != -1 else own for own, number in enumerate(given))
    arguments = [os.fsdecode(word) for word in args] if isinstance(args, list | tuple) else []
    environment = dict(os.environ if env is None else env)
    program = Program(arguments, None if cwd is None else os.fspath(cwd), environment, new_session, group)
    special = any((executable, pass_fds, shell, gid, gids, uid)) or umask != -1 or not close_fds
    servable = not special and _is_program(arguments) and not _too_long(program)
    return program if servable else None, (stdin, stdout, stderr), pipes


def _is_program(arguments: list[str]) -> bool:
    words = arguments[1:3] if arguments[1:2] != ["-u"] else arguments[2:4]
    if arguments[:1] != [sys.executable] or not words:
        return False
    return len(words) == 2 if words[0] in ("-m", "-c") else words[0].endswith(".py")


def _too_long(program: Program) -> bool:
    arguments, environment = _blocks(program)
    return len(arguments) > ARGUMENTS_ROOM or len(environment) > ENVIRONMENT_ROOM


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    return {name: value for name, value in kept.items() if name not in (*NOT_AT_IMPORT, *WITHOUT_POOLS)}


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Within it, this process becomes the parent of an orphan among its descendants."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


# Of the warm process.


def main() -> None:
    """Imports everything, then forks a program for each request that comes through the socket, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends pytest, and the socket tells
    requests = socket.socket(fileno=int(sys.argv[1]))
    del sys.path[0]  # the folder of this file: a program has its own there
    sys.path.insert(0, str(REPOSITORY))
    gc.disable()  # nothing of what imports make is garbage
    _import_everything()
    gc.enable()
    sys.path.pop(0)
    _path.extend(sys.path)
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread, which no fork would have"
    while True:
        header, descriptors, _, _ = socket.recv_fds(requests, 8, 3)
        if not header:
            os._exit(0)
        request = json.loads(_exactly(requests, int.from_bytes(header, "big")))
        _fork_orphan(requests, Program(**request), descriptors)


def _fork_orphan(requests: socket.socket, program: Program, descriptors: list[int]) -> None:
    """A child's child, whose parent ends at once: it goes to the client, which adopts orphans while it waits."""
    told, tell = os.pipe()
    adopted, adopt = os.pipe()
    parent = os.fork()
    if parent == 0:
        pid = os.fork()
        if pid != 0:
            os.write(tell, pid.to_bytes(8, "big"))
            os._exit(0)
        os.close(adopt)
        os.read(adopted, 1)
        _become(program, descriptors)
    os.waitpid(parent, 0)
    os.write(adopt, b"!")
    requests.sendall(os.read(told, 8))
    for descriptor in (told, tell, adopted, adopt, *descriptors):
        os.close(descriptor)


def _exactly(requests: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += requests.recv(size - len(data))
    return data


def _import_everything() -> None:
    """All of forge, and what it imports only when it is needed."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed prints what it misses
    import accelerate.commands.launch  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # by transformers and accelerate, when they save a model
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - by its engine; imports torch's compiler, 2 s
    import numpy  # noqa: F401 - reseeded in each fork
    import peft  # noqa: F401
    import torch.distributed.run
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import PreTrainedTokenizerFast, conversion_mapping  # noqa: F401

    import forge

    for module in pkgutil.walk_packages(forge.__path__, "forge."):
        if not module.name.endswith(("__main__", ".launcher")):  # programs
            importlib.import_module(module.name)
    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # builds its tables, 0.2 s
    _read_packages_once()


def _read_packages_once() -> None:
    """The list of installed packages in a run's metadata takes 0.2 s, and is the same for all."""
    import forge.run.provenance

    read = forge.run.provenance.package_freeze
    cached = functools.cache(read)
    cached()
    for name, module in list(sys.modules.items()):
        if name.startswith("forge.") and getattr(module, "package_freeze", None) is read:
            module.package_freeze = cached  # type: ignore[attr-defined]


# Of a fork.


def _become(program: Program, descriptors: Sequence[int], preexec_fn: Any = None) -> None:
    """Turns this process into the program, and ends with it."""
    try:
        _take_place(program, descriptors)
        if preexec_fn is not None:
            preexec_fn()
        _reset(program)
        for name, options in program.before:
            module, function = name.split(":")
            getattr(importlib.import_module(module), function)(**options)
        main = _prepare_main(program.arguments[1:])
    except BaseException:  # noqa: BLE001 - nothing of the fork may run on in the warm process's own code
        traceback.print_exc()
        os._exit(1)
    code = 1
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does
        error.__traceback__ = _of_the_program(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    _leave(code)


def _take_place(program: Program, descriptors: Sequence[int]) -> None:
    """Session, folder, descriptors and signals, as between a fork and an exec."""
    high = [os.dup2(os.dup(given), 200 + i) for i, given in enumerate(descriptors)]
    for i, given in enumerate(high):
        os.dup2(given, i)
    os.closerange(3, 4096)
    if program.cwd is not None:
        os.chdir(program.cwd)
    if program.new_session:
        os.setsid()
    if program.process_group >= 0:
        os.setpgid(0, program.process_group)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _reset(program: Program) -> None:
    """What an interpreter takes from its start: environment, arguments, path, random numbers, threads."""
    import numpy
    import torch

    os.environ.clear()
    os.environ.update(program.environment)
    _show(program)
    sys.path[:] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry] + _path
    sys.orig_argv = program.arguments
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    if PREDICTS_MEMORY not in os.environ:
        import forge.attempt.measured_memory

        forge.attempt.measured_memory.predict_memory = lambda *given: None
    unbuffered = program.arguments[1] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)  # type: ignore[union-attr]
    subprocess.Popen._execute_child = _fork_warm  # type: ignore[attr-defined]


def _show(program: Program) -> None:
    """Writes the arguments and the environment where the kernel, and so ps and psutil, look for them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])  # the 48th to the 51st of proc(5)
    for block, start, end in zip(_blocks(program), (arg_start, env_start), (arg_end, env_end), strict=True):
        ctypes.memmove(start, block.ljust(end - start, b"\0")[: end - start], end - start)


def _blocks(program: Program) -> tuple[bytes, bytes]:
    pairs = [f"{name}={value}" for name, value in program.environment.items()]
    return tuple(os.fsencode("".join(f"{word}\0" for word in words)) for words in (program.arguments, pairs))  # type: ignore[return-value]


def _prepare_main(words: list[str]) -> Any:
    """The program as a function; sys.argv and sys.path are as it expects them."""
    words = words[1:] if words[0] == "-u" else words
    if words[0] == "-m":
        sys.argv, module = ["-m", *words[2:]], words[1]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(module, None)  # as in an interpreter that has not run it yet
        return functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = type(sys)("__main__")
        return functools.partial(exec, compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    module = sys.modules["__main__"] = type(sys)("__main__")
    module.__file__ = os.path.abspath(words[0])
    return functools.partial(exec, compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(module))


def _of_the_program(frames: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this file and of runpy."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    return frames


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return (leaving.code or 0) & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1


def _leave(code: int) -> None:
    """What an interpreter does at its end, but for taking its modules apart, which takes a quarter of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or (120 if stream is sys.stdout else 0)
    os._exit(code)


if __name__ == "__main__":
    main()
