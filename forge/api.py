"""forge in a notebook or a script: train, resume and read runs in this process, with one rank."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

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
from forge.cluster.processes import check_launcher_variables, world_size
from forge.cluster.signals import STOP_SIGNALS, StopRequest
from forge.config.explain import config_name, inline
from forge.config.loader import load_config as load_file
from forge.config.schema import Config
from forge.errors import UsageError
from forge.run.directory import RunDirectory, find_run
from forge.run.log import start_logging
from forge.run.metadata import RunMetadata, read_metadata
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState

if TYPE_CHECKING:
    from forge.attempt.outcome import Result

Settings = Mapping[str, object] | Sequence[str]


@dataclass(frozen=True)
class Run:
    """A run as its directory holds it at the moment it is read."""

    path: Path
    config: Config = field(repr=False)
    state: TrainingState = field(repr=False)
    metadata: RunMetadata = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.absolute().name

    @property
    def complete(self) -> bool:
        """True once every stage of the run is done."""
        return self.state.pipeline_complete

    @property
    def final(self) -> Path:
        """The folder of the trained model, for from_pretrained; its README.md is the model card."""
        return self.path / "final"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one for each report of training, and one for each evaluation (with `stage`)."""
        file = RunDirectory(self.path).metrics_file
        return read_metrics(file) if file.exists() else []

    def evaluation(self, stage: str = "final") -> dict[str, Any]:
        """The last evaluation of a stage (teacher, baseline, training or final) by `split/metric`; empty if none."""
        found = [row for row in self.metrics if row.get("stage") == stage]
        return {name: value for name, value in found[-1].items() if "/" in name} if found else {}


def train(
    config: str | Path,
    settings: Settings = (),
    *,
    run_name: str | None = None,
    output_root: str | Path | None = None,
    debug: bool = False,
) -> Run:
    """Train a new run of a config file to its end, and its control if the config wants one.

    Ctrl-C stops it with a committed checkpoint: it raises Stopped, and `resume` continues. It trains in this process;
    for several ranks use `forge launch`.

    Args:
        config: A YAML file.
        settings: Changes of its keys: {"training.seed": 1} or ["training.seed=1"].
        run_name: Name of the run directory; None: the start time.
        output_root: The folder of all runs; None: as the config says.
        debug: A few rows and two steps through every stage.

    Raises:
        ForgeError: What the command line reports as an error, such as UsageError for a wrong config.
    """
    if run_name is not None and not isinstance(run_name, str):
        raise UsageError(f"run_name is {run_name!r}; give a text, or None for the start time")
    root = None if output_root is None else str(_path("output_root", output_root))
    loaded = load_file(_path("config", config), _lines(settings), debug=debug, output_root=root)
    return _to_the_end(Request(loaded, sys.orig_argv, run_name))


def resume(
    run: "str | Path | Run",
    settings: Settings = (),
    *,
    allow_changes: Sequence[str] = (),
    take_over: bool = False,
    output_root: str | Path = "outputs",
) -> Run:
    """Resume a run to its end, and its control; a run with nothing left to do is returned as it is.

    Args:
        run: A run directory, or the name of a run if only one under output_root has it.
        settings: Changes of its config.
        allow_changes: Keys that may change the meaning of the run.
        take_over: From a process that is frozen, or on a dead host.
        output_root: Where a name is looked for.

    Raises:
        ForgeError: As `train` does.
    """
    allowed = _texts("allow_changes", allow_changes, "a list of keys")
    directory = RunDirectory(run.path) if isinstance(run, Run) else _found(run, output_root)
    loaded = load_file(directory.config_file, _lines(settings))
    return _to_the_end(Request(loaded, sys.orig_argv, None, directory, tuple(allowed), take_over))


def load_run(run: "str | Path | Run", *, output_root: str | Path = "outputs") -> Run:
    """Read a run back; run: its directory, or its name if only one under output_root has it. Raises UsageError."""
    directory = RunDirectory(run.path) if isinstance(run, Run) else _found(run, output_root)
    return Run(
        directory.path,
        load_file(directory.config_file).config,
        TrainingState.load(directory.state_file),
        read_metadata(directory),
    )


def load_config(file: str | Path, settings: Settings = ()) -> Config:
    """Load and check a config file with the files that it inherits. Raises ConfigError with every problem in it."""
    return load_file(_path("file", file), _lines(settings)).config


def _lines(settings: Settings) -> list[str]:
    """The settings as the command line has them."""
    if isinstance(settings, Mapping):
        return [f"{key}={_inline(key, value)}" for key, value in settings.items()]
    return _texts("settings", settings, "a list of texts such as 'training.seed=1', or a mapping")


def _inline(key: object, value: object) -> str:
    plain = str(value) if isinstance(value, Path) else value
    try:
        return inline(plain)
    except yaml.YAMLError:
        raise UsageError(f"settings: {key} is a {type(value).__name__}, which a config cannot hold") from None


def _texts(name: str, value: object, wanted: str) -> list[str]:
    """Check a list of texts. Raises UsageError with the name of the argument and what it should be."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name} is {value!r}; give {wanted}")
    return list(value)


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | Path):
        raise UsageError(f"{name} is {value!r}; give a path")
    return Path(value)


def _found(run: object, output_root: object) -> RunDirectory:
    return find_run(_path("output_root", output_root), str(_path("run", run)))


def _to_the_end(request: Request) -> Run:
    check_launcher_variables()
    if world_size() > 1:
        raise UsageError("forge.train and forge.resume train with one rank; for several use `forge launch`")
    if wants_control(request.config):
        request = replace(request, before_training=ControlCheck(request.config, tuple(request.allowed_changes)))
        if request.resumed is not None or request.run_name is not None:
            place = Path(request.config.output_root) / config_name(request.loaded.file) / (request.run_name or "")
            check_free_for_control(request.resumed or RunDirectory(place), request.config, request.allowed_changes)
    with _stops() as stop:
        run = request.resumed
        if run is None or not is_done(run, request.config):
            run = _pipeline(request, stop).run
        controlled, control = run_of(run), None
        if controlled is not None:  # this was a control, resumed by its own name
            control = run
        elif not nothing_left(run):
            controlled, control = run, train_control(run, request, lambda twin: _pipeline(twin, stop))
        if controlled is not None and control is not None:
            from forge.attempt.outcome import record_control

            check_unchanged(control)
            record_control(controlled, control)
    return load_run(run.path)


@contextmanager
def _stops() -> Iterator[StopRequest]:
    """Stop signals ask the run to stop while it trains; afterwards they do what they did before.

    A second Ctrl-C raises KeyboardInterrupt, and does not end the process as it does on the command line. In another
    thread than the main one, no signal is heard.
    """
    from forge.ranks.world import leave_ranks

    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        try:
            yield stop
        finally:
            leave_ranks()
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop.listen()
    ask = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        if stop.reason is not None or not callable(ask):
            raise KeyboardInterrupt
        ask(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        leave_ranks()


def _pipeline(request: Request, stop: StopRequest) -> "Result":
    from forge.data.progress import hide_progress_bars
    from forge.pipeline import run_pipeline

    level = logging.getLogger().level
    log = start_logging(0)
    try:
        log.adopt_library_loggers()
        if not log.console.is_terminal:
            hide_progress_bars()
        return run_pipeline(request, log, stop)
    finally:
        log.close()
        logging.getLogger().setLevel(level)
