"""A teacher that is not in memory: its outputs come from the files of `forge cache-teacher`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from forge.task.classification import Classification
from forge.task.task import Task
from forge.teacher.placement import dtype_name, teacher_config, teacher_dtype
from forge.teacher.teacher import Teacher, TeacherOutputs, TeacherSource, required_depth, teacher_layers
from forge.teacher_cache.files import (
    HIDDEN,
    KEY,
    MANIFEST,
    TOKEN_OFFSETS,
    Record,
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

CACHES = ".teacher_caches"  # below output_root


@dataclass(frozen=True)
class TeacherCache(TeacherSource):
    """A complete cache of the teacher's outputs on the rows of a run, and what the run tells of that teacher."""

    folder: Path
    manifest: dict[str, Any]
    source: ModelSource
    origin: Origin
    label_ids: list[int]  # of a classifier: for each label of the data the index of the teacher's output

    def facts(self) -> dict[str, Any]:
        """What run_metadata.json tells of the teacher: as of one in memory, and where its outputs lie."""
        return {
            **self.manifest["teacher"],
            "source": self.source.name,
            "location": self.source.location,
            "revision": self.source.revision,
            "commit": self.origin.base.commit,
            "weights_sha256": self.origin.weights_sha256,
            "location_sha256": self.origin.base.sha256,
            "adapters": [adapter.model_dump() for adapter in self.origin.adapters],
            "cache": {"folder": str(self.folder.absolute()), "digest": self.manifest["digest"]},
        }

    def place(self, accelerator: Accelerator, task: Task, columns: list[int] | None) -> "CachedTeacher":
        """Return a teacher that reads the files; columns as TeacherSource.place takes them."""
        return CachedTeacher(self, accelerator.device, columns)


class CachedTeacher(Teacher):
    """A teacher whose outputs are read."""

    def __init__(self, cache: TeacherCache, device: torch.device, columns: list[int] | None = None):
        """Open no file yet; columns as TeacherSource.place takes them."""
        manifest = cache.manifest
        self._folder, self._device, self._columns = cache.folder, device, columns
        self.origin = cache.origin
        self._temperature: float | None = manifest["temperature"]
        self._widths: list[int] = manifest["hidden_widths"]
        records = [Record(**record) for record in manifest["shards"]]
        self._records = {name: [item for item in records if item.split == name] for name in manifest["splits"]}
        self._readers: dict[str, SplitReader] = {}

    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Of the rows batch["ids"], which need not be on the device: logits, or top_log_probs and top_indices, in
        float32; of rows that are trained on, where `layers` asks, hidden_states.L in float16, zeros at padding.

        Raises ValueError at a temperature that a top k was not kept for, and for rows with another number of labels.
        """
        reader, ids = self._reader(split), batch["ids"].tolist()
        whole = self._temperature is None
        arrays, counts = reader.read(ids, ["logits"] if whole else ["log_probs", "indices", "tails"])
        if sum(counts) != len(batch["positions"]):
            raise ValueError(
                f"The rows {ids} have {len(batch['positions'])} labels, and {self._folder} holds {sum(counts)} of them."
            )
        outputs = self._logits(arrays["logits"]) if whole else self._top_k(arrays, temperature)
        return outputs | self._hidden_states(reader, ids, batch) if split is None and self.layers else outputs

    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        """Of the hidden states of the embeddings and of each layer of the teacher, kept or not."""
        return tuple(self._widths)

    def _reader(self, split: str | None) -> SplitReader:
        name = split_name(split)
        if name not in self._readers:
            self._readers[name] = SplitReader(self._folder, self._records[name])
        return self._readers[name]

    def _logits(self, logits: np.ndarray) -> TeacherOutputs:
        return {"logits": self._placed(logits if self._columns is None else logits[:, self._columns])}

    def _top_k(self, arrays: dict[str, np.ndarray], temperature: float) -> TeacherOutputs:
        if temperature not in (1.0, self._temperature):
            raise ValueError(
                f"{self._folder} holds the teacher at temperatures 1 and {self._temperature}, and not at {temperature}."
            )
        log_probs = self._placed(arrays["log_probs"])
        tail = self._placed(arrays["tails"][:, 0 if temperature == 1.0 else 1])
        indices = self._placed(arrays["indices"].astype(np.int32)).long()  # a device knows little of uint16
        return {"top_log_probs": at_temperature(log_probs, tail, temperature), "top_indices": indices}

    def _hidden_states(self, reader: SplitReader, ids: list[int], batch: Batch) -> TeacherOutputs:
        names = [f"{HIDDEN}{layer}" for layer in self.layers]
        arrays, counts = reader.read(ids, names, TOKEN_OFFSETS)
        ids_of_tokens = next(batch[name] for name in ("input_ids", "decoder_input_ids") if name in batch)
        places = token_places(batch, counts, ids_of_tokens.shape[1], self._device)
        states = {}
        for name, layer in zip(names, self.layers, strict=True):
            padded = torch.zeros(ids_of_tokens.numel(), self._widths[layer], dtype=torch.float16, device=self._device)
            padded[places] = self._placed(arrays[name])
            states[name] = padded.view(*ids_of_tokens.shape, -1)  # (B, T, D)
        return states

    def _placed(self, array: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def token_places(batch: Batch, counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Where the tokens of a batch of (B, width) lie in it when it is flattened: (sum(counts),) int64, on the device.

    counts: the tokens of each row. They are neighbours; where there is a mask of tokens, it says which is the first.
    """
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
    within = torch.from_numpy(np.concatenate([np.arange(count) for count in counts])).to(device)
    places = rows * width + within
    mask = batch.get("attention_mask")
    return places if mask is None or not len(rows) else places + mask.argmax(dim=1)[rows]


def find_teacher_cache(
    config: Config, task: Task, student: LoadedModel, accelerator: Accelerator, command: str
) -> TeacherCache:
    """The cache that the config names, or the one below output_root, checked; the teacher's weights are only hashed.

    Of all ranks at once. command: what makes the cache. Raises UsageError where it is another teacher's, not complete
    or damaged, and where it cannot give what the config wants.
    """
    source, origin, _, key = wanted_key(config, task, student, accelerator)
    folder = on_rank_0(accelerator, lambda: _folder(config, key, command))
    hashes = accelerator.is_main_process  # unless it was done; the other ranks look at the sizes
    manifest = on_every_rank(accelerator, lambda: _checked(folder, key, command, every_byte=hashes))
    label_ids = align(task.labels, manifest["labels"], "teacher") if isinstance(task, Classification) else []
    check_loss(config, manifest["temperature"] is not None)
    logger.info("teacher: %s, from the cache %s", source.name, folder)
    return TeacherCache(folder, manifest, source, origin, label_ids)


def wanted_key(
    config: Config, task: Task, student: LoadedModel | None, accelerator: Accelerator
) -> tuple[ModelSource, Origin, tuple[int, ...], ContentKey]:
    """The teacher, the layers of it whose hidden states are wanted, and the key of such a cache. Of all ranks at once.

    student: None where no layer follows from it.
    """

    def read() -> tuple[ModelSource, Origin, tuple[int, ...], ContentKey]:
        source = model_source(teacher_config(config), "teacher")
        origin = origin_of(source, "teacher")
        distillation = config.distillation
        teacher_depth = required_depth(load_model_config(source, "teacher.path")) if distillation.hidden else 0
        student_depth = required_depth(student.model.config) if student is not None else 0
        layers = teacher_layers(distillation, student_depth, teacher_depth)
        dtype = dtype_name(teacher_dtype(config.teacher, accelerator))
        return source, origin, layers, cache_key(config, task, origin, dtype, layers)

    return on_rank_0(accelerator, read)


def default_folder(config: Config, key: ContentKey) -> Path:
    """Where the cache of this key lies, unless teacher.cache names another folder."""
    return Path(config.output_root) / CACHES / digest(key)[:16]


def differences(held: ContentKey, wanted: ContentKey) -> list[str]:
    """What keeps a cache from serving, in a few words each: hidden states that nobody wants do not."""
    if set(wanted[LAYERS]) <= set(held.get(LAYERS, [])):
        held = {**held, LAYERS: wanted[LAYERS]}
    return changed(held, wanted)


def check_loss(config: Config, top_k: bool) -> None:
    """Raises UsageError for a divergence that a top k cannot give."""
    distillation = config.distillation
    if top_k and distillation.alpha > 0 and distillation.divergence != "forward_kl":
        raise UsageError(
            f"distillation.divergence is {distillation.divergence}, and of so many tokens a cache holds the top k, "
            "which give forward_kl only; set that, or teacher.placement: replicated"
        )


def named_folder(config: Config) -> Path | None:
    """Of teacher.cache. Raises UsageError where that is a file."""
    if config.teacher.cache is None:
        return None
    folder = Path(config.teacher.cache).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"teacher.cache is {folder}, which is a file; name a folder")
    return folder


def place_of_cache(config: Config, key: ContentKey) -> Path:
    """The folder that teacher.cache names; else that of a complete cache below output_root which serves, with these
    hidden states or with more; else where it is to be made. Raises UsageError for a file."""
    if (named := named_folder(config)) is not None:
        return named
    folder = default_folder(config, key)
    if (folder / MANIFEST).is_file():
        return folder
    serving = [other for other, held in neighbours(folder) if not differences(held, key) and _is_complete(other)]
    return serving[0] if serving else folder


def neighbours(folder: Path) -> list[tuple[Path, ContentKey]]:
    """The caches beside a folder, and itself, with their keys; what cannot be read is no reason to stop."""
    found = []
    for file in sorted(folder.parent.glob(f"*/{KEY}")):
        try:
            held = read_key(file.parent)
        except UsageError as error:
            logger.debug("not looked at: %s", error)
            continue
        if held is not None:
            found.append((file.parent, held["key"]))
    return found


def _is_complete(folder: Path) -> bool:
    try:
        return read_manifest(folder) is not None
    except UsageError:
        return False


def _folder(config: Config, key: ContentKey, command: str) -> Path:
    """Where a cache that serves lies, complete or not."""
    folder = place_of_cache(config, key)
    if config.teacher.cache is not None:
        held = read_key(folder)
        if held is None:
            raise UsageError(
                f"teacher.cache is {folder}, which holds no outputs of a teacher (no {KEY}); make them with `{command}`"
            )
        if parts := differences(held["key"], key):
            raise UsageError(
                f"teacher.cache: {folder} holds outputs of {held['teacher']}, and what they depend on has changed: "
                f"{', '.join(parts)}; name another folder and run `{command}`, or go back to what they were made with"
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
        f"teacher.placement is cached, and there is no cache for this config below {folder.parent}{nearest}; make it "
        f"with `{command}`, or set teacher.placement: replicated"
    )


def _checked(folder: Path, key: ContentKey, command: str, *, every_byte: bool) -> dict[str, Any]:
    """The manifest of a folder whose files are as they were written."""
    held = read_key(folder)
    if held is None:
        raise UsageError(f"{folder} cannot be seen from every rank; put the cache where all of them see it")
    if parts := differences(held["key"], key):  # a default folder's name says the same, unless somebody changed it
        raise UsageError(f"{folder} holds outputs of another teacher or other rows: {', '.join(parts)}; delete it")
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"the cache {folder} is not complete; go on with `{command}`")
    records = [Record(**record) for record in manifest["shards"]]
    sizes = (damage(folder, record, sizes_only=True) for record in records)
    if reason := verify(folder, manifest) if every_byte else next(filter(None, sizes), None):
        raise UsageError(f"{reason}; `{command}` writes it anew")
    return manifest
