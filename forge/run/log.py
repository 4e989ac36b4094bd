"""RunLog: copies everything that the console shows into output.log, even the last words of a crash in native code."""

import atexit
import faulthandler
import fcntl
import io
import logging
import os
import shutil
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

# Libraries with console handlers of their own, or with a lot to say: below WARNING they go to the file only.
LIBRARIES = (
    *("transformers", "datasets", "accelerate", "torch", "peft", "trl", "DeepSpeed", "wandb", "huggingface_hub"),
    *("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "asyncio", "hf_xet", "h11", "h2", "hpack"),
    *("requests", "aiohttp", "PIL", "bitsandbytes", "numexpr", "tokenizers", "safetensors"),
    "libraries",  # what forge itself keeps of them for the file, such as the traceback of what one raised
)
# Exec'd by sh: neither signals from SLURM to the whole job nor a closed console may end the tee before the run.
TEE = 'trap "" HUP INT TERM PIPE USR1 USR2; exec "$0" -a "$1"'
DRAIN_TIMEOUT_S = 5.0  # for a file system that hangs
TEE_TIMEOUT_S = 0.5  # a drained tee ends at once, unless a child process (such as the W&B service) holds its pipe

logger = logging.getLogger(__name__)


def start_logging(rank: int) -> "RunLog":
    """Start the log, as the first thing a training does; until `open`, its lines are kept in memory.

    Rank 0 logs everything, other ranks only warnings.
    """
    return RunLog(rank)


class RunLog:
    """The two handlers of the root logger, and the tees between file descriptors 1 and 2 and the console."""

    def __init__(self, rank: int):
        console_stream = os.fdopen(_original_stderr(), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        #: For the progress bar, which must not overlap with log lines. Give `redirect_stdout=False,
        #: redirect_stderr=False` to rich's Live and Progress, or prints bypass the descriptors and output.log.
        self.console = Console(file=console_stream, stderr=True)
        prefix = f"[rank {rank}] " if rank > 0 else ""
        self._to_console = _console_handler(self.console, prefix)
        self._to_file: logging.StreamHandler[Any] = logging.StreamHandler(
            io.StringIO()
        )  # memory, until the file exists
        self._to_file.setFormatter(
            logging.Formatter(f"%(asctime)s {prefix}%(levelname)-7s %(name)s: %(message)s")  # 2026-11-23 00:45:12,123
        )
        self._tees: list[tuple[int, int, subprocess.Popen[bytes]]] = []  # descriptor, its original, the child

        root = logging.getLogger()
        root.setLevel(logging.INFO)
        for handler in (self._to_console, self._to_file):
            handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
            root.addHandler(handler)
        logging.captureWarnings(True)
        self.adopt_library_loggers()
        faulthandler.enable(sys.__stderr__ or 2)  # by number: it follows descriptor 2 into the file

    def adopt_library_loggers(self) -> None:
        """Send the libraries' logs through the root logger. Called again after imports, which set up some handlers."""
        existing = [
            name for name in logging.root.manager.loggerDict if name.startswith(tuple(f"{n}." for n in LIBRARIES))
        ]
        for name in (*LIBRARIES, "py.warnings", *existing):
            library = logging.getLogger(name)
            own = [handler for handler in library.handlers if _writes_to_console(handler)]
            for handler in own:
                library.removeHandler(handler)
            if own or "." not in name:  # torch silences some of its loggers on purpose
                library.propagate = True

    @property
    def is_open(self) -> bool:
        """True if the lines go to a file, and not only to memory."""
        return not isinstance(self._to_file.stream, io.StringIO)

    def open(self, path: Path) -> None:
        """Copy everything to the file from now on: kept lines, the log, and all output to file descriptors 1 and 2.

        That includes prints, tracebacks and native code. Several processes may share the file.
        """
        path = path.absolute()
        # Unbuffered and O_APPEND: each record is one write, so the lines of two ranks do not mix.
        file = io.TextIOWrapper(
            io.FileIO(path, "a"), encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True
        )
        self._to_file.acquire()  # no line of another thread may come between the kept ones and the next
        try:
            kept = self._to_file.setStream(file)
            file.write(kept.getvalue() if isinstance(kept, io.StringIO) else "")
        finally:
            self._to_file.release()
        self._redirect(path)

    def close(self) -> None:
        """Restore the descriptors and wait until the last lines are written. A second call does nothing."""
        atexit.unregister(self.close)
        self._close_tees()
        for handler in (self._to_console, self._to_file):
            logging.getLogger().removeHandler(handler)
        file = self._to_file.setStream(io.StringIO())
        if file is not None:
            file.close()
        logging.captureWarnings(False)

    def _close_tees(self) -> None:
        _flush_streams()
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        for descriptor, original, child in self._tees:
            while _unread_bytes(descriptor) and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.dup2(original, descriptor)
            os.close(original)
        for _, _, child in self._tees:
            with suppress(subprocess.TimeoutExpired):  # not killed: a process that holds its pipe may still write
                child.wait(TEE_TIMEOUT_S)
        self._tees.clear()

    def _redirect(self, path: Path) -> None:
        tee = shutil.which("tee")
        if tee is None:
            logger.warning("no `tee` on the PATH: %s gets the log, but not prints and crashes", path)
            return
        _flush_streams()
        for descriptor in (1, 2):
            try:
                original = os.dup(descriptor)
            except OSError:  # closed by the process that started us: nothing to copy
                continue
            end, entry = os.pipe()
            # A process, not a thread: it writes our last output after we are gone. In a session of its own, so that
            # Ctrl-C does not reach it; it ends with the pipe, however we end.
            child = subprocess.Popen(
                ["/bin/sh", "-c", TEE, tee, str(path)],
                stdin=end,
                stdout=original,
                stderr=self.console.file.fileno(),
                start_new_session=True,
            )
            os.close(end)
            os.dup2(entry, descriptor)
            os.close(entry)
            self._tees.append((descriptor, original, child))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # Python buffers 8 KiB for a pipe, which a crash would lose
        atexit.register(self.close)


def _original_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # closed by the process that started us: only the file is left
        return os.open(os.devnull, os.O_WRONLY)


class _PlainHandler(logging.StreamHandler[Any]):
    """Stops writing when nobody reads the console any more, as with `| head`; the file continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            logging.getLogger().removeHandler(self)
        else:
            super().handleError(record)


class _PlainFormatter(logging.Formatter):
    """Formats as `12:34:56 message`, with the level from WARNING on."""

    def __init__(self, prefix: str):
        plain = f"%(asctime)s {prefix}%(message)s"
        super().__init__(plain, datefmt="%H:%M:%S")
        self._marked = logging.Formatter(plain.replace("%(message)s", "%(levelname)s: %(message)s"), datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self._marked.format(record) if record.levelno >= logging.WARNING else super().format(record)


def _for_the_console(record: logging.LogRecord) -> bool:
    if record.name == "huggingface_hub.utils._http":
        return record.levelno >= logging.ERROR  # twenty retries, each with a line; the error at the end is enough
    return record.levelno >= logging.WARNING or record.name.split(".")[0] not in LIBRARIES


def _console_handler(console: Console, prefix: str) -> logging.Handler:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console,
            show_path=False,
            omit_repeated_times=False,
            log_time_format="%H:%M:%S",
            highlighter=NullHighlighter(),  # only the level is coloured, not parts of the message
        )
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    else:
        handler = _PlainHandler(console.file)
        handler.setFormatter(_PlainFormatter(prefix))
    handler.addFilter(_for_the_console)
    return handler


def _writes_to_console(handler: logging.Handler) -> bool:
    # The exact type: FileHandler and torch's trace handler are subclasses.
    return type(handler) is logging.StreamHandler and handler.stream in (
        *(sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__),
    )


def _unread_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # a closed console is not a reason to stop
                stream.flush()
