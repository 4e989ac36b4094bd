"""Where the next attempt begins: under the lock of its run, at a checkpoint that holds, with a config that fits it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from forge.checkpoint.manifest import Manifest
from forge.checkpoint.selection import remove_leftovers, select
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


@dataclass(frozen=True)
class ResumePoint:
    """Decided by rank 0, known to all. As it stands: the first attempt of a new run."""

    attempt: int = 1
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    changes: list[str] = field(default_factory=list)  # of the config since that checkpoint, one line each
    allowed: dict[str, str] = field(default_factory=dict)  # those of the meaning, and their new values
    fingerprint: str | None = None  # of the rows that the run was trained on so far
    weights: str | None = None  # without a checkpoint: the hash of the files that the run began with; None: not known
    teacher: str | None = None  # the hash of the teacher that the run was begun with; None: there is none, or not known
    other_teacher: bool = False  # it goes on with another one, as was allowed


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
    """Takes the lock, chooses the checkpoint and judges what has changed since; on rank 0 only.

    rows_per_step, precision: what the config comes to on these ranks and devices. Raises UsageError while another
    process holds the run, and for a change of meaning that is not allowed; AlreadyComplete; and TrainingError where
    there were checkpoints and none can be trusted.
    """
    attempt = lock.take(take_over=take_over, after=TrainingState.load(run.state_file).attempts)
    state = TrainingState.load(run.state_file)  # again: until now another process may have written it
    if state.pipeline_complete:  # by an attempt that was alive when this process began
        raise AlreadyComplete(complete_message(run))
    remove_leftovers(run)
    selected = select(run, state)
    checkpoint, manifest = selected if selected is not None else (None, None)
    metadata = read_metadata(run)
    wanted = config.training.max_steps
    if manifest is not None and wanted is not None and wanted < manifest.step:
        raise UsageError(
            f"training.max_steps is {wanted}, and {run.path} is at step {manifest.step} already; give that or more"
        )
    found, earlier = _changes(run, config, manifest, metadata, rows_per_step, precision)
    lines = check_changes(found, allowed_changes, earlier)
    shown = [f"changed: {line}" for line in lines]
    fingerprint = manifest.data_fingerprint if manifest is not None else metadata.data.fingerprint
    weights = metadata.model.weights_sha256 if manifest is None else None
    teacher = metadata.teacher.weights_sha256 if metadata.teacher is not None else None
    return ResumePoint(attempt, checkpoint, manifest, shown, allowances(found), fingerprint, weights, teacher)


def check_rows(point: ResumePoint, fingerprint: str, description: str, allowed_changes: list[str]) -> ResumePoint:
    """The beginning with the rows there are now, told as a change where they are others and that is allowed.

    Raises UsageError where it is not: other rows under the same name would be another training.
    """
    known = point.fingerprint or fingerprint
    if fingerprint == known:
        return point
    if ROWS not in allowed_changes:
        raise UsageError(
            f"the rows of {description}, or their tokens, are not those of the run so far (fingerprint "
            f"{fingerprint[:12]} instead of {known[:12]}); bring them back, or go on with the new ones by "
            f"--allow-change {ROWS}"
        )
    line = f"changed: the rows of {description}: {known[:12]} -> {fingerprint[:12]} (allowed by --allow-change {ROWS})"
    allowed = {**point.allowed, ROWS: fingerprint}
    return replace(point, changes=[*point.changes, line], allowed=allowed)


def check_base(point: ResumePoint, base: str | None, weights: str | None = None) -> None:
    """Raises UsageError where the adapter of the checkpoint was trained on other weights than there are now, and where
    a run without a checkpoint, which begins anew, would begin with others.

    base: the hash of what the adapter lies on now; None where all weights are trained. weights: of all that the model
    is loaded from now; None: not known.
    """
    if point.weights is not None and weights is not None and point.weights != weights:
        raise UsageError(
            f"the weights of the model are {weights[:SHOWN]}, and the run began with {point.weights[:SHOWN]}; "
            "bring those back (run_metadata.json names them), or start a new run"
        )
    then = point.manifest.base if point.manifest is not None else None
    if then is not None and base is not None and then != base:
        raise UsageError(
            f"the weights below the adapter are {base[:SHOWN]}, and {point.checkpoint} was trained on "
            f"{then[:SHOWN]}; bring those back (base.json in the checkpoint names them), or start a new run"
        )


def check_teacher(point: ResumePoint, weights: str | None, allowed_changes: list[str]) -> ResumePoint:
    """The beginning, with what is known of the teacher there is now; weights: its hash; None: not known, or no teacher.

    Raises UsageError where it is not the one that the run was begun with, and no other one was allowed.
    """
    then = point.teacher
    if then is None or weights is None or then == weights:
        return point
    if not set(allowed_changes) & set(TEACHER_KEYS):
        raise UsageError(
            f"the weights of the teacher are {weights[:SHOWN]}, and the run was begun with {then[:SHOWN]}; bring those "
            "back (run_metadata.json names them), start a new run, or name another teacher by --set teacher.path=… "
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
    """What differs from the checkpoint, and what earlier attempts were allowed."""
    if manifest is not None:
        old, old_rows_per_step = manifest.config, manifest.rows_per_step
    else:  # the run begins anew, and yet as the run that it was said to be
        old = effective(with_absolute_paths(load_config(run.config_file).config))
        old_rows_per_step = metadata.world.rows_per_step
    found = changes(old, config, rows_per_step_old=old_rows_per_step, rows_per_step_new=rows_per_step)
    if manifest is not None and manifest.mixed_precision != precision:
        key = "training.mixed_precision"
        reason = "what auto comes to depends on the device; each step would be rounded in another way"
        others = [change for change in found if change.key != key]
        found = [*others, Change(key, manifest.mixed_precision, precision, Kind.MEANING, reason)]
    # Each attempt records what still differs from its checkpoint: what the last one took back is allowed no more.
    return found, metadata.attempts[-1].allowed
