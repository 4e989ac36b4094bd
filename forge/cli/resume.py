"""The command resume: one run, or every run that is incomplete, on this machine."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge.attempt.control import nothing_left
from forge.attempt.resume import is_done
from forge.cli.arguments import Overrides, resume_arguments
from forge.cli.console import print_error, print_table
from forge.cli.runs import incomplete_under
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, ForgeError, UsageError
from forge.run.directory import RunDirectory, complete_message, find_run
from forge.run.metadata import read_metadata
from forge.run.state import TrainingState

if TYPE_CHECKING:
    from forge.cluster.launch import SignalRelay

OUTCOMES = {EXIT_COMPLETE: "complete", EXIT_FAILED: "failed", EXIT_USAGE: "refused", EXIT_STOPPED: "stopped"}


def resume(args: argparse.Namespace) -> int:
    """Resume one run, or all, in child processes with as many ranks as the last attempt had; forge's exit code."""
    from forge.cluster.launch import SignalRelay

    if args.all:
        return _resume_all(args)
    run = find_run(Path(args.output_root), args.which)
    with SignalRelay() as relay:
        return _train_to_the_end(run, args, relay)


def _resume_all(args: argparse.Namespace) -> int:
    """Resume every incomplete run, one after the other; a stop signal ends them all. Returns the worst exit code."""
    from forge.cluster.launch import SignalRelay
    from forge.run.registry import is_alive

    if args.take_over:
        raise UsageError("--take-over cannot be combined with --all: it is for one run that you know to be dead")
    root = Path(args.output_root)
    runs = incomplete_under(root)
    if not runs:
        print(f"no incomplete runs under {root}")
        return EXIT_COMPLETE
    codes: list[int] = []
    outcomes: list[str] = []
    with SignalRelay() as relay:
        for number, (run, entry) in enumerate(runs, start=1):
            print(f"run {number} of {len(runs)}: {run.path}", flush=True)
            if is_alive(entry):
                print(f"skipped: process {entry.pid} is training it", flush=True)
                codes.append(EXIT_USAGE)
                outcomes.append(f"skipped: process {entry.pid} is training it")
                continue
            try:
                code = _train_to_the_end(run, args, relay)
            except ForgeError as error:
                print_error(error)
                code = error.exit_code
            codes.append(EXIT_STOPPED if relay.received else code)
            outcomes.append(_outcome(run, code))
            if codes[-1] == EXIT_STOPPED:
                break
    outcomes += ["not started"] * (len(runs) - len(outcomes))
    print_table(("run", "outcome"), [(str(run.path), text) for (run, _), text in zip(runs, outcomes, strict=True)])
    return next((code for code in (EXIT_STOPPED, EXIT_FAILED, EXIT_USAGE) if code in codes), EXIT_COMPLETE)


def _train_to_the_end(run: RunDirectory, args: argparse.Namespace, relay: "SignalRelay") -> int:
    """Train the run to its end in a child process; forge's exit code."""
    from forge.cluster.launch import option_words, run_training

    overrides = replace(Overrides.of(args), output_root=None)  # where it looks for the run, not a change of it
    config = overrides.load(run.config_file).config  # a wrong override is reported here, once, and not by every rank
    if is_done(run, config) and nothing_left(run):
        print(complete_message(run), flush=True)
        return EXIT_COMPLETE
    arguments = [*option_words(resume=run.path), *overrides.arguments(), *resume_arguments(args)]
    return run_training(arguments, args.processes or read_metadata(run).attempts[-1].ranks, relay=relay)


def _outcome(run: RunDirectory, code: int) -> str:
    """One line for the table of `resume --all`."""
    word = OUTCOMES.get(code, f"exit code {code}")
    if code != EXIT_FAILED:
        return word
    try:
        error = TrainingState.load(run.state_file).error
    except UsageError as broken:
        error = str(broken)
    return f"{word}: {error.splitlines()[0]}" if error else word
