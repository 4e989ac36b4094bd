"""Files are read with the types that they state, wherever in the file that shows, and again when they have changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from forge.config.task_schema import DatasetConfig
from forge.data.files import BOM, read_file, stream_file
from forge.data.fingerprints import rows_hash
from forge.data.rows import load_rows, load_stream
from forge.errors import UsageError


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_text_is_never_taken_for_a_number_or_a_date(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-10", "code": "007", "n": 1, "x": 1, "ok": True} for _ in range(3)]
    rows[2]["x"] = 0.1
    read = read_file(jsonl(tmp_path / "a.jsonl", rows))
    assert list(read) == rows
    assert [str(read.features[name].dtype) for name in read.features] == [
        "string",
        "string",
        "int64",
        "float64",
        "bool",
    ]
    (tmp_path / "a.csv").write_text("text,n\r\n2024-01-10,1\r\n" + '007," 1.50"\r\n')
    assert list(read_file(tmp_path / "a.csv")) == [{"text": "2024-01-10", "n": "1"}, {"text": "007", "n": " 1.50"}]


def test_a_csv_of_many_rows_keeps_its_leading_zeros(tmp_path: Path) -> None:
    """Readers that guess look at 10,000 cells at a time."""
    (tmp_path / "a.csv").write_text("text\n" + "red\n" * 10000 + "".join(f"{i:06d}\n" for i in range(10000)))
    read = read_file(tmp_path / "a.csv")["text"]
    assert (read[9999], read[10000], read[19999]) == ("red", "000000", "009999")


def test_a_key_may_come_late_and_be_null_at_first(tmp_path: Path) -> None:
    """Readers that guess look at the first 10 MB."""
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"arguments": {"x": 0.30000000000000004, "id": 2**70}}],
    }
    plain = {"messages": [{"role": "user", "content": "one " * 150}], "note": None}
    rows = [plain] * 20000 + [{"messages": [call], "note": "hello", "late": "x"}]
    read = read_file(jsonl(tmp_path / "a.jsonl", rows))
    assert read[0] == {**plain, "late": None}
    assert read[20000] == rows[20000], "no number is rounded, and no key is filled in"
    assert read.with_format("python")[20000] == rows[20000]
    assert list(read.select_columns(["messages"]).select([20000])) == [{"messages": [call]}]


def test_values_of_several_types_stay_what_they_are(tmp_path: Path) -> None:
    rows = [{"v": value} for value in ("12", 12, None, [1, "a"], {"a": 1}, '{"a": 1}', "", 2**70)]
    assert list(read_file(jsonl(tmp_path / "a.jsonl", rows))) == rows


def test_a_byte_order_mark_is_no_content_and_a_list_of_rows_is_read(tmp_path: Path) -> None:
    rows = [{"text": "a b"}, {"text": "c"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for content in (BOM + lines, json.dumps(rows, indent=1).encode(), BOM + json.dumps(rows).encode(), b"\n" + lines):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert list(read_file(tmp_path / "a.jsonl")) == rows
        assert list(stream_file(tmp_path / "a.jsonl")) == rows
    (tmp_path / "a.csv").write_bytes(BOM + b"text\na b\n\nc\n")
    assert list(read_file(tmp_path / "a.csv")) == rows
    assert list(stream_file(tmp_path / "a.csv")) == rows


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text" 3}\n', "line 2, column 9: Expecting ':' delimiter"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2 is not a JSON object"),
        ("a.jsonl", '[{"text": "a"}, 3]', "entry 1 of the list is not a JSON object"),
        ("a.csv", "text,label\na,1\nb,2,3\n", "line 3 has 3 cells, but line 1 names 2"),
        ("a.csv", 'text,label\n"a,1\nb,2\n', "line 3: unexpected end of data"),
        ("a.csv", "text,text\na,1\n", "line 1 names the column text twice"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as refused:
        read_file(file)
    assert f"{file} cannot be read as {file.suffix[1:]} ({reason}" in str(refused.value)


def test_a_short_line_of_a_csv_lacks_its_last_cells_and_long_cells_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na\n" + "b" * 200000 + ",1\n")
    assert list(read_file(tmp_path / "a.csv")) == [
        {"text": "a", "label": None},
        {"text": "b" * 200000, "label": "1"},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_that_was_replaced_is_read_again_though_its_time_and_size_are_the_same(
    kind: str, tmp_path: Path
) -> None:
    """As rsync -t, cp -p, tar and image layers replace files."""
    hashes = set()
    for word in ("red", "tan", "red"):
        rows = Dataset.from_dict({"text": [word, "x"]})
        write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind]
        for split in ("train", "validation"):
            write(str(tmp_path / f"{split}.{kind}"))
            os.utime(tmp_path / f"{split}.{kind}", (1577836800, 1577836800))
        train, _ = load_rows(DatasetConfig(path=str(tmp_path)))
        assert train["text"][:] == [word, "x"]
        hashes.add((train._fingerprint, rows_hash({"train": train})))
    assert len(hashes) == 2


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_path_is_no_pattern(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "[v2] da*ta"
    folder.mkdir()
    rows = Dataset.from_dict({"text": ["a", "b"]})
    write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind]
    for split in ("train", "validation"):
        write(str(folder / f"{split}.{kind}"))
    assert load_rows(DatasetConfig(path=str(folder)))[0]["text"][:] == ["a", "b"]
    stream, _, _ = load_stream(DatasetConfig(path=str(folder), streaming=True), None)
    assert [row["text"] for row in stream] == ["a", "b"]


def test_a_stream_gives_text_as_it_is_written(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-10", "n": None}, {"text": "007", "late": [0.1]}]
    assert list(stream_file(jsonl(tmp_path / "a.jsonl", rows))) == rows
