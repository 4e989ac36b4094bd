"""Tables and errors as the commands print them."""

import sys
from typing import TYPE_CHECKING

from forge.errors import ConfigError, ForgeError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 160  # of tables, where there is no terminal


def print_error(error: ForgeError) -> None:
    """Print an error to stderr, one line for each problem."""
    for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
        print(f"error: {problem}", file=sys.stderr, flush=True)


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table without a frame."""
    from rich.table import Table

    table = Table(box=None)
    for column in columns:
        table.add_column(column, overflow="fold")  # on a narrow terminal; a path that is cut names no run
    for row in rows:
        table.add_row(*row)
    widest = sum(max(len(cell) for cell in cells) + 2 for cells in zip(columns, *rows, strict=True))
    table_console(widest).print(table)


def table_console(at_least: int = 0) -> "Console":
    """A console as wide as the terminal, or wide enough for a table if output is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout and sys.stdout.isatty() else max(PLAIN_WIDTH, at_least), markup=False)
