"""The `forge` command: train, launch, resume, prove-resume, cache-teacher, plan, runs, compare, config."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module

from forge import __version__
from forge.cli.arguments import (
    EPILOG,
    RUN,
    Parser,
    add_config_arguments,
    add_launch_arguments,
    add_output_root,
    add_override_arguments,
    add_resume_arguments,
    add_train_arguments,
    positive,
)
from forge.cli.configs import add_config_commands
from forge.cli.console import print_error
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, ForgeError


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    parser, given = _parser(), sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help()
        return EXIT_USAGE
    args = parser.parse_args(given)
    try:
        return args.run(args)
    except ForgeError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:  # `forge runs | head`
        sys.stderr.close()
        return EXIT_COMPLETE
    except OSError as error:  # a name that is too long, an unreadable folder
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="forge", description="Train models from one YAML config.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"forge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train from a config, or resume a run", epilog=EPILOG)
    add_train_arguments(command)
    command.set_defaults(run=_later("forge.cli.train", "train"))

    command = commands.add_parser("launch", help="train in several processes on this machine", epilog=EPILOG)
    add_launch_arguments(command)
    command.set_defaults(run=_later("forge.cli.train", "launch"))

    command = commands.add_parser(
        "resume", help="resume one run, or all incomplete ones, on this machine", epilog=EPILOG
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("which", metavar="RUN", nargs="?", help=RUN)
    what.add_argument("--all", action="store_true", help="every incomplete run, one after the other, the oldest first")
    command.add_argument(
        "--processes", type=positive, metavar="N", help="number of ranks (default: as many as in the last attempt)"
    )
    add_override_arguments(command)
    add_resume_arguments(command)
    add_output_root(command)
    command.set_defaults(run=_later("forge.cli.resume", "resume"))

    add_config_commands(commands.add_parser("config", help="show, check and compare configs"))

    command = commands.add_parser(
        "prove-resume",
        help="kill a run repeatedly, resume it, and compare its end with that of an uninterrupted run",
        epilog="Exit codes: 0 identical to the last bit; 1 different, or a run failed; 2 usage or config error; "
        "130 interrupted.",
    )
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--kills", type=int, default=10, metavar="N", help="number of kills (default: 10)")
    command.add_argument("--processes", type=int, default=1, metavar="P", help="ranks on this machine (default: 1)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random kill times (default: 0)")
    add_config_arguments(command)
    command.set_defaults(run=_later("forge.proof.procedure", "prove_resume"))

    command = commands.add_parser(
        "cache-teacher", help="compute a teacher's outputs once, for teacher.placement: cached", epilog=EPILOG
    )
    command.add_argument("config", metavar="X.yaml")
    add_config_arguments(command)
    command.set_defaults(run=_later("forge.cli.train", "cache_teacher"))

    command = commands.add_parser("plan", help="will it fit? memory per GPU under each plan; see docs/plan.md")
    command.add_argument("config", metavar="X.yaml")
    command.add_argument("--gpus", required=True, metavar="GxM", help="GPUs per node, and GiB of each, such as 8x80")
    command.add_argument("--nodes", type=positive, default=1, metavar="M", help="number of such nodes (default: 1)")
    command.add_argument("--json", action="store_true", help="every number, for scripts")
    add_config_arguments(command)
    command.set_defaults(run=_later("forge.cli.plan", "plan"))

    command = commands.add_parser("runs", help="list runs")
    command.add_argument("--incomplete", action="store_true", help="only those that can be resumed, and how")
    command.add_argument("--json", action="store_true", help="one JSON list, for scripts")
    add_output_root(command)
    command.set_defaults(run=_later("forge.cli.runs", "runs"))

    command = commands.add_parser(
        "compare", help="one table of complete runs, with 95 %% intervals over their seeds; see docs/compare.md"
    )
    command.add_argument("which", metavar="RUN", nargs="+", help=RUN)
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
    add_output_root(command)
    command.set_defaults(run=_later("forge.cli.runs", "compare"))
    return parser


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A command whose module is imported when it runs, so that --help answers at once."""

    def run(args: argparse.Namespace) -> int:
        code: int = getattr(import_module(module), function)(args)
        return code

    return run
