"""Finds the teacher cache that a config needs, and the teacher that reads its outputs from those files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from forge.config.schema import Config
from forge.data.batches import Batch
from forge.errors import UsageError
from forge.model.classifier import align
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.model.source import ModelSource, load_model_config, model_source, origin_of
from forge.ranks.agreement import on_every_rank, on_rank_0
from forge.task.task import Task
from forge.teacher.placement import dtype_name, teacher_config, teacher_dtype
from forge.teacher.teacher import Teacher, TeacherOutputs, TeacherSource, required_depth, teacher_layers
from forge.teacher_cache.files import (
    HIDDEN,
    KEY,
    MANIFEST,
    TOKEN_OFFSETS,
    Manifest,
    SplitReader,
    damage,
    read_key,
    read_manifest,
    split_name,
    verify,
)
from forge.teacher_cache.key import LAYERS, ContentKey, cache_key, changed, digest
from forge.teacher_cache.top_k import at_temperature

logger = logging.getLogger(__name__)

CACHES = ".teacher_caches"  # under output_root


@dataclass(frozen=True)
class TeacherCache(TeacherSource):
    """A complete cache of the teacher's outputs on the rows of a run."""

    folder: Path
    manifest: Manifest
    source: ModelSource  # of the teacher
    origin: Origin
    label_ids: list[int]

    def facts(self) -> dict[str, Any]:
        """Return the section `teacher` of run_metadata.json: as for a teacher in memory, and where its cache is."""
        return {
            **self.manifest.teacher,
            "source": self.source.name,
            "location": self.source.location,
            "revision": self.source.revision,
            "commit": self.origin.base.commit,
            "weights_sha256": self.origin.weights_sha256,
            "location_sha256": self.origin.base.sha256,
            "adapters": [adapter.model_dump() for adapter in self.origin.adapters],
            "cache": {"folder": str(self.folder.absolute()), "digest": self.manifest.digest},
        }

    def place(self, accelerator: Accelerator, task: Task, columns: list[int] | None) -> "CachedTeacher":
        """Return a teacher that reads the files; columns as TeacherSource.place takes them."""
        return CachedTeacher(self, accelerator.device, columns)


class CachedTeacher(Teacher):
    """A teacher whose outputs are read from the files of its cache."""

    def __init__(self, cache: TeacherCache, device: torch.device, columns: list[int] | None = None):
        """Open no file yet; columns as TeacherSource.place takes them."""
        manifest = cache.manifest
        self._folder, self._device, self._columns = cache.folder, device, columns
        self.origin = cache.origin
        self._temperature, self._widths = manifest.temperature, manifest.hidden_widths
        self._records = {name: [item for item in manifest.shards if item.split == name] for name in manifest.splits}
        self._readers: dict[str, SplitReader] = {}

    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Return logits, or top_log_probs and top_indices, of the rows batch["ids"], in float32.

        For training rows, if `layers` names any, also hidden_states.L in float16, zero at padding. The ids need not be
        on the device. Raises ValueError for a temperature that the top k was not kept for, and if the rows have
        another number of labels than those in the cache.
        """
        reader, ids = self._reader(split), batch["ids"].tolist()
        whole = self._temperature is None
        arrays, counts = reader.read(ids, ["logits"] if whole else ["log_probs", "indices", "tails"])
        if sum(counts) != len(batch["positions"]):
            raise ValueError(
                f"The rows {ids} have {len(batch['positions'])} labels, but {self._folder} holds {sum(counts)}."
            )
        outputs = self._logits(arrays["logits"]) if whole else self._top_k(arrays, temperature)
        return outputs | self._hidden_states(reader, ids, batch) if split is None and self.layers else outputs

    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        """Return the widths of the teacher's hidden states: the embeddings' output, then each layer's, kept or not."""
        return self._widths

    def _reader(self, split: str | None) -> SplitReader:
        name = split_name(split)
        if name not in self._readers:
            self._readers[name] = SplitReader(self._folder, self._records[name])
        return self._readers[name]

    def _logits(self, logits: np.ndarray) -> TeacherOutputs:
        return {"logits": self._to_device(logits if self._columns is None else logits[:, self._columns])}

    def _top_k(self, arrays: dict[str, np.ndarray], temperature: float) -> TeacherOutputs:
        if temperature not in (1.0, self._temperature):
            raise ValueError(
                f"{self._folder} has the teacher's top k at temperatures 1 and {self._temperature}, not {temperature}."
            )
        log_probs = self._to_device(arrays["log_probs"])
        tail = self._to_device(arrays["tails"][:, 0 if temperature == 1.0 else 1])
        indices = self._to_device(arrays["indices"].astype(np.int32)).long()  # GPUs have few operations for uint16
        return {"top_log_probs": at_temperature(log_probs, tail, temperature), "top_indices": indices}

    def _hidden_states(self, reader: SplitReader, ids: list[int], batch: Batch) -> TeacherOutputs:
        names = [f"{HIDDEN}{layer}" for layer in self.layers]
        arrays, counts = reader.read(ids, names, TOKEN_OFFSETS)
        tokens = next(batch[name] for name in ("input_ids", "decoder_input_ids") if name in batch)  # (B, T)
        places = token_places(batch, counts, tokens.shape[1], self._device)
        states = {}
        for name, layer in zip(names, self.layers, strict=True):
            padded = torch.zeros(tokens.numel(), self._widths[layer], dtype=torch.float16, device=self._device)
            padded[places] = self._to_device(arrays[name])
            states[name] = padded.view(*tokens.shape, -1)  # (B, T, D)
        return states

    def _to_device(self, array: np.ndarray) -> Tensor:
        """Copy an array to the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def token_places(batch: Batch, counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Return where the tokens of a (B, width) batch are once it is flattened: (sum(counts),) int64, on the device.

    counts has the number of tokens of each row. They are contiguous; if there is an attention mask, it says where each
    row's start.
    """
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
    within = torch.from_numpy(np.concatenate([np.arange(count) for count in counts])).to(device)
    places = rows * width + within
    mask = batch.get("attention_mask")
    return places if mask is None or not len(rows) else places + mask.argmax(dim=1)[rows]


class WantedCache(NamedTuple):
    """The cache that a config asks for, whether or not it exists."""

    source: ModelSource  # of the teacher
    origin: Origin
    key: ContentKey


def wanted_cache(config: Config, task: Task, student: LoadedModel | None, accelerator: Accelerator) -> WantedCache:
    """Return the teacher of a config, and the key of the cache that it needs. All ranks call it together.

    student may be None if the layers whose hidden states are kept do not depend on it.
    """

    def read() -> WantedCache:
        source = model_source(teacher_config(config), "teacher")
        origin = origin_of(source, "teacher")
        distillation = config.distillation
        teacher_depth = required_depth(load_model_config(source, "teacher.path")) if distillation.hidden else 0
        student_depth = required_depth(student.model.config) if student is not None else 0
        layers = teacher_layers(distillation, student_depth, teacher_depth)
        dtype = dtype_name(teacher_dtype(config.teacher, accelerator))
        return WantedCache(source, origin, cache_key(config, task, origin, dtype, layers))

    return on_rank_0(accelerator, read)


def find_teacher_cache(
    config: Config, task: Task, student: LoadedModel, accelerator: Accelerator, command: str
) -> TeacherCache:
    """Return the cache that the config names, or the one under output_root, checked. All ranks call it together.

    The teacher's weights are hashed, but not loaded. command is the one that creates the cache, for messages. Raises
    UsageError if the cache is another teacher's, incomplete or damaged, or if it cannot give what the config wants.
    """
    source, origin, key = wanted_cache(config, task, student, accelerator)
    folder = on_rank_0(accelerator, lambda: _folder(config, key, command))
    hashes = accelerator.is_main_process  # the other ranks check the sizes only
    manifest = on_every_rank(lambda: _checked(folder, key, command, every_byte=hashes))
    label_ids = align(task.label_names, manifest.labels, "teacher") if task.label_names else []
    check_loss(config, manifest.temperature is not None)
    logger.info("teacher: %s, from the cache %s", source.name, folder)
    return TeacherCache(folder, manifest, source, origin, label_ids)


def check_loss(config: Config, top_k: bool) -> None:
    """Raise UsageError for a divergence that cannot be computed from a top k."""
    distillation = config.distillation
    if top_k and distillation.alpha > 0 and distillation.divergence != "forward_kl":
        raise UsageError(
            f"distillation.divergence is {distillation.divergence}, but for so many tokens a teacher cache keeps only "
            "the top k, from which only forward_kl can be computed; set distillation.divergence: forward_kl, or "
            "teacher.placement: replicated"
        )


def default_folder(config: Config, key: ContentKey) -> Path:
    """Return the folder of a key's cache if teacher.cache does not name one."""
    return Path(config.output_root) / CACHES / digest(key)[:16]


def named_folder(config: Config) -> Path | None:
    """Return the folder that teacher.cache names, if any. Raises UsageError if it is a file."""
    if config.teacher.cache is None:
        return None
    folder = Path(config.teacher.cache).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"teacher.cache is {folder}, which is a file; name a folder")
    return folder


def cache_folder(config: Config, key: ContentKey) -> Path:
    """Return the folder to read the cache from, or to create it in.

    It is the one that teacher.cache names; else that of a complete cache under output_root with these hidden states or
    more; else the default one. Raises UsageError if it is a file.
    """
    if (named := named_folder(config)) is not None:
        return named
    folder = default_folder(config, key)
    if (folder / MANIFEST).is_file():
        return folder
    usable = [other for other, held in neighbours(folder) if not differences(held, key) and _is_complete(other)]
    return usable[0] if usable else folder


def differences(held: ContentKey, wanted: ContentKey) -> list[str]:
    """Return why a cache cannot be used, a few words for each reason; additional hidden states do not matter."""
    if set(wanted[LAYERS]) <= set(held.get(LAYERS, [])):
        held = {**held, LAYERS: wanted[LAYERS]}
    return changed(held, wanted)


def neighbours(folder: Path) -> list[tuple[Path, ContentKey]]:
    """Return the caches next to a folder, and itself, with their keys; unreadable ones are left out."""
    found = []
    for file in sorted(folder.parent.glob(f"*/{KEY}")):
        try:
            held = read_key(file.parent)
        except UsageError as error:
            logger.debug("ignored: %s", error)
            continue
        if held is not None:
            found.append((file.parent, held.key))
    return found


def _is_complete(folder: Path) -> bool:
    try:
        return read_manifest(folder) is not None
    except UsageError:
        return False


def _folder(config: Config, key: ContentKey, command: str) -> Path:
    """Return the folder of a cache that can be used, complete or not; raise UsageError if there is none."""
    folder = cache_folder(config, key)
    if config.teacher.cache is not None:
        held = read_key(folder)
        if held is None:
            raise UsageError(
                f"teacher.cache is {folder}, which is not a teacher cache (it has no {KEY}); fill it with `{command}`"
            )
        if parts := differences(held.key, key):
            raise UsageError(
                f"teacher.cache: {folder} holds outputs of {held.teacher}, but what they depend on has changed: "
                f"{', '.join(parts)}; name another folder and run `{command}`, or undo the change"
            )
        return folder
    if (folder / KEY).is_file():
        return folder
    others = []
    for other, its_key in neighbours(folder):
        parts = differences(its_key, key)
        others += [(len(parts), parts, other)] if parts else []
    nearest = ""
    if others:
        _, parts, other = min(others)
        nearest = f" (the nearest one, {other}, differs in {', '.join(parts)})"
    raise UsageError(
        f"teacher.placement is cached, but {folder.parent} has no cache for this config{nearest}; create it with "
        f"`{command}`, or set teacher.placement: replicated"
    )


def _checked(folder: Path, key: ContentKey, command: str, *, every_byte: bool) -> Manifest:
    """Return the manifest of a complete and undamaged cache; raise UsageError if it is not that."""
    held = read_key(folder)
    if held is None:
        raise UsageError(f"{folder} is not visible from every rank; put the cache on a shared file system")
    if parts := differences(held.key, key):  # impossible in a default folder, unless its key was edited
        raise UsageError(f"{folder} holds outputs of another teacher or other rows: {', '.join(parts)}; delete it")
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"the cache {folder} is not complete; resume `{command}`")
    sizes = (damage(folder, record, sizes_only=True) for record in manifest.shards)
    if reason := verify(folder, manifest) if every_byte else next(filter(None, sizes), None):
        raise UsageError(f"{reason}; run `{command}` to write it again")
    return manifest
