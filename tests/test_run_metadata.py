"""run_metadata.json: what was written is read, unknown keys stay, and a broken file is named with its key."""

from pathlib import Path
from typing import Any

import pytest
from recorded_runs import metadata_of

from forge.errors import UsageError
from forge.run.directory import RunDirectory
from forge.run.files import read_json, write_json
from forge.run.metadata import Merged, RunName, amend_metadata, named, read_metadata


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "mine")
    run.path.mkdir()
    write_json(run.metadata_file, metadata_of(run, ranks=4))
    return run


def test_a_section_is_added_and_removed_and_all_else_stays(run: RunDirectory) -> None:
    values = read_json(run.metadata_file)
    values["data"] |= {"truncated": {"train": 3}}  # a task's own
    values["of_another_forge"] = {"a": [1]}
    write_json(run.metadata_file, values)
    merged = Merged(dtype="bfloat16", rows=4, largest_logit=1.5, largest_difference=0.25, before_rounding=0.0)
    assert amend_metadata(run, merged=merged).merged == merged
    assert read_json(run.metadata_file) == values | {"merged": merged.model_dump()}
    amend_metadata(run, merged=None)
    assert read_json(run.metadata_file) == values


def test_the_guard_is_asked_before_the_file_is_replaced(run: RunDirectory) -> None:
    def refuse() -> None:
        raise RuntimeError("not any more")

    before = run.metadata_file.read_bytes()
    with pytest.raises(RuntimeError, match="not any more"):
        amend_metadata(run, refuse, control=RunName(run_id="abc", name="mine-sft"))
    assert run.metadata_file.read_bytes() == before


def test_a_run_is_named_by_its_directory_which_may_have_moved(run: RunDirectory) -> None:
    moved = RunDirectory(run.path.rename(run.path.with_name("moved")))
    assert named(moved) == RunName(run_id="id-mine", name="moved")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda values: values.pop("world"), "world is missing"),
        (lambda values: values["world"].update(rows_per_step="32"), "world.rows_per_step is '32'"),
        (lambda values: values["data"].update(fingerprint=None), "data.fingerprint is None"),
        (lambda values: values["attempts"][0].update(ranks=0), "attempts.0.ranks is 0"),
        (lambda values: values.update(attempts=[]), r"attempts is \[\]"),
        (lambda values: values["teacher"].pop("weights_sha256"), "teacher.weights_sha256 is missing"),
    ],
)
def test_a_broken_file_is_named_with_its_key(break_it: Any, words: str, run: RunDirectory) -> None:
    values = read_json(run.metadata_file)
    values["teacher"] = dict(values["model"])
    break_it(values)
    write_json(run.metadata_file, values)
    with pytest.raises(UsageError, match=f"run_metadata.json is broken: {words}"):
        read_metadata(run)


def test_a_missing_file_is_named(run: RunDirectory) -> None:
    run.metadata_file.unlink()
    with pytest.raises(UsageError, match=r"run_metadata.json cannot be read \(No such file"):
        read_metadata(run)


def test_names_of_an_earlier_forge_are_read_as_those_of_today(run: RunDirectory) -> None:
    values = read_json(run.metadata_file)
    values["task"]["headline"] = ["loss", "accuracy"]
    values["attempts"][0]["allowed"] = {"evaluation.max_samples": "5"}
    write_json(run.metadata_file, values)
    metadata = read_metadata(run)
    assert metadata.task.headline == ["ce", "accuracy"]
    assert metadata.attempts[0].allowed == {"evaluation.max_rows": "5"}
