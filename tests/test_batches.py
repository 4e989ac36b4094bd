"""Which rows a step takes: each once an epoch, the same for any number of ranks, from any position."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from forge.data.batches import (
    FILLER,
    Loading,
    Share,
    StepBatches,
    epoch_steps,
    evaluated_rows,
    evaluation_batches,
    split_step,
)
from forge.losses.cross_entropy import IGNORE

LENGTHS = np.random.default_rng(0).integers(5, 60, size=1003)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_row_comes_exactly_once_an_epoch(group_by_length: bool) -> None:
    steps = epoch_steps(LENGTHS, 16, seed=1, epoch=0, group_by_length=group_by_length)

    assert len(steps) == 63
    assert [len(step) for step in steps] == [16] * 62 + [11]
    assert sorted(np.concatenate(steps)) == list(range(1003))


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    def plan(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_steps(LENGTHS, 16, seed, epoch, group_by_length=True)).tolist()

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)


def test_grouping_by_length_leaves_little_padding_and_still_shuffles() -> None:
    def padding(grouped: bool) -> float:
        steps = epoch_steps(LENGTHS, 16, 1, 0, group_by_length=grouped)
        padded = sum(len(step) * LENGTHS[step].max() for step in steps)
        return padded / LENGTHS.sum() - 1

    assert padding(True) < 0.1 < 0.5 < padding(False)
    longest = [LENGTHS[step].max() for step in epoch_steps(LENGTHS, 16, 1, 0, group_by_length=True)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_steps_of_similar_rows_come_in_a_random_order_and_another_one_each_epoch() -> None:
    lengths = np.arange(20 * 16)  # twenty steps: rows are grouped among all of them

    def ranks_of(epoch: int) -> list[int]:
        """Of each step its place among the steps by length."""
        steps = epoch_steps(lengths, 16, 1, epoch, group_by_length=True)
        assert all(np.ptp(lengths[step]) == 15 for step in steps)
        return [int(step.min()) // 16 for step in steps]

    first, second = ranks_of(0), ranks_of(1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first not in (sorted(first), sorted(first, reverse=True))
    assert first != second


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 8), (2, 4), (3, 2)])
def test_a_step_is_dealt_out_without_loss_to_any_number_of_ranks(ranks: int, micro_batches: int) -> None:
    rows = np.arange(100, 116)
    dealt = [split_step(rows, Share(rank, ranks, micro_batches)) for rank in range(ranks)]

    assert [len(rank) for rank in dealt] == [micro_batches] * ranks
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(100, 116))


@pytest.mark.parametrize("count", [1, 5, 16, 23, 24, 100])
def test_a_rank_works_out_its_own_part_of_what_numpy_deals_out_to_all(count: int) -> None:
    rows = np.arange(count)
    places = [part.tolist() or [FILLER] for part in np.array_split(rows, 6 * 4)]
    for rank in range(6):
        assert split_step(rows, Share(rank, 6, 4)) == places[rank::6]


def test_a_short_step_fills_empty_places_so_that_every_rank_takes_part() -> None:
    dealt = [split_step(np.array([7, 8, 9]), Share(rank, ranks=2, micro_batches=2)) for rank in (0, 1)]
    assert dealt == [[[7], [9]], [[8], [FILLER]]]


def test_evaluated_rows_are_drawn_by_the_seed_and_come_in_ascending_order() -> None:
    drawn = evaluated_rows(100, 10, seed=3).tolist()
    assert drawn == sorted({*drawn})
    assert len(drawn) == 10
    assert drawn == evaluated_rows(100, 10, seed=3).tolist() != evaluated_rows(100, 10, seed=4).tolist()
    assert max(drawn) >= 10  # not the first rows
    for most in (None, 100, 101):
        assert evaluated_rows(100, most, seed=3).tolist() == list(range(100))


def test_evaluation_covers_every_row_once_with_as_many_batches_on_each_rank() -> None:
    lengths = np.arange(13)
    dealt = evaluation_batches(lengths, np.arange(13), batch_size=4, ranks=3)

    assert [len(rank) for rank in dealt] == [2, 2, 2]
    assert dealt[0][0] == [12, 11, 10, 9]  # the longest first
    assert sorted(row for rank in dealt for batch in rank for row in batch) == [FILLER, FILLER, *range(13)]


def batches(num_workers: int = 0, rank: int = 0, ranks: int = 1, rows_per_step: int = 4) -> StepBatches:
    rows = Dataset.from_dict({"length": [5 + i % 7 for i in range(21)]})
    return StepBatches(
        rows,
        lambda rows: {"labels": torch.ones(len(rows)).long(), "tokens": torch.tensor(len(rows))},
        rows_per_step,
        Share(rank, ranks, micro_batches=2),
        seed=3,
        group_by_length=True,
        loading=Loading(num_workers),
    )


def ledger(loader: StepBatches, start: int, steps: int) -> list[list[object]]:
    loader.start_at(start)
    rows = [
        [None if row == FILLER else row for batch in loader.next_step() for row in batch["ids"].tolist()]
        for _ in range(steps)
    ]
    loader.close()
    return rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_anywhere_gives_the_same_rows_as_running_there(num_workers: int) -> None:
    whole = ledger(batches(), 0, 17)  # six steps an epoch: almost three epochs

    assert sorted(row for step in whole[:6] for row in step if row is not None) == list(range(21))
    for start in (1, 5, 6, 13):
        assert ledger(batches(num_workers), start, 17 - start) == whole[start:]


def test_a_loader_leaves_torchs_random_numbers_alone() -> None:
    """Else the dropout after an evaluation or a resume would differ from that of an uninterrupted run."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for start in (0, 3):
        ledger(batches(), start, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_ranks_together_take_the_rows_that_one_takes() -> None:
    alone = [set(step) - {None} for step in ledger(batches(), 0, 12)]
    first, second = (ledger(batches(rank=rank, ranks=2), 0, 12) for rank in (0, 1))

    assert [(set(a) | set(b)) - {None} for a, b in zip(first, second, strict=True)] == alone
    assert all(not (set(a) & set(b)) - {None} for a, b in zip(first, second, strict=True))


def test_a_filler_is_a_row_without_a_label() -> None:
    last_of_epoch = ledger(batches(), 5, 1)[0]  # 21 = 5 * 4 + 1: one row and one filler

    assert len([row for row in last_of_epoch if row is not None]) == 1
    assert last_of_epoch.count(None) == 1
    loader = batches()
    loader.start_at(5)
    real, filler = loader.next_step()
    assert (real["labels"].tolist(), int(real["tokens"])) == ([1], 1)
    assert (filler["labels"].tolist(), int(filler["tokens"]), filler["ids"].tolist()) == ([IGNORE], 0, [FILLER])


def ids(steps: list[list[object]]) -> list[object]:
    return [row for step in steps for row in step if row is not None]


def test_a_step_of_another_size_deals_out_what_the_epoch_has_left() -> None:
    """Twice within one epoch of 21 rows, and over its edge: each row once an epoch, from any step on alike."""
    first = ledger(batches(), 0, 2)
    second = batches(rows_per_step=5)
    second.adopt(2, [[0, 4]])
    assert second.step_sizes == [[0, 4], [2, 5]]
    more = ledger(second, 2, 1)
    third = batches(rows_per_step=3)
    third.adopt(3, second.step_sizes)
    rest = ledger(third, 3, 3 + 7)

    assert sorted(ids(first + more + rest[:3])) == list(range(21))  # 8 + 5 + 8
    assert [len(ids([step])) for step in rest[:4]] == [3, 3, 2, 3]
    assert sorted(ids(rest[3:])) == list(range(21))
    for start in (4, 5, 6, 9):
        again = batches(rows_per_step=3)
        again.adopt(start, third.step_sizes)
        assert again.step_sizes == [[0, 4], [2, 5], [3, 3]]
        assert ledger(again, start, 13 - start) == rest[start - 3 :]
    assert [third.rows_at(step) for step in (0, 1, 2, 3, 4, 5, 6, 7, 13)] == [0, 4, 8, 13, 16, 19, 21, 24, 42]


def test_steps_and_epochs_are_counted_in_rows() -> None:
    loader = batches()  # six steps an epoch, the last of one row

    assert [loader.rows_at(step) for step in (0, 1, 5, 6, 7, 12)] == [0, 4, 20, 21, 25, 42]
    assert [loader.steps_for(epochs) for epochs in (0.01, 0.5, 1, 2, 2.5, 1 / 6)] == [1, 3, 6, 12, 15, 1]
    loader = batches(rows_per_step=2)  # eleven steps an epoch
    loader.adopt(5, [[0, 4]])  # one row is left
    assert [loader.steps_for(epochs) for epochs in (0.5, 1, 2, 2.1)] == [5, 6, 17, 19]
    loader = batches(rows_per_step=2)
    loader.adopt(6, [[0, 4]])  # at the edge
    assert [loader.steps_for(epochs) for epochs in (1, 2)] == [6, 17]


def test_a_step_of_the_same_size_changes_nothing() -> None:
    loader = batches()
    loader.adopt(3, [[0, 4]])
    assert loader.step_sizes == [[0, 4]]
    loader = batches(rows_per_step=5)
    loader.adopt(3, [[0, 4], [3, 7]])  # the change at step 3 took no step
    assert loader.step_sizes == [[0, 4], [3, 5]]
