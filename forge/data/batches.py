"""Chooses the rows of every optimizer step from seed, epoch and position alone, and prepares their batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from forge.errors import ForgeError, UnreadableRows
from forge.losses.cross_entropy import IGNORE

Row = dict[str, Any]  # of a data set, by column
Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Row]], Batch]

FILLER = -1  # id of a row that only keeps a rank busy: alone in its batch, without labels, counted nowhere
# What a batch holds besides the inputs of the models. aligned and teacher_aligned, (M,) int64 each, are the positions
# in the flattened (B, T) of the student's and the teacher's logits that predict the same continuation.
LOOP_TENSORS = ("labels", "positions", "tokens", "ids", "truncated", "aligned", "teacher_aligned")
TEACHER_PREFIX = "teacher_"  # of the inputs of a teacher that reads its own tokens
# Rows of similar length are grouped within the rows of this many steps. On MNLI-like rows in steps of 32, padding falls
# from 136 % to 8 %. With 8 steps it would be 26 %; with 64 it would be 4 %, but the rows of a step would be more alike.
STEPS_PER_GROUP = 32


@dataclass(frozen=True)
class Share:
    """The part of every optimizer step that one rank computes."""

    rank: int = 0
    ranks: int = 1
    micro_batches: int = 1


@dataclass(frozen=True)
class Loading:
    """How a process prepares its batches."""

    num_workers: int = 0  # processes; 0: the process itself
    pin_memory: bool = False
    worker_init: Callable[[int], None] | None = None  # called in each worker process with its number


IN_PROCESS = Loading()


def epoch_steps(
    lengths: np.ndarray, rows_per_step: int, seed: int, epoch: int, *, group_by_length: bool, deal: int = 0
) -> list[np.ndarray]:
    """Return the row ids of every optimizer step of one epoch: each row once, for any number of ranks the same.

    The last step takes the remaining rows. With group_by_length, rows of similar length share a step: a random
    permutation is sorted by length within stretches of STEPS_PER_GROUP steps, then the steps are shuffled.

    deal: counts how often the rows of this epoch were dealt out before, which happens when the step size changes.
    """
    generator = np.random.default_rng([seed, epoch, deal] if deal else [seed, epoch])
    order = generator.permutation(len(lengths))
    if group_by_length:
        stretch = rows_per_step * STEPS_PER_GROUP
        pieces = [order[i : i + stretch] for i in range(0, len(order), stretch)]
        order = np.concatenate([piece[np.argsort(lengths[piece], kind="stable")[::-1]] for piece in pieces])
    steps = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
    whole = [step for step in steps if len(step) == rows_per_step]
    if group_by_length:
        whole = [whole[i] for i in generator.permutation(len(whole))]
    return whole + [step for step in steps if len(step) < rows_per_step]


def split_step(rows: np.ndarray, share: Share) -> list[list[int]]:
    """Return one rank's micro-batches of a step; a place that gets no rows gets one filler.

    Neighbouring rows, which have similar lengths, go to the same micro-batch of neighbouring ranks, so that no rank
    waits for another's longer rows. The cost does not grow with the number of ranks, since this runs at every step.
    """
    count = share.ranks * share.micro_batches
    size, longer = divmod(len(rows), count)  # the first `longer` places have one more row
    places = range(share.rank, count, share.ranks)
    starts = [place * size + min(place, longer) for place in places]
    ends = [start + size + (place < longer) for place, start in zip(places, starts, strict=True)]
    return [rows[start:end].tolist() or [FILLER] for start, end in zip(starts, ends, strict=True)]


def evaluation_batches(lengths: np.ndarray, rows: np.ndarray, batch_size: int, ranks: int) -> list[list[list[int]]]:
    """Return the batches of each rank, longest rows first: every row on one rank, and equally many batches on each."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")[::-1]]
    batches = [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
    batches += [[FILLER]] * (-len(batches) % ranks)
    return [batches[rank::ranks] for rank in range(ranks)]


def evaluated_rows(count: int, max_rows: int | None, seed: int) -> np.ndarray:
    """Return the ids of a split's evaluated rows in ascending order: all, or max_rows of them drawn by the seed."""
    if max_rows is None or max_rows >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:max_rows])


@contextmanager
def preparing(what: str) -> Iterator[None]:
    """Raise UnreadableRows for any error inside, such as a deleted image or a line that is not JSON."""
    try:
        yield
    except Exception as error:  # a worker process passes on any kind of error, with its traceback as the text
        reason = str(error) if isinstance(error, ForgeError) else type(error).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and not isinstance(error, ForgeError):
            reason = lines[-1] if lines[0].startswith("Caught ") else f"{reason}: {lines[0]}"
        raise UnreadableRows(f"{what} could not be prepared ({reason[:500]}); fix the data, then resume") from error


class StepBatches:
    """This rank's micro-batches of one optimizer step after another, from any step on, epoch after epoch."""

    def __init__(
        self,
        rows: Dataset,
        collate: Collate,
        rows_per_step: int,
        share: Share,
        *,
        seed: int,
        group_by_length: bool = False,
        loading: Loading = IN_PROCESS,
    ):
        self.step_sizes: list[list[int]] = [[0, rows_per_step]]  # [first step, rows of each step from there on]
        self._rows, self._collate, self._share, self._loading = rows, collate, share, loading
        self._seed, self._group_by_length = seed, group_by_length
        self._lengths = np.asarray(rows["length"][:])
        self._loaded: Iterator[Batch] = iter(())

    @property
    def shortage(self) -> str | None:
        """A sentence where a step asks for more rows than there are; None: there are enough."""
        return too_few(len(self._rows), self.step_sizes[-1][1], "each step takes all of them")

    def adopt(self, step: int, step_sizes: list[list[int]]) -> None:
        """Continue, in the step size of this run, a run that took its first `step` steps in the given sizes.

        If the size differs, the rows left in the epoch are dealt out again: each still comes once.
        """
        self.step_sizes = continued_sizes(step, step_sizes, self.step_sizes[-1][1])

    def start_at(self, step: int) -> None:
        """Move to optimizer step `step`, counted from 0 over all epochs."""
        batches = _Endless(self._row_ids_from(step))
        self._loaded = iter(row_loader(self._rows, batches, self._collate, self._loading))

    def next_step(self) -> list[Batch]:
        """Return the micro-batches of the next optimizer step, on the CPU."""
        return [next(self._loaded) for _ in range(self._share.micro_batches)]

    def close(self) -> None:
        """End the worker processes, which would otherwise prepare batches forever."""
        self._loaded = iter(())  # the workers end with the loader's iterator, which nothing else holds

    def rows_at(self, step: int) -> int:
        """Return the rows trained on after `step` steps, over all ranks and epochs."""
        place = self._place(step)
        taken = len(self._rows) - len(place.rows) + min(place.steps * place.rows_per_step, len(place.rows))
        return place.epoch * len(self._rows) + taken

    def epochs_at(self, step: int) -> float:
        """Return the epochs trained on after `step` steps."""
        return self.rows_at(step) / len(self._rows)

    def steps_for(self, epochs: float) -> int:
        """Return the number of steps after which `epochs` are trained on, if the step size stays as it is now."""
        first, rows_per_step = self.step_sizes[-1]
        place = self._place(first)
        steps_per_epoch = -(-len(self._rows) // rows_per_step)
        left = -(-len(place.rows) // rows_per_step)  # steps left in the epoch in which the size changed
        ahead = epochs - place.epoch
        if ahead < 1:
            done = 1 - len(place.rows) / len(self._rows)  # the part of that epoch before the change
            return first + min(left, max(0, _ceil((ahead - done) * steps_per_epoch)))
        return first + left + _ceil((ahead - 1) * steps_per_epoch)

    def _place(self, step: int) -> "_Place":
        """Return the position in the data after `step` steps."""
        place = _Place(0, np.arange(len(self._rows)), 0, 0, self.step_sizes[0][1])
        for deal, (first, rows_per_step) in enumerate(self.step_sizes):
            if first > step:
                break
            if deal:
                left = self._deal(place)[place.steps :]
                place = _Place(place.epoch, np.concatenate(left), deal, 0, rows_per_step)
            later = [size[0] for size in self.step_sizes[deal + 1 :]]
            steps = min([step, *later]) - first
            in_deal = -(-len(place.rows) // rows_per_step)
            if steps >= in_deal:  # in a later epoch, which deals out all rows
                epochs, steps = divmod(steps - in_deal, -(-len(self._rows) // rows_per_step))
                place = _Place(place.epoch + 1 + epochs, np.arange(len(self._rows)), 0, steps, rows_per_step)
            else:
                place = replace(place, steps=steps)
        return place

    def _deal(self, place: "_Place") -> list[np.ndarray]:
        """Return the row ids of every step of the deal that `place` is in."""
        steps = epoch_steps(
            self._lengths[place.rows],
            place.rows_per_step,
            self._seed,
            place.epoch,
            group_by_length=self._group_by_length,
            deal=place.deal,
        )
        return [place.rows[step] for step in steps]

    def _row_ids_from(self, step: int) -> Iterator[list[int]]:
        place = self._place(step)
        while True:
            for rows in self._deal(place)[place.steps :]:
                yield from split_step(rows, self._share)
            place = _Place(place.epoch + 1, np.arange(len(self._rows)), 0, 0, place.rows_per_step)


def too_few(rows: int, rows_per_step: int, so: str) -> str | None:
    """Say that a step asks for more rows than the training split has, and what comes of it; None: it has enough."""
    if rows >= rows_per_step:
        return None
    return f"the batch of a step is {rows_per_step} rows, but the training split has only {rows}: {so}"


def continued_sizes(step: int, sizes: list[list[int]], rows_per_step: int) -> list[list[int]]:
    """Return the step sizes of a run that took `step` steps in the given sizes and continues in rows_per_step."""
    kept = [size for size in sizes if size[0] < step or size[0] == 0]
    return kept if kept[-1][1] == rows_per_step else [*kept, [step, rows_per_step]]


def _ceil(steps: float) -> int:
    return math.ceil(round(steps, 6))  # 1.1 * 10 is slightly more than 11


@dataclass(frozen=True)
class _Place:
    """A position in the data."""

    epoch: int
    rows: np.ndarray  # ids that this deal hands out: all in ascending order, or those that the last deal left
    deal: int  # 0: the deal of a whole epoch
    steps: int  # taken of this deal
    rows_per_step: int


def row_loader(rows: Dataset, batches: Any, collate: Collate, loading: Loading = IN_PROCESS) -> DataLoader[Batch]:
    """Return a loader of the given batches of row ids, each with its `ids` (B,) int64 and positions.

    A filler is loaded as row 0 without its labels and tokens.
    """
    return DataLoader(
        cast(Any, _Rows(rows)),
        batch_sampler=batches,
        collate_fn=partial(_collate, collate),
        num_workers=loading.num_workers,
        pin_memory=loading.pin_memory,
        # Without it every new iterator would draw a number from torch's global generator, so the dropout after an
        # evaluation or a resume would differ from that of an uninterrupted run.
        generator=torch.Generator(),
        worker_init_fn=loading.worker_init,
    )


class _Endless:
    """An iterator in the form of a batch sampler, which DataLoader iterates."""

    def __init__(self, batches: Iterator[list[int]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


def _collate(collate: Collate, rows: list[tuple[int, Row]]) -> Batch:
    return with_positions(collate([row for _, row in rows]), [index for index, _ in rows])


def with_positions(batch: Batch, ids: list[int]) -> Batch:
    """Return the batch with `ids` (B,) int64 and `positions` (N,) int64, where labels.flatten() is counted.

    Found while the batch is still on the CPU, so that code that computes at these positions alone need not wait for
    the GPU. A filler loses its labels and tokens.
    """
    if ids == [FILLER]:
        empty = {"labels": torch.full_like(batch["labels"], IGNORE), "tokens": torch.zeros_like(batch["tokens"])}
        batch = {**batch, **empty}
        batch |= {name: batch[name][:0] for name in ("aligned", "teacher_aligned") if name in batch}
    positions = (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    return {**batch, "ids": torch.tensor(ids), "positions": positions}


def model_inputs(batch: Batch) -> Batch:
    """Return the tensors of a batch that the model reads."""
    return {
        name: tensor
        for name, tensor in batch.items()
        if name not in LOOP_TENSORS and not name.startswith(TEACHER_PREFIX)
    }


def teacher_inputs(batch: Batch) -> Batch:
    """Return the tensors that the teacher reads: its own where the batch has some, otherwise the model's."""
    own = {
        name.removeprefix(TEACHER_PREFIX): tensor
        for name, tensor in batch.items()
        if name.startswith(TEACHER_PREFIX) and name not in LOOP_TENSORS
    }
    return own or model_inputs(batch)


def with_teacher_inputs(batch: Batch) -> Batch:
    """Return the batch with the teacher's inputs in place of the model's."""
    return {**{name: tensor for name, tensor in batch.items() if name in LOOP_TENSORS}, **teacher_inputs(batch)}


class _Rows(torch.utils.data.Dataset[tuple[int, Row]]):
    """Rows with their ids."""

    def __init__(self, rows: Dataset):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Row]]:
        """Read a whole batch at once."""
        columns = self._rows[[0 if index == FILLER else index for index in indices]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return list(zip(indices, rows, strict=True))
