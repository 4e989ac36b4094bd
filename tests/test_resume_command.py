"""`forge resume` goes on with one run or with all, on this machine, and tells what came of each."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, python
from recorded_runs import metadata_of

from forge.cli.main import main
from forge.cluster import launch
from forge.cluster.launch import training_command
from forge.run.directory import RunDirectory, create_run_directory
from forge.run.files import read_json, write_json
from forge.run.registry import register
from forge.run.state import Stage, TrainingState

CONFIG = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\ntraining: {max_steps: 20}\n"

# Stands for forge/train.py: notes its arguments, and does what the run's file `will` says.
STAND_IN = """
import json, os, signal, sys
from pathlib import Path
from forge.cluster.launch import write_outcome

run = Path(sys.argv[1].removeprefix("--resume="))
with open("calls.jsonl", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
will = (run / "will").read_text()
state = json.loads((run / "training_state.json").read_text())
if will == "0":
    state |= {"pipeline_complete": True, "stage": "complete"}
elif will == "1":
    state |= {"error": "TrainingError: loss nan at step 7\\nmore"}
elif will == "signal":  # to whoever started it, which passes it on
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(int(os.environ["FORGE_PARENT"]), signal.SIGTERM)
    signal.sigwait({signal.SIGTERM})
    will = "75"
(run / "training_state.json").write_text(json.dumps(state))
write_outcome(int(will))
sys.exit(1)
"""


@pytest.fixture
def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunDirectory]]:
    """Makes incomplete runs below ./outputs, each older than the next; a stand-in trains them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    Path("entry.py").write_text(STAND_IN)
    monkeypatch.setattr(launch, "ENTRY", tmp_path / "entry.py")
    alive: list[subprocess.Popen[bytes]] = []

    def make(
        name: str, will: str = "0", *, ranks: int = 1, live: bool = False, host: str | None = None
    ) -> RunDirectory:
        root = Path("outputs")
        run = create_run_directory(root, Path("sft"), name)
        number = len(list(run.path.parent.iterdir()))
        state = TrainingState(
            run_id=f"id{number}", stage=Stage.TRAINING, step=5, total_steps=20, attempts=3,
            latest_checkpoint="checkpoint-5", created_at=f"2026-11-23T00:00:0{number}+00:00",
        )  # fmt: skip
        state.save(run.state_file)
        run.config_file.write_text(CONFIG)
        write_json(run.metadata_file, metadata_of(run, ranks))
        (run.path / "will").write_text(will)
        register(root, run, state.run_id, state.stage)
        entry = root / ".incomplete" / f"{state.run_id}.json"
        known = json.loads(entry.read_text())
        if live:
            alive.append(subprocess.Popen([sys.executable, "-c", "input()", "forge.py"], stdin=subprocess.PIPE))
            known["pid"] = alive[-1].pid
        else:
            known["pid"] = 2**22 + 1  # above every process id of Linux
        entry.write_text(json.dumps(known | ({"host": host} if host else {})))
        return run

    yield make
    for process in alive:
        process.communicate(b"\n")


def test_one_run_goes_on_with_what_was_given(
    a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    run = a_run("r")
    a_run("other")
    overrides = ["--set", "logging.every_steps=2", "--set", "training.seed=1", "--max_steps", "40"]
    assert main(["resume", "r", *overrides, "--allow-change", "training.seed", "--take-over"]) == 0
    assert calls() == [
        [
            f"--resume={run.path}", "--set=logging.every_steps=2", "--set=training.seed=1", "--max_steps=40",
            "--allow-change=training.seed", "--take-over",
        ]
    ]  # fmt: skip
    assert main(["resume", str(run.path)]) == 0
    assert len(calls()) == 1
    assert capfd.readouterr().out == "outputs/sft/r is complete; its model is in outputs/sft/r/final\n"


@pytest.mark.parametrize("code", [1, 2, 75])
def test_one_runs_exit_code_is_forges_own(code: int, a_run: Callable[..., RunDirectory]) -> None:
    a_run("r", str(code))
    assert main(["resume", "r"]) == code


def test_the_ranks_are_those_of_the_last_attempt(
    a_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        launch, "training_command", lambda arguments, processes: asked.append(processes) or ([sys.executable], {})
    )
    run = a_run("r", ranks=4)
    main(["resume", "r"])
    main(["resume", "r", "--processes", "2"])
    attempts = [metadata_of(run, ranks)["attempts"][0] for ranks in (4, 1)]
    write_json(run.metadata_file, metadata_of(run) | {"attempts": attempts})
    main(["resume", "r"])
    assert asked == [4, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["r", "--set", "training.sed=1"], "--set training.sed=1: training.sed is not a config key; did you mean "
         "training.seed?"),
        (["r", "--epochs", "2", "--max_steps", "3"], "--epochs: training.epochs is an alternative to "
         "training.max_steps (--max_steps); keep only one of them"),
        (["q"], "no run in outputs is named 'q', and no run directory has that path; `forge runs` lists the runs"),
        (["--all", "--take-over"], "--take-over cannot be combined with --all: it is for one run that you know to be "
         "dead"),
        (["r", "--processes", "0"], "argument --processes: must be a positive integer, got '0'"),
        ([], "one of the arguments RUN --all is required; see `forge resume --help`"),
        (["r", "--all"], "argument --all: not allowed with argument RUN; see `forge resume --help`"),
    ],
)  # fmt: skip
def test_a_wrong_command_starts_nothing(
    arguments: list[str], expected: str, a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    a_run("r")
    try:
        code: object = main(["resume", *arguments])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert expected in capfd.readouterr().err
    assert calls() == []


def test_all_runs_go_on_one_after_the_other_whatever_comes_of_each(
    a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    a_run("first")
    a_run("fails", "1")
    broken = a_run("broken")
    broken.config_file.write_text("a: [\n")
    live = a_run("live", live=True)
    a_run("refused", "2", host="another-machine")
    a_run("last")
    assert main(["resume", "--all", "--set", "logging.every_steps=2"]) == 1
    called = [f"--resume=outputs/sft/{name}" for name in ("first", "fails", "refused", "last")]
    assert [call[0] for call in calls()] == called
    assert all(call[1:] == ["--set=logging.every_steps=2"] for call in calls())
    out, err = capfd.readouterr()
    assert out.splitlines()[:2] == ["run 1 of 6: outputs/sft/first", "run 2 of 6: outputs/sft/fails"]
    assert table(out) == {
        "first": "complete", "fails": "failed: TrainingError: loss nan at step 7", "broken": "refused",
        "live": f"skipped: process {pid_of(live)} is training it", "refused": "refused", "last": "complete",
    }  # fmt: skip
    assert f"skipped: process {pid_of(live)} is training it" in out.split("run 5 of 6")[0]
    assert "broken/config.yaml:2: YAML syntax" in err


def test_a_run_with_a_broken_state_is_refused_and_not_left_out(
    a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    """Without an entry in the registry, nothing else knows of it."""
    broken = a_run("broken")
    for entry in Path("outputs/.incomplete").iterdir():
        entry.unlink()
    a_run("whole")
    broken.state_file.write_text("{")
    assert main(["resume", "--all"]) == 2
    out, err = capfd.readouterr()
    assert table(out) == {"broken": "refused", "whole": "complete"}
    assert "broken/training_state.json is broken" in err


@pytest.mark.parametrize(("wills", "code"), [(["0", "0"], 0), (["0", "2"], 2), (["2", "1", "0"], 1)])
def test_the_worst_of_all_is_the_exit_code(wills: list[str], code: int, a_run: Callable[..., RunDirectory]) -> None:
    for number, will in enumerate(wills):
        a_run(f"r{number}", will)
    assert main(["resume", "--all"]) == code
    assert len(calls()) == len(wills)


@pytest.mark.parametrize("will", ["signal", "75"])
def test_a_stop_ends_them_all(will: str, a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]) -> None:
    """Whether the signal came to forge resume, or to the training alone."""
    before = signal.getsignal(signal.SIGTERM)
    for name, what in {"one": "1", "two": will, "three": "0"}.items():
        a_run(name, what)
    assert main(["resume", "--all"]) == 75
    outcomes = table(capfd.readouterr().out)
    assert (outcomes["two"], outcomes["three"]) == ("stopped", "not started")
    assert len(calls()) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_incomplete_runs_there_is_nothing_to_do(
    a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "--all"]) == 0
    assert capfd.readouterr().out.startswith("no incomplete runs ")


def test_incomplete_runs_are_listed_with_what_a_resume_needs_to_know(
    a_run: Callable[..., RunDirectory], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run("idle")
    far = a_run("far", host="node-9")
    live = a_run("live", live=True)
    assert main(["runs", "--incomplete", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["attempts"], row["latest_checkpoint"], row["alive"]) for row in rows] == [
        (3, "checkpoint-5", False), (3, "checkpoint-5", None), (3, "checkpoint-5", True),
    ]  # fmt: skip
    assert (rows[1]["host"], rows[2]["pid"]) == ("node-9", pid_of(live))
    monkeypatch.setattr("shutil.which", lambda name: None)
    main(["runs", "--incomplete"])
    lines = capfd.readouterr().out.splitlines()
    assert "checkpoint-5" in lines[1]
    assert "none" in lines[1]
    assert f"{pid_of(far)} on node-9, " in lines[2]
    assert f"{pid_of(live)}, alive" in lines[3]
    assert lines[-1].endswith("-m forge.cli resume outputs/sft/far")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    main(["runs", "--incomplete"])
    assert capfd.readouterr().out.splitlines()[-1] == "resume one of them: forge resume outputs/sft/far"


@pytest.mark.parametrize("flag", [["--allow-change", "training.seed"], ["--take-over"]])
def test_a_new_run_takes_no_arguments_of_a_resume(
    flag: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *flag]) == 2
    expected = f"{flag[0]} can be given with --resume only"
    assert expected in capfd.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.usefixtures("warm_starts")
def test_a_run_of_one_rank_and_one_of_two_go_on_to_their_end(config_file: Path, tmp_path: Path) -> None:
    """The true command, with runs that were ended in the middle of training."""
    for ranks in (1, 2):
        settings = ["--config", str(config_file), "--max_steps", "400", "--run_name", f"of_{ranks}"]
        command, environment = training_command(settings, ranks)
        with subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as training:
            assert training.stderr is not None
            for line in training.stderr:
                if "step 5/400" in line:
                    training.send_signal(signal.SIGTERM)
            assert training.wait(60) != 0
    outputs = tmp_path / "outputs"
    again = ("-m", "forge.cli", "resume", "--all", "--output_root", outputs, "--max_steps", "60")
    done = python(*again, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert table(done.stdout) == {"of_1": "complete", "of_2": "complete"}
    for ranks in (1, 2):
        run = RunDirectory(outputs / "tiny" / f"of_{ranks}")
        assert [attempt["ranks"] for attempt in read_json(run.metadata_file)["attempts"]] == [ranks, ranks]
        assert TrainingState.load(run.state_file).step == 60
        assert (run.final / "model.safetensors").exists()


def calls() -> list[list[str]]:
    """The arguments of each training that was started."""
    file = Path("calls.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(out: str) -> dict[str, str]:
    """The last table of `resume --all`: each run's name, and what came of it."""
    lines = out.splitlines()
    head = max(number for number, line in enumerate(lines) if line.split() == ["run", "outcome"])
    rows = [line.strip().split("  ", 1) for line in lines[head + 1 :]]
    return {Path(path.strip()).name: outcome.strip() for path, outcome in rows}


def pid_of(run: RunDirectory) -> int:
    state = TrainingState.load(run.state_file)
    return int(json.loads((run.path.parents[1] / ".incomplete" / f"{state.run_id}.json").read_text())["pid"])
