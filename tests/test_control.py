"""A distilled run trains its control beside it, whatever ends an attempt, and shows what the teacher was worth."""

import io
import logging
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, forge, forge_on_two_ranks, python
from recorded_runs import metadata_of, write_run
from rich.console import Console
from teachers import write_classifier

from forge import pipeline
from forge.attempt.callbacks.peak import PeakMetrics, peaks
from forge.attempt.control import (
    check_control,
    check_free_for_control,
    control_config,
    control_of,
    is_half_made,
    next_control,
    nothing_left,
    place_of,
    wants_control,
)
from forge.attempt.outcome import record_control
from forge.attempt.request import Request
from forge.cluster.signals import StopRequest
from forge.config.explain import difference, effective
from forge.config.loader import load_config
from forge.config.schema import Config
from forge.errors import UsageError
from forge.report.comparison import compare_runs
from forge.report.figures import gap_closed
from forge.run.directory import RunDirectory
from forge.run.files import append_json_line, read_json, read_json_lines
from forge.run.metadata import RunMetadata, read_metadata
from forge.run.records import record_of
from forge.run.state import Stage, TrainingState
from forge.trainer.build import build_trainer

CONTROLLED = ("--set", "distillation.alpha=0.7", "--set", "evaluation.control=sft")

# An entry that ends its own process: in the control while it is created (open), before its step 5 (step), or once it is
# complete and its run is about to take its metrics (end).
FAULT = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import forge.attempt.opening as opening
import forge.attempt.outcome as outcome
from forge.trainer.loop import LoopTrainer

where, number = {where!r}, signal.{signal}
write_config, train_step, record_control = opening._write_config, LoopTrainer.train_step, outcome.record_control

def ended(run, here):
    if where == here and run.name.endswith("-sft"):
        os.kill(os.getpid(), number)

def creating(loaded, run, guard):
    write_config(loaded, run, guard)
    ended(run, "open")

def stepping(self, *args):
    if self.state.step == 4:
        ended(self.attempt.run, "step")
    train_step(self, *args)

def recording(run, control):
    ended(control, "end")
    return record_control(run, control)

opening._write_config, LoopTrainer.train_step, outcome.record_control = creating, stepping, recording
from forge.train import main
sys.exit(main())
"""


def write_config(folder: Path, model: Path, data: Path, teacher: Path) -> Path:
    """Six steps of eight rows, with dropout."""
    file = folder / "tiny.yaml"
    file.write_text(f"""
task:
  type: classification
  dataset: {{path: {data}}}
  columns: {{text: premise, text_pair: hypothesis}}
  labels: [entailment, neutral, contradiction]
  max_length: 32
model: {{path: {model}, dropout: 0.1}}
teacher: {{path: {teacher}}}
training: {{epochs: 1, batch_size: 8, learning_rate: 1e-3, mixed_precision: no}}
logging: {{every_steps: 2}}
evaluation: {{every_steps: 2}}
checkpoint: {{every_steps: 3}}
output_root: {folder / "outputs"}
""")
    return file


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_folder: Path) -> tuple[Path, Path, str]:
    """The config's file, the folder with the runs plain (fine-tuned), kd and kd-sft, and what kd printed."""
    folder = tmp_path_factory.mktemp("controlled")
    teacher = write_classifier(folder / "teacher", tiny_model)
    config = write_config(folder, tiny_model, data_folder, teacher)
    printed = ""
    for name, settings in {"plain": (), "kd": CONTROLLED}.items():
        done = forge("--config", config, "--run_name", name, *settings, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return config, folder / "outputs" / "tiny", printed


def evaluation(run: Path, stage: str) -> dict[str, Any]:
    (row,) = [row for row in read_json_lines(run / "metrics.jsonl") if row.get("stage") == stage]
    return {name: value for name, value in row.items() if not name.endswith("/seconds")}


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_the_control_is_the_plain_run_to_the_last_bit(outputs: tuple[Path, Path, str]) -> None:
    _, runs, _ = outputs
    assert weights(runs / "kd-sft") == weights(runs / "plain")
    assert weights(runs / "kd") != weights(runs / "plain")
    state = read_json(runs / "kd-sft" / "training_state.json")
    assert (state["pipeline_complete"], state["step"], state["attempts"]) == (True, 6, 1)
    alone, beside = evaluation(runs / "plain", "final"), evaluation(runs / "kd-sft", "final")
    assert {name: beside[name] for name in alone} == {  # beside a teacher the cross-entropy is rounded elsewhere
        name: pytest.approx(value, rel=1e-5) if name.endswith("/ce") else value for name, value in alone.items()
    }
    assert {name for name in beside if name not in alone} == {
        f"{split}/{metric}" for split in ("matched", "other") for metric in ("agreement", "kl")
    }
    assert read_json(runs / "kd" / "run_metadata.json")["control"] == {"run_id": state["run_id"], "name": "kd-sft"}
    owner = read_json(runs / "kd" / "training_state.json")["run_id"]
    assert read_json(runs / "kd-sft" / "run_metadata.json")["control_of"] == {"run_id": owner, "name": "kd"}
    assert list((runs.parent / ".incomplete").iterdir()) == []


def test_the_teachers_numbers_are_its_own_and_computed_once(outputs: tuple[Path, Path, str]) -> None:
    _, runs, _ = outputs
    own = evaluation(runs / "kd", "teacher")  # tests/test_teacher_metrics.py has them from the model itself
    assert own["matched/ce"] != evaluation(runs / "kd", "baseline")["matched/ce"]
    assert evaluation(runs / "kd-sft", "teacher") == own
    assert " stored at 20" not in (runs / "kd" / "output.log").read_text()
    reused = f"{runs / 'kd'} stored at 20"
    assert reused in (runs / "kd-sft" / "output.log").read_text()
    assert len(list((runs.parent / ".teachers").iterdir())) == 1


def test_the_table_has_untrained_sft_kd_and_teacher(outputs: tuple[Path, Path, str]) -> None:
    _, runs, printed = outputs
    lines = [
        [cell.strip() for cell in line.strip("│┃").split("┃" if "┃" in line else "│")] for line in printed.splitlines()
    ]
    assert ["metric", "untrained", "SFT", "KD", "teacher", "gap closed"] in lines
    before, teacher = evaluation(runs / "kd", "baseline"), evaluation(runs / "kd", "teacher")
    after, sft = evaluation(runs / "kd", "final"), evaluation(runs / "kd-sft", "final")
    for metric in ("matched/ce", "matched/accuracy", "other/macro_f1", "matched/ece"):
        (row,) = [line for line in lines if line[0] == metric]
        assert row[1:5] == [f"{numbers[metric]:.4f}" for numbers in (before, sft, after, teacher)]
    (row,) = [line for line in lines if line[0] == "matched/kl"]
    assert row[1:] == [
        f"{before['matched/kl']:.4f}",
        f"{sft['matched/kl']:.4f}",
        f"{after['matched/kl']:.4f}",
        "-",
        "-",
    ]
    for metric in ("ce", "accuracy", "macro_f1"):
        share = gap_closed(metric, *(numbers[f"matched/{metric}"] for numbers in (sft, after, teacher)))
        (row,) = [line for line in lines if line[0] == f"matched/{metric}"]
        assert row[5] == ("-" if share is None else f"{100 * share:.0f} %")
    assert "gap closed: the share of the way from SFT to the teacher" in printed

    card = (runs / "kd" / "final" / "README.md").read_text()
    assert f"| matched/ce | {before['matched/ce']:.4f} | {sft['matched/ce']:.4f} |" in card
    sha256 = read_json(runs / "kd" / "run_metadata.json")["teacher"]["weights_sha256"]
    assert f"- Teacher: {runs.parents[1] / 'teacher'}, weights `{sha256[:12]}`, replicated\n" in card
    assert "; alpha 0.7, T 2, D forward_kl\n" in card
    plain = (runs / "plain" / "final" / "README.md").read_text()
    assert "| | before | after |" in plain
    assert "Teacher" not in plain


def test_each_log_has_its_own_runs_lines(outputs: tuple[Path, Path, str]) -> None:
    _, runs, _ = outputs
    main, control = ((runs / run / "output.log").read_text() for run in ("kd", "kd-sft"))
    for text in (main, control):
        assert text.count("step 6/6") == 1
        assert text.count("final evaluation, matched") == 1
    stages = [line.split("stage: ")[1] for line in main.splitlines() if "stage: " in line]
    assert stages == ["baseline evaluation", "training", "export", "final evaluation"]
    assert f"control run {runs / 'kd-sft'}: complete" in main.split("stage: final evaluation")[1]
    assert "┃ gap closed ┃" in main
    assert "gap closed" not in control
    assert main.splitlines()[-1].endswith("# train it further")
    for text in (main, control):
        assert text.count("best: matched/ce") == 1
    assert "best: " in main.split("final evaluation, other")[1].split("control run")[0]
    (line,) = [line for line in main.splitlines() if "step 4/6" in line]
    (row,) = [row for row in read_json_lines(runs / "kd" / "metrics.jsonl") if row["step"] == 4 and "ce" in row]
    assert f"loss {row['loss']:.4f} (ce {row['ce']:.4f}  divergence {row['divergence']:.4f})  rate" in line
    assert "(ce" not in control
    assert f"teacher: {runs.parents[1] / 'teacher'}, replicated, float32, " in main


def test_peaks_are_those_of_the_evaluations(outputs: tuple[Path, Path, str]) -> None:
    _, runs, _ = outputs
    found = read_json(runs / "kd" / "peak_metrics.json")
    rows = [row for row in read_json_lines(runs / "kd" / "metrics.jsonl") if row.get("stage") not in (None, "teacher")]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for metric, best in {"matched/kl": min, "other/ce": min, "matched/accuracy": max, "other/agreement": max}.items():
        assert found[metric]["value"] == best(row[metric] for row in rows[1:])  # not before training
        at = next(row for row in rows[1:] if row[metric] == found[metric]["value"])
        assert (found[metric]["step"], found[metric]["stage"]) == (at["step"], at["stage"])
    agreement = found["matched/agreement"]
    assert agreement["mean"] == pytest.approx(sum(row["matched/agreement"] for row in rows[1:]) / 3)
    assert agreement["evaluations"] == 3
    assert not [name for name in found if name.endswith(("/rows", "/seconds", "/neutral"))]
    told = f"matched/accuracy {found['matched/accuracy']['value']:.4f} at step {found['matched/accuracy']['step']}"
    assert told in (runs / "kd" / "output.log").read_text().split("best: ")[1].splitlines()[0]


def test_a_peak_goes_with_its_row() -> None:
    """A resumed run drops the rows of steps that it takes again."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "stage": "teacher", "a/accuracy": 0.99},
        {"step": 0, "stage": "baseline", "a/accuracy": 0.1, "a/cer": 0.9, "a/rows": 9, "a/perplexity": "nan"},
        {"step": 5, "loss": 0.1},
        {"step": 5, "stage": "training", "a/accuracy": 0.7, "a/cer": 0.4, "a/rows": 9},
        {"step": 9, "stage": "training", "a/accuracy": 0.7, "a/cer": 0.5, "a/rows": 9},
    ]
    assert peaks(rows) == {
        "a/accuracy": {"value": 0.7, "step": 5, "stage": "training"},
        "a/cer": {"value": 0.4, "step": 5, "stage": "training"},
    }
    assert peaks(rows[:3] + rows[4:])["a/cer"] == {"value": 0.5, "step": 9, "stage": "training"}
    assert peaks(rows[:1]) == {}


def test_the_mean_agreement_is_that_of_the_trained_student_each_step_once() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "stage": "baseline", "a/agreement": 0.9},
        {"step": 5, "stage": "training", "a/agreement": 0.4},
        {"step": 10, "stage": "training", "a/agreement": 0.6},
        {"step": 10, "stage": "final", "a/agreement": 0.6},
    ]
    best = {"value": 0.6, "step": 10, "stage": "training"}  # not the 0.9 of the untrained student
    assert peaks(rows)["a/agreement"] == {**best, "mean": pytest.approx(0.5), "evaluations": 2}
    assert peaks(rows[:1]) == {}


@pytest.mark.parametrize(("steps", "told"), [((0, 3, 5, 5), True), ((0, 5, 5), False), ((5, 5), False), ((), False)])
def test_the_best_numbers_are_told_where_there_are_several(
    steps: tuple[int, ...], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run without a control as well, and once its stages are done; the best of one evaluation is no news."""
    run = RunDirectory(tmp_path)
    callback = PeakMetrics(run, ["accuracy"])
    caplog.set_level(logging.INFO)
    for number, step in enumerate(steps):
        stage = "final" if number + 1 == len(steps) else "training" if step else "baseline"
        append_json_line(run.metrics_file, {"step": step, "stage": stage, "a/accuracy": 0.5 + step / 100})
    callback.finished(TrainingState(run_id="id"))
    assert "best" not in caplog.text
    callback.completing(TrainingState(run_id="id"))
    assert [record.message for record in caplog.records] == (["best: a/accuracy 0.5500 at step 5"] if told else [])


def test_a_run_and_its_control_are_twins_to_a_comparison(outputs: tuple[Path, Path, str]) -> None:
    """The run is trained for epochs, and its control for as many steps."""
    _, runs, _ = outputs
    found = compare_runs([RunDirectory(runs / name) for name in ("kd", "kd-sft")])
    assert [group.label for group in found.groups] == ["distillation.alpha 0.7", "distillation.alpha 0.0"]
    assert [line.groups for line in found.lines if line.kind == "gap closed"] == [(0, 1)]
    assert not [note for note in found.notes if "differs in more" in note]


class Log:
    """As much of a log as a run in this process asks for."""

    console = Console(file=io.StringIO())

    def adopt_library_loggers(self) -> None: ...

    def open(self, path: Path) -> None: ...


@pytest.fixture
def own_process_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_runs_models_are_gone_when_the_next_run_in_its_process_starts(
    tmp_path: Path, tiny_model: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, own_process_state: None
) -> None:
    kept: list[weakref.ref[Any]] = []
    gone: list[bool] = []

    def build(*args: Any) -> Any:
        gone.extend(ref() is None for ref in kept)
        trainer = build_trainer(*args)
        kept.extend(weakref.ref(part) for part in (trainer, trainer.model))
        return trainer

    monkeypatch.setattr(pipeline, "build_trainer", build)
    file = write_config(tmp_path, tiny_model, data_folder, write_classifier(tmp_path / "teacher", tiny_model))
    loaded = load_config(file, ["distillation.alpha=0.7", "training.max_steps=1", "evaluation.baseline=false"])
    for name in ("one", "two"):
        pipeline.run_pipeline(Request(loaded, [], name), Log(), StopRequest())  # type: ignore[arg-type]
    assert gone == [True, True]


def test_a_run_that_is_ended_in_its_control_resumes_there(outputs: tuple[Path, Path, str], tmp_path: Path) -> None:
    config, runs, _ = outputs
    run, control = runs / "killed", runs / "killed-sft"

    done = faulty(tmp_path, "open", "SIGKILL", "--config", config, "--run_name", "killed", *CONTROLLED)
    assert done.returncode == -9, done.stderr
    assert is_half_made(RunDirectory(control))
    assert read_json(run / "training_state.json")["pipeline_complete"]
    assert "Control" not in (run / "final" / "README.md").read_text()
    final = evaluation(run, "final")

    done = faulty(tmp_path, "step", "SIGTERM", "--resume", run)
    assert done.returncode == 75, done.stderr
    state = read_json(control / "training_state.json")
    assert (state["stage"], state["latest_checkpoint"]) == ("training", "checkpoint-5")
    assert state["error"] == "stopped by SIGTERM in training at step 5"
    assert f"{control}" in done.stderr.splitlines()[-1]

    done = faulty(tmp_path, "end", "SIGKILL", "--resume", run)
    assert done.returncode == -9, done.stderr
    assert "resuming from checkpoint-5" in (control / "output.log").read_text()
    assert read_json(control / "training_state.json")["pipeline_complete"]
    assert "control" not in read_json(run / "run_metadata.json")

    done = forge("--resume", run, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert f"the control run {control} is complete already" in done.stderr
    assert read_json(run / "run_metadata.json")["control"]["name"] == "killed-sft"
    assert "Control (alpha 0" in (run / "final" / "README.md").read_text()
    assert read_json(control / "training_state.json")["attempts"] == 2
    assert weights(control) == weights(runs / "plain")
    assert weights(run) == weights(runs / "kd")  # one has computed the teacher's metrics, the other has read them
    assert evaluation(run, "final") == final
    assert list((runs.parent / ".incomplete").iterdir()) == []

    done = forge("--resume", run, OMP_NUM_THREADS="1")
    assert (done.returncode, "┃" in done.stdout) == (0, False)
    assert f"{run} is complete" in done.stderr


def test_a_control_that_is_resumed_by_its_own_name_gives_its_run_its_metrics(
    outputs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    config, runs, _ = outputs
    done = faulty(tmp_path, "step", "SIGTERM", "--config", config, "--run_name", "named", *CONTROLLED)
    assert done.returncode == 75, done.stderr
    change = ("--set", "training.learning_rate=1", "--allow-change", "training.learning_rate")
    done = forge("--resume", runs / "named-sft", *change, OMP_NUM_THREADS="1")
    assert (done.returncode, "must stay its twin" in done.stderr) == (2, True)
    done = forge("--resume", runs / "named-sft", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert read_json(runs / "named" / "run_metadata.json")["control"]["name"] == "named-sft"
    assert "gap closed" in done.stdout
    assert (runs / "named" / "output.log").read_text().endswith(done.stdout[done.stdout.rindex("gap closed") :])


@pytest.mark.multiprocess
def test_two_ranks_train_both_runs(outputs: tuple[Path, Path, str], tiny_model: Path, data_folder: Path) -> None:
    config, runs, _ = outputs
    done = forge_on_two_ranks("--config", config, "--run_name", "two", *CONTROLLED)
    assert done.returncode == 0, done.stderr
    for name in ("two", "two-sft"):
        assert [attempt["ranks"] for attempt in read_json(runs / name / "run_metadata.json")["attempts"]] == [2]
    one, two = evaluation(runs / "kd", "teacher"), evaluation(runs / "two", "teacher")
    assert {name: value for name, value in two.items() if not name.endswith(("/ce", "/ece"))} == {
        name: value for name, value in one.items() if not name.endswith(("/ce", "/ece"))
    }


def test_debug_runs_every_stage_of_both(outputs: tuple[Path, Path, str]) -> None:
    config, runs, _ = outputs
    settings = ("--set", "distillation.alpha=1", "--set", "evaluation.control=sft")
    done = forge(
        *("--config", config, "--run_name", "quick", "--debug", *settings),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert {read_json(runs / name / "training_state.json")["step"] for name in ("quick", "quick-sft")} == {2}


def test_a_complete_control_serves_the_next_run_and_something_else_is_refused(
    outputs: tuple[Path, Path, str],
) -> None:
    config, runs, _ = outputs
    settings = [item for item in CONTROLLED if item != "--set"]
    again = RunDirectory(runs / "again")
    shutil.copytree(runs / "kd", again.path)
    shutil.copytree(runs / "kd-sft", runs / "again-sft")
    request = Request(load_config(config, settings), [], resumed=again)
    assert nothing_left(again)
    assert next_control(again, request) is None
    shutil.rmtree(runs / "again-sft")
    twin = next_control(again, request)
    assert twin is not None
    assert (twin.run_name, twin.resumed, twin.config.distillation.alpha) == ("again-sft", None, 0.0)
    assert twin.config.training.max_steps == 6

    shutil.copytree(runs / "kd-sft", runs / "other-sft")
    changed = load_config(config, [*settings, "training.seed=7"]).config
    with pytest.raises(UsageError) as raised:
        check_free_for_control(RunDirectory(runs / "other"), changed)
    assert "other-sft" in str(raised.value)
    assert "evaluation.control" in str(raised.value)
    assert "training.seed: 42 -> 7" in str(raised.value)
    done = forge(
        *("--config", config, "--run_name", "other", *CONTROLLED, "--set", "training.seed=7"), OMP_NUM_THREADS="1"
    )
    assert (done.returncode, (runs / "other").exists()) == (2, False)


def faulty(folder: Path, where: str, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    entry = folder / "entry.py"
    entry.write_text(FAULT.format(repository=str(REPOSITORY), where=where, signal=name))
    return python(entry, *arguments, OMP_NUM_THREADS="1")


# What is checked before training, on written runs.


@pytest.fixture
def wanted(tmp_path: Path) -> Config:
    """The config of a control of 100 steps."""
    run = write_run(
        tmp_path / "root" / "tiny" / "kd", settings={"distillation.alpha": 0.9, "evaluation.control": "sft"}
    )
    config = load_config(run.config_file).config
    assert wants_control(config)
    return control_config(config, 100)


def a_control(tmp_path: Path, settings: dict[str, Any] | None = None, **state: Any) -> RunDirectory:
    of_control = {"distillation.alpha": 0.0, "evaluation.teacher": True, **(settings or {})}
    return write_run(tmp_path / "root" / "tiny" / "kd-sft", settings=of_control, state=state)


def test_the_controls_config_differs_in_the_teachers_part_alone(tmp_path: Path) -> None:
    settings = {"distillation.alpha": 0.9, "evaluation.control": "sft", "export.push_to_hub": "me/student"}
    run = write_run(tmp_path / "kd", settings=settings | {"training.max_steps": None, "training.epochs": 2.0})
    config = load_config(run.config_file).config
    twin = control_config(config, 70)
    changed = {line.split(":")[0] for line in difference(config, twin)}
    assert changed >= {"distillation.alpha", "evaluation.teacher", "training.max_steps", "export.push_to_hub"}
    assert {key.split(".")[0] for key in changed} == {"distillation", "evaluation", "training", "export", "output_root"}
    assert not wants_control(twin)
    assert effective(twin)["distillation"] == {"alpha": 0.0}
    for without in ({"divergence": "uld"}, {}):
        evaluation = config.evaluation.model_copy(update={} if without else {"teacher": False})
        section = config.distillation.model_copy(update=without)
        unlike = config.model_copy(update={"distillation": section, "evaluation": evaluation})
        assert control_config(unlike, 70).evaluation.teacher is False
    assert (twin.training.max_steps, twin.export.push_to_hub, twin.evaluation.teacher) == (70, None, True)


def facts(fingerprint: str) -> RunMetadata:
    """The metadata of a run on those rows."""
    values = metadata_of(RunDirectory(Path("kd")))
    values["model"]["weights_sha256"] = None  # not known: no reason to refuse a control
    return record_of(RunMetadata, values | {"data": values["data"] | {"fingerprint": fingerprint}})


def test_a_free_name_and_a_matching_run_are_a_control(wanted: Config, tmp_path: Path) -> None:
    control = control_of(RunDirectory(tmp_path / "root" / "tiny" / "kd"))
    assert control.path == tmp_path / "root" / "tiny" / "kd-sft"
    assert check_control(control, wanted, steps=100) is None
    a_control(tmp_path)
    found = check_control(control, wanted, steps=100, facts=facts("963c2d6e6018"))
    assert found is not None
    assert (found.complete, found.allowed) == (True, [])


@pytest.mark.parametrize(
    ("settings", "state", "expected"),
    [
        ({"training.learning_rate": 1.0}, {}, "its config differs: training.learning_rate: 1.0 -> 5.0e-05"),
        ({"distillation.alpha": 0.5}, {}, "its config differs: distillation.alpha: 0.5 -> 0.0"),
        ({}, {"step": 60}, "it is complete at step 60, and this run takes 100"),
        (
            {},
            {"step": 101, "pipeline_complete": False, "stage": Stage.TRAINING},
            "it is at step 101, and this run takes 100",
        ),
    ],
)
def test_a_run_that_is_no_control_is_refused(
    settings: dict[str, Any], state: dict[str, Any], expected: str, wanted: Config, tmp_path: Path
) -> None:
    control = a_control(tmp_path, settings, **state)
    with pytest.raises(UsageError) as raised:
        check_control(control, wanted, steps=100)
    assert expected in str(raised.value)
    assert "set evaluation.control=null" in str(raised.value)


def test_a_control_on_other_rows_is_refused(wanted: Config, tmp_path: Path) -> None:
    control = a_control(tmp_path)
    with pytest.raises(UsageError, match="its rows, or their tokens, are 963c2d6e6018 instead of 0123"):
        check_control(control, wanted, steps=100, facts=facts("0123"))
    assert check_control(control, wanted, facts=facts("0123"), allowed=["task.dataset"]) is not None


def test_a_control_goes_on_with_what_was_allowed(wanted: Config, tmp_path: Path) -> None:
    control = a_control(
        tmp_path, {"training.learning_rate": 1.0}, step=5, pipeline_complete=False, stage=Stage.TRAINING
    )
    found = check_control(control, wanted, steps=100, allowed=["training.learning_rate", "distillation.temperature"])
    assert found is not None
    assert (found.complete, found.allowed) == (False, ["training.learning_rate"])


def test_a_strangers_folder_is_refused_and_a_half_made_one_is_none(wanted: Config, tmp_path: Path) -> None:
    control = RunDirectory(tmp_path / "root" / "tiny" / "kd-sft")
    control.path.mkdir()
    (control.path / "config.yaml").write_text("")
    assert check_control(control, wanted) is None
    (control.path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(UsageError, match=r"it holds no training_state\.json"):
        check_control(control, wanted)
    (control.path / "config.yaml").write_text("")
    (control.path / ".git").mkdir()
    with pytest.raises(UsageError, match=r"it holds no training_state\.json"):
        check_control(control, wanted)
    (control.path / ".git").rmdir()
    (control.path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"it holds no training_state\.json"):
        check_control(control, wanted)


def test_a_run_that_was_moved_has_its_control_beside_it(wanted: Config, tmp_path: Path) -> None:
    at_home = wanted.model_copy(update={"output_root": str(tmp_path / "root")})
    assert place_of(RunDirectory(tmp_path / "root" / "a" / "b" / "kd"), at_home) == (tmp_path / "root", Path("a/b"))
    assert place_of(RunDirectory(tmp_path / "away" / "kd"), at_home) == (tmp_path / "away", Path())


def test_a_control_whose_numbers_are_gone_is_not_recorded_without_them(tmp_path: Path) -> None:
    settings = {"distillation.alpha": 0.5, "evaluation.control": "sft"}
    run = write_run(tmp_path / "kd", {"validation/accuracy": 0.9}, settings=settings)
    control = write_run(tmp_path / "kd-sft", {"validation/accuracy": 0.8})
    control.metrics_file.unlink()
    with pytest.raises(UsageError, match=r"kd-sft/metrics.jsonl has no final evaluation of the control"):
        record_control(run, control)
    assert read_metadata(run).control is None
