"""Steps of a stream: the same rows as one after another in a file, from any step on and for any number of ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.task.batches import FILLER, StepBatches
from forge.task.stream import RowStream, StreamBatches, step_batches


class Rows:
    """Twenty-one numbered rows, which can only be read from the beginning."""

    def __init__(self, count: int = 21):
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.count):
            self.read += 1
            yield {"id": i}


def prepare(rows: list[dict[str, Any]], numbers: list[int]) -> tuple[list[dict[str, Any]], int]:
    """Row 13 is cut."""
    return [{"id": row["id"], "row": number} for row, number in zip(rows, numbers, strict=True)], 13 in numbers


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["id"] for row in rows])
    return {"input_ids": ids, "labels": ids + 100, "tokens": torch.tensor(len(rows))}


def stream(
    rows_per_step: int = 4, *, rank: int = 0, ranks: int = 1, micro_batches: int = 2, buffer: int = 0, **keys: Any
) -> StreamBatches:
    return StreamBatches(
        RowStream(keys.pop("rows", None) or Rows(), prepare, buffer, "demo, train"),
        collate,
        **{
            "rows_per_step": rows_per_step,
            "rank": rank,
            "ranks": ranks,
            "micro_batches": micro_batches,
            "seed": 3,
            **keys,
        },
    )


def ledger(batches: StreamBatches, start: int, steps: int) -> list[list[int]]:
    """The ids of each step, fillers left out."""
    batches.start_at(start)
    taken = [batches.next_step() for _ in range(steps)]
    batches.close()
    return [[int(i) for batch in step for i in batch["input_ids"] if batch["ids"][0] != FILLER] for step in taken]


def test_rows_come_in_their_order_and_begin_again_at_the_end_within_a_step() -> None:
    assert ledger(stream(), 0, 6) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 0, 1, 2],
    ]


@pytest.mark.parametrize("buffer", [0, 8, 100])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_starting_anywhere_gives_the_same_rows_as_running_there(buffer: int, num_workers: int) -> None:
    whole = ledger(stream(buffer=buffer), 0, 17)  # a little more than three passes

    for start in (1, 5, 6, 13):
        assert ledger(stream(buffer=buffer, num_workers=num_workers), start, 17 - start) == whole[start:]


@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (2, 2), (3, 2)])
def test_ranks_together_take_the_rows_that_one_takes(ranks: int, micro_batches: int, buffer: int) -> None:
    alone = ledger(stream(buffer=buffer, micro_batches=1), 0, 12)
    parts = [
        ledger(stream(rank=rank, ranks=ranks, micro_batches=micro_batches, buffer=buffer), 0, 12)
        for rank in range(ranks)
    ]

    for step, shares in zip(alone, zip(*parts, strict=True), strict=True):
        assert sorted(row for share in shares for row in share) == sorted(step)
        assert sum(map(len, shares)) == 4


def test_a_place_without_rows_gets_a_filler_that_counts_for_nothing() -> None:
    batches = stream(3, rank=1, ranks=2, micro_batches=2)
    batches.start_at(0)
    first, second = batches.next_step()

    assert first["ids"].tolist() == [1]
    assert second["ids"].tolist() == [FILLER]
    assert second["labels"].tolist() == [IGNORE]
    assert (second["tokens"], second["truncated"]) == (0, 0)
    assert "passes" not in second


def test_a_buffer_shuffles_each_pass_anew_and_loses_nothing() -> None:
    order = [row for step in ledger(stream(7, buffer=8), 0, 6) for row in step]
    first, second = order[:21], order[21:]

    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second
    assert first != sorted(first)
    assert [row for step in ledger(stream(7, buffer=8, seed=4), 0, 3) for row in step] != first
    assert all(row <= place + 7 for place, row in enumerate(first))  # none comes before it was read


def test_going_on_with_another_step_size_takes_what_follows() -> None:
    ledger(stream(4), 0, 3)
    later = stream(5)
    later.adopt(3, [[0, 4]])

    assert later.step_sizes == [[0, 4], [3, 5]]
    assert ledger(later, 3, 2) == [[12, 13, 14, 15, 16], [17, 18, 19, 20, 0]]
    assert [later.samples_at(step) for step in (0, 2, 3, 5)] == [0, 8, 12, 22]
    same = stream(4)
    same.adopt(3, [[0, 4]])
    assert same.step_sizes == [[0, 4]]
    again = stream(4)
    again.adopt(5, later.step_sizes)
    assert again.step_sizes == [[0, 4], [3, 5], [5, 4]]
    assert ledger(again, 4, 2) == [[17, 18, 19, 20, 0], [1, 2, 3, 4]]


def test_the_passes_are_counted_and_the_way_to_a_late_step_is_one_pass_long() -> None:
    rows = Rows()
    batches = stream(rows=rows)
    batches.start_at(105)  # 420 rows: the 21st pass begins
    step = batches.next_step()

    assert batches.epochs_at(106) == 20
    assert [int(i) for batch in step for i in batch["input_ids"]] == [0, 1, 2, 3]
    assert rows.read <= 21 + 5


def test_truncated_rows_are_counted_with_their_batch() -> None:
    batches = stream()
    batches.start_at(2)

    assert [int(batch["truncated"]) for _ in range(2) for batch in batches.next_step()] == [0, 0, 1, 0]


def test_an_empty_stream_is_told_and_not_waited_for() -> None:
    batches = stream(rows=Rows(0))
    batches.start_at(0)
    with pytest.raises(UsageError, match=r"^demo, train has no rows; training needs at least one$"):
        batches.next_step()
    with pytest.raises(UsageError, match=r"set training.max_steps"):
        batches.steps_for(1.0)


def test_the_kind_of_rows_decides_between_the_two() -> None:
    from datasets import Dataset

    options: dict[str, Any] = {"rows_per_step": 2, "rank": 0, "ranks": 1, "micro_batches": 1, "seed": 0}
    options |= {"group_by_length": True, "num_workers": 0, "pin_memory": False}

    assert isinstance(step_batches(RowStream(Rows(), prepare), collate, **options), StreamBatches)
    assert isinstance(step_batches(Dataset.from_dict({"length": [1, 2]}), collate, **options), StepBatches)
