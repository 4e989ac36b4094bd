"""Sharded checkpoints: weights and moments that each rank writes for itself, read by any number of ranks.

A part is a range of elements of one flattened tensor. Each rank's file says in its header where its parts start, so a
reader can fetch just the slices it needs, whatever the plan and the number of ranks at the time of the save.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from forge.checkpoint.manifest import OPTIMIZER_FILE, PROJECTIONS_FILE, model_shard, optimizer_shard
from forge.errors import TrainingError
from forge.ranks.partitions import MOMENTS, Partitions, shape_of

PROJECTIONS = "projections."  # prefix of the names of what is trained in addition to the model
STARTS, STEPS = "starts", "steps"  # in a shard's header: where its parts start, and the optimizer's steps


@dataclass(frozen=True)
class Named:
    """The tensors of a training by their names in checkpoints."""

    trained: dict[str, nn.Parameter]  # in the optimizer's order
    constant: dict[str, Tensor]  # frozen weights and buffers

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], model: nn.Module, projections: nn.Module | None, optimizer: Optimizer
    ) -> Self:
        """Collect them before the model is sharded.

        tensors: the model's own, by name; projections: what is trained in addition.
        """
        parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        named: dict[str, Tensor] = {name: parameters.get(t.data_ptr(), t) for name, t in tensors.items()}
        if projections is not None:
            named |= {f"{PROJECTIONS}{name}": parameter for name, parameter in projections.named_parameters()}
        names = {id(tensor): name for name, tensor in named.items()}
        trained = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        return cls(trained, {name: tensor for name, tensor in named.items() if name not in trained})


def shards(named: Named, partitions: Partitions) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Return this rank's parts of the weights and of the moments (as MOMENT/NAME), and the header of both files."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for name, parameter in named.trained.items():
        part = partitions.of(parameter)
        if part is not None:
            starts[name] = part.start
            weights[name] = part.weight
            moments |= {f"{moment}/{name}": tensor for moment, tensor in part.moments.items()}
    return weights, moments, {STARTS: json.dumps(starts), STEPS: str(partitions.steps)}


class SavedTensors:
    """The weights and moments of a checkpoint, sharded or not, read slice by slice."""

    def __init__(self, folder: Path, weights_file: str, order: list[str]):
        """order: the names of what is trained, in the order of the optimizer that saved them."""
        self._folder, self._files = folder, ExitStack()
        self._sources: dict[str, list[tuple[int, int, Any, str]]] = {}  # start, end, file, name in it
        self.steps = 0
        self.constant: dict[str, Tensor] = {}
        if is_sharded(folder):
            self._read_shards()
        else:
            self._read_whole(weights_file, order)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def weight(self, name: str, start: int, length: int) -> Tensor:
        """Return a slice of the flattened weight, (length,) on the CPU. Raises TrainingError if it is not all there."""
        return self._piece(name, start, length)

    def moment(self, moment: str, name: str, start: int, length: int) -> Tensor:
        """Return the same slice of one of the weight's moments."""
        return self._piece(f"{moment}/{name}", start, length)

    def has_moments(self, name: str) -> bool:
        """False if no step had a gradient for the weight: an optimizer that is not sharded then has no moments."""
        return f"{MOMENTS[0]}/{name}" in self._sources

    @property
    def weights(self) -> list[str]:
        """The names of the trained weights."""
        return [name for name in self._sources if not name.startswith(tuple(f"{moment}/" for moment in MOMENTS))]

    def _piece(self, name: str, start: int, length: int) -> Tensor:
        pieces, at, end = [], start, start + length
        for first, last, source, key in sorted(self._sources.get(name, []), key=lambda found: found[:2]):
            if first <= at < last and at < end:
                pieces.append(_elements(source, key, at - first, min(end, last) - first))
                at = min(end, last)
        if at != end:
            raise TrainingError(f"{self._folder} lacks elements {at} to {end} of {name}; it belongs to another model")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read_shards(self) -> None:
        rank = 0
        while (self._folder / model_shard(rank)).exists():
            for file in (model_shard(rank), optimizer_shard(rank)):
                opened = self._files.enter_context(safe_open(self._folder / file, "pt"))
                header = opened.metadata()
                starts, steps = json.loads(header[STARTS]), int(header[STEPS])
                if rank and steps != self.steps:
                    raise TrainingError(
                        f"{self._folder / file} was written at optimizer step {steps}, but other files at {self.steps}"
                    )
                self.steps = steps
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    name = key.split("/", 1)[1] if key.startswith(tuple(f"{moment}/" for moment in MOMENTS)) else key
                    if name not in starts:
                        self.constant[name] = opened.get_tensor(key)
                        continue
                    length = opened.get_slice(key).get_shape()[0]
                    self._sources.setdefault(key, []).append((starts[name], starts[name] + length, opened, key))
            rank += 1

    def _read_whole(self, weights_file: str, order: list[str]) -> None:
        for file, prefix in ((weights_file, ""), (PROJECTIONS_FILE, PROJECTIONS)):
            if not (self._folder / file).exists():
                continue
            opened = self._files.enter_context(safe_open(self._folder / file, "pt"))
            for key in opened.keys():  # noqa: SIM118 - not a dict
                name = f"{prefix}{key}"
                if name not in order:
                    self.constant[name] = opened.get_tensor(key)
                    continue
                self._sources[name] = [(0, math.prod(opened.get_slice(key).get_shape()), opened, key)]
        states = torch.load(self._folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
        for index, state in states["optimizer"]["state"].items():
            self.steps = int(state["step"])
            for moment in MOMENTS:
                flat = state[moment].flatten()
                self._sources[f"{moment}/{order[index]}"] = [(0, flat.numel(), flat, "")]


def is_sharded(folder: Path) -> bool:
    """True if each rank wrote its own part of the checkpoint."""
    return (folder / model_shard(0)).exists()


@torch.no_grad()
def load_parts(saved: SavedTensors, named: Named, partitions: Partitions) -> None:
    """Load a checkpoint's weights and moments into this rank's parts; the model uses them once they are published."""
    partitions.begin(saved.steps)
    for name, parameter in named.trained.items():
        part = partitions.of(parameter)
        if part is None:
            continue
        length = part.weight.numel()
        part.weight.copy_(saved.weight(name, part.start, length))
        for moment, tensor in part.moments.items() if saved.has_moments(name) else ():
            tensor.copy_(saved.moment(moment, name, part.start, length))


def whole_tensors(saved: SavedTensors, named: Named) -> dict[str, Tensor]:
    """Return all weights, for a training that is not sharded."""
    return {name: _whole(saved, name, parameter) for name, parameter in named.trained.items()} | saved.constant


def optimizer_state(saved: SavedTensors, named: Named, optimizer: Optimizer) -> dict[str, Any]:
    """Return what optimizer.load_state_dict takes, for an optimizer that is not sharded."""
    state: dict[int, Any] = {}
    for index, (name, parameter) in enumerate(named.trained.items()):
        if not saved.has_moments(name):
            continue
        moments = {moment: _whole(saved, f"{moment}/{name}", parameter) for moment in MOMENTS}
        state[index] = {"step": torch.tensor(float(saved.steps)), **moments}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _whole(saved: SavedTensors, name: str, parameter: nn.Parameter) -> Tensor:
    shape = shape_of(parameter)
    return saved.weight(name, 0, math.prod(shape)).view(shape)


def _elements(source: Any, key: str, start: int, end: int) -> Tensor:
    if isinstance(source, Tensor):
        return source[start:end]
    piece = source.get_slice(key)
    found: Tensor = piece[start:end] if len(piece.get_shape()) == 1 else source.get_tensor(key).flatten()[start:end]
    return found
