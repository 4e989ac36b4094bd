"""The arguments that the commands share, and the overrides of a config among them."""

import argparse
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from forge.cluster.launch import option_words
from forge.errors import EXIT_USAGE

if TYPE_CHECKING:
    from forge.config.loader import LoadedConfig

EPILOG = "Exit codes: 0 complete; 1 failed; 2 usage or config error; 75 stopped on a signal, to be resumed."
SHIPPED = "configs/... also names one that comes with forge, from any folder"
RUN = "a run directory, or the name of a run if only one has it"


class Parser(argparse.ArgumentParser):
    """Reports in one sentence what is wrong with the command line, and takes no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take each flag with `-` or `_` between its words; argparse calls this for every subcommand too."""
        given = [self._as_declared(argument) for argument in (sys.argv[1:] if args is None else args)]
        if not any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            for flag in (argument.partition("=")[0] for argument in given if argument.startswith("--")):
                if flag not in self._option_string_actions and flag != "--":
                    self.error(f"there is no flag {flag}{self._meant(flag)}")  # before its value is taken for a file
        return super().parse_known_args(given, namespace)

    def _as_declared(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            return argument
        declared = {name.replace("_", "-"): name for name in self._option_string_actions}
        return f"{declared.get(flag.replace('_', '-'), flag)}{equals}{value}"

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message}; see `{self.prog} --help`\n")

    def _meant(self, unknown: str) -> str:
        """A hint for a flag that there is not: the nearest one, or the key of the config that is called like it."""
        from forge.config.hints import key_named

        flags = {flag.replace("_", "-"): flag for flag in self._option_string_actions if flag.startswith("--")}
        near = get_close_matches(unknown.replace("_", "-"), flags, n=1)
        if near:
            return f"; did you mean {flags[near[0]]}?"
        key = key_named(unknown.removeprefix("--").replace("-", "_"))
        return f"; keys of the config are set by --set {key}=VALUE" if key else ""


@dataclass(frozen=True)
class Overrides:
    """What a command line changes of a config: read once, applied once."""

    settings: tuple[str, ...] = ()  # of --set
    max_steps: str | None = None
    epochs: str | None = None
    debug: bool = False
    output_root: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Read them from parsed arguments; a command that lacks some of the flags leaves them out."""
        return cls(
            tuple(args.set),
            args.max_steps,
            args.epochs,
            getattr(args, "debug", False),
            getattr(args, "output_root", None),
        )

    @property
    def change_training(self) -> bool:
        """True if they ask for more than the config itself does."""
        return bool(self.settings or self.max_steps or self.epochs)

    def load(self, file: Path) -> "LoadedConfig":
        """Load a config with them. Raises ConfigError."""
        from forge.config.loader import load_config

        return load_config(
            file,
            self.settings,
            debug=self.debug,
            max_steps=self.max_steps,
            epochs=self.epochs,
            output_root=self.output_root,
        )

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        return option_words(
            set=self.settings,
            max_steps=self.max_steps,
            epochs=self.epochs,
            output_root=self.output_root,
            debug=self.debug,
        )


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that change keys of a config, a new run's or a resumed one's."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key of the config, such as training.seed=1; repeatable",
    )
    parser.add_argument("--max_steps", metavar="N", help="train for N optimizer steps, instead of epochs")
    parser.add_argument("--epochs", metavar="E", help="train for E passes over the training split")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments that change a config."""
    add_override_arguments(parser)
    parser.add_argument(
        "--debug", action="store_true", help="a few rows and two steps through every stage; nothing is sent to W&B"
    )
    parser.add_argument("--output_root", metavar="DIR", help="the folder for all runs (default: outputs)")


def add_output_root(parser: argparse.ArgumentParser) -> None:
    """Add the folder in which a command looks for runs."""
    parser.add_argument(
        "--output_root", metavar="DIR", default="outputs", help="the folder of all runs (default: outputs)"
    )


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only a resume has."""
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although this key differs from the checkpoint's config and changes the meaning of the run; "
        "repeatable",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="resume a run whose other process is frozen, or on a dead host",
    )


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training in this process."""
    _add_config_or_resume(parser)
    _add_run_name(parser)
    add_config_arguments(parser)
    add_resume_arguments(parser)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training in several processes on this machine."""
    _add_config_or_resume(parser)
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="number of ranks (default: one per GPU, or one on the CPU)"
    )
    parser.add_argument(
        "--deepspeed",
        metavar="PLAN",
        help="the DeepSpeed plan that shards the student, such as zero2 or a path.json; null for none "
        "(--set deepspeed.student=PLAN)",
    )
    _add_run_name(parser)
    add_config_arguments(parser)
    add_resume_arguments(parser)


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def training_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of `forge train` that asks for what parsed arguments of it, or of `forge launch`, do."""
    named = option_words(config=args.config, resume=args.resume, run_name=args.run_name)
    return [*named, *Overrides.of(args).arguments(), *resume_arguments(args)]


def resume_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of `forge train` that only a resume has, as they were given."""
    return option_words(allow_change=args.allow_change, take_over=args.take_over)


def _add_config_or_resume(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="X.yaml", help=f"start a new run from this config; {SHIPPED}")
    what.add_argument(  # SUPPRESS: where it is absent, it leaves what --config has set
        "config", metavar="X.yaml", nargs="?", default=argparse.SUPPRESS, help="the same without --config"
    )
    what.add_argument("--resume", metavar="RUN", help=f"resume a run: {RUN}")


def _add_run_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_name", metavar="NAME", help="name of the run directory (default: the start time)")
