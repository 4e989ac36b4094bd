"""Under every plan of DeepSpeed a training takes the steps of one process with the same batch, and goes on anywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, forge, forge_on_two_ranks, python, trainer_of
from conversations import config_on, conversation
from teachers import write_chat_teacher, write_classifier
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from forge.config.loader import load_config
from forge.config.plans import read_plan
from forge.run.files import read_json, read_json_lines, write_json

pytestmark = pytest.mark.multiprocess
STEPS = ("training.max_steps=2", "training.per_device_batch_size=2", "evaluation.baseline=false")  # 2 micro-batches


def bare(folder: Path, name: str) -> Path:
    """A plan of stage 3 that keeps no weight whole, and fetches none ahead: the models of tests are so small that the
    shipped ones would never let go of any."""
    plan = read_plan(name).values
    plan["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    plan["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    file = folder / f"bare_{name}.json"
    file.write_text(json.dumps(plan))
    return file


def seen_by_both(file: Path, scenarios: list[list[str]], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank has seen of each scenario."""
    script = REPOSITORY / "tests" / "sharded_trajectories.py"
    done = forge_on_two_ranks(file, json.dumps(scenarios), folder, script=script, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def alone(file: Path, settings: list[str], folder: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """The reports and the final weights of one process without a plan."""
    trainer = trainer_of(load_config(file, settings).config, folder)
    trainer.train()
    weights = [x for p in trainer.training.named.trained.values() for x in p.flatten().tolist()]
    return trainer.attempt.callbacks.reports, weights


def weights_at_start(file: Path, settings: list[str], folder: Path) -> list[float]:
    trainer = trainer_of(load_config(file, settings).config, folder)
    return [x for p in trainer.training.named.trained.values() for x in p.flatten().tolist()]


def assert_same(seen: dict[str, Any], wanted: tuple[list[dict[str, Any]], list[float]], rel: float) -> None:
    reports, weights = wanted
    for name in ("loss", "grad_norm") if seen["reports"] else ():  # rank 0's
        assert [r[name] for r in seen["reports"]] == pytest.approx([r[name] for r in reports], rel=rel)
    assert seen["weights"] == pytest.approx(weights, abs=rel)


def test_a_classifier_takes_the_steps_of_one_process(config_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    teacher = write_classifier(tmp_path / "teacher", tiny_model)
    kd = [*STEPS, f"teacher.path={teacher}", "distillation.alpha=0.6"]
    plans = [f"deepspeed.student=zero{stage}" for stage in (1, 2, 3)]
    scenarios = [[*STEPS, plan] for plan in plans] + [[*kd, plan] for plan in plans]
    scenarios += [[*kd, plans[1], "teacher.placement=zero3"], [*kd, plans[2], "teacher.placement=zero3"]]
    # A rate so small that a step leaves what the optimizer took over as it was, to float32's precision.
    still = [*STEPS, "training.max_steps=1", "training.learning_rate=1e-12", "training.mixed_precision=bf16"]
    scenarios += [[*still, plan] for plan in plans]
    found = seen_by_both(config_file, scenarios, tmp_path / "seen")
    sft, distilled = alone(config_file, [*STEPS], tmp_path / "sft"), alone(config_file, kd, tmp_path / "kd")
    assert [len(seen["reports"]) for seen in found[0]] == [2] * 8 + [1] * 3
    start = weights_at_start(config_file, [*STEPS], tmp_path / "start")
    for rank in range(2):
        for number, seen in enumerate(found[rank][:8]):
            assert_same(seen, sft if number < 3 else distilled, 1e-5)
        for seen in found[rank][8:]:  # the optimizer's float32 weights are those of the model, never rounded to bf16
            assert seen["weights"] == pytest.approx(start, abs=1e-8)
    for number in (6, 7):  # each rank holds half of the teacher
        whole = found[0][3]["held"]
        assert sum(found[rank][number]["held"] for rank in range(2)) == pytest.approx(whole, rel=0.01)
        assert found[0][number]["held"] == found[1][number]["held"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_takes_them_too(chat_model: Path, tmp_path: Path, tied: bool) -> None:
    student = chat_model
    if tied:
        student = write_tied(tmp_path / "tied", chat_model)
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    rows = [conversation(i, turns=1 + i % 3) for i in range(24)]
    config_on(tmp_path, student, rows, rows[:5])
    file = tmp_path / "c.yaml"
    same = [*STEPS, "training.adam_epsilon=1e-3"]
    kd = [*same, f"teacher.path={teacher}", "distillation.alpha=0.6"]
    zero3 = f"deepspeed.student={bare(tmp_path, 'zero3')}"
    sharded = ["teacher.placement=zero3", f"deepspeed.teacher={bare(tmp_path, 'teacher_zero3')}"]
    scenarios = [
        [*same, zero3],
        [*kd, "deepspeed.student=zero2", *sharded],
        [*kd, zero3],
        [*kd, zero3, *sharded],
        *([*kd, f"deepspeed.student=zero{stage}", "training.mixed_precision=bf16"] for stage in (1, 2, 3)),
    ]
    if tied:  # the stages 1 and 2 leave the weights whole, and the tie as it is
        del scenarios[4:6], scenarios[1]
    found = seen_by_both(file, scenarios, tmp_path / "seen")
    sft, distilled = alone(file, same, tmp_path / "sft"), alone(file, kd, tmp_path / "kd")
    assert [len(seen["reports"]) for seen in found[0]] == [2] * len(scenarios)
    for rank in range(2):
        for settings, seen in zip(scenarios, found[rank], strict=True):
            in_bf16 = "training.mixed_precision=bf16" in settings
            assert_same(seen, distilled if "distillation.alpha=0.6" in settings else sft, 2e-2 if in_bf16 else 2e-5)
            # The loss reads the head's weight outside the head's own forward.
            assert seen["gathered"] == (1 if {zero3, "deepspeed.student=zero3"} & set(settings) else 0)


def write_tied(folder: Path, chat_model: Path) -> Path:
    """The chat model with one matrix for embeddings and head."""
    shutil.copytree(chat_model, folder)
    config = LlamaConfig.from_pretrained(chat_model, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(run / "metrics.jsonl") if "learning_rate" in row]


def test_a_run_goes_on_under_other_plans_and_on_other_ranks(config_file: Path, tmp_path: Path) -> None:
    """Two ranks with ZeRO-2, two with ZeRO-3, one without a plan, one with ZeRO-1: one curve, and one final model."""
    same = ["training.schedule=constant", "training.warmup_steps=0", "evaluation.baseline=false"]
    settings = [word for setting in same for word in ("--set", setting)]
    started = forge_on_two_ranks(
        *("--config", config_file, "--run_name", "moving", *settings, "--max_steps", 2),
        *("--set", "deepspeed.student=zero2"),
    )
    assert started.returncode == 0, started.stderr
    run = tmp_path / "outputs" / "tiny" / "moving"
    assert {file.name for file in (run / "checkpoint-2").glob("*.safetensors")} == {
        f"{what}-0000{rank}.safetensors" for what in ("model", "optimizer") for rank in range(2)
    }
    steps = [
        (forge_on_two_ranks, 4, "zero3", "model-00001.safetensors"),
        (forge, 5, "null", "optimizer.pt"),
        (forge, 6, "zero1", "model-00000.safetensors"),
    ]
    for command, step, plan, file in steps:
        state = read_json(run / "training_state.json")  # as of a run that was to be longer, and was stopped
        write_json(run / "training_state.json", state | {"pipeline_complete": False, "stage": "training"})
        done = command("--resume", run, "--max_steps", step, "--set", f"deepspeed.student={plan}")
        assert done.returncode == 0, done.stderr
        assert (run / f"checkpoint-{step}" / file).is_file()
    unbroken = trainer_of(load_config(config_file, same).config, tmp_path / "unbroken")
    unbroken.train()
    assert losses(run) == pytest.approx([report["loss"] for report in unbroken.attempt.callbacks.reports], rel=1e-5)
    final = AutoModelForSequenceClassification.from_pretrained(run / "final").state_dict()
    for name, tensor in unbroken.model.state_dict().items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-5)


def test_a_layer_of_the_teacher_is_whole_for_its_forward_alone(chat_model: Path, tmp_path: Path) -> None:
    """Beside its half each rank holds one layer at a time."""
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    rows = [conversation(i, turns=1 + i % 3) for i in range(24)]
    config_on(tmp_path, chat_model, rows, rows[:5])
    settings = [*STEPS, f"teacher.path={teacher}", "distillation.alpha=0.6", "deepspeed.student=zero2"]
    settings += ["teacher.placement=zero3", f"deepspeed.teacher={bare(tmp_path, 'teacher_zero3')}"]
    (seen,), _ = seen_by_both(tmp_path / "c.yaml", [settings], tmp_path / "seen")
    model = LlamaForCausalLM.from_pretrained(teacher)
    largest = max(sum(p.numel() for p in layer.parameters(recurse=False)) for layer in model.modules())
    whole = sum(p.numel() for p in model.parameters())
    assert seen["held"] == pytest.approx(whole * 4 / 2, rel=0.01)
    assert seen["live"] <= largest < whole / 3


@pytest.mark.parametrize("plan", ["zero2", "zero3"])  # stage 1 saves the same shards as stage 2
def test_a_run_that_was_killed_in_a_save_ends_with_the_bits_of_the_unbroken_one(
    config_file: Path, tmp_path: Path, plan: str
) -> None:
    settings = ("--set", f"deepspeed.student={plan}", "--set", "model.dropout=0.1", "--set", "checkpoint.every_steps=2")
    proof = python(
        *("-m", "forge.cli", "prove-resume", config_file, "--processes", 2, "--kills", 1, *settings),
        ACCELERATE_USE_CPU="true",
    )
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert "identical: every bit is the unbroken run's after 1 kill on 2 processes" in proof.stdout + proof.stderr
