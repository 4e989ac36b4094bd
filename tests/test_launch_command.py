"""`forge launch` trains in many processes of this machine, and leaves with forge's own exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import warm
from conftest import REPOSITORY, python
from test_signals import wait_for

from forge.cli.main import main
from forge.cluster import launch
from forge.cluster.launch import run_training, training_command
from forge.errors import UsageError
from forge.run.directory import RunDirectory
from forge.run.files import read_json, read_json_lines
from forge.run.state import Stage, TrainingState

CONFIG = """
task: {type: classification, dataset: {path: data}}
model: {path: m}
training: {max_steps: 20}
"""
# What `accelerate config` may have left on a machine; and a key that this accelerate does not know.
OF_ANOTHER_MACHINE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, deepspeed_multinode_launcher: pdsh}
num_machines: 4
machine_rank: 3
main_process_ip: 203.0.113.7
main_process_port: 1
num_processes: 32
gpu_ids: "0"
mixed_precision: fp16
use_cpu: true
no_such_key: 7
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Arguments and number of processes of each training that is started; none of them trains."""
    calls: list[tuple[list[str], int]] = []

    def command(arguments: list[str], processes: int) -> tuple[list[str], dict[str, str]]:
        calls.append((arguments, processes))
        return [sys.executable, "-c", "raise SystemExit(0)"], dict(os.environ)

    monkeypatch.setattr(launch, "training_command", command)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    Path("data").mkdir()
    return calls


def test_every_argument_of_train_is_passed_on(started: list[tuple[list[str], int]]) -> None:
    given = ["--set", "training.seed=1", "--set", "model.path=a b", "--epochs", "2", "--debug", "--run_name", "r"]
    assert main(["launch", "--processes", "3", *given, "--output_root", "o", "c.yaml", "--deepspeed", "zero3"]) == 0
    settings = ["--set=training.seed=1", "--set=model.path=a b", "--set=deepspeed.student=zero3"]
    named = ["--config=c.yaml", "--run_name=r", "--epochs=2", "--output_root=o", "--debug"]
    ((arguments, processes),) = started
    assert (sorted(arguments), processes) == (sorted([*settings, *named]), 3)
    assert [word for word in arguments if word.startswith("--set")] == settings  # of one key, the last counts


def test_a_run_goes_on_in_many_processes(
    started: list[tuple[list[str], int]], capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(Path("outputs/r"))
    run.path.mkdir(parents=True)
    run.config_file.write_text(CONFIG)
    state = TrainingState(run_id="id1", created_at="2026-11-23T00:00:00+00:00")
    state.save(run.state_file)
    assert main(["launch", "--resume", "r", "--processes", "2", "--allow-change", "training.seed", "--take-over"]) == 0
    assert started == [(["--resume=r", "--allow-change=training.seed", "--take-over"], 2)]
    state.pipeline_complete, state.stage = True, Stage.COMPLETE
    state.save(run.state_file)
    assert main(["launch", "--resume", "r", "--processes", "2"]) == 0
    assert capfd.readouterr().out == "outputs/r is complete; its model is in outputs/r/final\n"
    assert len(started) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["c.yaml", "--deepspeed", "zero9"],
            "--set deepspeed.student=zero9: deepspeed.student is zero9: no such plan; ds_configs/ has zero1, "
            "zero2, zero2_offload, zero3, zero3_offload, teacher_zero3, teacher_zero3_offload, and the path of a file "
            "ends in .json",
        ),
        (
            ["c.yaml", "--set", "training.sed=1"],
            "--set training.sed=1: training.sed is not a config key; did you mean training.seed?",
        ),
        (["--resume", "q"], "no run in outputs is named 'q', and no run directory has that path; `forge runs` lists "
         "the runs"),
        (["c.yaml", "--take-over"], "--take-over can be given with --resume only"),
        (["c.yaml", "--processes", "0"], "argument --processes: must be a positive integer, got '0'"),
        ([], "one of the arguments --config X.yaml --resume is required; see `forge launch --help`"),
        (["c.yaml", "--resume", "r"], "argument --resume: not allowed with argument X.yaml; see `forge launch --help`"),
    ],
)  # fmt: skip
def test_a_wrong_command_starts_nothing(
    arguments: list[str],
    expected: str,
    started: list[tuple[list[str], int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    try:
        code: object = main(["launch", "--processes", "2", *arguments])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert expected in capfd.readouterr().err
    assert started == []


def test_the_config_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "data").mkdir()
    code = (
        "import sys; from forge.cli import main as cli; from forge.cluster import launch; "
        "launch.run_training = lambda arguments, processes: 70 + processes; "
        "code = cli.main(['launch', 'c.yaml', '--processes', '4', '--deepspeed', 'zero2']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = python("-c", code, cwd=tmp_path, fresh=True, PYTHONPATH=str(REPOSITORY))
    assert done.stdout == "74 False\n", done.stderr


def test_more_processes_than_gpus_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("path: data", f"path: {tmp_path}"))
    monkeypatch.setattr(launch, "_trains_on_cpu", lambda environment: False)
    monkeypatch.setattr(launch, "visible_gpus", lambda environment: 2)
    assert main(["launch", str(tmp_path / "c.yaml"), "--processes", "4"]) == 2
    expected = "error: 4 processes need as many GPUs, but only 2 are visible here; give --processes 2\n"
    assert capfd.readouterr().err == expected
    with pytest.raises(UsageError):
        training_command([], 4)


def test_more_processes_than_cores_are_warned_of(
    started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert main(["launch", "c.yaml", "--processes", "2"]) == 0
    assert capfd.readouterr().err == ""
    assert main(["launch", "c.yaml", "--processes", "5"]) == 0
    assert "5 processes share 2 CPU cores" in capfd.readouterr().err
    assert main(["launch", "c.yaml"]) == 0
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(launch, "_trains_on_cpu", lambda environment: False)
    monkeypatch.setattr(launch, "visible_gpus", lambda environment: 8)
    assert main(["launch", "c.yaml"]) == 0
    assert [processes for _, processes in started] == [2, 5, 1, 8]  # without --processes one per GPU, or one on the CPU


@pytest.mark.multiprocess
def test_two_launches_at_once_train_to_their_end_whatever_accelerate_was_configured_for(
    config_file: Path, tmp_path: Path
) -> None:
    caches = tmp_path / "hf_home"
    (caches / "accelerate").mkdir(parents=True)
    (caches / "accelerate" / "default_config.yaml").write_text(OF_ANOTHER_MACHINE)
    both = [start(config_file, "--run_name", "one", HF_HOME=str(caches)), start(config_file, "--run_name", "two")]
    for name, process in zip(("one", "two"), both, strict=True):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        run = RunDirectory(tmp_path / "outputs" / "tiny" / name)
        assert (run.final / "model.safetensors").is_file()
        (attempt,) = read_json(run.metadata_file)["attempts"]
        assert attempt["ranks"] == 2
        reported = [row["step"] for row in read_json_lines(run.metrics_file) if "learning_rate" in row]
        assert reported == [1, 2, 3, 4, 5, 6]
        assert err.count("step 6/6") == 1  # one rank speaks
        assert out.count(f"model  {run.final}") == 1
    # The first imported everything itself, the second is warm: what the tests run is what a user runs.
    fresh, warmed = (tmp_path / "outputs" / "tiny" / name / "final" / "model.safetensors" for name in ("one", "two"))
    assert fresh.read_bytes() == warmed.read_bytes()


@pytest.mark.multiprocess
def test_what_only_the_ranks_can_find_is_told_once(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = start(config_file, "--set", f"task.dataset.path={tmp_path / 'empty'}")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert err.count("ERROR: ") == 1
    assert err.count(f"{tmp_path / 'empty'}") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "outputs" / "tiny").exists()


@pytest.mark.multiprocess
def test_a_signal_to_the_launch_commits_a_checkpoint_that_another_launch_goes_on_from(
    config_file: Path, tmp_path: Path
) -> None:
    process = start(config_file, "--run_name", "r", "--max_steps", "5000")
    wait_for(process, "step 5/5000")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    run = RunDirectory(tmp_path / "outputs" / "tiny" / "r")
    state = TrainingState.load(run.state_file)
    assert state.latest_checkpoint == f"checkpoint-{state.step}"
    assert (run.path / state.latest_checkpoint / "manifest.json").is_file()
    done = python(
        *("-m", "forge.cli", "launch", "--resume", run.path, "--processes", "2"),
        *("--max_steps", state.step + 2),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert TrainingState.load(run.state_file).step == state.step + 2
    assert [attempt["ranks"] for attempt in read_json(run.metadata_file)["attempts"]] == [2, 2]


@pytest.mark.multiprocess
def test_a_launch_with_a_killed_rank_has_failed(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "--run_name", "r", "--max_steps", "5000")
    wait_for(process, "step 5/5000")
    (rank,) = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank_1(child)]
    rank.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.count(f"rank 1 (process {rank.pid}) was killed by SIGKILL") == 1
    assert err.count("another rank has died") == 1


# Stands for forge/train.py. The first rank hears signals; the second one dies once it does.
DIES_EARLY = """
import os, signal, sys
from pathlib import Path
from forge.cluster.launch import write_outcome

ready = Path(sys.argv[1])
if os.environ["RANK"] == "1":
    open(ready).read()
    os.kill(os.getpid(), signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
open(ready, "w").close()
signal.sigwait({signal.SIGTERM})
write_outcome(75)
sys.exit(75)
"""

# It has not come so far as to hear signals.
HEARS_NOTHING = """
import os, signal, sys

open(sys.argv[1] + os.environ["RANK"], "w").close()
signal.pause()
"""


@pytest.mark.multiprocess
def test_a_rank_that_dies_is_no_stop_though_the_others_take_it_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, DIES_EARLY)
    os.mkfifo(tmp_path / "ready")
    with open(tmp_path / "output", "wb") as output:
        assert run_training([str(tmp_path / "ready")], 2, output) == 1
    assert "was killed by SIGKILL" in (tmp_path / "output").read_text()


@pytest.mark.multiprocess
def test_a_signal_before_the_ranks_hear_signals_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = stand_in(tmp_path, monkeypatch, HEARS_NOTHING)
    for rank in "01":
        os.mkfifo(tmp_path / f"ready{rank}")
    code = (
        "import sys; from pathlib import Path; from forge.cluster import launch; "
        "launch.ENTRY = Path(sys.argv[1]); sys.exit(launch.run_training(sys.argv[2:], 2))"
    )
    with warm.starts():
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(entry), str(tmp_path / "ready")], stderr=subprocess.DEVNULL
        )
    for rank in "01":
        (tmp_path / f"ready{rank}").read_text()  # waits until it runs
    parent.terminate()
    assert parent.wait(60) == 75


def test_a_training_that_is_killed_after_it_began_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a signal that forge was sent: what had been done until then is not known."""
    stand_in(
        tmp_path,
        monkeypatch,
        "import os, signal\n"
        "from forge.cluster.launch import write_outcome\n"
        "write_outcome(1)\n"
        "os.kill(int(os.environ['FORGE_PARENT']), signal.SIGTERM)\n"
        "signal.pause()\n",
    )
    assert run_training([], 1) == 1


def test_training_has_failed_until_it_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome that stands there while it trains."""
    from forge.cli import train as command

    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_OUTCOME", str(tmp_path / "outcome"))
    seen = []
    monkeypatch.setattr(command, "_checked", lambda args: seen.append((tmp_path / "outcome").read_text()) or 1 / 0)
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    try:
        assert main(["train", "--config", "c.yaml"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == ["1"]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """A script in the place of forge/train.py."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    file = folder / "entry.py"
    file.write_text(text)
    monkeypatch.setattr(launch, "ENTRY", file)
    return file


def start(config: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """`forge launch` of two processes, warm; with another HF_HOME, which accelerate reads at its import, all fresh."""
    command = [sys.executable, "-m", "forge.cli", "launch", str(config), "--processes", "2", *arguments]
    with warm.starts():
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def is_rank_1(process: psutil.Process) -> bool:
    command = process.cmdline()
    return "forge/train.py" in " ".join(command) and process.environ().get("RANK") == "1"
