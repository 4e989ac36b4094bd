"""Prints a comparison as a table in a terminal or in Markdown, transposed if it is too wide."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from forge.report.comparison import Comparison, Line
from forge.report.estimate import Estimate

ABSENT = "-"
GAP = "  gap closed"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print groups as rows if they fit the console, else metrics as rows, in as many blocks of columns as needed."""
    header, rows = cells_of(comparison)
    table = _table(header, rows)
    if _width(table, console) <= console.width:
        console.print(table)
    else:
        header, rows = transposed(header, rows)
        header = [_folded(label) for label in header]
        first = 1
        while first < len(header):
            count = len(header) - first
            while count > 1 and _width(_block(header, rows, first, count), console) > console.width:
                count -= 1
            if count > 1 and header[first + count :][:1] == [GAP]:  # it stays next to the group that closed it
                count -= 1
            console.print(_block(header, rows, first, count))
            first += count
    for line in _notes(comparison):
        console.print(line, highlight=False)


def comparison_markdown(comparison: Comparison, width: int) -> str:
    """Return the comparison for a document with lines of up to `width` characters; the notes are one list."""
    header, rows = cells_of(comparison)
    text = markdown(header, rows)
    if max(map(len, text.splitlines())) > width:
        text = markdown(*transposed(header, rows))
    notes = "\n".join(f"{'  ' * line.startswith(' ')}- {line.strip()}" for line in _notes(comparison) if line)
    return f"{text}\n\n{notes}\n" if notes else f"{text}\n"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of GitHub's Markdown, without a newline at the end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)


def cells_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, with groups as rows; the column of times is left out if there are none."""
    timed = any(line.seconds_per_step is not None for line in comparison.lines)
    header = ["", "seeds", *comparison.metrics, *(["s/step"] if timed else [])]
    rows = []
    for line in comparison.lines:
        cells = [_cell(line, line.cells.get(metric)) for metric in comparison.metrics]
        times = [_cell(line, line.seconds_per_step)] if timed else []
        rows.append([GAP if line.kind == "gap closed" else line.label, _seeds(comparison, line), *cells, *times])
    return header, rows


def transposed(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows with rows and columns swapped."""
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    return columns[0], columns[1:]


def number(value: float) -> str:
    """Return a number with four decimals if it is small, and fewer if it is large: 0.8213, 25.03, 1520."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.0f}"


def _seeds(comparison: Comparison, line: Line) -> str:
    """Return the number of seeds that the cells are means of."""
    if line.kind == "trained":
        return str(len(comparison.groups[line.groups[0]].runs))
    means = [cell.seeds for cell in line.cells.values() if cell.half_width is not None]
    return str(max(means)) if means else ABSENT


def _cell(line: Line, known: Estimate | None) -> str:
    if known is None:
        return ABSENT
    if line.kind == "gap closed":
        return f"{100 * known.mean:.0f} %"
    return _with_interval(known)


def _with_interval(known: Estimate, sign: str = "") -> str:
    mean = f"{sign if known.mean >= 0 else ''}{number(known.mean)}"
    if known.half_width is None:
        return mean
    decimals = len(mean.partition(".")[2])  # as many as the mean has
    return f"{mean} ± {known.half_width:.{decimals}f}"


def _notes(comparison: Comparison) -> list[str]:
    """Return the lines that follow the table: its legend, the paired differences, and the notes."""
    lines = []
    if comparison.legend:
        lines += ["", *comparison.legend]
    if comparison.paired:
        first = comparison.paired[0]
        lines += ["", f"{first.left} minus {first.right}, seed by seed:"]
        for item in comparison.paired:
            seeds = sorted(item.difference.values)
            named = f"seed {seeds[0]} only" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
            lines.append(f"  {item.metric}: {_with_interval(item.difference, '+')} ({named})")
    return [*lines, "", *comparison.notes] if comparison.notes else lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table


def _folded(label: str) -> str:
    """Put each key of a label on its own line."""
    return label.replace(", ", ",\n").replace("; ", ";\n").replace(": ", ":\n")


def _block(header: Sequence[str], rows: Sequence[Sequence[str]], first: int, count: int) -> Table:
    places = [0, *range(first, first + count)]
    return _table([header[place] for place in places], [[row[place] for place in places] for row in rows])


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum
