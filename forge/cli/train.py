"""The commands that train: train, launch and cache-teacher."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from forge.attempt.control import (
    ControlCheck,
    check_free_for_control,
    check_unchanged,
    nothing_left,
    run_of,
    train_control,
    wants_control,
)
from forge.attempt.request import Request
from forge.attempt.resume import is_done
from forge.cli.arguments import Overrides, training_arguments
from forge.cli.outcome import announce, heard_signals, logged, print_summary
from forge.cluster.processes import check_launcher_variables, rank
from forge.config.explain import config_name
from forge.config.loader import LoadedConfig, load_config
from forge.config.places import missing_places
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, ConfigError, UsageError
from forge.run.directory import RunDirectory, complete_message, find_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from forge.attempt.outcome import Result
    from forge.cluster.signals import StopRequest
    from forge.run.log import RunLog

logger = logging.getLogger("forge")


def train(args: argparse.Namespace) -> int:
    """Train a run, and then its control, which is a second run; return the exit code, also to the parent process."""
    stop = heard_signals()
    announce(EXIT_FAILED)  # until the end says otherwise
    control: RunDirectory | None = None
    left = False
    with logged() as outcome:
        run, request = _train(args, stop, outcome.log)
        left = _control_is_left(run)
        if (controlled := run_of(run)) is not None:  # this was a control, resumed by its own name
            run, control = controlled, run
    if outcome.complete and left:
        with logged() as outcome:
            run_pipeline, log = _imported_page(stop, outcome.log), outcome.log
            control = train_control(run, request, lambda twin: run_pipeline(twin, log, stop))
    if outcome.complete and control is not None and rank() == 0:
        with logged() as outcome:
            _report_with_control(run, control, outcome.log)
    if outcome.complete and "forge.ranks.world" in sys.modules:
        sys.modules["forge.ranks.world"].leave_ranks()
    return announce(outcome.exit_code)


def launch(args: argparse.Namespace) -> int:
    """Train in args.processes processes on this machine, and return forge's own exit code.

    Config, overrides and the run's name are checked first: what is wrong is reported before any process is started.
    """
    from forge.cluster.launch import default_processes, run_training

    if args.deepspeed is not None:
        args.set = [*args.set, f"deepspeed.student={args.deepspeed}"]
    loaded, resumed = _checked(args)
    if resumed is not None and is_done(resumed, loaded.config) and nothing_left(resumed):
        print(complete_message(resumed), flush=True)
        return EXIT_COMPLETE
    return run_training(training_arguments(args), args.processes or default_processes())


def cache_teacher(args: argparse.Namespace) -> int:
    """Compute a teacher's outputs into its cache, and return the exit code."""
    stop = heard_signals()
    with logged() as outcome:
        _cache_teacher(args, stop, outcome.log)
    return announce(outcome.exit_code)


def _train(args: argparse.Namespace, stop: "StopRequest", log: "RunLog") -> tuple[RunDirectory, Request]:
    """Train to the end; the run, complete now or before, and what was asked."""
    check_launcher_variables()
    loaded, resumed = _checked(args)
    check = ControlCheck(loaded.config, tuple(args.allow_change)) if wants_control(loaded.config) else None
    request = Request(
        *(loaded, sys.orig_argv, args.run_name, resumed, args.allow_change, args.take_over), before_training=check
    )
    if resumed is not None and is_done(resumed, loaded.config):
        logger.info("%s", complete_message(resumed))
        return resumed, request
    if resumed is not None or args.run_name is not None:  # a run named by the time has a control with a new name
        place = Path(loaded.config.output_root) / config_name(loaded.file) / (args.run_name or "")
        check_free_for_control(resumed or RunDirectory(place), loaded.config, args.allow_change)
    try:
        result = _imported_page(stop, log)(request, log, stop)
    except UsageError as error:
        if resumed is not None and error.__cause__ is not None and rank() == 0 and not log.is_open:
            log.open(resumed.log_file)  # with what a library raised, whose sentence alone is on the console
        raise
    if rank() == 0 and not wants_control(loaded.config):
        print_summary(result)
    return result.run, request


def _report_with_control(run: RunDirectory, control: RunDirectory, log: "RunLog") -> None:
    """Note a complete control in its run, and print the run's table with it."""
    from forge.attempt.outcome import record_control

    check_unchanged(control)
    log.open(run.log_file)
    logger.info("control run %s: complete", control.path)
    print_summary(record_control(run, control))


def _control_is_left(run: RunDirectory) -> bool:
    return wants_control(load_config(run.config_file).config) and not nothing_left(run)


def _imported_page(stop: "StopRequest", log: "RunLog") -> "Callable[[Request, RunLog, StopRequest], Result]":
    """The page, whose import takes some seconds, in which a signal is heard at once."""
    if "forge.pipeline" not in sys.modules:  # else the ranks are joined, and no rank may leave alone
        stop.breaks(_import_pipeline)
    from forge.data.progress import hide_progress_bars
    from forge.pipeline import run_pipeline

    log.adopt_library_loggers()
    if rank() > 0 or not log.console.is_terminal:
        hide_progress_bars()
    return run_pipeline


def _cache_teacher(args: argparse.Namespace, stop: "StopRequest", log: "RunLog") -> None:
    check_launcher_variables()
    config = Overrides.of(args).load(Path(args.config)).config
    stop.breaks(_import_caching)
    from forge.data.progress import hide_progress_bars
    from forge.student.teacher_metrics import keep_teacher_metrics
    from forge.teacher_cache import job

    log.adopt_library_loggers()
    if rank() > 0 or not log.console.is_terminal:
        hide_progress_bars()
    cache = job.cache_teacher(config, stop)
    keep_teacher_metrics(cache)
    cache.close()


def _import_pipeline() -> None:
    import forge.pipeline  # noqa: F401


def _import_caching() -> None:
    import forge.student.teacher_metrics
    import forge.teacher_cache.job  # noqa: F401


def _checked(args: argparse.Namespace) -> tuple[LoadedConfig, RunDirectory | None]:
    """The checked config, and the run to resume. Needs no torch: a wrong config answers at once."""
    overrides = Overrides.of(args)
    if args.config is not None:
        named = {"--allow-change": args.allow_change, "--take-over": args.take_over}
        if given := [flag for flag, value in named.items() if value]:
            raise UsageError(f"{', '.join(given)} can be given with --resume only: there is no run to resume")
        loaded = overrides.load(Path(args.config))
        if missing := missing_places(loaded):
            raise ConfigError(missing)
        return loaded, None
    if given := [f"--{name}" for name in ("debug", "run_name") if getattr(args, name)]:
        raise UsageError(f"{', '.join(given)} cannot be combined with --resume: a resumed run stays what it is")
    run = find_run(Path(args.output_root or "outputs"), args.resume)
    if (args.allow_change or overrides.change_training) and (owner := run_of(run)) is not None:
        raise UsageError(
            f"{run.path} is the control of {owner.path}, and must stay its twin: resume it without --set, --max_steps, "
            "--epochs and --allow-change"
        )
    return overrides.load(run.config_file), run
