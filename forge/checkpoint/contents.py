"""What a checkpoint holds: taken from a training in progress, written by each rank, and put back.

The learning rate is a pure function of the step, and the order of the rows one of seed, epoch and step: neither has
a state to be saved. Checkpoints are taken between two optimizer steps, so that no gradient is half accumulated.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from forge.ranks.agreement import on_every_rank, rank_seed
from forge.ranks.deepspeed import gathered
from forge.ranks.partitions import Partitions
from forge.run.state import TrainingState

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}


class Weights(Protocol):
    """The weights that training changes, all of a model's or an adapter's, under the names that their file has."""

    file: str
    base: str | None  # the hash of what an adapter is trained on; None: all weights are here

    def tensors(self) -> dict[str, Tensor]:
        """The model's own, not copies, and none twice."""

    def load(self, tensors: dict[str, Tensor]) -> None: ...

    def texts(self) -> dict[str, str]:
        """The small files that from_pretrained needs beside the weights, by name."""


@dataclass(frozen=True)
class Training:
    """The parts of a training in progress that a checkpoint is taken from and put back into."""

    accelerator: Accelerator
    weights: Weights
    optimizer: Optimizer  # of the trained parameters only
    seed: int
    projections: nn.Module | None = None  # trained beside the model: no part of what is exported
    named: Named | None = None  # of a training that may be sharded, or go on from a sharded one
    partitions: Partitions | None = None  # of a training that is sharded


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint; what is None is another rank's to write."""

    rank: int
    rng: dict[str, Any]
    state: dict[str, Any] | None  # TrainingState and progress, as JSON
    weights_file: str
    weights: dict[str, Tensor] | None
    texts: dict[str, str] | None
    optimizer: dict[str, Any] | None
    projections: dict[str, Tensor] | None = None  # None also where nothing is trained beside the model
    header: dict[str, str] | None = None  # of a rank's parts: weights and optimizer are these, flat

    @property
    def bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(tensor.nbytes for tensor in _tensors([self.weights, self.projections, self.optimizer, self.rng]))


def take_snapshot(training: Training, state: TrainingState, progress: dict[str, Any], *, copy: bool) -> Snapshot:
    """Waits for the device. With copy, all of it stays as it is now while training goes on.

    progress: what the next report has collected, as JSON.
    """
    accelerator, weights = training.accelerator, training.weights
    rng = _rng_state()
    if training.partitions is not None:
        return _snapshot_of_parts(training, rng, {"state": asdict(state), "progress": progress}, copy=copy)
    if not accelerator.is_main_process:
        return Snapshot(accelerator.process_index, rng, None, weights.file, None, None, None)
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    optimizer = {"optimizer": training.optimizer.state_dict(), "scaler": scaler}
    return Snapshot(
        accelerator.process_index,
        rng,
        {"state": asdict(state), "progress": progress},
        weights.file,
        _on_cpu(weights.tensors(), copy=copy),
        weights.texts(),
        _on_cpu(optimizer, copy=copy),
        None if training.projections is None else _on_cpu(training.projections.state_dict(), copy=copy),
    )


def _snapshot_of_parts(training: Training, rng: dict[str, Any], state: dict[str, Any], *, copy: bool) -> Snapshot:
    assert training.named is not None
    assert training.partitions is not None
    named, rank, is_main = training.named, training.accelerator.process_index, training.accelerator.is_main_process
    weights, moments, header = shards(named, training.partitions)
    for name, tensor in named.constant.items():  # on every rank at once: it may be spread too
        with gathered([tensor]):
            if is_main:
                weights[name] = tensor.detach().to("cpu", copy=True)  # at once: all of them may be more than fits
    return Snapshot(
        rank,
        rng,
        state if is_main else None,
        model_shard(rank),
        _on_cpu(weights, copy=copy),
        training.weights.texts() if is_main else None,
        _on_cpu(moments, copy=copy),
        header=header,
    )


def write_snapshot(snapshot: Snapshot, folder: Path) -> dict[str, StoredFile]:
    """Writes this rank's files and tells what they are. Raises OSError; what was written then is worth nothing."""
    writers: dict[str, Callable[[IO[bytes]], None]] = {rng_file(snapshot.rank): _saves(snapshot.rng)}
    if snapshot.header is not None:
        weights, moments, header = snapshot.weights or {}, snapshot.optimizer or {}, snapshot.header
        writers[snapshot.weights_file] = lambda file: write_safetensors(weights, file, header)
        writers[optimizer_shard(snapshot.rank)] = lambda file: write_safetensors(moments, file, header)
        if snapshot.texts is not None:
            texts = {**snapshot.texts, STATE_FILE: json.dumps(snapshot.state, indent=2) + "\n"}
            writers |= {name: _writes(text) for name, text in texts.items()}
    elif snapshot.weights is not None and snapshot.texts is not None:
        weights = snapshot.weights
        beside = snapshot.projections
        if beside is not None:
            writers[PROJECTIONS_FILE] = lambda file: write_safetensors(beside, file)
        texts = {**snapshot.texts, STATE_FILE: json.dumps(snapshot.state, indent=2) + "\n"}
        writers |= {
            snapshot.weights_file: lambda file: write_safetensors(weights, file),
            OPTIMIZER_FILE: _saves(snapshot.optimizer),
            **{name: _writes(text) for name, text in texts.items()},
        }
    return {name: store(folder / name, write) for name, write in writers.items()}


def restore(training: Training, folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Puts a verified checkpoint back on this rank; returns the run's state at it, and the report's progress.

    A rank that the checkpoint does not know (there are more now) starts random numbers of its own. Raises UsageError
    where it was saved with other projections than are trained now.
    """
    accelerator = training.accelerator
    if training.partitions is not None or is_sharded(folder):
        _restore_parts(training, folder)
    else:
        _restore_projections(training.projections, folder)
        training.weights.load(load_file(folder / training.weights.file))
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        training.optimizer.load_state_dict(states["optimizer"])
        if accelerator.scaler is not None and states["scaler"] is not None:
            accelerator.scaler.load_state_dict(states["scaler"])
    values = json.loads((folder / STATE_FILE).read_bytes())
    state = TrainingState.from_values(values["state"], folder / STATE_FILE)
    own_rng = folder / rng_file(accelerator.process_index)
    if own_rng.exists():
        _set_rng_state(torch.load(own_rng, map_location="cpu", weights_only=True))
    else:
        torch.manual_seed(rank_seed(training.seed, accelerator.process_index * 2**32 + state.step))
    return state, values["progress"]


def _restore_parts(training: Training, folder: Path) -> None:
    """Where the checkpoint, or the training that goes on from it, or both are in parts."""
    named, partitions = training.named, training.partitions
    assert named is not None
    order = list(named.trained)
    # No rank may be left waiting by one that could not read.
    with on_every_rank(training.accelerator, lambda: SavedTensors(folder, training.weights.file, order)) as saved:
        if lacking := sorted({*named.trained} ^ {*saved.weights}):
            raise UsageError(
                f"{folder} was saved with other tensors than are trained now (the first is {lacking[0]}); set model, "
                "teacher and distillation.hidden back to what the run had, or start a new run"
            )
        if partitions is not None:
            on_every_rank(training.accelerator, lambda: load_parts(saved, named, partitions))
            partitions.publish()
            for name, tensor in named.constant.items():
                if name in saved.constant:
                    with gathered([tensor], modified=True):
                        tensor.data.copy_(saved.constant[name])
            return
        tensors = whole_tensors(saved, named)
        beside = {name.removeprefix(PROJECTIONS): t for name, t in tensors.items() if name.startswith(PROJECTIONS)}
        if training.projections is not None:
            training.projections.load_state_dict(beside)
        training.weights.load({name: t for name, t in tensors.items() if not name.startswith(PROJECTIONS)})
        training.optimizer.load_state_dict(optimizer_state(saved, named, training.optimizer))


def _restore_projections(projections: nn.Module | None, folder: Path) -> None:
    file = folder / PROJECTIONS_FILE
    back = "set teacher, model and distillation.hidden back to what the run had, or start a new run"
    if projections is None:
        if file.exists():
            raise UsageError(
                f"{file} holds projections of hidden states, and none are trained now: the optimizer's state has their "
                f"moments among the model's; {back}"
            )
        return
    if not file.exists():
        raise UsageError(f"{folder} has no {file.name}, and distillation.hidden trains projections; {back}")
    try:
        projections.load_state_dict(load_file(file))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise UsageError(f"{file} does not fit the projections that are trained now ({reason}); {back}") from error


def write_safetensors(tensors: dict[str, Tensor], file: IO[bytes], more: dict[str, str] | None = None) -> None:
    """Streams CPU tensors in the safetensors format, with no second copy of them in memory. more: of its metadata.

    The format: https://huggingface.co/docs/safetensors/index#format
    """
    # Without a format from_pretrained refuses the file.
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
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _saves(value: Any) -> Callable[[IO[bytes]], None]:
    return lambda file: torch.save(value, file)


def _writes(text: str) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    return write
