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

from forge.data.batches import FILLER, Batch, StepBatches, for_the_loop, split_step
from forge.errors import UsageError

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
        """Of no effect: group_by_length, for lengths are unknown; num_workers and worker_init, for each process would
        read all rows, and a fork of one whose reader or tokenizer has threads can hang."""
        self.micro_batches = micro_batches
        self.step_sizes: list[list[int]] = [[0, rows_per_step]]  # [first step, rows of each step from there on]
        self._rows, self._collate = rows, collate
        self._rank, self._ranks, self._seed, self._pin_memory = rank, ranks, seed, pin_memory
        self._loaded: Iterator[Batch] = iter(())
        self._length: int | None = None  # of the stream, once its end was reached

    def adopt(self, step: int, step_sizes: list[list[int]]) -> None:
        """A run that took its first `step` steps in the given sizes goes on in the size of this one."""
        rows_per_step = self.step_sizes[-1][1]
        self.step_sizes = [size for size in step_sizes if size[0] < step or size[0] == 0]
        if self.step_sizes[-1][1] != rows_per_step:
            self.step_sizes.append([step, rows_per_step])

    def start_at(self, step: int) -> None:
        """Goes to optimizer step `step`, counted from 0."""
        self._loaded = self._from(step)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, on the CPU. Raises UsageError for a row that cannot be read."""
        return [next(self._loaded) for _ in range(self.micro_batches)]

    def close(self) -> None:
        """Stops reading."""
        self._loaded = iter(())

    def rows_at(self, step: int) -> int:
        """Rows read, over all ranks and passes, once `step` steps are taken."""
        ends = [size[0] for size in self.step_sizes[1:]] + [step]
        return sum(
            max(0, min(end, step) - first) * rows for (first, rows), end in zip(self.step_sizes, ends, strict=True)
        )

    def epochs_at(self, step: int) -> float:
        """Passes that lie wholly behind the last row of the first `step` steps; a fraction nobody knows.

        Known of every step up to those that were taken, also by the attempts before: who goes on reads past their rows.
        """
        return float((self.rows_at(step) - 1) // self._length) if self._length and step else 0.0

    def steps_for(self, epochs: float) -> int:
        """Raises UsageError: nobody knows."""
        raise UsageError("a stream has no known length; set training.max_steps")

    def _from(self, step: int) -> Iterator[Batch]:
        stream = self._endless(self.rows_at(step))
        for later in itertools.count(step):
            rows_per_step = next(size[1] for size in reversed(self.step_sizes) if size[0] <= later)
            taken = list(itertools.islice(stream, rows_per_step))
            for places in split_step(np.arange(rows_per_step), self._ranks, self.micro_batches, self._rank):
                yield self._batch([taken[max(place, 0)] for place in places], filler=places == [FILLER])

    def _batch(self, taken: list[tuple[int, Row]], *, filler: bool) -> Batch:
        rows, truncated = self._rows.prepare([row for _, row in taken], [number for number, _ in taken])
        batch = for_the_loop(self._collate(rows), [FILLER] if filler else [row["row"] for row in rows])
        batch["truncated"] = torch.tensor(0 if filler else truncated)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def _endless(self, skipped: int) -> Iterator[tuple[int, Row]]:
        """The numbered rows of pass after pass, without so many at the beginning."""
        for passes in itertools.count():
            if self._length is not None and skipped >= self._length:  # the pass lies wholly behind
                skipped -= self._length
                continue
            count = 0
            for numbered in _one_pass(self._rows, self._seed, passes):
                count += 1
                if skipped:
                    skipped -= 1
                else:
                    yield numbered
            if count == 0:
                raise UsageError(f"{self._rows.description} has no rows; training needs at least one")
            self._length = count


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
