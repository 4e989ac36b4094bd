"""What a checkpoint holds: taken from a training, written by each rank, and restored.

The learning rate depends on the step alone, and the order of the rows on seed, epoch and step, so neither has a state
to save. Checkpoints are taken between two optimizer steps, so no gradient is half accumulated.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from forge.checkpoint.manifest import (
    OPTIMIZER_FILE,
    PROJECTIONS_FILE,
    STATE_FILE,
    StoredFile,
    model_shard,
    optimizer_shard,
    rng_file,
    store,
)
from forge.checkpoint.shards import (
    PROJECTIONS,
    Named,
    SavedTensors,
    is_sharded,
    load_parts,
    optimizer_state,
    shards,
    whole_tensors,
)
from forge.errors import UsageError
from forge.ranks.accelerator import rank_seed
from forge.ranks.agreement import on_every_rank
from forge.ranks.deepspeed import gathered
from forge.ranks.partitions import Partitions
from forge.run.records import Record, read_record
from forge.run.state import TrainingState

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
SET_BACK = "set teacher, model and distillation.hidden back to what the run had, or start a new run"


class Weights(Protocol):
    """The weights that training changes, a model's or an adapter's, under the names that their file has."""

    file: str
    base: str | None  # the hash of what an adapter is trained on; None: these are all the weights

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's own tensors, not copies, each once."""

    def load(self, tensors: dict[str, Tensor]) -> None: ...

    def texts(self) -> dict[str, str]:
        """Return the small files, by name, that from_pretrained needs in addition to the weights."""


@dataclass(frozen=True)
class Training:
    """The parts of a training that a checkpoint is taken from and restored into."""

    accelerator: Accelerator
    weights: Weights
    optimizer: Optimizer  # of the trained parameters only
    seed: int
    projections: nn.Module | None = None  # trained in addition to the model, but not exported
    named: Named | None = None  # of a training that may be sharded, or resume from a sharded one
    partitions: Partitions | None = None  # of a training that is sharded


class CheckpointState(Record):
    """What state.json in a checkpoint holds."""

    state: TrainingState
    progress: dict[str, Any]  # what the next report has collected so far


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file."""

    content: dict[str, Tensor]  # on the CPU
    header: dict[str, str] = field(default_factory=dict)

    def write(self, file: IO[bytes]) -> None:
        write_safetensors(self.content, file, self.header)


@dataclass(frozen=True)
class PickledFile:
    """A file that torch.load reads."""

    content: Any  # its tensors are on the CPU

    def write(self, file: IO[bytes]) -> None:
        torch.save(self.content, file)


@dataclass(frozen=True)
class TextFile:
    content: str

    def write(self, file: IO[bytes]) -> None:
        file.write(self.content.encode())


@dataclass(frozen=True)
class Snapshot:
    """One rank's files of a checkpoint, by name, before they are written."""

    rank: int
    files: dict[str, TensorFile | PickledFile | TextFile]

    @property
    def bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(tensor.nbytes for file in self.files.values() for tensor in _tensors(file.content))


def take_snapshot(training: Training, state: TrainingState, progress: dict[str, Any], *, copy: bool) -> Snapshot:
    """Return this rank's files; waits for the device. Called on all ranks at once.

    progress: what the next report has collected so far, as JSON. copy: keep it as it is now while training continues.
    """
    accelerator = training.accelerator
    rank, is_main = accelerator.process_index, accelerator.is_main_process
    files: dict[str, TensorFile | PickledFile | TextFile] = {rng_file(rank): PickledFile(_rng_state())}
    if training.partitions is not None:
        files |= _files_of_parts(training, training.partitions, copy=copy)
    elif is_main:
        files |= _files_of_all(training, copy=copy)
    if is_main:
        own = {"state": state.model_dump(), "progress": progress}
        texts = {**training.weights.texts(), STATE_FILE: json.dumps(own, indent=2) + "\n"}
        files |= {name: TextFile(text) for name, text in texts.items()}
    return Snapshot(rank, files)


def _files_of_all(training: Training, *, copy: bool) -> dict[str, TensorFile | PickledFile]:
    """Return the weights and the optimizer's state of a training that is not sharded."""
    scaler, weights = training.accelerator.scaler, training.weights
    files: dict[str, TensorFile | PickledFile] = {}
    if training.projections is not None:
        files[PROJECTIONS_FILE] = TensorFile(_on_cpu(training.projections.state_dict(), copy=copy))
    optimizer = {
        "optimizer": training.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    return {
        **files,
        weights.file: TensorFile(_on_cpu(weights.tensors(), copy=copy)),
        OPTIMIZER_FILE: PickledFile(_on_cpu(optimizer, copy=copy)),
    }


def _files_of_parts(training: Training, partitions: Partitions, *, copy: bool) -> dict[str, TensorFile]:
    """Return this rank's parts of the weights and moments; rank 0 adds the constant tensors, whole."""
    assert training.named is not None
    rank, is_main = training.accelerator.process_index, training.accelerator.is_main_process
    weights, moments, header = shards(training.named, partitions)
    for name, tensor in training.named.constant.items():  # gathered on all ranks at once, if it is sharded too
        with gathered([tensor]):
            if is_main:
                weights[name] = tensor.detach().to("cpu", copy=True)  # one by one: whole, they may not fit the device
    return {
        model_shard(rank): TensorFile(_on_cpu(weights, copy=copy), header),
        optimizer_shard(rank): TensorFile(_on_cpu(moments, copy=copy), header),
    }


def write_snapshot(snapshot: Snapshot, folder: Path) -> dict[str, StoredFile]:
    """Write this rank's files and return their sizes and hashes. Raises OSError; the files are useless then."""
    return {name: store(folder / name, file.write) for name, file in snapshot.files.items()}


def restore(training: Training, folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Restore a verified checkpoint on this rank; return the run's state at it, and the progress of its report.

    A rank that the checkpoint has no random state for (there are more ranks now) starts one of its own. Raises
    UsageError if other projections are trained now than when it was saved.
    """
    accelerator = training.accelerator
    if training.partitions is not None or is_sharded(folder):
        _restore_parts(training, folder)
    else:
        _restore_all(training, folder)
    saved = read_record(CheckpointState, folder / STATE_FILE, "restore the checkpoint's file")
    own_rng = folder / rng_file(accelerator.process_index)
    if own_rng.exists():
        _set_rng_state(torch.load(own_rng, map_location="cpu", weights_only=True))
    else:
        torch.manual_seed(rank_seed(training.seed, accelerator.process_index * 2**32 + saved.state.step))
    return saved.state, saved.progress


def _restore_all(training: Training, folder: Path) -> None:
    """Restore a checkpoint that is not sharded into a training that is not."""
    _restore_projections(training.projections, folder)
    training.weights.load(load_file(folder / training.weights.file))
    states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    training.optimizer.load_state_dict(states["optimizer"])
    scaler = training.accelerator.scaler
    if scaler is not None and states["scaler"] is not None:
        scaler.load_state_dict(states["scaler"])


def _restore_parts(training: Training, folder: Path) -> None:
    """Restore where the checkpoint, the training, or both are sharded."""
    named, partitions = training.named, training.partitions
    assert named is not None
    order = list(named.trained)
    # A rank that cannot read the files must not leave the others waiting.
    with on_every_rank(lambda: SavedTensors(folder, training.weights.file, order)) as saved:
        if differing := sorted({*named.trained} ^ {*saved.weights}):
            raise UsageError(
                f"{folder} was saved with other tensors than are trained now (the first is {differing[0]}); {SET_BACK}"
            )
        if partitions is None:
            _load_whole(training, named, saved)
            return
        on_every_rank(lambda: load_parts(saved, named, partitions))
        partitions.publish()
        for name in [name for name in named.constant if name in saved.constant]:
            tensor = named.constant[name]
            with gathered([tensor], modified=True):
                tensor.data.copy_(saved.constant[name])


def _load_whole(training: Training, named: Named, saved: SavedTensors) -> None:
    """Load a sharded checkpoint into a training that is not sharded."""
    tensors = whole_tensors(saved, named)
    projections = {name.removeprefix(PROJECTIONS): t for name, t in tensors.items() if name.startswith(PROJECTIONS)}
    if training.projections is not None:
        training.projections.load_state_dict(projections)
    training.weights.load({name: t for name, t in tensors.items() if not name.startswith(PROJECTIONS)})
    training.optimizer.load_state_dict(optimizer_state(saved, named, training.optimizer))


def _restore_projections(projections: nn.Module | None, folder: Path) -> None:
    file = folder / PROJECTIONS_FILE
    if projections is None:
        if file.exists():
            raise UsageError(
                f"{file} holds projections of hidden states, but none are trained now, and the optimizer's state has "
                f"their moments among the model's; {SET_BACK}"
            )
        return
    if not file.exists():
        raise UsageError(f"{folder} has no {file.name}, but distillation.hidden trains projections; {SET_BACK}")
    try:
        projections.load_state_dict(load_file(file))
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()[:200]
        raise UsageError(f"{file} does not fit the projections that are trained now ({why}); {SET_BACK}") from error


def write_safetensors(tensors: dict[str, Tensor], file: IO[bytes], more: dict[str, str] | None = None) -> None:
    """Stream CPU tensors in the safetensors format, without a second copy of them in memory.

    more: metadata for the header. The format: https://huggingface.co/docs/safetensors/index#format
    """
    # from_pretrained refuses a file without a format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(more or {})}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _rng_state() -> dict[str, Any]:
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(rng: dict[str, Any]) -> None:
    random.setstate(rng["python"])
    keys, *rest = rng["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _on_cpu(tree: Any, *, copy: bool) -> Any:
    if isinstance(tree, Tensor):
        held = tree.detach().to("cpu")  # waits for the GPU
        return held.clone() if copy and held.device == tree.device else held
    if isinstance(tree, dict):
        return {key: _on_cpu(value, copy=copy) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_on_cpu(value, copy=copy) for value in tree)
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
