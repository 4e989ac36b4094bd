"""The commands that read runs back: runs and compare."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from forge.attempt.control import nothing_left
from forge.cli.console import PLAIN_WIDTH, print_table, table_console
from forge.errors import EXIT_COMPLETE, UsageError
from forge.run.directory import RunDirectory, find_run, find_runs
from forge.run.hints import forge_command
from forge.run.registry import IncompleteRun, incomplete_runs, is_alive
from forge.run.state import TrainingState


def runs(args: argparse.Namespace) -> int:
    """List the runs under the output root, or those that can be resumed."""
    root = Path(args.output_root)
    found: list[tuple[RunDirectory, IncompleteRun | None]] = (
        [*incomplete_under(root)] if args.incomplete else [(run, None) for run in find_runs(root)]
    )
    rows = [row for run, entry in found if (row := _row(run, entry)) is not None]
    if args.json:
        print(json.dumps(rows, indent=2))
        return EXIT_COMPLETE
    if not rows:
        print(f"no {'incomplete ' if args.incomplete else ''}runs under {root}")
        return EXIT_COMPLETE
    more = ("attempts", "checkpoint", "process") if args.incomplete else ()
    table: list[tuple[str, ...]] = []
    for row in rows:
        last_error = (row["error"] or "").splitlines()
        cells = [row["run"], row["stage"], f"{row['step']}/{row['total_steps']}", row["created_at"][:16]]
        if args.incomplete:
            cells += [str(row["attempts"]), row["latest_checkpoint"] or "none", _process(row)]
        table.append((*cells, last_error[0][:60] if last_error else ""))
    print_table(("run", "stage", "step", "started (UTC)", *more, "last error"), table)
    if args.incomplete:
        idle = [row for row in rows if not row["alive"]] or rows
        print(f"\nresume one of them: {forge_command()} resume {shlex.quote(idle[-1]['run'])}")
    return EXIT_COMPLETE


def compare(args: argparse.Namespace) -> int:
    """Print one table of several complete runs."""
    from forge.report.comparison import as_json, compare_runs
    from forge.report.table import comparison_markdown, print_comparison

    comparison = compare_runs([find_run(Path(args.output_root), run) for run in args.which], args.metric)
    if args.json:
        print(json.dumps(as_json(comparison), indent=2, allow_nan=False))
    elif args.markdown:
        print(comparison_markdown(comparison, PLAIN_WIDTH), end="")
    else:
        print_comparison(comparison, table_console())
    return EXIT_COMPLETE


def incomplete_under(root: Path) -> list[tuple[RunDirectory, IncompleteRun]]:
    """The runs under root that can be resumed, the oldest first, with what the registry knows of them.

    A run's own state says whether it is complete: a run that was moved or copied has no entry.
    """
    entries = {entry.path.resolve(): entry for entry in incomplete_runs(root)}
    found = []
    for run in find_runs(root):
        entry = entries.get(run.path.resolve())
        try:
            state = TrainingState.load(run.state_file)
        except UsageError:  # a broken state: nobody knows that the run is complete
            found.append((run, entry or _entry(run, TrainingState(run_id="unknown", created_at=""))))
            continue
        try:
            left = not (state.pipeline_complete and nothing_left(run))  # a complete run's control may be left
        except UsageError as error:  # one broken run must not hide the others
            print(f"error: {error}", file=sys.stderr)
            continue
        if left:
            found.append((run, entry or _entry(run, state)))
    return found


def _entry(run: RunDirectory, state: TrainingState) -> IncompleteRun:
    """What the registry would know of a run that it does not have, such as one that was moved here."""
    return IncompleteRun(
        run_id=state.run_id,
        path=run.path.absolute(),
        name=run.name,
        host="",
        pid=0,
        created_at=state.created_at,
        stage=state.stage,
    )


def _row(run: RunDirectory, entry: IncompleteRun | None) -> dict[str, Any] | None:
    """What the list shows of a run; None, and an error line, for a broken one, which must not hide the others."""
    try:
        state = TrainingState.load(run.state_file)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    row: dict[str, Any] = {
        "run": str(run.path),
        "stage": state.stage.value,
        "complete": state.pipeline_complete,
        "step": state.step,
        "total_steps": state.total_steps,
        "attempts": state.attempts,
        "latest_checkpoint": state.latest_checkpoint,
        "created_at": state.created_at,
        "error": state.error,
    }
    if entry is not None:  # alive: null where it ran on another host
        row |= {"host": entry.host or None, "pid": entry.pid or None, "alive": is_alive(entry)}
    return row


def _process(row: dict[str, Any]) -> str:
    """The process that trains the run, as far as it can be seen from this host."""
    if row["host"] is None:
        return "none"
    if row["alive"] is None:
        return f"{row['pid']} on {row['host']}, not visible from here"
    return f"{row['pid']}, alive" if row["alive"] else "none"
