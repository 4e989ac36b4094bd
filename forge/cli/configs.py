"""The `forge config` commands: show, validate, diff and schema."""

import argparse
import sys
from pathlib import Path

from forge.cli.arguments import SHIPPED, Overrides, add_config_arguments
from forge.errors import EXIT_COMPLETE, EXIT_USAGE, BaseConfigError, ConfigError

FILE = f"a config; {SHIPPED}"


def add_config_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `forge config`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("show", help="print the merged config")
    command.add_argument("config", metavar="X.yaml", help=FILE)
    command.add_argument("--origin", action="store_true", help="show which file and line, or flag, set each value")
    add_config_arguments(command)
    command.set_defaults(run=_show)

    command = commands.add_parser("validate", help="check configs; exit 2 if one is wrong")
    command.add_argument("configs", nargs="+", metavar="X.yaml", help=FILE)
    command.set_defaults(run=_validate)

    command = commands.add_parser("diff", help="print the keys in which two merged configs differ")
    command.add_argument("left", metavar="A.yaml", help=FILE)
    command.add_argument("right", metavar="B.yaml", help="the config to compare it with")
    command.set_defaults(run=_diff)

    command = commands.add_parser("schema", help="print the JSON schema of a config, for editors")
    command.set_defaults(run=_schema)


def _show(args: argparse.Namespace) -> int:
    from forge.config.explain import show

    loaded = Overrides.of(args).load(Path(args.config))
    print(show(loaded, origin=args.origin), end="")
    for notice in loaded.notices:
        print(f"notice: {notice}", file=sys.stderr)
    return EXIT_COMPLETE


def _validate(args: argparse.Namespace) -> int:
    from forge.config.loader import load_config
    from forge.config.places import missing_places

    wrong = 0
    for name in args.configs:
        try:
            loaded = load_config(Path(name))
            if missing := missing_places(loaded):
                raise ConfigError(missing)
        except BaseConfigError:
            print(f"{name}: valid, but only a base for other configs: it sets neither task nor model")
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
