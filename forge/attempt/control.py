"""The control of a distilled run: its twin without the teacher, trained for as many steps in a run next to it."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.attempt.request import Request
from forge.cluster.processes import rank, world_size
from forge.config.changes import ROWS, Kind, changes
from forge.config.explain import effective, with_absolute_paths
from forge.config.loader import LoadedConfig, load_config
from forge.config.schema import Config
from forge.errors import ForgeError, Stopped, UsageError
from forge.run.directory import RunDirectory
from forge.run.hints import resume_command
from forge.run.lock import RunLock
from forge.run.metadata import RunMetadata, named, read_metadata
from forge.run.state import TrainingState

logger = logging.getLogger(__name__)

SUFFIX = "-sft"
# What open_run writes before the state, which marks a run: a folder that holds no more was left by a kill meanwhile.
FIRST_FILE = re.compile(  # or one that was being written
    r"config\.yaml|run_metadata\.json|requirements\.txt|dirty_1\.diff"
    r"|\.(config\.yaml|run_metadata\.json|requirements\.txt|dirty_1\.diff|training_state\.json)\.[0-9a-f]{12}\.tmp"
)
FACTS: tuple[tuple[str, Callable[[RunMetadata], object]], ...] = (  # that a run and its control have in common
    ("rows, or their tokens,", lambda metadata: metadata.data.fingerprint),
    ("weights of the model", lambda metadata: metadata.model.weights_sha256),
    ("weights of the teacher", lambda metadata: metadata.teacher.weights_sha256 if metadata.teacher else None),
    ("rows of a step", lambda metadata: metadata.world.rows_per_step),
)


@dataclass(frozen=True)
class Control:
    """A control that exists already."""

    run: RunDirectory
    complete: bool
    allowed: list[str]  # keys of --allow-change that it is resumed with


def train_control(run: RunDirectory, request: Request, train: Callable[[Request], object]) -> RunDirectory:
    """Train the control of a complete run to its end, and return it; one that is complete already is returned at once.

    The run stays locked meanwhile, so that no other process does the same. For all ranks at once.

    Args:
        request: The one that the run was started or resumed by.
        train: Takes a request through the whole page.

    Raises:
        UsageError: Something else has the control's name, or another process trains it.
        Stopped: By a signal; the message says how to go on.
    """
    from forge.ranks.agreement import on_every_rank  # imports torch

    control, lock = control_of(run), RunLock(run)

    def locked() -> Request | None:
        if rank() == 0:
            lock.take(take_over=request.take_over)
        return next_control(run, request)

    try:
        twin = on_every_rank(locked)
        if twin is None:
            logger.info("the control run %s is complete already", control.path)
            return control
        steps = twin.config.training.max_steps
        logger.info("control run %s: the same without the teacher, %s steps", control.path, steps)
        train(twin)
    except Stopped as stopped:
        if control.state_file.is_file():  # it says itself how to resume it
            raise
        resume = resume_command(run.path, world_size())
        reason = str(stopped).split(";")[0]  # what follows is about a run that is started again
        raise Stopped(f"{reason} of its control; {run.path} is complete; train its control with `{resume}`") from None
    except ForgeError:
        logger.warning("the run %s is complete; what follows is about its control", run.path)
        raise
    finally:
        lock.release()
    return control


def next_control(run: RunDirectory, request: Request) -> Request | None:
    """The request for the control of a complete run; None: that is complete already.

    request: the one that the run was started or resumed by, for the command, `--allow-change` and `--take-over`.

    Raises:
        UsageError: Something else has the control's name.
    """
    config = load_config(run.config_file).config
    state, metadata, control = TrainingState.load(run.state_file), read_metadata(run), control_of(run)
    twin = control_config(config, state.total_steps)
    known = check_control(control, twin, steps=state.total_steps, facts=metadata, allowed=request.allowed_changes)
    if known is not None and known.complete:
        return None
    root, place = place_of(run, config)
    return Request(
        LoadedConfig(twin.model_copy(update={"output_root": str(root)}), metadata.config_file),
        request.command,
        control.name,
        known.run if known is not None else None,
        known.allowed if known is not None else [],
        request.take_over and known is not None,
        place,
        {"control_of": named(run).model_dump()},
    )


def check_free_for_control(run: RunDirectory, config: Config, allowed: Sequence[str] = ()) -> None:
    """Refuse, before the run, a name that its control cannot have. Raises UsageError."""
    if wants_control(config):
        check_control(control_of(run), control_config(config, 1), allowed=allowed)


@dataclass(frozen=True)
class ControlCheck:
    """Refuses, before the first step, a control that an earlier attempt left and that is not this run's twin."""

    config: Config
    allowed: tuple[str, ...] = ()

    def __call__(self, run: RunDirectory, steps: int) -> None:
        """run: open, with its metadata; steps: of the whole run. Raises UsageError."""
        wanted = control_config(self.config, steps)
        check_control(control_of(run), wanted, steps=steps, facts=read_metadata(run), allowed=self.allowed)


def run_of(control: RunDirectory) -> RunDirectory | None:
    """The complete run that a complete control belongs to and that has not its metrics yet; None for any other run."""
    owner = read_metadata(control).control_of if control.name.endswith(SUFFIX) else None
    if owner is None:
        return None
    run = RunDirectory(control.path.with_name(control.name.removesuffix(SUFFIX)))
    if not run.state_file.is_file() or not TrainingState.load(run.state_file).pipeline_complete:
        return None
    return run if owner == named(run) and read_metadata(run).control is None else None


def check_unchanged(control: RunDirectory) -> None:
    """Refuse a complete control that is not the twin of its run, before the run takes its metrics.

    Raises:
        UsageError: Its config, rows, weights or steps differ from the run's, and the run was not allowed that.
    """
    run = run_of(control)
    if run is None:
        return
    config, metadata = load_config(run.config_file).config, read_metadata(run)
    steps = TrainingState.load(run.state_file).total_steps
    allowed = sorted({key for attempt in metadata.attempts for key in attempt.allowed})
    check_control(control, control_config(config, steps), steps=steps, facts=metadata, allowed=allowed)


def nothing_left(run: RunDirectory) -> bool:
    """True if the run is complete, and so is its control if it wants one, and the run has its metrics."""
    if not TrainingState.load(run.state_file).pipeline_complete:
        return False
    try:  # loading a config takes milliseconds, for each of all runs
        if b"control: sft" not in run.config_file.read_bytes():
            return True
    except OSError as error:
        raise UsageError(
            f"{run.config_file} cannot be read ({error.strerror}); restore it, or move the run away"
        ) from None
    return not wants_control(load_config(run.config_file).config) or read_metadata(run).control is not None


def wants_control(config: Config) -> bool:
    """True if the config is distilled and asks for its twin."""
    return config.evaluation.control is not None and config.distillation.alpha > 0


def control_of(run: RunDirectory) -> RunDirectory:
    """Where the run's control is, or will be."""
    return RunDirectory(run.path.with_name(f"{run.name}{SUFFIX}"))


def control_config(config: Config, steps: int) -> Config:
    """The config of the control: only the teacher's part in the loss differs. Its weights go to no hub, where
    they would replace the run's own."""
    compared = config.evaluation.teacher is not False and config.distillation.divergence != "uld"
    updates: dict[str, dict[str, object]] = {
        "distillation": {"alpha": 0.0},  # the other keys stay, without effect: a cache of outputs is found by some
        "evaluation": {"control": None, "teacher": compared},
        "training": {"max_steps": steps},
        "export": {"push_to_hub": None},
    }
    whole = with_absolute_paths(config)
    sections = {name: getattr(whole, name).model_copy(update=update) for name, update in updates.items()}
    return whole.model_copy(update=sections)


def place_of(run: RunDirectory, config: Config) -> tuple[Path, Path]:
    """Output root and config name of a run next to this one, even if this one was moved."""
    root, parent = Path(config.output_root).absolute(), run.path.absolute().parent
    return (root, parent.relative_to(root)) if parent.is_relative_to(root) else (parent, Path())


def check_control(
    control: RunDirectory,
    wanted: Config,
    *,
    steps: int | None = None,
    facts: RunMetadata | None = None,
    allowed: Sequence[str] = (),
) -> Control | None:
    """Return the control that an earlier attempt started or completed; None: the name is free.

    Args:
        wanted: The control's config, from control_config.
        steps: Of the whole run; None: not known yet.
        facts: What run_metadata.json holds of the run, to be the same for its control.
        allowed: Keys that may change the meaning of the control.

    Raises:
        UsageError: Something else has the name.
    """
    if not control.path.exists() or is_half_made(control):
        return None
    if not control.state_file.is_file():
        raise UsageError(_other(control, "it holds no training_state.json"))
    state = TrainingState.load(control.state_file)
    recorded = effective(with_absolute_paths(load_config(control.config_file).config))
    found = [
        change
        for change in changes(recorded, wanted, rows_per_step_old=0, rows_per_step_new=0)
        if change.kind is Kind.MEANING
    ]
    if strange := [str(change) for change in found if change.key not in allowed]:
        raise UsageError(_other(control, f"its config differs: {'; '.join(strange)}"))
    own = read_metadata(control)
    for words, fact in FACTS if facts is not None and ROWS not in allowed else ():
        assert facts is not None
        here, there = fact(facts), fact(own)
        if here is not None and there is not None and here != there:
            raise UsageError(_other(control, f"its {words} are {str(there)[:12]} instead of {str(here)[:12]}"))
    if steps is not None and (state.step != steps if state.pipeline_complete else state.step > steps):
        done = "complete at" if state.pipeline_complete else "at"
        raise UsageError(_other(control, f"it is {done} step {state.step}, and this run takes {steps}"))
    keys = [change.key for change in found] + [key for key in allowed if key == ROWS]
    return Control(control, state.pipeline_complete, keys)


def is_half_made(control: RunDirectory) -> bool:
    """True if an attempt was killed before the folder was a run."""
    if control.state_file.exists() or not control.path.is_dir():
        return False
    if not all(path.is_file() and FIRST_FILE.fullmatch(path.name) for path in control.path.iterdir()):
        return False
    config = control.config_file
    text = config.read_text(errors="replace") if config.exists() else ""
    return not text or text.startswith("# The merged config of ")


def remove_half_made(control: RunDirectory) -> None:
    """Make the name free again where an attempt was killed before the folder was a run."""
    if is_half_made(control):
        for path in control.path.iterdir():
            path.unlink()
        control.path.rmdir()


def _other(control: RunDirectory, why: str) -> str:
    return (
        f"{control.path} is reserved for this run's control (evaluation.control: sft), but holds something else: "
        f"{why}; move it away and resume, or, while this run is not complete, set evaluation.control=null"
    )
