"""A run has one writer: whoever comes second is told who is first, and whoever is outdated learns of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from forge.errors import Superseded, UsageError
from forge.run.directory import RunDirectory
from forge.run.files import read_json
from forge.run.lock import RunLock

# Another process: POSIX locks are held by processes, so that one of them cannot be in its own way.
HOLDER = """
import sys
from pathlib import Path
from forge.errors import ForgeError
from forge.run.directory import RunDirectory
from forge.run.lock import RunLock

lock = RunLock(RunDirectory(Path(sys.argv[1])))
for line in sys.stdin:
    try:
        if line == "check\\n":
            lock.check()
            print("current", flush=True)
        else:
            print("attempt", lock.take(take_over=line == "take over\\n"), flush=True)
    except ForgeError as error:
        print(type(error).__name__, error, flush=True)
"""


class Other:
    """A process that takes the lock when told, and answers with one line."""

    def __init__(self, run: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run)],
            **{"cwd": REPOSITORY, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        )

    def __call__(self, line: str) -> str:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def test_the_second_process_is_told_who_is_the_first_and_gets_the_run_when_that_one_is_killed(tmp_path: Path) -> None:
    first, second = Other(tmp_path), Other(tmp_path)
    assert first("take") == "attempt 1"
    refused = second("take")
    assert refused.startswith(f"UsageError the run {tmp_path} is being trained by process {first.process.pid} on ")
    assert "(attempt 1, since " in refused
    assert not (tmp_path / "attempts" / "2.json").exists()

    first.kill()
    assert second("take") == "attempt 2"
    assert read_json(tmp_path / "attempts" / "2.json")["pid"] == second.process.pid
    assert json.loads((tmp_path / ".lock").read_text())["attempt"] == 2
    second.kill()


def test_a_take_over_outdates_the_first_for_good(tmp_path: Path) -> None:
    first, second, third = Other(tmp_path), Other(tmp_path), Other(tmp_path)
    assert first("take") == "attempt 1"
    assert second("take over") == "attempt 2"
    assert first("check").startswith(f"Superseded attempt 2 has taken over {tmp_path}; attempt 1 stops")
    assert second("check") == "current"
    assert "UsageError" in third("take")
    first.kill()  # its lock is on a file without a name: its end frees nothing
    assert "UsageError" in third("take")
    second.kill()
    third.kill()


def test_a_forked_child_does_not_hold_the_run_when_its_parent_has_ended(tmp_path: Path) -> None:
    lock = RunLock(RunDirectory(tmp_path))
    lock.take()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a loader's worker, which may outlive its parent by seconds
        os.read(read, 1)
        os._exit(0)
    lock.release()
    other = Other(tmp_path)
    assert other("take") == "attempt 2"
    os.write(write, b"x")
    os.waitpid(child, 0)
    other.kill()


def test_the_number_guards_alone_where_the_file_system_keeps_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    first, second = RunLock(RunDirectory(tmp_path)), RunLock(RunDirectory(tmp_path))
    assert (first.take(), second.take()) == (1, 2)
    assert "no locks on this file system" in caplog.text
    with pytest.raises(Superseded):
        first.check()
    second.check()


def test_a_file_in_attempts_that_is_no_number_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    for name in ("10.json", "nine.json", "12.json.tmp", ".13.json"):
        (tmp_path / "attempts" / name).write_text("")
    assert RunLock(RunDirectory(tmp_path)).take() == 11


def test_a_holder_that_has_not_said_who_it_is_yet(tmp_path: Path) -> None:
    other = Other(tmp_path)
    assert other("take") == "attempt 1"
    (tmp_path / ".lock").write_text("")
    with pytest.raises(UsageError, match="is being trained by another process"):
        RunLock(RunDirectory(tmp_path)).take()
    other.kill()


def test_an_attempt_whose_file_vanished_writes_nothing_more(tmp_path: Path) -> None:
    """The next attempt would be given the same number, and neither would know of the other."""
    lock = RunLock(RunDirectory(tmp_path))
    assert lock.take(after=2) == 3
    lock.check()
    (tmp_path / "attempts" / "3.json").unlink()
    with pytest.raises(Superseded, match=r"attempts/3\.json is gone"):
        lock.check()


def test_an_attempt_is_numbered_above_those_that_the_state_knows(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "4.json").write_text("")
    lock = RunLock(RunDirectory(tmp_path))
    assert (lock.take(after=9), lock.take(after=2)) == (10, 11)


def test_a_number_that_no_attempt_can_have_does_not_end_the_run(tmp_path: Path) -> None:
    lock = RunLock(RunDirectory(tmp_path))
    assert lock.take() == 1
    for name in ("99999999999.json", "999999999999999999.json"):
        (tmp_path / "attempts" / name).touch()
    lock.check()
    lock.release()
    assert RunLock(RunDirectory(tmp_path)).take() == 2
