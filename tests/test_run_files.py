"""The small files of a run are whole, whatever happens while they are written."""

import errno
import json
import os
from pathlib import Path

import pytest

from forge.errors import Superseded
from forge.run.files import append_json_line, publish_folder, read_json_lines, write_atomically, write_json


def test_a_write_that_fails_keeps_the_old_text_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    seen_before_replace = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen_before_replace.append((Path(source).read_text(), path.read_text(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_atomically(path, "new")
    assert seen_before_replace == [("new", "old", tmp_path)]
    assert path.read_text() == "new"


def test_a_file_is_readable_for_the_group_as_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", "text")
    (tmp_path / "plain").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_keeps_its_order_writes_paths_as_text_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    write_json(path, {"b": Path("/data"), "a": [1]})
    assert path.read_text() == '{\n  "b": "/data",\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        write_json(path, {"labels": {1}})
    assert json.loads(path.read_text())["a"] == [1]


def test_lines_are_read_as_written_and_non_finite_numbers_are_words(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1, "loss": 0.5})
    append_json_line(path, {"step": 2, "loss": float("nan"), "norms": [float("inf"), -float("inf")]})
    assert path.read_text().count("\n") == 2
    assert read_json_lines(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": "nan", "norms": ["inf", "-inf"]}]


def test_a_file_that_does_not_exist_yet_holds_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "los')
    assert read_json_lines(path) == [{"step": 1}]
    assert caplog.text == ""
    append_json_line(path, {"step": 2})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    assert "metrics.jsonl:2 is not a JSON object" in caplog.text


def test_a_line_that_the_disk_took_in_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    with pytest.raises(OSError, match="only 4 of 12 bytes"):
        append_json_line(tmp_path / "metrics.jsonl", {"step": 1})


def test_a_folder_is_published_whole_in_place_of_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "final"
    publish_folder(target, lambda folder: written(folder, "old"))
    (target / "stale").touch()
    publish_folder(target, lambda folder: written(folder, "new"))
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("model", "new")]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_not_published_where_the_guard_forbids_it(tmp_path: Path) -> None:
    target = tmp_path / "final"
    publish_folder(target, lambda folder: written(folder, "old"))

    def superseded() -> None:
        raise Superseded("attempt 2 has taken over")

    with pytest.raises(Superseded):
        publish_folder(target, lambda folder: written(folder, "new"), superseded)
    with pytest.raises(Superseded):
        write_atomically(tmp_path / "state.json", "new", superseded)
    assert (target / "model").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def written(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "model").write_text(text)
