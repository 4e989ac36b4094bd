"""What Weights & Biases gets, read from its own file: exit code, name, config, summary, and each step once."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import forge
from forge.attempt.callbacks.wandb_file import items_of, logged_steps, records
from forge.errors import EXIT_STOPPED, Stopped, TrainingError
from forge.trainer.loop import LoopTrainer

SETTINGS = (
    "tracking.wandb={project: p, mode: offline, tags: [a]}",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=2",
)


def exits(run: Path) -> list[int]:
    """The exit code of each attempt, the oldest first."""
    return [record.exit.exit_code for file in files(run) for record in records(file) if record.HasField("exit")]


def files(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def history(run: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for file in files(run) for record in records(file) if record.HasField("history")]
    return [{name: json.loads(value) for name, value in items_of(row).items()} for row in rows]


def summary(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(file):
        if record.HasField("summary"):
            found |= {name: json.loads(value) for name, value in items_of(record.summary.update).items()}
    return found


def steps_of(kind: str, run: Path) -> Counter[int]:
    return Counter(row["step"] for row in history(run) if any(name.startswith(f"{kind}/") for name in row))


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has `work` called after a training step, for the rest of the test: at_step(3, work)."""
    plain = LoopTrainer.train_step

    def arm(step: int, work: Any) -> None:
        def train_step(self: LoopTrainer, *arguments: Any) -> None:
            plain(self, *arguments)
            if self.state.step + 1 == step:
                work()

        monkeypatch.setattr(LoopTrainer, "train_step", train_step)

    return arm


def fail() -> None:
    raise TrainingError("the disk is full")


def test_a_complete_run_is_finished_with_its_numbers(config_file: Path, tmp_path: Path) -> None:
    run = forge.train(config_file, [*SETTINGS, "training.max_steps=4"], run_name="r", output_root=tmp_path / "runs")
    assert exits(run.path) == [0]
    (file,) = files(run.path)
    assert f"wandb sync {file.parent}`" in (run.path / "output.log").read_text()
    (started,) = [record.run for record in records(file) if record.HasField("run")][:1]
    assert (started.display_name, started.run_id, started.project) == ("r", run.state.run_id, "p")
    config = items_of(started.config.update)
    assert json.loads(config["training"])["max_steps"] == 4
    assert json.loads(config["run_metadata"])["run_id"] == run.state.run_id
    assert steps_of("train", run.path) == Counter([1, 2, 3, 4])
    assert steps_of("eval", run.path) == Counter([0, 2, 4])  # one curve: untrained, in training, at the end
    assert all("epoch" in row for row in history(run.path) if "step" in row)
    final = run.evaluation("final")["matched/accuracy"]
    assert summary(file)["eval/matched/accuracy"] == final
    assert summary(file)["peak/matched/accuracy"] >= final


def test_a_resumed_run_has_each_step_once_and_the_summary_of_all(
    config_file: Path, tmp_path: Path, at_step: Any
) -> None:
    """It failed at step 5 with a checkpoint of step 4 that is lost: steps 3 and 4 are taken again."""
    settings = [*SETTINGS, "training.max_steps=6"]
    at_step(5, fail)
    with pytest.raises(TrainingError):
        forge.train(config_file, settings, run_name="r", output_root=tmp_path)
    path = forge.load_run("r", output_root=tmp_path).path
    assert exits(path) == [1]
    os.rename(path / "checkpoint-4", tmp_path / "lost")
    at_step(99, fail)
    run = forge.resume(path)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert exits(path) == [1, 0]
    assert steps_of("train", path) == Counter([1, 2, 3, 4, 5, 6])
    assert steps_of("eval", path) == Counter([0, 2, 4, 6])
    assert steps_of("checkpoint", path) == Counter([2, 4, 6])
    last = summary(files(path)[-1])
    assert last["train/loss"] == run.metrics[-2]["loss"]
    assert last["eval/matched/accuracy"] == run.evaluation()["matched/accuracy"]


def test_a_stopped_run_is_preempted_and_not_failed(config_file: Path, tmp_path: Path, at_step: Any) -> None:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        forge.train(config_file, [*SETTINGS, "training.max_steps=50"], run_name="r", output_root=tmp_path)
    path = forge.load_run("r", output_root=tmp_path).path
    assert exits(path) == [EXIT_STOPPED]
    (file,) = files(path)
    assert any(record.HasField("preempting") for record in records(file))


def test_what_a_kill_has_torn_is_left_out(config_file: Path, tmp_path: Path) -> None:
    run = forge.train(config_file, [*SETTINGS, "training.max_steps=2"], run_name="r", output_root=tmp_path)
    (file,) = files(run.path)
    whole = list(records(file))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert 0 < len(list(records(file))) < len(whole)
    assert logged_steps(run.path / "wandb") <= {("train", 1), ("train", 2), ("eval", 0), ("eval", 2), ("checkpoint", 2)}
    file.write_bytes(b"")
    assert logged_steps(run.path / "wandb") == set()
