"""A run that is resumed with another config: what is refused, what is taken, and what later attempts know of it."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from conftest import REPOSITORY, forge

from forge.run.files import read_json


def test_changes_are_judged_recorded_and_hold_for_later_attempts(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "tiny" / "r"
    new = ("--config", config_file, "--max_steps", "400", "--run_name", "r")
    assert ended_at("step 5/400", signal.SIGTERM, *new) == 75
    written = (run / "config.yaml").read_text()

    refused = forge("--resume", run, "--set", "training.learning_rate=1e-3")
    assert refused.returncode == 2
    assert "training.learning_rate: 0.003 -> 0.001 changes the meaning of the run" in refused.stderr
    assert "--allow-change training.learning_rate" in refused.stderr
    assert (run / "config.yaml").read_text() == written

    # An attempt that may, and is killed before any checkpoint has the new rate.
    allowed = ("--resume", run, "--set", "training.learning_rate=1e-3", "--allow-change", "training.learning_rate")
    assert ended_at("stage: training", signal.SIGKILL, *allowed, "--max_steps", "60") == -signal.SIGKILL
    rest = forge("--resume", run)
    assert rest.returncode == 0, rest.stderr
    assert "training.learning_rate: 0.003 -> 0.001 (allowed in an earlier attempt" in rest.stderr
    assert "training.max_steps: 400 -> 60 (" in rest.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["training"]["learning_rate"], config["training"]["max_steps"]) == (1e-3, 60)
    attempts = read_json(run / "run_metadata.json")["attempts"]
    rate = {"training.learning_rate": "0.001"}
    assert [attempt["allowed"] for attempt in attempts] == [{}, rate, rate]


def test_other_rows_and_another_precision_are_refused(config_file: Path, data_folder: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "outputs" / "tiny" / "r"
    shutil.copytree(data_folder, data)
    new = ("--config", config_file, "--set", f"task.dataset.path={data}", "--run_name", "r", "--max_steps", "400")
    assert ended_at("step 5/400", signal.SIGTERM, *new) == 75
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]))

    refused = forge("--resume", run, "--set", "training.mixed_precision=bf16")
    assert refused.returncode == 2
    assert "training.mixed_precision: no -> bf16 changes the meaning of the run" in refused.stderr
    refused = forge("--resume", run)
    assert refused.returncode == 2
    assert f"the rows of {data}, or their tokens, are not those of the run so far" in refused.stderr
    assert "by --allow-change task.dataset" in refused.stderr
    taken = forge("--resume", run, "--allow-change", "task.dataset", "--max_steps", "30")
    assert taken.returncode == 0, taken.stderr


def test_a_step_of_another_size_is_refused_and_goes_on_where_it_is_allowed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "tiny" / "r"
    new = ("--config", config_file, "--run_name", "r", "--set", "training.batch_size=5", "--max_steps", "400")
    assert ended_at("step 7/400", signal.SIGTERM, *new) == 75
    refused = forge("--resume", run, "--set", "training.batch_size=12")
    assert refused.returncode == 2
    assert "training.batch_size: 5 rows per step -> 12 rows per step changes the meaning" in refused.stderr
    assert "`--set training.batch_size=5`" in refused.stderr

    step = read_json(run / "training_state.json")["step"]
    samples = read_json(run / f"checkpoint-{step}" / "manifest.json")["samples"]
    flags = ("--set", "training.batch_size=12", "--allow-change", "training.batch_size", "--max_steps", str(step + 1))
    taken = forge("--resume", run, *flags)
    assert taken.returncode == 0, taken.stderr
    manifest = read_json(run / f"checkpoint-{step + 1}" / "manifest.json")
    left = 48 - samples % 48
    assert manifest["samples"] - samples == min(12, left)
    assert read_json(run / "training_state.json")["step_sizes"] == [[0, 5], [step, 12]]


@pytest.mark.multiprocess
def test_forge_resume_brings_back_the_exit_code_of_two_ranks(config_file: Path, tmp_path: Path) -> None:
    """The same rows a step on two ranks as on one: nothing has to be allowed."""
    run = tmp_path / "outputs" / "tiny" / "r"
    assert (
        ended_at("step 5/400", signal.SIGTERM, "--config", config_file, "--max_steps", "400", "--run_name", "r") == 75
    )
    command = ("resume", run, "--processes", "2")
    assert ended_at("step 12/400", signal.SIGUSR1, *command, entry=("-m", "forge.cli")) == 75
    attempts = read_json(run / "run_metadata.json")["attempts"]
    assert [(attempt["ranks"], attempt["changes"]) for attempt in attempts] == [(1, []), (2, [])]


def ended_at(words: str, number: int, *arguments: object, entry: tuple[str, ...] = ("forge.py",)) -> int:
    """The exit code of a command that gets a signal as soon as its log says these words."""
    command = [sys.executable, *entry, *map(str, arguments)]
    with (
        warm.starts(),
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if words in line and number:
                process.send_signal(number)
                number = 0
        assert number == 0, said
        return process.wait(120)
