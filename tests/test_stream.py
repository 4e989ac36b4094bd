"""Steps of a stream: the same rows as one after another in a file, from any step on and for any number of ranks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import write_rows
from datasets import Dataset

from forge.config.task_schema import DatasetConfig
from forge.data.batches import FILLER, Share, StepBatches
from forge.data.rows import StreamedRows, load_stream
from forge.data.stream import RowStream, StreamBatches, step_batches
from forge.errors import TrainingError, UsageError
from forge.losses.cross_entropy import IGNORE


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
        rows_per_step,
        Share(rank, ranks, micro_batches),
        **{"seed": 3, **keys},
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
def test_starting_anywhere_gives_the_same_rows_as_running_there(buffer: int) -> None:
    whole = ledger(stream(buffer=buffer), 0, 17)  # a little more than three passes

    for start in (1, 5, 6, 13):
        assert ledger(stream(buffer=buffer), start, 17 - start) == whole[start:]


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


def test_a_buffer_shuffles_each_pass_differently_and_loses_nothing() -> None:
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
    assert [later.rows_at(step) for step in (0, 2, 3, 5)] == [0, 8, 12, 22]
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


def test_an_empty_stream_is_an_error_and_not_an_endless_wait() -> None:
    batches = stream(rows=Rows(0))
    batches.start_at(0)
    with pytest.raises(UsageError, match=r"^demo, train has no rows; training needs at least one$"):
        batches.next_step()
    with pytest.raises(UsageError, match=r"set training.max_steps"):
        batches.steps_for(1.0)


def test_the_kind_of_rows_decides_between_the_two() -> None:
    rows = Dataset.from_dict({"length": [1, 2]})

    assert isinstance(step_batches(RowStream(Rows(), prepare), collate, 2, Share(), seed=0), StreamBatches)
    assert isinstance(step_batches(rows, collate, 2, Share(), seed=0), StepBatches)


def test_the_passes_are_those_of_the_step_on_every_rank_and_after_a_resume() -> None:
    for rank in range(4):  # step 5 takes rows 20, 0, 1 and 2: one for each rank
        batches = stream(rank=rank, ranks=4, micro_batches=1)
        batches.start_at(0)
        for _ in range(6):
            batches.next_step()
        assert [batches.epochs_at(step) for step in (0, 4, 5, 6)] == [0, 0, 0, 1]
        resumed = stream(rank=rank, ranks=4, micro_batches=1)
        resumed.start_at(12)
        resumed.next_step()
        assert [resumed.epochs_at(step) for step in (0, 4, 5, 6, 12, 13)] == [0, 0, 0, 1, 2, 2]
    whole = stream(7)
    whole.start_at(0)
    for _ in range(4):
        whole.next_step()
    assert [whole.epochs_at(step) for step in (3, 4)] == [0, 1]  # as it was when step 3 was the last, its end unseen


def test_a_filler_counts_no_truncated_row() -> None:
    batches = stream(1, rank=1, ranks=2, micro_batches=1)
    batches.start_at(13)  # row 13 is cut, and is in the filler's place
    (batch,) = batches.next_step()

    assert (batch["ids"].tolist(), int(batch["truncated"])) == ([FILLER], 0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of ten training and five validation rows, on the hub."""
    splits = {"train": 10, "validation": 5}
    streams = {name: Dataset.from_dict({"text": list("abcdefghij")[:rows]}) for name, rows in splits.items()}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: {name: rows.to_iterable_dataset() for name, rows in streams.items()}
    )


@pytest.mark.parametrize(
    ("max_evaluated", "max_rows", "expected"), [(3, None, (10, "abc")), (3, 2, (2, "ac")), (100, 4, (4, "abce"))]
)
def test_of_a_hubs_stream_so_many_rows_are_read(
    hub: None, max_evaluated: int, max_rows: int | None, expected: tuple[int, str]
) -> None:
    config = DatasetConfig(name="some/texts", streaming=True, max_rows=max_rows)
    train, validation, _ = load_stream(config, max_evaluated)

    assert len(list(train)) == len(list(train)) == expected[0]
    assert "".join(validation["validation"]["text"]) == expected[1]


def test_max_rows_bounds_a_streamed_file(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": letter} for letter in "abcdefg"])
    whole = load_stream(DatasetConfig(path=str(tmp_path), streaming=True), None)
    few = load_stream(DatasetConfig(path=str(tmp_path), streaming=True, max_rows=3), None)

    assert ["".join(row["text"] for row in loaded[0]) for loaded in (whole, few)] == ["abcdefg", "abc"]
    assert ["".join(loaded[1]["validation"]["text"]) for loaded in (whole, few)] == ["abcdefg", "adg"]
    assert whole[2] != few[2]


def test_a_broken_line_of_a_streamed_file_is_reported_with_its_place(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "a" * 1000}] * 20000)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": broken\n')
    train, _, _ = load_stream(DatasetConfig(path=str(tmp_path), streaming=True), None)

    with pytest.raises(UsageError) as refused:
        list(train)
    place = rf"{tmp_path}/train.jsonl failed after 20000 rows \(ValueError: line 20001, column 10: Expecting value\)"
    assert re.search(place, str(refused.value)), refused.value


def test_a_lost_network_connection_is_reported_and_may_be_resumed() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"id": 0}
        raise ConnectionError("no route\nto the hub")

    read = iter(StreamedRows(rows(), "some/texts, train"))
    assert next(read) == {"id": 0}
    with pytest.raises(TrainingError) as broken:
        next(read)
    assert "some/texts, train failed after 1 rows (ConnectionError: no route to the hub)" in str(broken.value)
    assert "resume" in str(broken.value)


def test_a_step_larger_than_the_stream_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger(stream(50, micro_batches=1), 0, 2)
    assert [record.message for record in caplog.records] == [
        "the batch of a step is 50 rows, but the training split has only 21: a step has the same row several times"
    ]
    caplog.clear()
    ledger(stream(21, micro_batches=1), 0, 2)
    assert caplog.records == []
