"""Training in a child process: its command line, its signals, its own exit code, and its end with its parent."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import REPOSITORY

from forge.cluster import launch
from forge.cluster.launch import SignalRelay, option_words, run_training, training_command, visible_gpus, write_outcome
from forge.cluster.processes import rank, world_size
from forge.errors import UsageError

# Stands for forge/train.py: says which signals came, one line each, and leaves after as many as its argument says.
STOPPED = """
import os, signal, sys
from forge.cluster.launch import write_outcome

came = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: came.append(number))
waits = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, waits)
with open(sys.argv[1], "w") as report:
    print("ready", os.getpid(), os.getpgid(0), os.environ["FORGE_PARENT"], file=report, flush=True)
    for _ in range(int(sys.argv[2])):
        print(signal.Signals(signal.sigwait(waits)).name, file=report, flush=True)
if os.environ.get("RANK", "0") == "0":
    write_outcome(75)
"""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a script in the place of forge/train.py."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))

    def put(text: str) -> Path:
        file = tmp_path / "entry.py"
        file.write_text(text)
        monkeypatch.setattr(launch, "ENTRY", file)
        return file

    return put


def test_options_become_the_words_of_a_command_line() -> None:
    assert option_words(resume=Path("a b"), set=["x=1", "y=2"], max_steps="3", epochs=None, allow_change=["k"]) == [
        *("--resume=a b", "--set=x=1", "--set=y=2", "--max_steps=3", "--allow-change=k"),
    ]
    assert option_words(take_over=True, debug=False, run_name=None, set=()) == ["--take-over"]


def test_a_process_without_a_launcher_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size()) == (3, 4)


def test_one_process_is_forge_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_OUTCOME", "of another run")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a start around this one, whose ranks it would wait for
    computer(monkeypatch, gpus=0)
    command, environment = training_command(["--resume", "r"], 1)
    assert command == [sys.executable, str(REPOSITORY / "forge" / "train.py"), "--resume", "r"]
    assert (environment["FORGE_PARENT"], environment["KEPT"]) == (str(os.getpid()), "yes")
    assert {"FORGE_OUTCOME", "WORLD_SIZE"}.isdisjoint(environment)
    assert environment["ACCELERATE_USE_CPU"] == "true"


def test_many_processes_are_started_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    computer(monkeypatch, gpus=0)
    command, environment = training_command(["--resume", "r"], 3)
    assert command == [
        *(sys.executable, str(REPOSITORY / "forge" / "cluster" / "launcher.py"), "--multi_gpu", "--num_machines", "1"),
        *("--num_processes", "3", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(str(REPOSITORY / "forge" / "train.py"), "--resume", "r"),
    ]
    assert (environment["ACCELERATE_USE_CPU"], environment["OMP_NUM_THREADS"]) == ("true", "4")
    assert {"SIGUSR1", "SIGUSR2", "SIGTERM"} < set(environment["PET_SIGNALS_TO_HANDLE"].split(","))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert training_command([], 24)[1]["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert training_command([], 24)[1]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("gpus", "torch", "user", "on_cpu"),
    [
        (8, "2.13.0+cu130", None, False),
        (8, "2.13.0", None, False),
        (8, "2.13.0+cpu", None, True),
        (0, "2.13.0", None, True),
        (8, "2.13.0", "true", True),
        (8, "2.13.0", "false", False),
    ],
)
def test_ranks_train_on_the_cpu_where_torch_has_no_gpu(
    gpus: int, torch: str, user: str | None, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if user is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", user)
    computer(monkeypatch, gpus=gpus, torch=torch)
    assert (training_command([], 2)[1].get("ACCELERATE_USE_CPU", "false") == "true") is on_cpu


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    computer(monkeypatch, gpus=4, torch="2.13.0")
    with pytest.raises(UsageError, match=r"8 processes .* 4 .*--processes 4"):
        training_command([], 8)
    assert "--multi_gpu" in training_command([], 4)[0]


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("0, 1, -1, 2", 2), ("GPU-8f3a,MIG-77", 2)]
)
def test_visible_gpus_are_those_of_cuda_visible_devices(visible: str, count: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("from forge.cluster.launch import write_outcome; write_outcome(2); raise SystemExit(1)", 2),
        ("from forge.cluster.launch import write_outcome; write_outcome(75)", 75),
        ("", 0),
        ("raise SystemExit(2)", 2),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1),
    ],
)
def test_the_exit_code_is_forges_own(body: str, code: int, entry: Callable[[str], Path]) -> None:
    entry(body)
    assert run_training([], 1) == code


def test_what_the_child_prints_can_be_kept(entry: Callable[[str], Path], tmp_path: Path) -> None:
    entry("import sys; print(sys.argv[1:], flush=True); print('words', file=sys.stderr)")
    with open(tmp_path / "output", "wb") as output:
        assert run_training(["--resume", "a b"], 1, output) == 0
    assert (tmp_path / "output").read_text() == "['--resume', 'a b']\nwords\n"


def test_an_outcome_that_nobody_asked_for_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORGE_OUTCOME", raising=False)
    write_outcome(0)
    monkeypatch.setenv("FORGE_OUTCOME", str(tmp_path / "gone" / "outcome"))
    write_outcome(0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FORGE_OUTCOME", str(tmp_path / "outcome"))
    write_outcome(75)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("outcome", "75")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_reaches_the_child_once(name: str, entry: Callable[[str], Path], tmp_path: Path) -> None:
    entry(STOPPED)
    before = signal.getsignal(signal.SIGINT)
    with Reports(tmp_path, 1) as reports, SignalRelay() as relay:
        reports.when_ready(lambda: os.kill(os.getpid(), signal.Signals[name]))
        assert run_training([*reports.arguments, "1"], 1, relay=relay) == 75
        assert reports.lines() == [[name]]
        assert relay.received == [signal.Signals[name]]
    (ready,) = reports.ready
    assert int(ready[1]) != os.getpgid(0)  # a Ctrl-C of the terminal would not reach it a second time
    assert int(ready[2]) == os.getpid()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_the_child_is_not_lost(entry: Callable[[str], Path], tmp_path: Path) -> None:
    started = tmp_path / "started"
    entry(f"open({str(started)!r}, 'w')")
    with SignalRelay() as relay:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run_training([], 1, relay=relay) == 75
        assert not started.exists()
    with SignalRelay() as relay:  # it comes while the child is being started, and has no handler yet
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        os.kill(os.getpid(), signal.SIGTERM)
        assert relay.wait(child) == -signal.SIGTERM


def test_a_child_that_a_signal_ends_before_it_is_ready_for_it_was_stopped(
    entry: Callable[[str], Path], tmp_path: Path
) -> None:
    entry("import signal, sys; print('ready', file=open(sys.argv[1], 'w'), flush=True); signal.pause()")
    with Reports(tmp_path, 1) as reports:
        reports.when_ready(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert run_training(reports.arguments, 1) == 75


def test_a_launcher_that_a_signal_ends_before_its_ranks_are_ready_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns 1 for a stop as for a failure, and no rank has left a code."""
    launcher = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
        "print('ready', file=open(sys.argv[1], 'w'), flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", launcher]
    monkeypatch.setattr(launch, "training_command", lambda arguments, _: ([*command, *arguments], dict(os.environ)))
    with Reports(tmp_path, 1) as reports:
        reports.when_ready(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_training(reports.arguments, 2) == 75
    command[2] = "import sys; sys.exit(1)"
    assert run_training([], 2) == 1


def test_the_child_is_stopped_when_its_parent_is_killed(entry: Callable[[str], Path], tmp_path: Path) -> None:
    file = entry(STOPPED)
    with Reports(tmp_path, 1) as reports:
        code = (
            "import sys; from pathlib import Path; from forge.cluster import launch; "
            "launch.ENTRY = Path(sys.argv[1]); launch.run_training(sys.argv[2:], 1)"
        )
        parent = subprocess.Popen([sys.executable, "-c", code, str(file), *reports.arguments, "1"])
        reports.when_ready(parent.kill)
        assert parent.wait(30) == -signal.SIGKILL
        assert reports.lines() == [["SIGTERM"]]


@pytest.mark.multiprocess
def test_the_launcher_passes_a_signal_to_every_rank(
    entry: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its own exit code, 1, is not forge's."""
    entry(STOPPED.replace("sys.argv[1]", "sys.argv[1] + os.environ['RANK']") + "sys.exit(75)\n")
    with Reports(tmp_path, 2) as reports:
        reports.when_ready(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with open(tmp_path / "output", "wb") as output:
            assert run_training([*reports.arguments, "1"], 2, output) == 75
        assert reports.lines() == [["SIGUSR1"], ["SIGUSR1"]]
    assert "Traceback" not in (tmp_path / "output").read_text()


@pytest.mark.multiprocess
def test_a_second_interrupt_ends_every_rank_at_once(entry: Callable[[str], Path], tmp_path: Path) -> None:
    entry(STOPPED.replace("sys.argv[1]", "sys.argv[1] + os.environ['RANK']"))
    with Reports(tmp_path, 2) as reports, open(tmp_path / "output", "wb") as output:
        interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
        reports.when_ready(interrupt, interrupt)  # the second one when every rank has got the first
        assert run_training([*reports.arguments, "9"], 2, output) == 1
        assert reports.lines() == [["SIGINT"], ["SIGINT"]]  # and all have ended


@pytest.mark.multiprocess
def test_a_rank_that_is_killed_is_named(entry: Callable[[str], Path], tmp_path: Path) -> None:
    entry("import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)")
    with open(tmp_path / "output", "wb") as output:
        assert run_training([], 2, output) == 1
    said = (tmp_path / "output").read_text()
    assert "rank 1 (process " in said
    assert "was killed by SIGKILL\n" in said
    assert "Traceback" not in said


class Reports:
    """What the children say of themselves, through one named pipe each: a read waits, and nothing has to sleep."""

    def __init__(self, folder: Path, count: int):
        self.arguments = [str(folder / "report")]
        self.pipes = [folder / f"report{rank}" for rank in range(count)] if count > 1 else [folder / "report"]
        self.ready: list[list[str]] = []
        self._lines: list[list[str]] = []
        self._thread: threading.Thread | None = None
        for pipe in self.pipes:
            os.mkfifo(pipe)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join(60)

    def when_ready(self, then: Callable[[], None], *later: Callable[[], None]) -> None:
        """Calls then as soon as every child runs, and each later one after another line of each; in a thread."""

        def follow() -> None:
            files = [open(pipe) for pipe in self.pipes]  # noqa: SIM115 - all of them are open at once
            self.ready = [file.readline().split()[1:] for file in files]
            then()
            for call in later:
                self._lines.append([file.readline().strip() for file in files])
                call()
            rest = [file.read().split() for file in files]
            self._lines = [[*said, *more] for *said, more in zip(*self._lines, rest, strict=True)]
            for file in files:
                file.close()

        self._thread = threading.Thread(target=follow, daemon=True)
        self._thread.start()

    def lines(self) -> list[list[str]]:
        """What each child said after it was ready, once it has ended."""
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive(), "a child did not end"
        return self._lines


def computer(monkeypatch: pytest.MonkeyPatch, *, gpus: int, torch: str = "2.13.0") -> None:
    """A computer with so many GPUs, and that build of torch."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: torch)
