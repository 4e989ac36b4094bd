"""The training command behind every entry: arguments in, exit code out."""

import argparse
import functools
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from forge.cluster.processes import rank, world_size
from forge.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_USAGE,
    AlreadyComplete,
    ConfigError,
    ForgeError,
    LostRank,
    Stopped,
    UnreadableRows,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from forge.cluster.signals import StopRequest
    from forge.config.loader import LoadedConfig
    from forge.pipeline import Result
    from forge.run.directory import RunDirectory
    from forge.run.log import RunLog


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with the command line, and takes no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message}; see `{self.prog} --help`\n")


EPILOG = "Exit codes: 0 complete; 1 failed; 2 usage or config error; 75 stopped on a signal, to be resumed."


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that change keys of a config, a new run's or a resumed one's."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key, such as training.seed=1; repeatable",
    )
    parser.add_argument("--max_steps", metavar="N", help="optimizer steps to train for, instead of epochs")
    parser.add_argument("--epochs", metavar="E", help="passes over the training split")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that change a config."""
    add_override_arguments(parser)
    parser.add_argument(
        "--debug", action="store_true", help="a few rows, two steps, every stage; nothing is sent to W&B"
    )
    parser.add_argument("--output_root", metavar="DIR", help="the folder that holds all runs (outputs)")


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a resume alone."""
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on although this key differs from the checkpoint's config and changes the meaning of the run; "
        "repeatable",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="go on with a run whose other process is frozen, or on a host that is dead",
    )


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="X.yaml", help="start a new run from this config")
    _add_resume(what)
    _add_run_name(parser)
    add_config_arguments(parser)
    add_resume_arguments(parser)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training in many processes of this machine."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", metavar="X.yaml", nargs="?", help="start a new run from this config")
    _add_resume(what)
    parser.add_argument(
        "--processes", type=process_count, required=True, metavar="N", help="one for each GPU, or so many on the CPU"
    )
    parser.add_argument(
        "--deepspeed",
        metavar="PLAN",
        help="the plan by which DeepSpeed shards the student, such as zero2 or a path.json; null for none "
        "(--set deepspeed.student=PLAN)",
    )
    _add_run_name(parser)
    add_config_arguments(parser)
    add_resume_arguments(parser)


def process_count(text: str) -> int:
    """For argparse: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes; give 1 or more")
    return int(text)


def _add_resume(parser: argparse._MutuallyExclusiveGroup) -> None:
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run: its directory, or its name if there is one such"
    )


def _add_run_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_name", metavar="NAME", help="the run directory's name (the time of the start)")


def train(args: argparse.Namespace) -> int:
    """Trains as the parsed arguments say, and returns the exit code, also to the command that started this one."""
    from forge.cluster.launch import write_outcome

    code = _train(args)
    if rank() == 0:
        write_outcome(code)
    return code


def _train(args: argparse.Namespace) -> int:
    """The heavy imports wait until the config holds."""
    from forge.cluster.launch import write_outcome
    from forge.run.directory import complete_message
    from forge.run.state import TrainingState

    def work(log: "RunLog", stop: "StopRequest") -> int:
        if rank() == 0:
            write_outcome(EXIT_FAILED)  # until the end says otherwise: from here on a signal is heard
        loaded, resumed = _loaded(args)
        if resumed is not None and TrainingState.load(resumed.state_file).pipeline_complete:
            asked = " (what else the command line asks for was not done)" if _overrides(args) else ""
            logging.getLogger("forge").info("%s%s", complete_message(resumed), asked)
            return EXIT_COMPLETE
        stop.breaks(_import_pipeline)
        from forge.pipeline import Request, run_pipeline

        request = Request(loaded, sys.orig_argv, args.run_name, resumed, args.allow_change, args.take_over)
        result = run_pipeline(request, log, stop)
        if rank() == 0:
            _print_summary(result)
        return EXIT_COMPLETE

    return _with_outcome(work)


def launch(args: argparse.Namespace) -> int:
    """Trains in args.processes processes of this machine, and returns forge's own exit code.

    Config, overrides and the run's name are checked here first: what is wrong is told before any process is started.
    """
    from forge.cluster.launch import run_training
    from forge.run.directory import complete_message
    from forge.run.state import TrainingState

    if args.deepspeed is not None:
        args.set = [*args.set, f"deepspeed.student={args.deepspeed}"]
    _, resumed = _loaded(args)
    if resumed is not None and TrainingState.load(resumed.state_file).pipeline_complete:
        print(complete_message(resumed), flush=True)
        return EXIT_COMPLETE
    return run_training(training_arguments(args), args.processes)


def training_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of `forge train` that asks for the same as parsed arguments of it do."""
    from forge.cluster.launch import option_words

    names = ("set", "config", "resume", "run_name", "max_steps", "epochs", "output_root", "allow_change")
    return option_words(**{name: getattr(args, name) for name in (*names, "debug", "take_over")})


def cache_teacher(args: argparse.Namespace) -> int:
    """Fills the teacher's cache as the parsed arguments say, and returns the exit code."""
    from forge.config.loader import load_config

    def work(log: "RunLog", stop: "StopRequest") -> int:
        overrides = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
        config = load_config(Path(args.config), args.set, debug=args.debug, **overrides).config
        stop.breaks(_import_caching)
        from forge.student.teacher_metrics import keep_numbers
        from forge.teacher_cache import job as caching

        log.adopt_library_loggers()
        if rank() > 0 or not log.console.is_terminal:
            caching.hide_progress_bars()
        caching.cache_teacher(config, stop, functools.partial(keep_numbers, stop))
        return EXIT_COMPLETE

    return _with_outcome(work)


def _with_outcome(work: "Callable[[RunLog, StopRequest], int]") -> int:
    """The exit code of work, which is given a log on the console and hears signals; its errors are told there."""
    from forge.cluster.signals import StopRequest
    from forge.run.log import start_logging

    stop = StopRequest()
    stop.listen()
    log = start_logging(rank())
    logger = logging.getLogger("forge")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if world_size() > 1 else "true")
    try:
        return work(log, stop)
    except AlreadyComplete as error:
        logger.info("%s", error)
        return error.exit_code
    except Stopped as stopped:
        if rank() == 0:
            logger.warning("%s", stopped)
        return stopped.exit_code
    except ForgeError as error:
        if rank() == 0 or isinstance(error, LostRank | UnreadableRows):
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                logger.error(problem)
        return error.exit_code
    except OSError as error:
        logger.error("stopped by the system: %s", error)
        return EXIT_FAILED
    except Exception as error:
        if "forge.ranks.agreement" in sys.modules and sys.modules["forge.ranks.agreement"].lost_rank(error):
            logger.error(
                "another rank has died before the first stage; its own messages, or the system's log, say why (here: "
                "%s)",
                str(error).splitlines()[0][:200],
            )
            return EXIT_FAILED
        logger.exception("forge failed; this is a bug in forge or in what it calls, and the traceback says where")
        return EXIT_FAILED
    finally:
        log.close()


def _import_pipeline() -> None:
    """Some seconds of imports, in which a signal is heard at once."""
    import forge.pipeline  # noqa: F401


def _import_caching() -> None:
    pass


def _loaded(args: argparse.Namespace) -> "tuple[LoadedConfig, RunDirectory | None]":
    """The checked config, and the run it is resumed in. Needs no torch: a wrong config answers at once."""
    from forge.config.loader import load_config
    from forge.run.directory import find_run

    if args.config is not None:
        named = {"--allow-change": args.allow_change, "--take-over": args.take_over}
        if given := [flag for flag, value in named.items() if value]:
            raise UsageError(f"{', '.join(given)} can be given with --resume only: a new run goes on with nothing")
        overrides = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
        return load_config(Path(args.config), args.set, debug=args.debug, **overrides), None
    if given := [f"--{name}" for name in ("debug", "run_name") if getattr(args, name)]:
        raise UsageError(f"{', '.join(given)} cannot be combined with --resume: a run goes on as what it is")
    run = find_run(Path(args.output_root or "outputs"), args.resume)
    overrides = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
    return load_config(run.config_file, args.set, **overrides), run


def _overrides(args: argparse.Namespace) -> bool:
    return bool(args.set or args.max_steps or args.epochs)


def _print_summary(result: "Result") -> None:
    """The numbers before and after, where the run lies, and what to do next."""
    if sys.stdout is None:  # closed by whoever started us; the log and the model card have the numbers
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, markup=False)  # a path may hold [brackets]
    known = result.evidence
    header, rows = (["metric", "before", "after"], result.table()) if known is None else known.table()
    if rows:
        table = Table(*header, title=result.run.name, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if known is not None and known.text:
        console.print(known.text, highlight=False)
    path = os.path.relpath(result.run.path) if result.run.path.is_relative_to(Path.cwd()) else result.run.path
    active = shutil.which("forge") is not None  # the environment that forge is installed in
    python = "python" if active else os.path.relpath(sys.executable)
    lines = (
        ("run", path, "metrics, log, config, provenance"),
        ("model", f"{path}/final", "its README.md is the model card, and says how to load it"),
        ("next", "forge runs" if active else f"{python} -m forge.cli runs", "all runs"),
        ("", f"{python} forge.py --config X.yaml --set model.path={shlex.quote(str(path))}", "go on from this model"),
    )
    for word, what, why in lines:
        console.print(f"{word:<6} {what}   # {why}", highlight=False, soft_wrap=True)
