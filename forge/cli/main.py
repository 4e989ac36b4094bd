"""The `forge` command: train, launch, resume, prove-resume, cache-teacher, plan, runs, compare, config."""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge import __version__
from forge.cli.train import (
    EPILOG,
    Parser,
    add_config_arguments,
    add_launch_arguments,
    add_override_arguments,
    add_resume_arguments,
    add_train_arguments,
    cache_teacher,
    launch,
    process_count,
    train,
)
from forge.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    BaseConfigError,
    ConfigError,
    ForgeError,
    UsageError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from forge.cluster.launch import SignalRelay
    from forge.run.directory import RunDirectory
    from forge.run.registry import IncompleteRun

OUTCOMES = {EXIT_COMPLETE: "complete", EXIT_FAILED: "failed", EXIT_USAGE: "refused", EXIT_STOPPED: "stopped"}
PLAIN_WIDTH = 160  # of tables, where there is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except ForgeError as error:
        _print_error(error)
        return error.exit_code
    except BrokenPipeError:  # `forge runs | head`
        sys.stderr.close()
        return EXIT_COMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="forge", description="Train models from one YAML config.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"forge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train from a config, or go on with a run", epilog=EPILOG)
    add_train_arguments(command)
    command.set_defaults(run=train)

    command = commands.add_parser("launch", help="train in many processes of this machine", epilog=EPILOG)
    add_launch_arguments(command)
    command.set_defaults(run=launch)

    command = commands.add_parser(
        "resume", help="go on with a run, or with all that are incomplete, on this machine", epilog=EPILOG
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("which", metavar="RUN", nargs="?", help="a run's directory, or its name if there is one such")
    what.add_argument("--all", action="store_true", help="every incomplete run, the oldest first, one after the other")
    command.add_argument(
        "--processes", type=process_count, metavar="N", help="ranks to train with (as many as the last attempt had)"
    )
    add_override_arguments(command)
    add_resume_arguments(command)
    _add_output_root(command)
    command.set_defaults(run=_resume)

    config = commands.add_parser("config", help="show, check and compare configs").add_subparsers(
        required=True, metavar="COMMAND"
    )
    command = config.add_parser("show", help="print the merged config")
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--origin", action="store_true", help="say which file and line, or flag, set each value")
    add_config_arguments(command)
    command.set_defaults(run=_show)
    command = config.add_parser("validate", help="check configs; exit 2 if one is wrong")
    command.add_argument("configs", nargs="+", metavar="X.yaml")
    command.set_defaults(run=_validate)
    command = config.add_parser("diff", help="the keys in which two merged configs differ")
    command.add_argument("left", metavar="A.yaml")
    command.add_argument("right", metavar="B.yaml")
    command.set_defaults(run=_diff)
    command = config.add_parser("schema", help="the JSON schema of a config, for editors")
    command.set_defaults(run=_schema)

    command = commands.add_parser(
        "prove-resume",
        help="kill a run again and again, and compare its end with the unbroken run's",
        epilog="Exit codes: 0 identical to the last bit; 1 different, or a run failed; 2 usage or config error; "
        "130 interrupted.",
    )
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--kills", type=int, default=10, metavar="N", help="how often the run is killed (10)")
    command.add_argument("--processes", type=int, default=1, metavar="P", help="ranks on this machine (1)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="draws the instants of the kills (0)")
    add_config_arguments(command)
    command.set_defaults(run=_prove_resume)

    command = commands.add_parser(
        "cache-teacher", help="compute a teacher's outputs once, for teacher.placement: cached", epilog=EPILOG
    )
    command.add_argument("config", metavar="X.yaml")
    add_config_arguments(command)
    command.set_defaults(run=cache_teacher)

    command = commands.add_parser("plan", help="will it fit? memory per GPU under each plan; see docs/plan.md")
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--gpus", required=True, metavar="GxM", help="GPUs of a node and GiB of each, such as 8x80")
    command.add_argument("--nodes", type=_nodes, default=1, metavar="M", help="how many such nodes (1)")
    command.add_argument("--json", action="store_true", help="every number, for scripts")
    add_config_arguments(command)
    command.set_defaults(run=_plan)

    command = commands.add_parser("runs", help="list runs")
    command.add_argument("--incomplete", action="store_true", help="only those that can go on, with the command for it")
    command.add_argument("--json", action="store_true", help="one JSON list, for scripts")
    _add_output_root(command)
    command.set_defaults(run=_runs)

    command = commands.add_parser(
        "compare", help="one table of complete runs, with 95 %% intervals over their seeds; see docs/compare.md"
    )
    command.add_argument("which", metavar="RUN", nargs="+", help="a run's directory, or its name if there is one such")
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one, such as accuracy or matched/accuracy; repeatable",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every number of every run, for scripts")
    form.add_argument("--markdown", action="store_true", help="the table for a document")
    _add_output_root(command)
    command.set_defaults(run=_compare)
    return parser


def _prove_resume(args: argparse.Namespace) -> int:
    from forge.proof.procedure import prove_resume

    return prove_resume(args)


def _plan(args: argparse.Namespace) -> int:
    from forge.cli.plan import plan

    return plan(args, _console())


def _add_output_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_root", metavar="DIR", default="outputs", help="the folder that holds all runs (outputs)"
    )


def _nodes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes; give 1 or more")
    return int(text)


def _print_error(error: ForgeError) -> None:
    for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
        print(f"error: {problem}", file=sys.stderr, flush=True)


def _resume(args: argparse.Namespace) -> int:
    from forge.cluster.launch import SignalRelay
    from forge.run.directory import find_run

    if args.all:
        return _resume_all(args)
    run = find_run(Path(args.output_root), args.which)
    with SignalRelay() as relay:
        return _go_on(run, args, relay)


def _resume_all(args: argparse.Namespace) -> int:
    """Every incomplete run, one after the other; a stop signal ends them all. The worst exit code of all."""
    from forge.cluster.launch import SignalRelay
    from forge.run.registry import is_alive

    if args.take_over:
        raise UsageError("--take-over cannot be combined with --all: it is for one run that you know to be dead")
    root = Path(args.output_root)
    runs = _incomplete(root)
    if not runs:
        print(f"no incomplete runs below {root}")
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
                code = _go_on(run, args, relay)
            except ForgeError as error:
                _print_error(error)
                code = error.exit_code
            codes.append(EXIT_STOPPED if relay.received else code)
            outcomes.append(_outcome(run, code))
            if codes[-1] == EXIT_STOPPED:
                break
    outcomes += ["not started"] * (len(runs) - len(outcomes))
    _print_table(("run", "outcome"), [(str(run.path), text) for (run, _), text in zip(runs, outcomes, strict=True)])
    return next((code for code in (EXIT_STOPPED, EXIT_FAILED, EXIT_USAGE) if code in codes), EXIT_COMPLETE)


def _go_on(run: "RunDirectory", args: argparse.Namespace, relay: "SignalRelay") -> int:
    """Trains the run to its end in a child process; forge's exit code."""
    from forge.cluster.launch import option_words, run_training
    from forge.config.loader import load_config
    from forge.run.metadata import read_metadata
    from forge.run.state import TrainingState

    if TrainingState.load(run.state_file).pipeline_complete:
        print(f"{run.path} is complete; its model is in {run.final}", flush=True)
        return EXIT_COMPLETE
    # A wrong override is told here, at once, and not by every rank.
    load_config(run.config_file, args.set, max_steps=args.max_steps, epochs=args.epochs)
    names = ("set", "max_steps", "epochs", "allow_change", "take_over")
    arguments = option_words(resume=run.path, **{name: getattr(args, name) for name in names})
    return run_training(arguments, args.processes or read_metadata(run).attempts[-1].ranks, relay=relay)


def _outcome(run: "RunDirectory", code: int) -> str:
    """One line for the table of `resume --all`."""
    from forge.run.state import TrainingState

    word = OUTCOMES.get(code, f"exit code {code}")
    if code != EXIT_FAILED:
        return word
    try:
        error = TrainingState.load(run.state_file).error
    except UsageError as broken:
        error = str(broken)
    return f"{word}: {error.splitlines()[0]}" if error else word


def _incomplete(root: Path) -> "list[tuple[RunDirectory, IncompleteRun]]":
    """The runs below root that can go on, with what the registry says of them; the oldest first.

    Whether one is complete stands in its own state: a run that was moved or copied has no entry.
    """
    from forge.run.directory import find_runs
    from forge.run.registry import IncompleteRun, incomplete_runs
    from forge.run.state import TrainingState

    entries = {entry.path.resolve(): entry for entry in incomplete_runs(root)}
    found = []
    for run in find_runs(root):
        entry = entries.get(run.path.resolve())
        try:
            state = TrainingState.load(run.state_file)
        except UsageError:  # a broken one: only its entry tells that it is no complete one
            found += [(run, entry)] if entry is not None else []
            continue
        if not state.pipeline_complete:
            known = IncompleteRun(
                run_id=state.run_id,
                path=run.path.absolute(),
                name=run.name,
                host="",
                pid=0,
                created_at=state.created_at,
                stage=state.stage,
            )
            found.append((run, entry or known))
    return found


def _show(args: argparse.Namespace) -> int:
    from forge.config.explain import show
    from forge.config.loader import load_config

    loaded = load_config(
        Path(args.config),
        args.set,
        debug=args.debug,
        max_steps=args.max_steps,
        epochs=args.epochs,
        output_root=args.output_root,
    )
    print(show(loaded, origin=args.origin), end="")
    for notice in loaded.notices:
        print(f"notice: {notice}", file=sys.stderr)
    return EXIT_COMPLETE


def _validate(args: argparse.Namespace) -> int:
    from forge.config.loader import load_config

    wrong = 0
    for name in args.configs:
        try:
            loaded = load_config(Path(name))
        except BaseConfigError:
            print(f"{name}: valid, a base for other configs: it sets neither task nor model")
        except ConfigError as error:
            wrong += 1
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        else:
            print(f"{name}: valid" + "".join(f"; {notice}" for notice in loaded.notices))
    return EXIT_USAGE if wrong else EXIT_COMPLETE


def _diff(args: argparse.Namespace) -> int:
    from forge.config.explain import difference
    from forge.config.loader import load_config

    configs, problems = [], []
    for name in (args.left, args.right):
        try:
            configs.append(load_config(Path(name)).config)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    lines = difference(*configs)
    print("\n".join(lines) if lines else "no difference")
    return EXIT_COMPLETE


def _schema(args: argparse.Namespace) -> int:
    from forge.config.explain import json_schema

    print(json_schema())
    return EXIT_COMPLETE


def _runs(args: argparse.Namespace) -> int:
    from forge.run.directory import find_runs
    from forge.run.registry import is_alive
    from forge.run.state import TrainingState

    root = Path(args.output_root)
    found: list[tuple[RunDirectory, IncompleteRun | None]] = (
        [*_incomplete(root)] if args.incomplete else [(run, None) for run in find_runs(root)]
    )
    rows: list[dict[str, Any]] = []
    for run, entry in found:
        try:
            state = TrainingState.load(run.state_file)
        except UsageError as error:  # one broken run must not hide the others
            print(f"error: {error}", file=sys.stderr)
            continue
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
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=2))
        return EXIT_COMPLETE
    if not rows:
        print(f"no {'incomplete ' if args.incomplete else ''}runs below {root}")
        return EXIT_COMPLETE
    more = ("attempts", "checkpoint", "process") if args.incomplete else ()
    table: list[tuple[str, ...]] = []
    for row in rows:
        last_error = (row["error"] or "").splitlines()
        cells = [row["run"], row["stage"], f"{row['step']}/{row['total_steps']}", row["created_at"][:16]]
        if args.incomplete:
            cells += [str(row["attempts"]), row["latest_checkpoint"] or "none", _process(row)]
        table.append((*cells, last_error[0][:60] if last_error else ""))
    _print_table(("run", "stage", "step", "started (UTC)", *more, "last error"), table)
    if args.incomplete:
        command = "forge resume" if shutil.which("forge") else "python forge.py --resume"
        idle = [row for row in rows if not row["alive"]] or rows
        print(f"\ngo on with one of them: {command} {shlex.quote(idle[-1]['run'])}")
    return EXIT_COMPLETE


def _compare(args: argparse.Namespace) -> int:
    from forge.report.comparison import as_json, compare_runs
    from forge.report.table import comparison_markdown, print_comparison
    from forge.run.directory import find_run

    comparison = compare_runs([find_run(Path(args.output_root), run) for run in args.which], args.metric)
    if args.json:
        print(json.dumps(as_json(comparison), indent=2, allow_nan=False))
    elif args.markdown:
        print(comparison_markdown(comparison, PLAIN_WIDTH), end="")
    else:
        print_comparison(comparison, _console())
    return EXIT_COMPLETE


def _process(row: dict[str, Any]) -> str:
    """Is anybody at work on the run?"""
    if row["alive"] is None:
        return f"{row['pid']} on {row['host']}, not seen from here"
    return f"{row['pid']}, alive" if row["alive"] else "none"


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout and sys.stdout.isatty() else PLAIN_WIDTH, markup=False)
