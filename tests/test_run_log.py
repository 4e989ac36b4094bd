"""output.log holds what the console showed, also of a process that dies without a word to Python."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = """
import logging, os, signal, sys, warnings
from pathlib import Path
from forge.run.log import start_logging
path = Path(sys.argv[1])
run_log = start_logging(int(sys.argv[2]))
logger = logging.getLogger("forge.test")
"""
MANY_VOICES = """
logger.info("before the directory")
run_log.open(path)
print("from print")
warnings.warn("from warnings")
library = logging.getLogger("transformers")  # as that library sets itself up at its first use
library.addHandler(logging.StreamHandler())
library.propagate = False
run_log.adopt_library_loggers()
logging.getLogger("transformers.trainer").warning("from a library")
os.write(2, b"from native code\\n")
os.system("echo from a child")
logger.error("from the log")
"""
VOICES = {
    "before the directory",
    "from print",
    "from warnings",
    "from a library",
    "from native code",
    "from a child",
    "from the log",
}


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os.abort()", -signal.SIGABRT),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("sys.exit(3)", 3),
        ("run_log.close()", 0),
    ],
)
def test_every_voice_is_in_the_file_and_on_the_console_however_the_process_ends(
    tmp_path: Path, end: str, code: int
) -> None:
    # That the call returns shows that the tees have ended: they hold the console.
    done = run(tmp_path, MANY_VOICES + end)
    assert done.returncode == code
    said = (tmp_path / "output.log").read_text()
    for voice in VOICES:
        assert said.count(voice) == 1, voice
        assert (done.stdout + done.stderr).count(voice) == 1, voice
    assert done.stdout == "from print\nfrom a child\n"
    assert "WARNING py.warnings: " in said


def test_the_last_words_of_a_crash_are_in_the_file(tmp_path: Path) -> None:
    run(tmp_path, "run_log.open(path)\nos.abort()")
    assert "Fatal Python error: Aborted" in (tmp_path / "output.log").read_text()
    run(tmp_path, "run_log.open(path)\nraise RuntimeError('nobody caught me')")
    said = (tmp_path / "output.log").read_text()
    assert "Traceback (most recent call last)" in said
    assert said.endswith("RuntimeError: nobody caught me\n")


def test_the_file_has_date_level_and_logger_the_console_the_time(tmp_path: Path) -> None:
    done = run(tmp_path, "logger.info('early')\nrun_log.open(path)\nlogger.info('late')\nlogger.warning('bad')")
    assert mask_times((tmp_path / "output.log").read_text()) == (
        "DATE TIME,MS INFO    forge.test: early\nDATE TIME,MS INFO    forge.test: late\n"
        "DATE TIME,MS WARNING forge.test: bad\n"
    )
    assert mask_times(done.stderr) == "TIME early\nTIME late\nTIME WARNING: bad\n"


def test_a_second_attempt_appends(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("first attempt\n")
    run(tmp_path, "logger.info('early')\nrun_log.open(path)\nprint('second attempt')")
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert lines[0] == "first attempt"
    assert lines[1].endswith("early")
    assert lines[2] == "second attempt"


def test_rank_1_only_warns_and_says_who_it_is(tmp_path: Path) -> None:
    code = "logger.info('quiet')\nrun_log.open(path)\nlogger.warning('bad')\nprint('stray')"
    done = run(tmp_path, code, rank=1)
    log, stray = sorted((tmp_path / "output.log").read_text().splitlines())
    assert mask_times(log) == "DATE TIME,MS [rank 1] WARNING forge.test: bad"
    assert stray == "stray"
    assert mask_times(done.stderr) == "TIME [rank 1] WARNING: bad\n"


def test_two_ranks_share_the_file_line_by_line(tmp_path: Path) -> None:
    code = "run_log.open(path)\nfor i in range(2000): logger.warning('%d %s', i, 'x' * (i % 300))"
    ranks = [start(tmp_path, code, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.communicate(timeout=20)
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert len(lines) == 4000
    whole = re.compile(r"\S+ \S+ (\[rank 1\] )?WARNING forge\.test: (\d+) (x*)")
    matches = [whole.fullmatch(line) for line in lines]
    assert all(match is not None and len(match[3]) == int(match[2]) % 300 for match in matches)


def test_libraries_below_a_warning_are_for_the_file_and_the_users_own_code_for_both(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "run_log.open(path)\n"
        "logging.getLogger('httpx').info('HTTP Request')\n"
        "logging.getLogger('httpx').warning('slow')\n"
        "logging.getLogger('my_rewards').info('a reward')",
    )
    said = (tmp_path / "output.log").read_text()
    assert "HTTP Request" in said
    assert "a reward" in said
    assert mask_times(done.stderr) == "TIME WARNING: slow\nTIME a reward\n"


def test_a_librarys_own_file_and_its_silent_children_stay(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "own = logging.FileHandler(path.with_name('debug.log'))\n"
        "logging.getLogger('wandb').addHandler(own)\n"
        "trace = logging.getLogger('torch.__trace')\n"
        "trace.propagate = False\n"
        "child = logging.getLogger('transformers.models')\n"
        "child.addHandler(logging.StreamHandler(sys.stdout)); child.propagate = False\n"
        "run_log.adopt_library_loggers()\n"
        "print(logging.getLogger('wandb').handlers == [own], trace.propagate, child.handlers, child.propagate)",
    )
    assert done.stdout == "True False [] True\n"


def test_a_log_call_that_cannot_be_formatted_does_not_stop_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "run_log.open(path)\nlogger.info('%d', 'x')\nlogger.info('caf\\u00e9 \\udcff')\nprint('on')")
    assert done.returncode == 0
    assert done.stdout == "on\n"
    assert "café \\udcff" in (tmp_path / "output.log").read_text()


def test_close_gives_the_descriptors_back_and_leaves_no_child(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "before = [(os.fstat(n).st_dev, os.fstat(n).st_ino) for n in (1, 2)]\n"
        "opened = len(os.listdir('/proc/self/fd'))\n"
        "run_log.open(path)\n"
        "assert before[0] != (os.fstat(1).st_dev, os.fstat(1).st_ino)\n"
        "print('during')\n"
        "run_log.close()\n"
        "run_log.close()\n"
        "assert before == [(os.fstat(n).st_dev, os.fstat(n).st_ino) for n in (1, 2)]\n"
        "assert opened == len(os.listdir('/proc/self/fd'))\n"
        "try: os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError: print('no child')\n",
    )
    assert done.stdout == "during\nno child\n", done.stderr
    assert (tmp_path / "output.log").read_text() == "during\n"


def test_close_does_not_wait_for_ever_for_a_child_that_holds_the_console(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "import subprocess, time\n"
        "run_log.open(path)\n"
        "child = subprocess.Popen(['sh', '-c', 'read line; echo outlived'], stdin=subprocess.PIPE)\n"
        "began = time.monotonic()\n"
        "run_log.close()\n"
        "print(time.monotonic() - began < 2)\n",
    )
    stdout, _ = process.communicate(timeout=20)
    assert stdout.splitlines() == ["True", "outlived"]
    assert (tmp_path / "output.log").read_text() == "outlived\n"


def test_close_waits_until_a_slow_tee_has_read_all(tmp_path: Path) -> None:
    slow = tmp_path / "tee"
    slow.write_text('#!/bin/sh\nsleep 1; exec /usr/bin/env PATH=/usr/bin:/bin tee "$@"\n')
    slow.chmod(0o755)
    code = "os.environ['PATH'] = str(path.parent) + ':' + os.environ['PATH']\nrun_log.open(path)\nprint('late')\n"
    done = run(tmp_path, code + "run_log.close()\nprint(path.read_text() == 'late\\n')")
    assert done.stdout == "late\nTrue\n"


def test_signals_to_the_whole_job_do_not_end_the_tee(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import time\n"
        "run_log.open(path)\n"
        "print('before')\n"
        "while 'before' not in path.read_text(): time.sleep(0.01)\n"
        "for name in ('HUP', 'INT', 'TERM', 'USR1', 'USR2'):\n"
        "    for _, _, child in run_log._tees: child.send_signal(getattr(signal, 'SIG' + name))\n"
        "time.sleep(0.1)\n"
        "print('after')",
    )
    assert done.returncode == 0
    assert done.stdout == "before\nafter\n"
    assert (tmp_path / "output.log").read_text() == "before\nafter\n"


def test_a_kill_of_the_whole_process_group_leaves_the_tee_its_last_lines(tmp_path: Path) -> None:
    done = run(tmp_path, "os.setpgid(0, 0)\nrun_log.open(path)\nprint('last')\nos.killpg(0, signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "output.log").read_text() == "last\n"


def test_a_console_that_was_closed_costs_no_line_of_the_file(tmp_path: Path) -> None:
    code = "run_log.open(path)\nfor i in range(5000): print('line', i)"
    process = start(tmp_path, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()  # as `| head -1` does
    assert process.stderr is not None
    process.stderr.read()
    assert process.wait(timeout=20) == 0
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert lines == [f"line {i}" for i in range(5000)]


def test_without_tee_there_is_one_warning_and_the_log(tmp_path: Path) -> None:
    done = run(tmp_path, "os.environ['PATH'] = ''\nrun_log.open(path)\nlogger.info('on')\nprint('stray')")
    assert done.returncode == 0
    assert done.stdout == "stray\n"
    warning, line = mask_times((tmp_path / "output.log").read_text()).splitlines()
    assert "no `tee` on the PATH" in warning
    assert line == "DATE TIME,MS INFO    forge.test: on"


def test_on_a_terminal_the_lines_are_rich_and_the_file_stays_plain(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    code = START + "run_log.open(path)\nlogger.warning('bad [bold]news[/bold]')\nprint('stray')"
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "output.log", "0"],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = read_to_end(master).decode()
    assert process.wait(timeout=20) == 0
    assert "\x1b[" in shown
    assert "WARNING" in shown
    assert "bad [bold]news[/bold]" in shown
    assert "stray\r\n" in shown
    said = (tmp_path / "output.log").read_text()
    assert "\x1b" not in said
    assert "WARNING forge.test: bad [bold]news[/bold]\n" in said
    assert "stray\n" in said


def run(folder: Path, code: str, rank: int = 0) -> subprocess.CompletedProcess[str]:
    process = start(folder, code, rank)
    stdout, stderr = process.communicate(timeout=20)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(folder: Path, code: str, rank: int = 0) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return subprocess.Popen(
        [sys.executable, "-c", START + code, folder / "output.log", str(rank)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def mask_times(text: str) -> str:
    text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "DATE TIME,MS", text, flags=re.MULTILINE)
    return re.sub(r"^\d\d:\d\d:\d\d", "TIME", text, flags=re.MULTILINE)


def read_to_end(master: int) -> bytes:
    shown = b""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the last holder of the terminal has ended
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    return shown


TWO = """
run_log.open(path)
logger.info("ours, before")
print("ours, printed")
run_log.close()
run_log = start_logging(0)
logger.info("theirs, kept")
run_log.open(path.with_name("theirs.log"))
print("theirs, printed")
os.system("echo theirs, of a child")
run_log.close()
run_log = start_logging(0)
run_log.open(path)
logger.info("ours, after")
"""


@pytest.mark.parametrize("end", ["run_log.close()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_two_runs_in_a_process_have_a_log_each(tmp_path: Path, end: str) -> None:
    done = run(tmp_path, TWO + end)
    ours, theirs = (tmp_path / "output.log").read_text(), (tmp_path / "theirs.log").read_text()
    for words in ("before", "printed", "after"):
        assert ours.count(f"ours, {words}") == 1, words
    assert "theirs" not in ours
    for words in ("kept", "printed", "of a child"):
        assert theirs.count(f"theirs, {words}") == 1, words
        assert (done.stdout + done.stderr).count(f"theirs, {words}") == 1, words
    assert "ours" not in theirs
