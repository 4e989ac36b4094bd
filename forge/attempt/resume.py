"""Where a resumed attempt starts: under the lock of its run, at a verified checkpoint, with a config that fits it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from forge.attempt.control import control_of, wants_control
from forge.checkpoint.manifest import Manifest
from forge.checkpoint.selection import checkpoints, remove_leftovers, select
from forge.config.changes import ROWS, Change, Kind, allowances, changes, check_changes
from forge.config.explain import effective, with_absolute_paths
from forge.config.loader import load_config
from forge.config.schema import Config
from forge.errors import AlreadyComplete, UsageError
from forge.run.directory import RunDirectory, complete_message
from forge.run.lock import RunLock
from forge.run.metadata import RunMetadata, read_metadata
from forge.run.state import TrainingState

SHOWN = 12  # digits of a hash in a message
TEACHER_KEYS = tuple(f"teacher.{name}" for name in ("path", "revision", "base", "adapter"))  # each names its weights
LENGTH_KEYS = ("training.max_steps", "training.epochs")


@dataclass(frozen=True)
class ResumePoint:
    """Where an attempt starts, decided by rank 0; with its defaults, the first attempt of a new run."""

    attempt: int = 1
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    changes: list[str] = field(default_factory=list)  # of the config since that checkpoint, one line each
    allowed: dict[str, str] = field(default_factory=dict)  # those that change the meaning, and their new values
    fingerprint: str | None = None  # of the rows that the run was trained on so far
    weights: str | None = None  # without a checkpoint: the hash of the files that the run started from; None: unknown
    teacher: str | None = None  # the hash of the teacher that the run started with; None: no teacher, or unknown
    other_teacher: bool = False  # the run continues with another teacher, which was allowed


def prepare_resume(
    run: RunDirectory,
    lock: RunLock,
    config: Config,
    *,
    rows_per_step: int,
    precision: str,
    allowed_changes: list[str],
    take_over: bool,
) -> ResumePoint:
    """Take the lock, choose the checkpoint and judge what has changed since; on rank 0 only.

    Args:
        rows_per_step: What the config gives on these ranks.
        precision: What the config gives on this device.

    Raises:
        UsageError: Another process holds the run, or a change of its meaning is not allowed.
        AlreadyComplete: Another process has completed it.
        TrainingError: There are checkpoints, and none can be trusted.
    """
    attempt = lock.take(take_over=take_over, after=TrainingState.load(run.state_file).attempts)
    state = TrainingState.load(run.state_file)  # again: until now another process may have written it
    if state.pipeline_complete and not lengthens(run, config):  # by an attempt that was alive when this process began
        raise AlreadyComplete(complete_message(run))
    remove_leftovers(run)
    selected = select(run, state)
    checkpoint, manifest = selected if selected is not None else (None, None)
    metadata = read_metadata(run)
    wanted = config.training.max_steps
    if manifest is not None and wanted is not None and wanted < manifest.step:
        raise UsageError(
            f"training.max_steps is {wanted}, but {run.path} is at step {manifest.step} already; give that or more"
        )
    found, earlier = _changes(run, config, manifest, metadata, rows_per_step, precision)
    lines = check_changes(found, allowed_changes, earlier)
    shown = [f"changed: {line}" for line in lines]
    fingerprint = manifest.data_fingerprint if manifest is not None else metadata.data.fingerprint
    weights = metadata.model.weights_sha256 if manifest is None else None
    teacher = metadata.teacher.weights_sha256 if metadata.teacher is not None else None
    return ResumePoint(attempt, checkpoint, manifest, shown, allowances(found), fingerprint, weights, teacher)


def is_done(run: RunDirectory, config: Config) -> bool:
    """Return True if a run is complete and a config asks for no more of it. Raises UsageError as `lengthens` does."""
    return TrainingState.load(run.state_file).pipeline_complete and not lengthens(run, config)


def lengthens(run: RunDirectory, config: Config) -> bool:
    """Return True if a config asks a complete run for more steps than it has taken, and False if it asks for nothing.

    Raises:
        UsageError: It asks for anything else, which a complete run cannot do any more.
    """
    state = TrainingState.load(run.state_file)
    old = effective(with_absolute_paths(load_config(run.config_file).config))
    found = changes(old, config, rows_per_step_old=0, rows_per_step_new=0)
    found = [change for change in found if change.key != "output_root"]  # where a name is looked for
    if not found:
        return False
    metadata = read_metadata(run)
    if metadata.control_of is not None:
        raise UsageError(
            f"{run.path} is the control of {metadata.control_of.name}, and must stay its twin; start a new run"
        )
    steps, epochs = config.training.max_steps, config.training.epochs
    longer = steps > state.step if steps is not None else epochs > state.epoch
    if not longer or not any(change.key in LENGTH_KEYS for change in found):
        raise UsageError(
            f"{run.path} is complete at step {state.step}, so nothing else can be changed ({found[0]}); give a larger "
            f"--max_steps to train it further, or start a new run with model.path={run.path}"
        )
    if wants_control(config) and control_of(run).state_file.is_file():
        raise UsageError(
            f"{run.path} has a control of as many steps, {control_of(run).name}, which would stay behind: add --set "
            "evaluation.control=null to train the run further without it"
        )
    if not checkpoints(run):
        raise UsageError(
            f"{run.path} is complete but has no checkpoint to continue from; start a new run with model.path={run.path}"
        )
    return True


def check_rows(point: ResumePoint, fingerprint: str, description: str, allowed_changes: list[str]) -> ResumePoint:
    """Return the point with the rows that there are now, reported as a change if they differ and that is allowed.

    Raises:
        UsageError: They differ, and it is not allowed: other rows would be another training.
    """
    known = point.fingerprint or fingerprint
    if fingerprint == known:
        return point
    if ROWS not in allowed_changes:
        raise UsageError(
            f"the rows of {description}, or their tokens, are not those of the run so far (fingerprint "
            f"{fingerprint[:12]} instead of {known[:12]}); restore them, or continue with the new ones by "
            f"--allow-change {ROWS}"
        )
    line = f"changed: the rows of {description}: {known[:12]} -> {fingerprint[:12]} (allowed by --allow-change {ROWS})"
    allowed = {**point.allowed, ROWS: fingerprint}
    return replace(point, changes=[*point.changes, line], allowed=allowed)


def check_base(point: ResumePoint, base: str | None, weights: str | None = None) -> None:
    """Check that the weights a run builds on are still the same.

    Args:
        base: The hash of the weights under the adapter now; None if all weights are trained.
        weights: The hash of all files that the model is loaded from now; None: unknown.

    Raises:
        UsageError: The checkpoint's adapter was trained on another base, or a run without a checkpoint, which starts
            again, would start from other weights.
    """
    if point.weights is not None and weights is not None and point.weights != weights:
        raise UsageError(
            f"the weights of the model are {weights[:SHOWN]}, but the run started from {point.weights[:SHOWN]}; "
            "restore those (run_metadata.json names them), or start a new run"
        )
    then = point.manifest.base if point.manifest is not None else None
    if then is not None and base is not None and then != base:
        raise UsageError(
            f"the weights under the adapter are {base[:SHOWN]}, but {point.checkpoint} was trained on "
            f"{then[:SHOWN]}; restore those (base.json in the checkpoint names them), or start a new run"
        )


def check_teacher(point: ResumePoint, weights: str | None, allowed_changes: list[str]) -> ResumePoint:
    """Return the point with the teacher that there is now; weights: its hash; None: unknown, or no teacher.

    Raises:
        UsageError: It is not the teacher that the run started with, and `--allow-change` names no key of a teacher.
    """
    then = point.teacher
    if then is None or weights is None or then == weights:
        return point
    if not set(allowed_changes) & set(TEACHER_KEYS):
        raise UsageError(
            f"the weights of the teacher are {weights[:SHOWN]}, but the run started with {then[:SHOWN]}; restore those "
            "(run_metadata.json names them), start a new run, or name another teacher by --set teacher.path=… "
            "--allow-change teacher.path"
        )
    line = f"changed: the weights of the teacher: {then[:SHOWN]} -> {weights[:SHOWN]}"
    return replace(point, changes=[*point.changes, line], other_teacher=True)


def _changes(
    run: RunDirectory,
    config: Config,
    manifest: Manifest | None,
    metadata: RunMetadata,
    rows_per_step: int,
    precision: str,
) -> tuple[list[Change], dict[str, str]]:
    """What differs from the checkpoint, and what the last attempt was allowed."""
    if manifest is not None:
        old, old_rows_per_step = manifest.config, manifest.rows_per_step
    else:  # the run starts again, but as the run that its own config describes
        old = effective(with_absolute_paths(load_config(run.config_file).config))
        old_rows_per_step = metadata.world.rows_per_step
    found = changes(old, config, rows_per_step_old=old_rows_per_step, rows_per_step_new=rows_per_step)
    if manifest is not None and manifest.mixed_precision != precision:
        key = "training.mixed_precision"
        reason = "what auto comes to depends on the device; each step would be rounded in another way"
        others = [change for change in found if change.key != key]
        found = [*others, Change(key, manifest.mixed_precision, precision, Kind.MEANING, reason)]
    # Each attempt records what still differs from its checkpoint: what the last one undid is no longer allowed.
    return found, metadata.attempts[-1].allowed
