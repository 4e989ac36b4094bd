"""Data in a format that forge does not read get a sentence that says which file is there, and what to do."""

from pathlib import Path

import pytest
from conftest import write_rows

from forge.config.task_schema import DatasetConfig
from forge.data.rows import load_rows, load_stream
from forge.errors import UsageError


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("train.json", r"There is train.json: write one JSON object in each line of a .jsonl file \(jq -c"),
        ("train.jsonl.gz", r"There is train.jsonl.gz: unpack it$"),
        ("train.tsv", r"There is train.tsv: write it with commas as a .csv file$"),
        ("train.txt", r"There is train.txt: write one JSON object in each line .*\{\"text\": …\}$"),
        ("data/train-00000-of-00001.parquet", r"data/train-00000-of-00001.parquet: put one file for .* train.parquet$"),
        ("train/data-00000-of-00001.arrow", r"There is train/data-00000-of-00001.arrow: write one .*load_from_disk"),
        ("data-00000-of-00001.arrow", r"There is data-00000-of-00001.arrow: write one .*load_from_disk"),
        ("LICENSE.txt", r"next to its images$"),
    ],
)
def test_data_in_another_format_are_named_with_what_to_do(tmp_path: Path, file: str, expected: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("[]")
    for load in (lambda config: load_rows(config), lambda config: load_stream(config, 1)):
        with pytest.raises(UsageError, match=expected):
            load(DatasetConfig(path=str(tmp_path)))


def test_a_split_in_another_format_is_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": "a"}])
    (tmp_path / "README.txt").write_text("words")
    load_rows(DatasetConfig(path=str(tmp_path)))
    assert caplog.messages == []
    (tmp_path / "validation_other.json").write_text("[]")
    load_rows(DatasetConfig(path=str(tmp_path)))
    assert f"{tmp_path}: forge does not read validation_other.json: write one JSON object" in caplog.text


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_rows(tmp_path: Path, name: str) -> None:
    text = {"jsonl": '{"text": "a"}\n{"text": "b"}\n', "csv": "text\na\nb\n"}[name]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.{name}").write_text("\ufeff" + text, encoding="utf-8")
    config = DatasetConfig(path=str(tmp_path))
    assert list(load_rows(config)[0]) == [{"text": "a"}, {"text": "b"}]
    assert list(load_stream(config, 2)[0]) == [{"text": "a"}, {"text": "b"}]
