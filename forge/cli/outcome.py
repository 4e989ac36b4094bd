"""What surrounds a command that trains: its log and exit code, and the table at the end."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forge.cluster.launch import write_outcome
from forge.cluster.processes import rank, world_size
from forge.cluster.signals import StopRequest
from forge.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    AlreadyComplete,
    ConfigError,
    ForgeError,
    LostRank,
    Stopped,
    UnreadableRows,
)
from forge.run.hints import forge_command, train_command
from forge.run.log import RunLog, start_logging

if TYPE_CHECKING:
    from forge.attempt.outcome import Result


@dataclass
class Outcome:
    """The log of a command while it runs, and its exit code afterwards."""

    log: RunLog
    exit_code: int = EXIT_COMPLETE

    @property
    def complete(self) -> bool:
        return self.exit_code == EXIT_COMPLETE


@contextmanager
def logged() -> Iterator[Outcome]:
    """Log to the console inside; an error ends the block there, is reported, and sets the exit code."""
    outcome = Outcome(start_logging(rank()))
    logger = logging.getLogger("forge")
    try:
        yield outcome
    except AlreadyComplete as error:
        logger.info("%s", error)
        outcome.exit_code = error.exit_code
    except Stopped as stopped:
        if rank() == 0:
            logger.warning("%s", stopped)
        outcome.exit_code = stopped.exit_code
    except ForgeError as error:
        if rank() == 0 or isinstance(error, LostRank | UnreadableRows):
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                logger.error(problem)
        outcome.exit_code = error.exit_code
    except OSError as error:
        logger.error("stopped by the system: %s", error)
        outcome.exit_code = EXIT_FAILED
    except Exception as error:
        outcome.exit_code = EXIT_FAILED
        if "forge.ranks.agreement" in sys.modules and sys.modules["forge.ranks.agreement"].lost_rank(error):
            logger.error(
                "another rank has died before the first stage; its own messages, or the system's log, say why (here: "
                "%s)",
                str(error).splitlines()[0][:200],
            )
        else:
            logger.exception("forge failed; this is a bug in forge or in a library it calls; the traceback shows where")
    finally:
        outcome.log.close()


def heard_signals() -> StopRequest:
    """Listen to stop signals from here on, and to nothing else; until the end, the outcome counts as a failure."""
    _close_stdin()
    stop = StopRequest()
    stop.listen()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if world_size() > 1 else "true")
    return stop


def _close_stdin() -> None:
    """Leave nothing to read: a library that asks a question would wait for an answer that nobody gives."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if nothing != 0:
        os.close(nothing)


def announce(code: int) -> int:
    """Leave the exit code to the process that started this one, and return it."""
    if rank() == 0:
        write_outcome(code)
    return code


def print_summary(result: "Result") -> None:
    """Print the metrics before and after, where the run is, and what to do next."""
    if sys.stdout is None:  # closed by the parent process; the log and the model card have the metrics
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, markup=False)  # a path may hold [brackets]
    compared = result.evidence
    header, rows = (["metric", "before", "after"], result.table()) if compared is None else compared.table()
    if rows:
        table = Table(*header, title=result.run.name, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if compared is not None and compared.text:
        console.print(compared.text, highlight=False)
    path = os.path.relpath(result.run.path) if result.run.path.is_relative_to(Path.cwd()) else result.run.path
    lines = (
        ("run", path, "metrics, log, config, provenance"),
        ("model", f"{path}/final", "its README.md is the model card, and says how to load it"),
        ("next", f"{forge_command()} runs", "all runs"),
        (
            "",
            f"{train_command()} --config X.yaml --set model.path={shlex.quote(str(path))}",
            "train it further",
        ),
    )
    for word, what, why in lines:
        console.print(f"{word:<6} {what}   # {why}", highlight=False, soft_wrap=True)
