"""The `forge` command: train, prove-resume, config, runs."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from forge import __version__
from forge.command import EPILOG, Parser, add_config_arguments, add_train_arguments, train
from forge.errors import EXIT_COMPLETE, EXIT_USAGE, BaseConfigError, ConfigError, ForgeError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
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
        epilog="Exit codes: 0 identical to the last bit; 1 different, or a run failed; 2 usage or config error.",
    )
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--kills", type=int, default=10, metavar="N", help="how often the run is killed (10)")
    command.add_argument("--processes", type=int, default=1, metavar="P", help="ranks on this machine (1)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="draws the instants of the kills (0)")
    add_config_arguments(command)
    command.set_defaults(run=_prove_resume)

    command = commands.add_parser("runs", help="list runs")
    command.add_argument("--incomplete", action="store_true", help="only those that can go on, with the command for it")
    command.add_argument("--json", action="store_true", help="one JSON list, for scripts")
    command.add_argument(
        "--output_root", metavar="DIR", default="outputs", help="the folder that holds all runs (outputs)"
    )
    command.set_defaults(run=_runs)
    return parser


def _prove_resume(args: argparse.Namespace) -> int:
    from forge.prove_resume import prove_resume

    return prove_resume(args)


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
    from forge.run.registry import incomplete_runs
    from forge.run.state import TrainingState

    root = Path(args.output_root)
    runs = find_runs(root)
    if args.incomplete:
        unfinished = {entry.path.resolve() for entry in incomplete_runs(root)}
        runs = [run for run in runs if run.path.resolve() in unfinished]
    rows: list[dict[str, Any]] = []
    for run in runs:
        try:
            state = TrainingState.load(run.state_file)
        except UsageError as error:  # one broken run must not hide the others
            print(f"error: {error}", file=sys.stderr)
            continue
        rows.append(
            {
                "run": str(run.path),
                "stage": state.stage.value,
                "complete": state.pipeline_complete,
                "step": state.step,
                "total_steps": state.total_steps,
                "attempts": state.attempts,
                "created_at": state.created_at,
                "error": state.error,
            }
        )
    if args.json:
        print(json.dumps(rows, indent=2))
        return EXIT_COMPLETE
    if not rows:
        print(f"no {'incomplete ' if args.incomplete else ''}runs below {root}")
        return EXIT_COMPLETE
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "stage", "step", "started (UTC)", "last error", box=None)
    for row in rows:
        last_error = (row["error"] or "").splitlines()
        step = f"{row['step']}/{row['total_steps']}"
        table.add_row(row["run"], row["stage"], step, row["created_at"][:16], last_error[0][:60] if last_error else "")
    Console(width=None if sys.stdout and sys.stdout.isatty() else 160, markup=False).print(table)
    if args.incomplete:
        print(f"\ngo on with one of them: python forge.py --resume {shlex.quote(rows[-1]['run'])}")
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(main())
