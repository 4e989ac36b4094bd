"""The registry lists the runs that are not complete, and only those."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forge.run.directory import RunDirectory, create_run_directory
from forge.run.registry import incomplete_runs, is_alive, register, unregister, update
from forge.run.state import Stage, TrainingState


def test_a_run_is_listed_from_its_start_to_its_end(tmp_path: Path) -> None:
    run = a_run(tmp_path, "abc")
    (entry,) = incomplete_runs(tmp_path)
    assert (entry.run_id, entry.path, entry.name, entry.stage) == ("abc", run.path, "run-abc", Stage.SETUP)
    assert (entry.host, entry.pid) == (socket.gethostname(), os.getpid())
    update(tmp_path, "abc", Stage.EXPORT)
    assert [entry.stage for entry in incomplete_runs(tmp_path)] == [Stage.EXPORT]
    unregister(tmp_path, "abc")
    unregister(tmp_path, "abc")  # a resume of a run that was killed between its last two writes
    assert incomplete_runs(tmp_path) == []
    assert list((tmp_path / ".incomplete").iterdir()) == []


def test_the_entry_is_one_small_file_with_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(Path("outputs"), "abc")
    values = json.loads((tmp_path / "outputs" / ".incomplete" / "abc.json").read_text())
    assert list(values) == ["run_id", "path", "name", "host", "pid", "created_at", "stage"]
    assert values["path"] == str(tmp_path / "outputs" / "sft" / "run-abc")


def test_a_second_attempt_keeps_the_time_of_the_first_and_names_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path, "abc")
    rewrite(tmp_path, "abc", created_at="2026-01-01T00:00:00+00:00", host="node7", pid=7)
    register(tmp_path, run, "abc", Stage.TRAINING)
    (entry,) = incomplete_runs(tmp_path)
    assert entry.created_at == "2026-01-01T00:00:00+00:00"
    assert (entry.host, entry.pid, entry.stage) == (socket.gethostname(), os.getpid(), Stage.TRAINING)


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    for run_id, created_at in [("aaa", "2026-11-23T00:00:00+00:00"), ("bbb", "2026-11-22T00:00:00+00:00")]:
        a_run(tmp_path, run_id)
        rewrite(tmp_path, run_id, created_at=created_at)
    assert [entry.run_id for entry in incomplete_runs(tmp_path)] == ["bbb", "aaa"]


def test_a_run_that_is_gone_or_complete_is_said_to_be_stale_and_its_entry_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone, complete, _ = (a_run(tmp_path, run_id) for run_id in ("gone", "done", "live"))
    gone.state_file.unlink()
    gone.path.rmdir()
    TrainingState(run_id="done", stage=Stage.COMPLETE, pipeline_complete=True).save(complete.state_file)
    assert [entry.run_id for entry in incomplete_runs(tmp_path)] == ["live"]
    assert f"{gone.path} is gone" in caplog.text
    assert f"{complete.path} is complete" in caplog.text
    assert len(list((tmp_path / ".incomplete").iterdir())) == 3


def test_a_run_whose_state_is_missing_or_broken_is_unfinished(tmp_path: Path) -> None:
    a_run(tmp_path, "abc").state_file.unlink()
    a_run(tmp_path, "def").state_file.write_text("{")
    assert {entry.run_id for entry in incomplete_runs(tmp_path)} == {"abc", "def"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": "x", "pa', "7"])
def test_a_broken_entry_is_warned_of_and_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    a_run(tmp_path, "abc")
    broken = tmp_path / ".incomplete" / "broken.json"
    broken.write_text(text)
    (tmp_path / ".incomplete" / ".abc.json.0123.tmp").write_text("{")  # of a writer that was killed
    assert [entry.run_id for entry in incomplete_runs(tmp_path)] == ["abc"]
    assert len(caplog.records) == 1
    assert str(broken) in caplog.text


def test_a_vanished_entry_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    update(tmp_path, "abc", Stage.TRAINING)
    assert "abc.json cannot be read" in caplog.text
    assert incomplete_runs(tmp_path) == []


def test_an_id_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        unregister(tmp_path, "../config")


def a_run(root: Path, run_id: str) -> RunDirectory:
    run = create_run_directory(root, Path("sft"), f"run-{run_id}")
    TrainingState(run_id=run_id).save(run.state_file)
    register(root, run, run_id, Stage.SETUP)
    return run


def rewrite(root: Path, run_id: str, **changes: object) -> None:
    file = root / ".incomplete" / f"{run_id}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_process_is_alive_only_if_it_is_forge_and_on_this_host(tmp_path: Path) -> None:
    a_run(tmp_path, "abc")
    (entry,) = incomplete_runs(tmp_path)
    # The kernel shows a command line only a moment after Popen returns: wait until the process speaks.
    command = [sys.executable, "-c", "print('here', flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "forge.py"], **pipes) as forge:
        assert forge.stdout is not None
        assert forge.stdout.readline() == "here\n"
        assert is_alive(entry.model_copy(update={"pid": forge.pid})) is True
        assert is_alive(entry.model_copy(update={"pid": forge.pid, "host": "node7"})) is None
        forge.communicate("\n")
    with subprocess.Popen([*command, "another.py"], **pipes) as other:  # was given the pid since
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        assert is_alive(entry.model_copy(update={"pid": other.pid})) is False
        other.communicate("\n")
    assert is_alive(entry.model_copy(update={"pid": 2**22 + 1})) is False


def test_what_a_kill_left_of_an_entry_goes_with_the_next_attempt_and_with_the_end(tmp_path: Path) -> None:
    run = a_run(tmp_path, "abc")
    folder = tmp_path / ".incomplete"
    for name in (".abc.json.0123.tmp", ".other.json.0123.tmp"):
        (folder / name).write_text("{")
    register(tmp_path, run, "abc", Stage.TRAINING)
    assert sorted(path.name for path in folder.iterdir()) == [".other.json.0123.tmp", "abc.json"]
    (folder / ".abc.json.4567.tmp").write_text("{")
    unregister(tmp_path, "abc")
    assert [path.name for path in folder.iterdir()] == [".other.json.0123.tmp"]
