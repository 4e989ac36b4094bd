"""The proof of resume through the true command: it finds whole what is whole, and names what is not."""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY
from rich.console import Console

import forge.proof.procedure
from forge.cluster.launch import training_command
from forge.cluster.processes import Processes
from forge.proof.kill_points import KillPoint, PlannedKill
from forge.proof.procedure import Procedure, saving_override
from forge.run.files import read_json, read_json_lines

pytestmark = pytest.mark.usefixtures("warm_starts")

COMMAND = [sys.executable, "-m", "forge.cli", "prove-resume"]

# Started in place of forge/train.py: a resume that forgets something.
SABOTAGED = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import random
import torch
from forge.train import main
from forge.trainer.loop import LoopTrainer

restore = LoopTrainer.restore

def forgetful(self, *arguments):
    restore(self, *arguments)
    CHANGE

if any(word.startswith("--resume") for word in sys.argv):
    LoopTrainer.restore = forgetful
sys.exit(main())
"""


def prove(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=580, check=False
    )


def prove_here(script: Path, config: Path, *settings: str, kills: int = 1) -> tuple[int, str]:
    """The procedure in this process, with a script in the place of forge/train.py: exit code and what it said."""

    def command(arguments: list[str], processes: int) -> tuple[list[str], dict[str, str]]:
        argv, environment = training_command(arguments, processes)
        argv = [str(script) if word.endswith("train.py") else word for word in argv]
        return argv, environment | {"OMP_NUM_THREADS": "1"}

    args = argparse.Namespace(
        **{"config": str(config), "set": list(settings), "max_steps": None, "epochs": None, "output_root": None},
        **{"kills": kills, "processes": 1, "seed": 0, "debug": False},
    )
    said = io.StringIO()
    code = Procedure(args, Console(file=said, width=200, soft_wrap=True), command).run()
    return code, said.getvalue()


# Eight micro-batches a step: the whole training of a tiny model would be over before a kill could be aimed.
SLOWER = ("--set", "training.per_device_batch_size=1")


def certificate(root: Path) -> dict[str, Any]:
    (file,) = root.glob("outputs/tiny/*-killed/resume_certificate.json")
    return read_json(file)


def test_a_killed_run_is_proved_identical_and_the_certificate_says_how(config_file: Path, tmp_path: Path) -> None:
    """Epochs: only the run itself knows its steps, and that it saves too seldom for so many kills."""
    done = prove(config_file, "--kills", 3, "--epochs", 2, "--set", "model.dropout=0.1", *SLOWER)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("checkpoint.every_steps is 2 instead of 3 in all runs: ") for line in lines) == 1
    assert lines[-1] == "identical: every bit is the unbroken run's after 3 kills on 1 process"
    assert [line.split(",")[0] for line in lines if line.startswith("kill ")] == ["kill 1/3", "kill 2/3", "kill 3/3"]
    runs = tmp_path / "outputs" / "tiny"
    (unbroken,) = runs.glob("*-unbroken")
    assert list((tmp_path / "outputs" / ".incomplete").glob("[!.]*")) == []

    found = certificate(tmp_path)
    assert (found["verdict"], found["difference"], found["differences"]) == ("identical", None, [])
    assert (found["processes"], found["kills_asked"], found["total_steps"]) == (1, 3, 12)
    assert found["overrides"] == ["checkpoint.every_steps=2"]
    assert {kill["aimed_at"] for kill in found["kills"]} == {
        *("as a save begins", "within a save", "right after a save")
    }
    assert read_json(unbroken / "training_state.json")["attempts"] == 1
    manifest = read_json(unbroken / "checkpoint-12" / "manifest.json")
    assert found["config_hash"] == manifest["config_hash"]
    assert found["versions"]["torch"] == manifest["versions"]["torch"]
    assert "Resume proof" not in (unbroken / "final" / "README.md").read_text()
    # As a rule one run takes all kills; on a fast machine some come too late and are made on another.
    killed = sorted(set(runs.iterdir()) - {unbroken})
    assert [str(run) for run in killed] == sorted(found["killed_runs"])
    assert killed[0].name.endswith("-killed")
    for run in killed:
        kills = [kill for kill in found["kills"] if Path(kill["run"]).name == run.name]
        assert [kill["attempt"] for kill in kills] == list(range(1, len(kills) + 1))
        assert read_json(run / "training_state.json")["attempts"] == len(kills) + 1
        counts = found["compared"][run.name]
        assert counts["curve"]["rows"] == 14
        assert counts["model"]["tensors"] == counts["final model"]["tensors"] == 41
        assert counts["optimizer"]["tensors"] == 3 * 41
        assert counts["random numbers"]["files"] == 1
        card = (run / "final" / "README.md").read_text()
        assert card.count(f"- Resume proof: bit-identical after {len(kills)} kill") == 1
    assert sum(read_json(run / "training_state.json")["attempts"] - 1 for run in killed) == 3


@pytest.mark.multiprocess
def test_two_processes_are_killed_together_and_one_by_one(config_file: Path, tmp_path: Path) -> None:
    done = prove(
        *(config_file, "--kills", 4, "--processes", 2, "--max_steps", 24, "--seed", 1),
        *("--set", "model.dropout=0.1", "--set", "checkpoint.every_steps=4", *SLOWER),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "identical: every bit is the unbroken run's after 4 kills on 2 processes"
    found = certificate(tmp_path)
    assert [counts["random numbers"]["files"] for counts in found["compared"].values()] in ([2], [2, 2], [2, 2, 2])
    victims = [kill["victim"] for kill in found["kills"]]
    assert victims.count("all processes") == 2
    assert victims.count("the launcher") == 1
    assert sum(victim in ("rank 0", "rank 1") for victim in victims) == 1
    assert all(kill["all_ended_s"] is not None for kill in found["kills"])  # nothing was left behind by any kill


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("torch.manual_seed(0)", "loss"),  # dropout draws other masks in the first step already
        ("self.optimizer.state.clear()", "loss|grad_norm"),  # the first step's loss is that of the same weights
        ("self.meter.restart()", "loss"),  # what the report has collected: the weights are right, the curve is not
    ],
    ids=["random numbers", "optimizer", "report"],
)
def test_a_resume_that_forgets_is_found_out(change: str, where: str, config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SABOTAGED.replace("CHANGE", change))
    settings = ("model.dropout=0.1", "training.max_steps=15", "checkpoint.every_steps=5", "logging.every_steps=2")
    code, said = prove_here(script, config_file, *settings)

    assert code == 1, said
    found = certificate(tmp_path)
    assert found["verdict"] == "different"
    difference = found["difference"]
    assert difference["part"] == "curve"
    step, name = re.fullmatch(r"metrics.jsonl: the report of step (\d+): (\w+)", difference["where"]).groups()
    resumed_from = max(
        (int(saved.split("-")[1]) for saved in found["kills"][0]["on_disk"] if saved.startswith("checkpoint-")),
        default=0,
    )
    assert re.fullmatch(where, name)
    assert int(step) in (resumed_from + 1, resumed_from + 2, resumed_from + 3)
    unbroken, killed = (
        {row["step"]: row for row in read_json_lines(path / "metrics.jsonl") if "stage" not in row}
        for path in sorted((tmp_path / "outputs" / "tiny").iterdir(), reverse=True)
    )
    assert (difference["unbroken"], difference["killed"]) == (
        repr(unbroken[int(step)][name]), repr(killed[int(step)][name])
    )  # fmt: skip
    last = said.splitlines()[-1]
    assert last.startswith(
        f"different after 1 kill on 1 process: {difference['where']} is {difference['unbroken']} in "
    )
    (card,) = (tmp_path / "outputs" / "tiny").glob("*-killed/final/README.md")
    assert "- Resume proof: DIFFERENT after 1 kill on 1 process" in card.read_text()
    parts = [item["part"] for item in found["differences"]]
    assert ("final model" in parts) == (change != "self.meter.restart()")


def test_a_resume_that_fails_is_the_difference(config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SABOTAGED.replace("CHANGE", "from forge.errors import ForgeError; raise ForgeError('no way')"))
    code, said = prove_here(script, config_file, "training.max_steps=9")

    assert code == 1
    difference = certificate(tmp_path)["difference"]
    assert difference["part"] == "resume"
    assert (difference["unbroken"], difference["killed"]) == ("complete", "exit 1 in attempt 2: no way")
    assert said.splitlines()[-1].endswith("is complete in the unbroken run and exit 1 in attempt 2: no way in the "
                                          "killed one")  # fmt: skip


def test_a_kill_that_came_too_late_is_aimed_again_at_another_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [PlannedKill(KillPoint.SAVED, from_step=12)]  # the last save is that of step 12
    monkeypatch.setattr(forge.proof.procedure, "plan_kills", lambda *_, **__: late)
    code, said = prove_here(REPOSITORY / "forge" / "train.py", config_file, "training.max_steps=12")

    assert code == 0, said
    assert "\n1 of the kills came too late" in said
    runs = sorted(path.name.partition("-killed")[1:] for path in (tmp_path / "outputs" / "tiny").iterdir())
    assert runs == [("", ""), ("-killed", ""), ("-killed", "-2")]
    (file,) = (tmp_path / "outputs" / "tiny").glob("*-killed-2/resume_certificate.json")
    (kill,) = read_json(file)["kills"]
    assert kill["run"].endswith("-killed-2")
    assert "checkpoint-9" in kill["on_disk"]


def test_an_interrupt_leaves_no_process_behind_and_names_the_runs(config_file: Path, tmp_path: Path) -> None:
    settings = ["--max_steps", "5000", "--set", "checkpoint.every_steps=20"]
    with subprocess.Popen(
        [*COMMAND, str(config_file), *settings],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as proof:
        runs = tmp_path / "outputs" / "tiny"
        deadline = time.monotonic() + 120
        while not list(runs.glob("*-unbroken/checkpoint-*")):  # polled: there is nothing else to wait for
            assert time.monotonic() < deadline
            assert proof.poll() is None
            time.sleep(0.05)
        assert len(_trainings(config_file)) == 1
        proof.send_signal(signal.SIGINT)
        said, _ = proof.communicate(timeout=120)

    (unbroken,) = runs.iterdir()
    assert proof.returncode == 130
    assert re.fullmatch(rf"interrupted: .*: {re.escape(str(unbroken))}", said.splitlines()[-1])
    assert _trainings(config_file) == []


def _trainings(config: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(word.endswith("train.py") for word in command) and any(str(config) in word for word in command):
            found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kills", "-1"], "--kills is -1; "),
        (["--processes", "0"], "--processes is 0; "),
        (["--kills", "x"], "argument --kills: invalid int value: 'x'"),
        (["--debug"], "error: --debug "),
        (["--max_steps", "x"], "--max_steps: training.max_steps is `x`; "),
        (["--set", "trainig.seed=1"], "--set trainig.seed=1: trainig "),
        (["--output_root", "/proc/forge"], "output root /proc/forge "),
    ],
)
def test_bad_input_exits_2_before_anything_runs(
    arguments: list[str], sentence: str, config_file: Path, tmp_path: Path
) -> None:
    done = prove(config_file, *arguments)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "outputs").exists()


def test_what_only_the_training_finds_wrong_exits_2_too(config_file: Path, tmp_path: Path) -> None:
    done = prove(config_file, "--set", "task.columns.text=sentence")

    assert done.returncode == 2, done.stderr
    assert "error: the unbroken run did not start: " in done.stderr
    assert "column sentence" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("every_steps", "total_steps", "kills", "expected"),
    [
        (100, 250, 10, 20),  # three saves are too few for ten kills
        (20, 250, 10, None),  # thirteen
        (21, 250, 10, None),  # twelve, the last one at the end
        (23, 250, 10, 20),  # eleven
        (None, 250, 10, 20),
        (None, 250, 0, 250),  # there must be one to compare
        (500, 250, 0, None),
        (5, 6, 10, 1),
    ],
)
def test_a_config_that_saves_too_seldom_is_overridden(
    every_steps: int | None, total_steps: int, kills: int, expected: int | None
) -> None:
    assert saving_override(every_steps, total_steps, kills) == expected


# A command, a child in a session of its own as accelerate's ranks are, and a child of that.
TREE = """
import os, subprocess, sys, time
depth = int(sys.argv[1])
if depth:
    environment = {**os.environ, "RANK": "0"}
    subprocess.Popen([sys.executable, *sys.argv[:1], str(depth - 1)], start_new_session=True, env=environment)
print(f"depth {depth} is {os.getpid()}", flush=True)
time.sleep(300)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple[Processes, dict[int, int]]]:
    """Three processes, found by what they print: depth to pid."""
    (tmp_path / "tree.py").write_text(TREE)
    with Processes([sys.executable, str(tmp_path / "tree.py"), "2"], dict(os.environ)) as processes:
        deadline = time.monotonic() + 30
        while len(found := dict(re.findall(r"depth (\d) is (\d+)", processes.output()))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield processes, {int(depth): int(pid) for depth, pid in found.items()}


def test_all_processes_are_killed_whatever_their_session(tree: tuple[Processes, dict[int, int]]) -> None:
    processes, pids = tree
    assert processes.exit_code is None
    processes.kill_all()

    assert processes.exit_code == -signal.SIGKILL
    _wait_until_ended(list(pids.values()))
    assert processes.ended_within(0.0)


def test_one_rank_is_killed_alone_and_the_launcher_alone(tree: tuple[Processes, dict[int, int]]) -> None:
    processes, pids = tree
    assert not processes.kill_rank(0)  # before they are known
    processes.learn()
    assert not processes.kill_rank(1)
    assert processes.kill_rank(0)
    deadline = time.monotonic() + 10
    while _runs(pids[1]) and time.monotonic() < deadline:  # polled: nobody waits for it, and it stays a zombie
        time.sleep(0.01)
    assert [_runs(pids[depth]) for depth in (2, 1, 0)] == [True, False, True]
    processes.kill_launcher()
    assert not processes.ended_within(0.2)  # the third is an orphan now
    assert _runs(pids[0])
    processes.kill_all()
    _wait_until_ended([pids[0]])


def _wait_until_ended(pids: list[int]) -> None:
    """A killed process that gives its memory back runs for some more moments, and has no environment any more."""
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_parent_is_named_to_the_processes(tmp_path: Path) -> None:
    script = "import os, json; print(json.dumps({name: os.environ[name] for name in ('FORGE_PARENT', 'A')}))"
    with Processes([sys.executable, "-c", script], {**os.environ, "A": "b"}) as processes:
        assert processes.ended_within(30)
        assert processes.exit_code == 0
        assert json.loads(processes.output()) == {"FORGE_PARENT": str(os.getpid()), "A": "b"}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
