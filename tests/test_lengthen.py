"""A complete run that is resumed with more steps is trained further; anything else asked of it is refused."""

import json
from pathlib import Path

import pytest

import forge
from forge.cli.main import main
from forge.errors import UsageError
from forge.run.files import read_json_lines


def trained(config: Path, root: Path, *settings: str) -> forge.Run:
    return forge.train(config, ["training.max_steps=3", *settings], run_name="r", output_root=root)


def reported(run: forge.Run) -> list[int]:
    return [row["step"] for row in read_json_lines(run.path / "metrics.jsonl") if "stage" not in row]


def test_more_steps_lengthen_a_complete_run_from_its_last_checkpoint(config_file: Path, tmp_path: Path) -> None:
    run = trained(config_file, tmp_path / "runs")
    before = (run.final / "model.safetensors").read_bytes()
    longer = forge.resume(run, {"training.max_steps": 5})
    assert (longer.complete, longer.state.step, longer.state.attempts) == (True, 5, 2)
    assert reported(longer) == [1, 2, 3, 4, 5]
    finals = [row["step"] for row in longer.metrics if row.get("stage") == "final"]
    assert finals == [5]  # the numbers of three steps are not those of the model that final/ holds now
    assert (longer.final / "model.safetensors").read_bytes() != before
    log = (run.path / "output.log").read_text()  # the head that is made new before is replaced by the checkpoint's
    assert log.rindex("resuming from checkpoint-3") < log.rindex("initialised at random")
    assert forge.resume(run).state.attempts == 2  # as long as was asked for: nothing is left
    assert forge.resume(run, {"training.max_steps": 5}).state.attempts == 2


def test_more_epochs_lengthen_it_too(config_file: Path, tmp_path: Path) -> None:
    run = forge.train(
        config_file,
        ["training.max_steps=null", "training.epochs=0.5"],
        run_name="r",
        output_root=tmp_path / "runs",
    )
    assert run.state.step == 3
    assert forge.resume(run, {"training.epochs": 1}).state.step == 6
    with pytest.raises(UsageError, match=r"is complete at step 6, so nothing else can be changed \(training.epochs"):
        forge.resume(run, {"training.epochs": 0.5})


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--max_steps", "2"], "is complete at step 3, so nothing else can be changed (training.max_steps: 3 -> 2)"),
        (["--set", "evaluation.max_rows=5"], "nothing else can be changed (evaluation.max_rows: null -> 5)"),
        (["--set", "training.seed=7", "--max_steps", "5"], "training.seed: 42 -> 7 changes the meaning of the run"),
    ],
)
def test_what_a_complete_run_cannot_do_is_refused_and_changes_nothing(
    asked: list[str], sentence: str, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(config_file, tmp_path / "runs")
    config = (run.path / "config.yaml").read_bytes()
    assert main(["train", "--resume", str(run.path), *asked]) == 2
    assert sentence in capfd.readouterr().err
    assert (run.path / "config.yaml").read_bytes() == config
    assert json.loads((run.path / "training_state.json").read_text())["pipeline_complete"] is True
    assert (run.path / "final").is_dir()


def test_a_complete_run_without_a_checkpoint_cannot_be_lengthened(config_file: Path, tmp_path: Path) -> None:
    run = trained(config_file, tmp_path / "runs", "checkpoint.every_steps=null")
    with pytest.raises(UsageError, match="is complete but has no checkpoint to continue from"):
        forge.resume(run, {"training.max_steps": 5})
    assert forge.load_run(run.path).complete
