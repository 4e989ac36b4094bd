"""Optimizer steps from a stream of rows, whose number is unknown and which are prepared as they come.

Every rank reads the whole stream and prepares its own rows of it. What a step takes depends only on the seed and the
step's number. To start at a later step, the rows before it are read again but not prepared.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from forge.data.batches import (
    FILLER,
    IN_PROCESS,
    Batch,
    Collate,
    Loading,
    Row,
    Share,
    StepBatches,
    continued_sizes,
    split_step,
    too_few,
    with_positions,
)
from forge.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowStream:
    """Training rows that can only be read from beginning to end, any number of times."""

    rows: Iterable[Row]
    prepare: Callable[[list[Row], list[int]], tuple[list[Row], int]]
    """Raw rows and their numbers in the stream -> rows for collate, at least one and each with the column `row`; and
    how many were cut or left out."""
    shuffle_buffer: int = 0  # rows among which the next one is drawn; 0: rows come in their order
    description: str = "the stream"


def step_batches(
    train: Dataset | RowStream,
    collate: Collate,
    rows_per_step: int,
    share: Share,
    *,
    seed: int,
    group_by_length: bool = False,
    loading: Loading = IN_PROCESS,
) -> "StepBatches | StreamBatches":
    """Return the optimizer steps of a task's training rows."""
    if isinstance(train, RowStream):
        return StreamBatches(train, collate, rows_per_step, share, seed=seed, pin_memory=loading.pin_memory)
    return StepBatches(
        train, collate, rows_per_step, share, seed=seed, group_by_length=group_by_length, loading=loading
    )


class StreamBatches:
    """This rank's micro-batches of one optimizer step after another, like StepBatches.

    Step k takes the rows_per_step rows that follow those of step k - 1. At its end the stream starts again, also within
    a step. Rows without labels are left out of their batch, and no other row takes their place.

    Rows are not grouped by length, since lengths are unknown. There are no worker processes: each would read all rows,
    and forking a process whose reader or tokenizer has threads can hang.
    """

    def __init__(
        self,
        rows: RowStream,
        collate: Collate,
        rows_per_step: int,
        share: Share,
        *,
        seed: int,
        pin_memory: bool = False,
    ):
        self.step_sizes: list[list[int]] = [[0, rows_per_step]]  # [first step, rows of each step from there on]
        self._rows, self._collate, self._share = rows, collate, share
        self._seed, self._pin_memory = seed, pin_memory
        self._loaded: Iterator[Batch] = iter(())
        self._length: int | None = None  # of the stream, once its end was reached

    @property
    def shortage(self) -> str | None:
        """None: how many rows there are is known only at the end of the first pass."""
        return None

    def adopt(self, step: int, step_sizes: list[list[int]]) -> None:
        """Continue, in the step size of this run, a run that took its first `step` steps in the given sizes."""
        self.step_sizes = continued_sizes(step, step_sizes, self.step_sizes[-1][1])

    def start_at(self, step: int) -> None:
        """Move to optimizer step `step`, counted from 0."""
        self._loaded = self._batches_from(step)

    def next_step(self) -> list[Batch]:
        """Return the micro-batches of the next optimizer step, on the CPU. Raises UsageError for an unreadable row."""
        return [next(self._loaded) for _ in range(self._share.micro_batches)]

    def close(self) -> None:
        """Stop reading."""
        self._loaded = iter(())

    def rows_at(self, step: int) -> int:
        """Return the rows read after `step` steps, over all ranks and passes."""
        ends = [size[0] for size in self.step_sizes[1:]] + [step]
        return sum(
            max(0, min(end, step) - first) * rows for (first, rows), end in zip(self.step_sizes, ends, strict=True)
        )

    def epochs_at(self, step: int) -> float:
        """Return how many whole passes end before the last row of the first `step` steps.

        Fractions of a pass are unknown. The length is known for every step taken so far, also by earlier attempts: a
        resumed run reads past their rows.
        """
        return float((self.rows_at(step) - 1) // self._length) if self._length and step else 0.0

    def steps_for(self, epochs: float) -> int:
        """Raise UsageError: a stream has no known number of steps."""
        raise UsageError("a stream has no known length; set training.max_steps")

    def _batches_from(self, step: int) -> Iterator[Batch]:
        stream = self._endless(self.rows_at(step))
        for later in itertools.count(step):
            rows_per_step = next(size[1] for size in reversed(self.step_sizes) if size[0] <= later)
            taken = list(itertools.islice(stream, rows_per_step))
            for places in split_step(np.arange(rows_per_step), self._share):
                yield self._batch([taken[max(place, 0)] for place in places], filler=places == [FILLER])

    def _batch(self, taken: list[tuple[int, Row]], *, filler: bool) -> Batch:
        rows, truncated = self._rows.prepare([row for _, row in taken], [number for number, _ in taken])
        batch = with_positions(self._collate(rows), [FILLER] if filler else [row["row"] for row in rows])
        batch["truncated"] = torch.tensor(0 if filler else truncated)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def _endless(self, skipped: int) -> Iterator[tuple[int, Row]]:
        """Yield the numbered rows of pass after pass, without the first `skipped` of them."""
        for passes in itertools.count():
            if self._length is not None and skipped >= self._length:  # the whole pass is skipped
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
            shortage = too_few(count, self.step_sizes[-1][1], "a step has the same row several times")
            if shortage and self._length is None and self._share.rank == 0:
                logger.warning(shortage)
            self._length = count


def _one_pass(stream: RowStream, seed: int, passes: int) -> Iterator[tuple[int, Row]]:
    """Yield numbered rows in their order, or each drawn from a buffer of shuffle_buffer rows."""
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
