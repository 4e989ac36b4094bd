"""Optimizer steps from rows that are read as they come: of unknown number, in their order, prepared on the way.

Every rank reads the whole stream and prepares its own rows of it; what a step takes depends on the seed and on its
place alone. To go on at a step, the rows before it are read once more, and not prepared.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.task.batches import FILLER, Batch, StepBatches, split_step

Row = dict[str, Any]


@dataclass(frozen=True)
class RowStream:
    """Training rows that can only be read from the beginning to the end, as often as wanted."""

    rows: Iterable[Row]
    prepare: Callable[[list[Row], list[int]], tuple[list[Row], int]]
    """Raw rows and their numbers in the stream -> those that collate takes, at least one, with the column `row`; and
    how many were cut or left out."""
    shuffle_buffer: int = 0  # rows among which the next one is drawn; 0: in their order
    description: str = "the stream"


def step_batches(train: Any, collate: Callable[[list[Row]], Batch], **options: Any) -> "StepBatches | StreamBatches":
    """The optimizer steps of a task's training rows, a data set or a stream; options as StepBatches has them."""
    kind = StreamBatches if isinstance(train, RowStream) else StepBatches
    return kind(train, collate, **options)


class StreamBatches:
    """Gives this rank's micro-batches of one optimizer step after another, as StepBatches does.

    Step k takes the rows_per_step rows that follow those of step k - 1. The stream begins again at its end, also within
    a step. Rows that carry no label are among them: they are left out of their batch, and nothing comes in their place.
    """

    def __init__(
        self,
        rows: RowStream,
        collate: Callable[[list[Row]], Batch],
        *,
        rows_per_step: int,
        rank: int,
        ranks: int,
        micro_batches: int,
        seed: int,
        group_by_length: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        worker_init: Callable[[int], None] | None = None,
    ):
        """group_by_length: of no effect, lengths are unknown. num_workers: one, if any; each would read all rows."""
        self.micro_batches = micro_batches
        self.step_sizes: list[list[int]] = [[0, rows_per_step]]  # [first step, rows of each step from there on]
        self._rows, self._collate = rows, collate
        self._rank, self._ranks, self._seed = rank, ranks, seed
        self._num_workers, self._pin_memory, self._worker_init = min(num_workers, 1), pin_memory, worker_init
        self._loaded: Iterator[Batch] = iter(())
        self._passes = 0

    def adopt(self, step: int, step_sizes: list[list[int]]) -> None:
        """A run that took its first `step` steps in the given sizes goes on in the size of this one."""
        rows_per_step = self.step_sizes[-1][1]
        self.step_sizes = [size for size in step_sizes if size[0] < step or size[0] == 0]
        if self.step_sizes[-1][1] != rows_per_step:
            self.step_sizes.append([step, rows_per_step])

    def start_at(self, step: int) -> None:
        """Goes to optimizer step `step`, counted from 0."""
        loader: DataLoader[Batch] = DataLoader(
            _MicroBatches(lambda: self._from(step)),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=self._worker_init,
            generator=torch.Generator(),  # else torch's global one would be drawn from
            multiprocessing_context="fork" if self._num_workers else None,
        )
        self._loaded = iter(loader)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, on the CPU. Raises UsageError for a row that cannot be read."""
        batches = [next(self._loaded) for _ in range(self.micro_batches)]
        self._passes = max(int(batch.pop("passes")) for batch in batches)
        return batches

    def close(self) -> None:
        """Ends the worker process, which would go on preparing batches for ever."""
        self._loaded = iter(())  # nothing else holds the loader's iterator, whose end is its own

    def samples_at(self, step: int) -> int:
        """Rows read, over all ranks and passes, once `step` steps are taken."""
        ends = [size[0] for size in self.step_sizes[1:]] + [step]
        return sum(
            max(0, min(end, step) - first) * rows for (first, rows), end in zip(self.step_sizes, ends, strict=True)
        )

    def epochs_at(self, step: int) -> float:
        """How often the stream has been read to its end; its length, and so any fraction of it, is unknown."""
        return float(self._passes)

    def steps_for(self, epochs: float) -> int:
        """Raises UsageError: nobody knows."""
        raise UsageError("a stream has no known length; set training.max_steps")

    def _from(self, step: int) -> Iterator[Batch]:
        stream = _endless(self._rows, self._seed, self.samples_at(step))
        for later in itertools.count(step):
            rows_per_step = next(size[1] for size in reversed(self.step_sizes) if size[0] <= later)
            taken = list(itertools.islice(stream, rows_per_step))
            for places in split_step(np.arange(rows_per_step), self._ranks, self.micro_batches)[self._rank]:
                yield self._batch([taken[max(place, 0)] for place in places], filler=places == [FILLER])

    def _batch(self, taken: list["_Numbered"], *, filler: bool) -> Batch:
        rows, truncated = self._rows.prepare([place.row for place in taken], [place.number for place in taken])
        batch = self._collate(rows)
        batch["ids"] = torch.tensor([row["row"] for row in rows])
        batch["truncated"] = torch.tensor(0 if filler else truncated)
        batch["passes"] = torch.tensor(taken[-1].passes)
        if filler:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
            batch["tokens"] = torch.zeros_like(batch["tokens"])
            batch["ids"] = torch.full_like(batch["ids"], FILLER)
        return batch


@dataclass(frozen=True)
class _Numbered:
    row: Row
    number: int  # in the stream
    passes: int  # over the stream that came before


def _endless(stream: RowStream, seed: int, skipped: int) -> Iterator[_Numbered]:
    """The rows of pass after pass, from the one with that number on."""
    length: int | None = None
    passes = 0
    while True:
        if length is not None:  # known from the first pass: the passes that lie wholly behind need not be read
            passes, skipped = passes + skipped // length, skipped % length
        count = 0
        for number, row in _one_pass(stream, seed, passes):
            count += 1
            if skipped:
                skipped -= 1
            else:
                yield _Numbered(row, number, passes)
        if count == 0:
            raise UsageError(f"{stream.description} has no rows; training needs at least one")
        length, passes = count, passes + 1


def _one_pass(stream: RowStream, seed: int, passes: int) -> Iterator[tuple[int, Row]]:
    """Numbered rows, in their order or each drawn from the next shuffle_buffer ones."""
    rows = enumerate(stream.rows)
    if not stream.shuffle_buffer:
        yield from rows
        return
    draw = np.random.default_rng([seed, passes])
    buffer = list(itertools.islice(rows, stream.shuffle_buffer))
    for row in rows:
        i = int(draw.integers(len(buffer)))
        drawn, buffer[i] = buffer[i], row
        yield drawn
    for i in draw.permutation(len(buffer)):
        yield buffer[i]


class _MicroBatches(IterableDataset[Batch]):
    def __init__(self, batches: Callable[[], Iterator[Batch]]):
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()
