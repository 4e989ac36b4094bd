"""A signal, to whichever process of the run, ends all of them at the same step, with a checkpoint, as 75."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, TWO_RANKS_ENVIRONMENT, forge, two_ranks_command

from forge.checkpoint.manifest import verify
from forge.run.files import read_json

pytestmark = pytest.mark.usefixtures("warm_starts")

LONG = ("--max_steps", 200_000, "--set", "checkpoint.every_steps=100000", "--run_name", "long")

# Entries that stay where a signal is to find them.
IN_PREPARATION = """
import sys, time
sys.path.insert(0, {repository!r})
import forge.attempt.components

def prepare(config):
    print("in preparation", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.01)

forge.attempt.components.load_task = prepare
"""
IN_EVALUATION = """
import sys, time
sys.path.insert(0, {repository!r})
import forge.student.evaluation as evaluation

count_labels, calls = evaluation.count_labels, []

def counted(labels):
    calls.append(1)
    if len(calls) == 4:  # within the first evaluation
        print("in evaluation", file=sys.stderr, flush=True)
    if len(calls) > 3:
        time.sleep(0.2)
    return count_labels(labels)

evaluation.count_labels = counted
"""
MAIN = """
from forge.train import main
sys.exit(main())
"""


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        watchdog = threading.Timer(150, lambda: os.killpg(process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return
    raise AssertionError("".join(seen))


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    ranks = {}
    for child in psutil.Process(launcher).children(recursive=True):
        if "--config" in child.cmdline():
            ranks[int(child.environ()["RANK"])] = child
    return ranks


def script(tmp_path: Path, body: str) -> Path:
    file = tmp_path / "entry.py"
    file.write_text(body.format(repository=str(REPOSITORY)) + MAIN)
    return file


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_one_process_commits_the_step_and_leaves_with_75(name: str, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "tiny" / "long"
    with started([sys.executable, "forge.py", "--config", str(config_file), *map(str, LONG)]) as process:
        wait_for(process, "step 40/")
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors

    state = read_json(run / "training_state.json")
    assert state["error"] == f"stopped by {name} in training at step {state['step']}"
    assert f"from checkpoint-{state['step']} " in errors
    assert f" forge.py --resume {run}`" in errors
    assert (state["preemptions"], state["stage"]) == (1, "training")
    assert verify(run / f"checkpoint-{state['step']}", state["run_id"]).step == state["step"]


def test_a_second_ctrl_c_leaves_at_once(config_file: Path, tmp_path: Path) -> None:
    entry = script(tmp_path, IN_EVALUATION.replace("time.sleep(0.2)", "time.sleep(600)"))
    settings = ["--config", str(config_file), "--set", "evaluation.per_device_batch_size=1"]
    with started([sys.executable, str(entry), *settings]) as process:
        wait_for(process, "in evaluation")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for the batch, which takes ten minutes
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "forge: second Ctrl-C" in errors


def test_a_stop_in_preparation_creates_nothing(config_file: Path, tmp_path: Path) -> None:
    entry = script(tmp_path, IN_PREPARATION)
    with started([sys.executable, str(entry), "--config", str(config_file)]) as process:
        wait_for(process, "in preparation")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "WARNING: stopped by SIGTERM before the first stage" in errors
    assert not (tmp_path / "outputs").exists()


def test_a_stop_in_evaluation_is_made_up_for(config_file: Path, tmp_path: Path) -> None:
    entry = script(tmp_path, IN_EVALUATION)
    settings = ["--config", str(config_file), "--run_name", "evaluating", "--set", "evaluation.baseline=false"]
    settings += ["--set", "evaluation.every_steps=2", "--set", "evaluation.per_device_batch_size=4"]
    with started([sys.executable, str(entry), *settings]) as process:
        wait_for(process, "in evaluation")
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    run = tmp_path / "outputs" / "tiny" / "evaluating"
    assert "training evaluation, matched" not in errors
    assert (run / "checkpoint-2").is_dir()

    resumed = forge("--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    rows = [row for row in (run / "metrics.jsonl").read_text().splitlines() if '"stage": "training"' in row]
    assert [row[: row.index(",")] for row in rows] == ['{"step": 2', '{"step": 4']


TARGETS: dict[str, Callable[[int], int]] = {
    "rank 0": lambda launcher: ranks_of(launcher)[0].pid,
    "rank 1": lambda launcher: ranks_of(launcher)[1].pid,
    "the launcher": lambda launcher: launcher,
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "target"),
    [("SIGTERM", "rank 1"), ("SIGUSR1", "rank 0"), ("SIGTERM", "the launcher"), ("SIGUSR1", "the launcher")],
)
def test_two_ranks_stop_at_the_same_step(name: str, target: str, config_file: Path, tmp_path: Path) -> None:
    """USR1 is no signal that the launcher handles: it dies of it, and the ranks stop since it is gone."""
    run = tmp_path / "outputs" / "tiny" / "long"
    with started(two_ranks_command("--config", config_file, *LONG), **TWO_RANKS_ENVIRONMENT) as launcher:
        wait_for(launcher, "step 40/")
        ranks = list(ranks_of(launcher.pid).values())
        os.kill(TARGETS[target](launcher.pid), getattr(signal, name))
        gone, alive = psutil.wait_procs(ranks, timeout=25)
        assert len(gone) == 2, alive
        _, errors = launcher.communicate(timeout=60)

    state = read_json(run / "training_state.json")
    assert state["stage"] == "training"
    assert verify(run / f"checkpoint-{state['step']}", state["run_id"]).ranks == 2
    assert f"in training at step {state['step']}; " in errors
    assert f"from checkpoint-{state['step']} " in errors
    if target != "the launcher":
        assert "exitcode  : 75" in errors


@pytest.mark.multiprocess
def test_ranks_end_when_the_launcher_is_killed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "tiny" / "long"
    with started(two_ranks_command("--config", config_file, *LONG), **TWO_RANKS_ENVIRONMENT) as launcher:
        wait_for(launcher, "step 40/")
        ranks = list(ranks_of(launcher.pid).values())
        os.kill(launcher.pid, signal.SIGKILL)
        gone, alive = psutil.wait_procs(ranks, timeout=25)
        assert len(gone) == 2, alive
        launcher.communicate(timeout=60)
    state = read_json(run / "training_state.json")
    assert state["error"].startswith("stopped by the death of its launcher in training at step ")
    assert verify(run / f"checkpoint-{state['step']}", state["run_id"])


@pytest.mark.multiprocess
def test_the_others_end_when_one_rank_is_killed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "tiny" / "long"
    with started(two_ranks_command("--config", config_file, *LONG), **TWO_RANKS_ENVIRONMENT) as launcher:
        wait_for(launcher, "step 40/")
        ranks = ranks_of(launcher.pid)
        ranks[1].kill()
        gone, alive = psutil.wait_procs(list(ranks.values()), timeout=25)
        assert len(gone) == 2, alive
        _, errors = launcher.communicate(timeout=60)
    assert "another rank has died in training at step" in errors
    assert "this is a bug in forge" not in errors
    assert read_json(run / "training_state.json")["error"] == "another rank has died"


@pytest.mark.parametrize("stopped", [False, True])
def test_loader_workers_end_with_the_run(stopped: bool, config_file: Path, tmp_path: Path) -> None:
    settings = ["--set", "training.num_workers=2", "--run_name", "long"]
    settings += ["--max_steps", "200000", "--set", "checkpoint.every_steps=100000"] if stopped else []
    with started([sys.executable, "forge.py", "--config", str(config_file), *settings]) as process:
        wait_for(process, "step 6/" if not stopped else "step 40/")
        workers = psutil.Process(process.pid).children(recursive=True)
        if stopped:
            os.killpg(process.pid, signal.SIGTERM)  # the workers too, as a scheduler may do
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
        _, errors = process.communicate(timeout=20)
    assert process.returncode == (75 if stopped else 0), errors
    if stopped:
        assert " from checkpoint-" in errors


def test_loader_workers_end_with_a_parent_that_is_killed(config_file: Path, tmp_path: Path) -> None:
    settings = ["--set", "training.num_workers=2", *map(str, LONG)]
    with started([sys.executable, "forge.py", "--config", str(config_file), *settings]) as process:
        wait_for(process, "step 40/")
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
