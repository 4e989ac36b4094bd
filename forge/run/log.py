"""Gives output.log all that the console shows, from the first line to the last words of a crash in native code."""

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

# Libraries that bring console handlers of their own, or that talk much: below WARNING they reach only the file.
LIBRARIES = (
    *("transformers", "datasets", "accelerate", "torch", "peft", "trl", "DeepSpeed", "wandb", "huggingface_hub"),
    *("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "asyncio"),
)
# Exec'd by sh: signals of SLURM to the whole job, and a closed console, must not end the tee before the run has ended.
TEE = 'trap "" HUP INT TERM PIPE USR1 USR2; exec "$0" -a "$1"'
DRAIN_TIMEOUT_S = 5.0  # for a file system that hangs
TEE_TIMEOUT_S = 0.5  # a drained tee ends at once, unless a child of ours (the service of W&B) holds its pipe

logger = logging.getLogger(__name__)


def start_logging(rank: int) -> "RunLog":
    """The first call of the training entry. Until `open`, the log's lines are kept in memory; rank 0 alone tells all,
    the others warn."""
    return RunLog(rank)


class RunLog:
    """The root logger's two handlers, and what stands between file descriptors 1 and 2 and the console."""

    def __init__(self, rank: int):
        console_stream = os.fdopen(_original_stderr(), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        #: For the progress bar, so that bar and log lines do not write across each other. Give `redirect_stdout=False,
        #: redirect_stderr=False` to rich's Live and Progress: else prints go round the descriptors, past output.log.
        self.console = Console(file=console_stream, stderr=True)
        prefix = f"[rank {rank}] " if rank > 0 else ""
        self._to_console = _console_handler(self.console, prefix)
        self._to_file: logging.StreamHandler[Any] = logging.StreamHandler(
            io.StringIO()
        )  # the memory, until the file is there
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
        """Lets the libraries speak through the root logger. Once more after their import: some set up handlers then."""
        existing = [
            name for name in logging.root.manager.loggerDict if name.startswith(tuple(f"{n}." for n in LIBRARIES))
        ]
        for name in (*LIBRARIES, "py.warnings", *existing):
            library = logging.getLogger(name)
            own = [handler for handler in library.handlers if _writes_to_console(handler)]
            for handler in own:
                library.removeHandler(handler)
            if own or "." not in name:  # torch silences some of its children on purpose
                library.propagate = True

    def open(self, path: Path) -> None:
        """From here on all goes to the file as well: the lines kept so far, the log, and whatever is written to file
        descriptors 1 and 2 by print, by a traceback or by native code. Several processes may share the file."""
        path = path.absolute()
        # No buffer of our own and O_APPEND: each record is one write, so that the lines of two ranks stay whole.
        file = io.TextIOWrapper(
            io.FileIO(path, "a"), encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True
        )
        self._to_file.acquire()  # no line of another thread between the kept ones and the next
        try:
            kept = self._to_file.setStream(file)
            file.write(kept.getvalue() if isinstance(kept, io.StringIO) else "")
        finally:
            self._to_file.release()
        self._redirect(path)

    def close(self) -> None:
        """Gives the descriptors back and waits for the last lines to be written. A second call does nothing."""
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
            with suppress(subprocess.TimeoutExpired):  # not killed: whoever holds its pipe may still have to say
                child.wait(TEE_TIMEOUT_S)
        self._tees.clear()

    def _redirect(self, path: Path) -> None:
        tee = shutil.which("tee")
        if tee is None:
            logger.warning("there is no `tee` on the PATH: %s gets the log, but no prints and no crashes", path)
            return
        _flush_streams()
        for descriptor in (1, 2):
            try:
                original = os.dup(descriptor)
            except OSError:  # closed by who started us: nothing is to be seen there
                continue
            end, entry = os.pipe()
            # A process, not a thread: it writes our last words after we are gone. In a session of its own, so that
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
            sys.stdout.reconfigure(line_buffering=True)  # into a pipe, Python keeps 8 KiB back: lost in a crash
        atexit.register(self.close)


def _original_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # closed by whoever started us: the file is all there is
        return os.open(os.devnull, os.O_WRONLY)


class _PlainHandler(logging.StreamHandler[Any]):
    """Falls silent when nobody reads the console any more, as behind `| head`; the file goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            logging.getLogger().removeHandler(self)
        else:
            super().handleError(record)


class _PlainFormatter(logging.Formatter):
    """12:34:56 message, with the level only where it matters."""

    def __init__(self, prefix: str):
        plain = f"%(asctime)s {prefix}%(message)s"
        super().__init__(plain, datefmt="%H:%M:%S")
        self._marked = logging.Formatter(plain.replace("%(message)s", "%(levelname)s: %(message)s"), datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self._marked.format(record) if record.levelno >= logging.WARNING else super().format(record)


def _for_the_console(record: logging.LogRecord) -> bool:
    if record.name == "huggingface_hub.utils._http":
        return record.levelno >= logging.ERROR  # a line for each of twenty retries, and then the error is said anyway
    return record.levelno >= logging.WARNING or record.name.split(".")[0] not in LIBRARIES


def _console_handler(console: Console, prefix: str) -> logging.Handler:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console,
            show_path=False,
            omit_repeated_times=False,
            log_time_format="%H:%M:%S",
            highlighter=NullHighlighter(),  # a log line is text; its colour is the level's
        )
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    else:
        handler = _PlainHandler(console.file)
        handler.setFormatter(_PlainFormatter(prefix))
    handler.addFilter(_for_the_console)
    return handler


def _writes_to_console(handler: logging.Handler) -> bool:
    # The exact type: a FileHandler is a StreamHandler too, and torch's handler of traces is a subclass.
    return type(handler) is logging.StreamHandler and handler.stream in (
        *(sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__),
    )


def _unread_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # a closed console is no reason to stop
                stream.flush()
