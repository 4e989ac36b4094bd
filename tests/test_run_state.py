"""training_state.json: what is saved is what is loaded, and a bad file is named."""

import json
from pathlib import Path

import pytest

from forge.errors import UsageError
from forge.run.directory import valid_run_name
from forge.run.state import BestEvaluation, Stage, TrainingState, new_run_id


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = TrainingState(
        run_id="abc",
        stage=Stage.TRAINING,
        step=500,
        total_steps=2000,
        epoch=0.75,
        latest_checkpoint="checkpoint-500",
        best_metric=BestEvaluation(name="matched/accuracy", value=0.81, step=400),
        attempts=2,
        preemptions=1,
        error="the disk is full",
    )
    state.save(tmp_path / "training_state.json")
    loaded = TrainingState.load(tmp_path / "training_state.json")
    assert loaded == state
    assert loaded.stage is Stage.TRAINING


def test_the_file_is_plain_for_other_readers(tmp_path: Path) -> None:
    values = json.loads(saved(tmp_path).read_text())
    assert list(values) == [
        *("run_id", "stage", "pipeline_complete", "step", "total_steps", "epoch", "samples", "tokens", "step_sizes"),
        *("evaluated_step", "latest_checkpoint", "best_metric", "kept_best", "attempts", "preemptions", "error"),
        *("created_at", "updated_at"),
    ]
    assert values["stage"] == "setup"
    assert values["pipeline_complete"] is False
    assert values["updated_at"].endswith("+00:00")


def test_saving_sets_the_time_of_the_update_only(tmp_path: Path) -> None:
    state = TrainingState(run_id="abc", created_at="2020-01-01T00:00:00+00:00", updated_at="2020-01-01T00:00:00+00:00")
    state.save(tmp_path / "training_state.json")
    assert state.created_at == "2020-01-01T00:00:00+00:00"
    assert state.updated_at > "2020-01-02"


def test_a_stage_is_reached_by_itself_and_by_all_that_follow() -> None:
    assert {stage: TrainingState(run_id="abc", stage=stage).reached(Stage.EXPORT) for stage in Stage} == {
        Stage.SETUP: False,
        Stage.BASELINE_EVALUATION: False,
        Stage.TRAINING: False,
        Stage.EXPORT: True,
        Stage.FINAL_EVALUATION: True,
        Stage.COMPLETE: True,
    }


def test_run_ids_differ_and_can_name_a_file() -> None:
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(valid_run_name(run_id) for run_id in ids)


def test_an_older_file_without_a_newer_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "training_state.json"
    path.write_text('{"run_id": "abc", "stage": "training", "epoch": 3}')
    state = TrainingState.load(path)
    assert (state.stage, state.epoch, state.preemptions) == (Stage.TRAINING, 3.0, 0)
    assert type(state.epoch) is float


def test_the_best_metric_of_an_older_file_has_the_name_of_today(tmp_path: Path) -> None:
    path = saved(tmp_path, best_metric={"name": "matched/loss", "value": 0.5, "step": 4})
    assert TrainingState.load(path).best_metric == BestEvaluation(name="matched/ce", value=0.5, step=4)


def test_a_file_of_a_newer_forge_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, colour="red")
    with pytest.raises(UsageError, match=r"newer forge.*colour") as refusal:
        TrainingState.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"stage": "resting"}, "stage is 'resting': .*'setup', 'baseline_evaluation'"),
        ({"stage": None}, "stage is None"),
        ({"step": "7"}, "step is '7': .*integer"),
        ({"step": True}, "step is True: .*integer"),
        ({"epoch": None}, "epoch is None: .*number"),
        ({"pipeline_complete": 1}, "pipeline_complete is 1: .*boolean"),
        ({"best_metric": [1]}, r"best_metric is \[1\]"),
        ({"best_metric": {"name": "matched/accuracy", "value": 0.8}}, "best_metric.step is missing"),
        ({"step_sizes": [[0, "32"]]}, r"step_sizes\.0\.1 is '32'"),
        ({"latest_checkpoint": 500}, "latest_checkpoint is 500: .*string"),
        ({"run_id": "../x"}, r"run_id is '\.\./x'"),
        ({"run_id": "a" * 300}, "run_id is "),
        ({"pipeline_complete": True, "stage": "training"}, "pipeline_complete is true, but stage is training"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, changes: dict[str, object], what: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(UsageError, match=what) as refusal:
        TrainingState.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("text", ["", '{"run_id": "a', "[]", "\xff", "{}", '{"run_id": "abc"}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "training_state.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match="is broken") as refusal:
        TrainingState.load(path)
    assert str(path) in str(refusal.value)


def test_the_control_stage_of_an_earlier_forge_is_complete(tmp_path: Path) -> None:
    assert TrainingState.load(saved(tmp_path, stage="control")).stage is Stage.COMPLETE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training_state.json cannot be read \(No such file"):
        TrainingState.load(tmp_path / "training_state.json")


def saved(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "training_state.json"
    TrainingState(run_id="abc").save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path
