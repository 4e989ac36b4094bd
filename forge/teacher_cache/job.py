"""The job of `forge cache-teacher`: computes a teacher's outputs once, shard by shard, and can be stopped."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from forge.cluster.signals import StopRequest, stopped_early
from forge.config.schema import Config
from forge.errors import Stopped, TrainingError, UnreadableRows, UsageError
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.model.source import load_model_config, with_run_paths
from forge.ranks.accelerator import build_accelerator
from forge.ranks.agreement import gather_values, on_every_rank
from forge.ranks.stop_vote import StopVote
from forge.ranks.world import Ranks
from forge.run.directory import check_writable
from forge.run.state import now
from forge.task.load import load_task
from forge.task.task import Task
from forge.teacher.placement import LoadedTeacher, load_teacher
from forge.teacher.teacher import ModelTeacher
from forge.teacher.vocabulary import for_teacher
from forge.teacher_cache import files
from forge.teacher_cache.files import (
    MANIFEST,
    TRAIN,
    CacheForm,
    Manifest,
    Shard,
    ShardRecord,
    SplitTotals,
    Totals,
    Truncation,
    split_name,
)
from forge.teacher_cache.key import LAYERS, ContentKey, changed, digest, keeps_whole_logits
from forge.teacher_cache.reader import cache_folder, check_loss, differences, named_folder, wanted_cache
from forge.teacher_cache.writer import MEASURED, CacheWriter, splits_of

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0


@dataclass(frozen=True)
class FilledCache:
    """A complete teacher cache, and what the job that completed it knows."""

    folder: Path
    manifest: Manifest
    config: Config
    task: Task  # as its student and its teacher need it
    origin: Origin  # of the teacher
    ranks: Ranks
    teacher: Callable[[], ModelTeacher]  # loads the teacher unless the job has; all ranks call it together

    def close(self) -> None:
        """Leave the other ranks."""
        self.ranks.accelerator.end_training()


def cache_teacher(config: Config, stop: StopRequest) -> FilledCache:
    """Compute and write what the cache of a config still lacks.

    Raises UsageError if the config, the data or the folder does not allow it, TrainingError if the disk is full, and
    Stopped at a signal, with every finished shard kept.
    """
    config = with_run_paths(config)
    _check(config)
    training = config.training
    accelerator = build_accelerator(training.mixed_precision, training.seed, deterministic=training.deterministic)
    ranks = Ranks(accelerator, stop, StopVote(accelerator, stop))
    ranks.on_rank_0(lambda: check_writable(Path(config.output_root)))
    task = ranks.rank_0_first(lambda: load_task(config))
    student = ranks.on_every_rank(lambda: _student(config, task))
    task = task if student is None else task.for_model(student)
    task = ranks.rank_0_first(lambda: for_teacher(config, task))
    check_loss(config, top_k=not keeps_whole_logits(task))
    wanted = wanted_cache(config, task, student, accelerator)
    del student
    folder = ranks.on_rank_0(lambda: cache_folder(config, wanted.key))
    key = ranks.on_rank_0(lambda: _usable_key(folder, wanted.key))
    layers = tuple(key[LAYERS])
    width = load_model_config(wanted.source, "teacher.path").get_text_config(decoder=True).hidden_size if layers else 0
    shards = _plan(config, task, len(layers) * width)
    load = _loader(config, task, wanted.origin, ranks)

    with ExitStack() as held:
        ranks.on_rank_0(lambda: _take(folder, key, wanted.source.name, held))
        mine = ranks.on_every_rank(lambda: _unfinished(folder, shards, accelerator))
        missing = sorted((shard for part in gather_values(mine) for shard in part), key=shards.index)
        manifest = ranks.on_rank_0(lambda: files.complete_manifest(folder, shards))
        if not missing and manifest is not None:
            logger.info("the cache is complete already; nothing is computed")
        else:
            source, teacher = load()
            writer = CacheWriter(config, task, teacher, accelerator, layers)
            logger.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
            ranks.on_rank_0(lambda: _reopen(folder))
            _fill(writer, folder, digest(key), missing, shards, ranks)
            about = {"digest": digest(key), "key": key, "teacher": source.facts(), "made_at": now()}
            manifest = ranks.on_rank_0(lambda: _complete(folder, shards, writer.form, about))
    for line in report(folder, manifest):
        logger.info(line)
    return FilledCache(folder, manifest, config, task, wanted.origin, ranks, lambda: load()[1])


def report(folder: Path, manifest: Manifest) -> list[str]:
    """Return a few lines on what was written and what it cost."""
    named = {name: name.removeprefix(split_name("")) for name in manifest.splits}
    rows = ", ".join(f"{named[name]} {split.rows}" for name, split in manifest.splits.items())
    lines = [
        f"{folder}: {rows} rows, {manifest.labels_in_all} labels, {manifest.bytes} bytes; "
        f"{manifest.bytes_per_label:.1f} bytes a label{', without hidden states' if manifest.layers else ''}, where "
        f"{manifest.columns} float32 logits take {4 * manifest.columns}; computed in {manifest.seconds:.1f} s"
    ]
    if lost := manifest.truncation:
        lines.append(
            f"the top {manifest.top_k} of {manifest.columns} tokens lack {lost.tail_mass:.3g} of the probability at "
            f"temperature {manifest.temperature:g}; KL(teacher || top k with the rest spread evenly) is "
            f"{lost.truncation_kl:.3g} nats a label, over {lost.labels} labels of the validation rows"
        )
    return lines


def _check(config: Config) -> None:
    """Raise UsageError for what is wrong before the data are read."""
    if config.teacher.path is None:
        raise UsageError("teacher.path is not set; name the teacher whose outputs are to be cached")
    if config.task.dataset.streaming:
        raise UsageError(
            "task.dataset.streaming is true, but a teacher cache needs all rows in advance; set it to false"
        )
    named_folder(config)


def _student(config: Config, task: Task) -> LoadedModel | None:
    """Load the student if the teacher's inputs, or the layers that are kept, depend on it."""
    hidden = config.distillation.hidden
    from_student = hidden is not None and hidden.layers is None and config.distillation.alpha > 0
    if task.inputs_need_model or from_student:
        return task.load_model(config.model, config.training)
    return None


def _loader(
    config: Config, task: Task, origin: Origin, ranks: Ranks
) -> Callable[[], tuple[LoadedTeacher, ModelTeacher]]:
    """Return a function that loads and places the teacher, once; all ranks call it together."""
    placement = "offload" if config.teacher.placement == "offload" else "replicated"

    @functools.cache
    def load() -> tuple[LoadedTeacher, ModelTeacher]:
        loaded = ranks.on_every_rank(lambda: load_teacher(config, task))
        source = LoadedTeacher(
            replace(loaded, origin=origin), config.teacher.model_copy(update={"placement": placement})
        )
        # The cache has the teacher's own order of labels, from which each student takes its own.
        return source, source.place(ranks.accelerator, task, None)

    return load


def _plan(config: Config, task: Task, hidden_columns: int) -> list[Shard]:
    """Return the shards of the training rows and of each validation split; the same for everyone who asks."""
    shards = []
    columns = task.logit_columns
    label_bytes = 4 * columns if keeps_whole_logits(task) else 6 * min(config.teacher.top_k, columns) + 8
    for split, rows in splits_of(task).items():
        lengths = np.asarray(rows["length"][:])
        labels = np.ones_like(lengths) if task.one_label_per_row else lengths  # at most
        hidden_bytes = 2 * hidden_columns * lengths if split == TRAIN else 0
        shards += files.plan_shards(split, label_bytes * labels + hidden_bytes)
    return shards


def _usable_key(folder: Path, wanted: ContentKey) -> ContentKey:
    """Return the key of the cache in the folder if that can be used (it may keep more layers); else `wanted`."""
    known = files.read_key(folder)
    return known.key if known is not None and not differences(known.key, wanted) else wanted


def _take(folder: Path, key: ContentKey, teacher: str, held: ExitStack) -> None:
    """Lock the folder and write its key. Raises UsageError if it holds something else."""
    known = files.read_key(folder)
    if known is None and folder.exists() and any(not _left_by_killed_job(path) for path in folder.iterdir()):
        raise UsageError(f"{folder} is not a teacher cache, and not empty; name another folder with teacher.cache")
    if known is not None and (parts := changed(known.key, key)):
        raise UsageError(
            f"{folder} holds outputs of {known.teacher}, but what they depend on has changed: {', '.join(parts)}; "
            "delete it, or name another folder with teacher.cache"
        )
    try:
        held.enter_context(files.only_writer(folder))
        files.start(folder, digest(key), key, teacher)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _left_by_killed_job(path: Path) -> bool:
    """True for what a job that was killed before it wrote its key leaves in a folder."""
    return path.name == ".lock" or (path.name.startswith(".") and path.suffix == ".tmp")


def _unfinished(folder: Path, shards: Sequence[Shard], accelerator: Accelerator) -> list[Shard]:
    """Return the shards that are not finished, among those that this rank checks."""
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    return [shard for shard in mine if files.finished(folder, shard) is None]


def _reopen(folder: Path) -> None:
    try:
        files.reopen(folder)
    except OSError as error:
        raise _unwritable(folder / MANIFEST, error) from error


def _fill(
    writer: CacheWriter, folder: Path, name: str, missing: Sequence[Shard], shards: Sequence[Shard], ranks: Ranks
) -> None:
    """Write the missing shards, every W-th on each of W ranks; all ranks stop together, after a finished shard.

    name is the digest of the cache's key.
    """
    accelerator, stop, vote = ranks.accelerator, ranks.stop, ranks.vote
    rank = accelerator.process_index
    started = reported = time.monotonic()
    labels = 0

    def write(shard: Shard) -> int:
        start = time.monotonic()
        try:
            arrays, sums = stop.breaks(lambda: writer.compute(shard))
            seconds = round(time.monotonic() - start, 3)
            return stop.breaks(lambda: files.write_shard(folder, shard, arrays, sums, name, seconds)).labels
        except UnreadableRows:
            if stop.reason is not None:  # a signal that came while rows were prepared
                raise stopped_early(stop.reason) from None
            raise
        except OSError as error:
            raise _unwritable(folder / shard.file, error) from error

    try:
        for first in range(0, len(missing), ranks.count):
            mine = missing[first : first + ranks.count][rank : rank + 1]
            labels += on_every_rank(lambda: sum(write(shard) for shard in mine))  # noqa: B023
            if vote.now():
                raise stopped_early(vote.reason())
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                speed = labels * ranks.count / (reported - started)
                logger.info("shard %d of %d, %.0f labels a second", first + ranks.count, len(missing), speed)
    except Stopped:
        done = sum(files.finished(folder, shard) is not None for shard in shards)
        reason = stop.reason or "a signal to another rank"
        raise Stopped(
            f"stopped by {reason}; {done} of {len(shards)} shards are in {folder}; run the same command again to resume"
        ) from None


def _complete(folder: Path, shards: Sequence[Shard], form: CacheForm, about: dict[str, Any]) -> Manifest:
    """Write the manifest and return it. Raises UsageError if a shard's record is missing."""
    records = []
    for shard in shards:
        try:
            records.append(files.read_shard_record(folder, shard))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{folder / shard.file} is missing ({error}): all ranks must see the same folder, and nothing else may "
                "change it; run the same command again"
            ) from error
    totals = _totals(form, records)
    manifest = Manifest(**about, **form.model_dump(), **totals.model_dump(), shards=tuple(records))
    try:
        files.write_manifest(folder, manifest)
    except OSError as error:
        raise _unwritable(folder / MANIFEST, error) from error
    return manifest


def _totals(form: CacheForm, records: Sequence[ShardRecord]) -> Totals:
    """Return what the job reports of all shards."""
    splits = {}
    for name in dict.fromkeys(record.split for record in records):
        own = [record for record in records if record.split == name]
        rows, labels, size = (sum(getattr(record, field) for record in own) for field in ("rows", "labels", "bytes"))
        splits[name] = SplitTotals(rows=rows, labels=labels, bytes=size)
    labels, size = (sum(getattr(split, field) for split in splits.values()) for field in ("labels", "bytes"))
    per_label = (size - sum(record.hidden_bytes for record in records)) / labels
    measured = [record for record in records if record.sums]
    truncation = None
    if measured:
        count = sum(record.labels for record in measured)
        means = {name: sum(record.sums[name] for record in measured) / count for name in MEASURED}
        truncation = Truncation(**means, labels=count)
    return Totals(
        splits=splits,
        labels_in_all=labels,
        bytes=size,
        bytes_per_label=per_label,
        share_of_whole_logits=per_label / (4 * form.columns),
        truncation=truncation,
        seconds=round(sum(record.seconds for record in records), 3),
    )


def _unwritable(file: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{file} could not be written ({error.strerror}); free some space, then run the same command again: finished "
        "shards are kept"
    )
