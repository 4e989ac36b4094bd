"""The job behind `forge cache-teacher`: computes the teacher's outputs once, shard by shard, and can be stopped."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from accelerate import Accelerator

from forge.cluster.signals import StopRequest, stopped_early
from forge.config.schema import Config
from forge.errors import Stopped, TrainingError, UnreadableRows, UsageError
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.model.source import load_model_config, with_run_paths
from forge.ranks.accelerator import build_accelerator
from forge.ranks.agreement import gather_values, on_every_rank, on_rank_0, rank_0_first
from forge.ranks.stop_vote import StopVote
from forge.run.directory import check_writable
from forge.run.state import now
from forge.task.classification import Classification
from forge.task.load import load_task
from forge.task.ocr.task import Ocr
from forge.task.task import Task
from forge.teacher.placement import LoadedTeacher, load_teacher
from forge.teacher.teacher import ModelTeacher
from forge.teacher.vocabulary import for_teacher
from forge.teacher_cache import files as cache
from forge.teacher_cache.files import TRAIN, Record, Shard, split_name
from forge.teacher_cache.key import LAYERS, ContentKey, changed, digest, keeps_whole_logits, token_columns
from forge.teacher_cache.reader import check_loss, differences, named_folder, place_of_cache, wanted_key
from forge.teacher_cache.writer import MEASURED, CacheWriter, splits_of

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0


@dataclass(frozen=True)
class FilledCache:
    """A complete teacher cache, and what the job that completed it knows."""

    folder: Path
    manifest: dict[str, Any]
    config: Config
    task: Task  # as its student and its teacher need it
    origin: Origin  # of the teacher
    accelerator: Accelerator
    teacher: Callable[[], ModelTeacher]  # of all ranks together: loads it, unless the job has done so

    def close(self) -> None:
        """Leave the other ranks."""
        self.accelerator.end_training()


def cache_teacher(config: Config, stop: StopRequest) -> FilledCache:
    """Compute and write what the cache of the config still lacks.

    Raises UsageError if the config, the data or the folder does not allow it, TrainingError if the disk is full, and
    Stopped at a signal, with every finished shard kept.
    """
    config = with_run_paths(config)
    _check(config)
    training = config.training
    accelerator = build_accelerator(training.mixed_precision, training.seed, deterministic=training.deterministic)
    on_rank_0(accelerator, lambda: check_writable(Path(config.output_root)))
    task = rank_0_first(accelerator, lambda: stop.breaks(lambda: load_task(config)))
    student = on_every_rank(accelerator, lambda: stop.breaks(lambda: _student(config, task)))
    task = task if student is None else task.for_model(student)
    task = rank_0_first(accelerator, lambda: stop.breaks(lambda: for_teacher(config, task)))
    check_loss(config, top_k=not keeps_whole_logits(task))
    source, origin, _, wanted = wanted_key(config, task, student, accelerator)
    del student
    folder = on_rank_0(accelerator, lambda: place_of_cache(config, wanted))
    key = on_rank_0(accelerator, lambda: _key_there(folder, wanted))
    layers = tuple(key[LAYERS])
    width = load_model_config(source, "teacher.path").get_text_config(decoder=True).hidden_size if layers else 0
    shards = _plan(config, task, len(layers) * width)

    @functools.cache
    def load() -> LoadedTeacher:
        loaded = on_every_rank(accelerator, lambda: stop.breaks(lambda: load_teacher(config, task)))
        placement = "offload" if config.teacher.placement == "offload" else "replicated"
        return LoadedTeacher(replace(loaded, origin=origin), config.teacher.model_copy(update={"placement": placement}))

    @functools.cache
    def teacher() -> ModelTeacher:
        # In the teacher's own order of labels: each student takes its own from it.
        return load().place(accelerator, task, None)

    with ExitStack() as held:
        on_rank_0(accelerator, lambda: _take(folder, key, source.name, held))
        lacking = on_every_rank(accelerator, lambda: stop.breaks(lambda: _lacking(folder, shards, accelerator)))
        missing = sorted((shard for part in gather_values(lacking) for shard in part), key=shards.index)
        manifest = on_rank_0(accelerator, lambda: cache.complete_manifest(folder, shards))
        if not missing and manifest is not None:
            logger.info("the cache is complete already; nothing is computed")
        else:
            writer = CacheWriter(config, task, teacher(), accelerator, layers)
            logger.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
            on_rank_0(accelerator, lambda: _reopen(folder))
            _fill(writer, folder, digest(key), missing, shards, stop)
            about = {"teacher": load().facts(), "made_at": now()}
            facts = {"digest": digest(key), "key": key, **about, **writer.facts()}
            manifest = on_rank_0(accelerator, lambda: _complete(folder, shards, facts))
    for line in report(folder, manifest):
        logger.info(line)
    return FilledCache(folder, manifest, config, task, origin, accelerator, teacher)


def report(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What was made, and what it cost, in a few lines."""
    names = {name: name.removeprefix(split_name("")) for name in manifest["splits"]}
    rows = ", ".join(f"{names[name]} {split['rows']}" for name, split in manifest["splits"].items())
    lines = [
        f"{folder}: {rows} rows, {manifest['labels_in_all']} labels, {manifest['bytes']} bytes; "
        f"{manifest['bytes_per_label']:.1f} bytes a label{', without hidden states' if manifest['layers'] else ''}, "
        f"where {manifest['columns']} float32 logits have {4 * manifest['columns']}; {manifest['seconds']:.1f} s of "
        "computing"
    ]
    if lost := manifest["truncation"]:
        lines.append(
            f"the top {manifest['top_k']} of {manifest['columns']} tokens lack {lost['tail_mass']:.3g} of the "
            f"probability at temperature {manifest['temperature']:g}; KL(teacher || what is kept, the rest spread "
            f"evenly) is {lost['truncation_kl']:.3g} nats a label, over {lost['labels']} labels of the validation rows"
        )
    return lines


def hide_progress_bars() -> None:
    """Of the libraries; the log says the same in lines."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _check(config: Config) -> None:
    """What can be told before the data is read."""
    if config.teacher.path is None:
        raise UsageError("teacher.path is not set; name the teacher whose outputs are to be cached")
    if config.task.dataset.streaming:
        raise UsageError(
            "task.dataset.streaming is true, and the rows of a stream are not known before; set it to false"
        )
    named_folder(config)


def _student(config: Config, task: Task) -> LoadedModel | None:
    """Loaded where the teacher's inputs, or the layers that are kept, follow from it; only to look at."""
    hidden = config.distillation.hidden
    if isinstance(task, Ocr) or (hidden is not None and hidden.layers is None and config.distillation.alpha > 0):
        return task.load_model(config.model, config.training)
    return None


def _plan(config: Config, task: Task, hidden_columns: int) -> list[Shard]:
    """Of the rows that are trained on, then of each validation split; the same wherever and whenever it is asked."""
    shards = []
    columns = len(task.labels) if isinstance(task, Classification) else token_columns(task)
    a_label = 4 * columns if keeps_whole_logits(task) else 6 * min(config.teacher.top_k, columns) + 8
    for split, rows in splits_of(task).items():
        lengths = np.asarray(rows["length"][:])
        labels = np.ones_like(lengths) if isinstance(task, Classification) else lengths  # at most
        hidden = 2 * hidden_columns * lengths if split == TRAIN else 0
        shards += cache.plan_shards(split, a_label * labels + hidden)
    return shards


def _key_there(folder: Path, wanted: ContentKey) -> ContentKey:
    """Of the cache that the folder holds, where it serves: with more hidden states than are wanted; else what is
    wanted."""
    known = cache.read_key(folder)
    serves = known is not None and not differences(known["key"], wanted)
    return known["key"] if known is not None and serves else wanted


def _reopen(folder: Path) -> None:
    try:
        cache.reopen(folder)
    except OSError as error:
        raise _unwritable(folder / cache.MANIFEST, error) from error


def _take(folder: Path, key: ContentKey, teacher: str, held: ExitStack) -> None:
    """Makes the folder this job's own. Raises UsageError where it is something else's."""
    known = cache.read_key(folder)
    if known is None and folder.exists() and any(not _left_behind(path) for path in folder.iterdir()):
        raise UsageError(f"{folder} is no teacher cache, and not empty; name another folder with teacher.cache")
    if known is not None and (parts := changed(known["key"], key)):
        raise UsageError(
            f"{folder} holds outputs of {known['teacher']}, and what they depend on has changed: {', '.join(parts)}; "
            "delete it, or name another folder with teacher.cache"
        )
    try:
        held.enter_context(cache.only_writer(folder))
        cache.begin(folder, digest(key), key, teacher)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _left_behind(path: Path) -> bool:
    """By a job that was killed before it wrote anything?"""
    return path.name == ".lock" or (path.name.startswith(".") and path.suffix == ".tmp")


def _lacking(folder: Path, shards: Sequence[Shard], accelerator: Accelerator) -> list[Shard]:
    """Of this rank's share, those that are not finished."""
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    return [shard for shard in mine if cache.finished(folder, shard) is None]


def _fill(
    writer: CacheWriter, folder: Path, name: str, missing: Sequence[Shard], shards: Sequence[Shard], stop: StopRequest
) -> None:
    """Writes the missing ones, each rank every W-th; all ranks stop together, behind a shard that is finished."""
    accelerator = writer.accelerator
    vote = StopVote(accelerator, stop)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    started = reported = time.monotonic()
    labels = 0

    def write(shard: Shard) -> int:
        begun = time.monotonic()
        try:
            kept = stop.breaks(lambda: writer.compute(shard))
            seconds = round(time.monotonic() - begun, 3)
            return stop.breaks(lambda: cache.write_shard(folder, shard, *kept, name, seconds)).labels
        except UnreadableRows:
            if stop.reason is not None:  # a signal that came while rows were prepared
                raise stopped_early(stop.reason) from None
            raise
        except OSError as error:
            raise _unwritable(folder / shard.file, error) from error

    try:
        for first in range(0, len(missing), ranks):
            mine = missing[first : first + ranks][rank : rank + 1]
            labels += on_every_rank(accelerator, lambda: sum(write(shard) for shard in mine))  # noqa: B023
            if vote.now():
                raise stopped_early(vote.reason())
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                speed = labels * ranks / (reported - started)
                logger.info("shard %d of %d, %.0f labels a second", first + ranks, len(missing), speed)
    except Stopped:
        done = sum(cache.finished(folder, shard) is not None for shard in shards)
        reason = stop.reason or "a signal to another rank"
        raise Stopped(
            f"stopped by {reason}; {done} of {len(shards)} shards are in {folder}, and the same command goes on"
        ) from None


def _complete(folder: Path, shards: Sequence[Shard], facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest, written."""
    try:
        return cache.complete(folder, shards, lambda records: {**facts, **_totals(facts, records)})
    except OSError as error:
        raise _unwritable(folder / cache.MANIFEST, error) from error


def _totals(facts: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """What the job reports, of all shards."""
    splits: dict[str, dict[str, int]] = {}
    for record in records:
        of_split = splits.setdefault(record.split, {"rows": 0, "labels": 0, "bytes": 0})
        of_split["rows"] += record.rows
        of_split["labels"] += record.labels
        of_split["bytes"] += record.bytes
    labels, size = (sum(split[name] for split in splits.values()) for name in ("labels", "bytes"))
    of_labels = (size - sum(record.hidden_bytes for record in records)) / labels
    measured = [record for record in records if record.sums]
    truncation = None
    if measured:
        count = sum(record.labels for record in measured)
        means = {name: sum(record.sums[name] for record in measured) / count for name in MEASURED}
        truncation = {**means, "labels": count}
    return {
        "splits": splits,
        "labels_in_all": labels,
        "bytes": size,
        "bytes_per_label": of_labels,
        "share_of_whole_logits": of_labels / (4 * facts["columns"]),
        "truncation": truncation,
        "seconds": round(sum(record.seconds for record in records), 3),
    }


def _unwritable(file: Path, error: OSError) -> TrainingError:
    return TrainingError(f"{file} could not be written ({error.strerror}); free some space, then run the same command "
                         "again: what is finished stays")  # fmt: skip
