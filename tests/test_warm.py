"""A program that is started warm is an ordinary child of the one who started it, and an ordinary interpreter inside."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import warm
from conftest import REPOSITORY, python

pytestmark = pytest.mark.usefixtures("warm_starts")

FACTS = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path[:2], "cwd": os.getcwd(), "name": __name__,
    "file": globals().get("__file__"), "parent": os.getppid(), "session": os.getsid(0), "pid": os.getpid(),
    "mark": os.environ.get("MARK"), "warm": "torch" in sys.modules, "input": sys.stdin.read(),
}))
"""


def run(*words: object, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def test_a_script_finds_itself_started_as_by_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    environment = {**os.environ, "MARK": "mine", "PYTHONPATH": "/somewhere"}
    done = run("facts.py", "--a", "b c", cwd=tmp_path, env=environment, input="typed", start_new_session=True)
    found = json.loads(done.stdout)

    assert found["warm"]
    assert found["argv"] == ["facts.py", "--a", "b c"]
    assert found["orig_argv"] == [sys.executable, "facts.py", "--a", "b c"]
    assert found["path"] == [str(tmp_path), "/somewhere"]
    assert (found["cwd"], found["file"]) == (str(tmp_path), str(tmp_path / "facts.py"))
    assert (found["name"], found["mark"], found["input"]) == ("__main__", "mine", "typed")
    assert (found["parent"], found["session"]) == (os.getpid(), found["pid"])


def test_code_and_modules_are_started_too(tmp_path: Path) -> None:
    found = json.loads(run("-c", FACTS, "x", cwd=tmp_path, stdin=subprocess.DEVNULL).stdout)
    assert (found["argv"], found["path"][0], found["cwd"]) == (["-c", "x"], "", str(tmp_path))
    (tmp_path / "facts.py").write_text(FACTS)
    found = json.loads(run("-m", "facts", "x", cwd=tmp_path, stdin=subprocess.DEVNULL).stdout)
    assert (found["argv"], found["path"][0]) == ([str(tmp_path / "facts.py"), "x"], str(tmp_path))


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("raise SystemExit(75)", 75, ""),
        ("import sys; sys.exit('words')", 1, "words\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
        ("1 / 0", 1, 'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n'
         "ZeroDivisionError: division by zero\n"),
    ],
)  # fmt: skip
def test_its_end_is_that_of_an_interpreter(code: str, expected: int, said: str) -> None:
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (expected, said)


def test_a_signal_to_its_pid_reaches_it_and_the_system_shows_its_arguments_and_environment() -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--mark"], env={**os.environ, "MARK": "seen"}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        seen = psutil.Process(process.pid)
        assert [word for word in seen.cmdline() if word] == [sys.executable, "-c", code, "--mark"]
        assert seen.environ()["MARK"] == "seen"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_what_a_warm_program_starts_is_warm_and_its_own_child(tmp_path: Path) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-u', os.path.abspath('facts.py')]\n"
        "inner = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,"
        " preexec_fn=lambda: os.chdir('/'))\n"
        "print(os.getpid(), inner.stdout)\n"
    )
    done = run("-c", code, cwd=tmp_path)
    pid, _, facts = done.stdout.partition(" ")
    found = json.loads(facts)
    assert (found["warm"], found["parent"], found["cwd"]) == (True, int(pid), "/")


def test_what_a_library_would_read_at_its_import_gets_a_fresh_interpreter(tmp_path: Path) -> None:
    code = "import sys; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "True\n"
    assert python("-c", code, HF_HOME=str(tmp_path)).stdout == "False\n"
    assert python("-c", code, fresh=True).stdout == "False\n"
    assert run("-I", "-c", code).stdout == "False\n"


def test_what_a_library_sets_in_this_process_keeps_programs_warm() -> None:
    import deepspeed  # noqa: F401
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert python("-c", "import sys; print('torch' in sys.modules)").stdout == "True\n"


def test_every_attempt_draws_numbers_of_its_own() -> None:
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.initial_seed())"
    one, other = (run("-c", code, cwd=REPOSITORY).stdout.split() for _ in range(2))
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert one[2] == other[2]  # torch always starts with the same seed


def test_no_thread_is_there_before_a_fork() -> None:
    assert warm.warm_python().threads() == 1
