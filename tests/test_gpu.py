"""On one CUDA device: what CPU tests cannot show of precision, random numbers, hidden waits and saves."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forge
from conversations import config_on, conversation
from teachers import write_chat_teacher, write_classifier
from test_checkpoints import stop_at
from test_trainer import trajectory
from transformers import LlamaConfig, LlamaForCausalLM

from forge.config.teacher_schema import DistillationConfig
from forge.errors import Stopped
from forge.losses.cross_entropy import IGNORE
from forge.model.head import LinearHead, find_head
from forge.run.files import read_json_lines
from forge.student.objective import Objective
from forge.student.student import Student
from forge.teacher.teacher import ModelTeacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
Build = Callable[..., Any]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_stopped_on_the_gpu_ends_with_the_bits_of_the_unbroken_one(precision: str, build_trainer: Build) -> None:
    """With dropout, drawn by the device, and with fp16's scaler, which left out steps before the stop."""
    settings = (f"training.mixed_precision={precision}", "model.dropout=0.1", "logging.every_steps=4")
    settings += ("training.max_steps=12", "training.deterministic=true")
    unbroken = build_trainer(*settings)
    assert unbroken.model.device.type == "cuda"
    losses, weights = trajectory(unbroken)

    stopped = build_trainer(*settings)
    stop_at(stopped, 7)
    with pytest.raises(Stopped):
        stopped.train()
    before = [report["loss"] for report in stopped.callbacks.reports]
    scale = None if stopped.accelerator.scaler is None else stopped.accelerator.scaler.get_scale()
    run = stopped.run

    resumed = build_trainer(*settings)
    resumed.restore(run.path / "checkpoint-7")
    if scale is not None:
        assert resumed.accelerator.scaler.get_scale() == scale
    more, resumed_weights = trajectory(resumed)
    assert before + more == losses
    assert resumed_weights == weights


def test_bf16_on_the_gpu_learns_what_can_be_learned(build_trainer: Build) -> None:
    trainer = build_trainer("training.max_steps=150", "training.mixed_precision=auto")
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    assert trainer.evaluate("final")["matched/accuracy"] == 1.0


@pytest.mark.parametrize("distilled", [False, True])
def test_a_step_waits_nowhere_for_the_gpu(
    build_trainer: Build, tiny_model: Path, tmp_path: Path, distilled: bool
) -> None:
    settings = ["training.mixed_precision=bf16", "training.per_device_batch_size=4"]
    if distilled:  # by a teacher whose labels are in another order
        settings += [f"teacher.path={write_classifier(tmp_path / 'teacher', tiny_model)}", "distillation.alpha=0.5"]
    trainer = build_trainer(*settings)
    trainer.batches.start_at(0)
    trainer.train_step(trainer.batches.next_step(), 1e-3)  # the first one allocates
    step = trainer.batches.next_step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step(step, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = {f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)}
    # Not ours: transformers asks of each batch whether its mask masks anything at all.
    assert not [place for place in places if "masking_utils" not in place], places


def test_an_asynchronous_save_holds_what_the_synchronous_one_does(build_trainer: Build) -> None:
    from safetensors.torch import load_file

    settings = ("checkpoint.every_steps=3", "training.deterministic=true", "model.dropout=0.1")
    saved = []
    for asynchronous in ("false", "true"):
        trainer = build_trainer(*settings, f"checkpoint.asynchronous={asynchronous}")
        trainer.train()
        saved.append(trainer.attempt.run.path / "checkpoint-3")
    plain, other = (load_file(folder / "model.safetensors") for folder in saved)
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    moments = [torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"] for folder in saved]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_distilled_language_model_takes_the_same_steps_with_and_without_kernels(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and each gradient of one batch, through linear_kd's kernels and through its plain path."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=width, intermediate_size=2 * width)).cuda()
        for width in (64, 128)
    )
    ids = torch.randint(0, 1000, (4, 33), device="cuda")
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    positions = (labels.flatten() != IGNORE).nonzero().squeeze(1)
    given = {"input_ids": ids, "labels": labels, "positions": positions}
    heads = [find_head(model, {}) for model in (student, teacher)]
    assert all(isinstance(head, LinearHead) for head in heads)
    told = ModelTeacher(teacher, {}, head=heads[1]).outputs(given, None, 2.0)
    objective = Objective(DistillationConfig(alpha=0.5, temperature=2.0))

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            sums = Student(student, {}, heads[0], objective).train()(given, told)
        sums["loss_sum"].backward()
        return sums["loss_sum"].item(), {name: p.grad.clone() for name, p in student.named_parameters()}

    loss, gradients = step()
    monkeypatch.setattr("forge.losses.products.refusal_of_kernels", lambda device, dtype: "a test forbids them")
    plain_loss, plain_gradients = step()
    tolerance = 1e-3 if precision == "no" else 2e-2
    assert loss == pytest.approx(plain_loss, rel=tolerance)
    for name, gradient in gradients.items():
        error = (gradient - plain_gradients[name]).norm() / plain_gradients[name].norm()
        assert error < 2 * tolerance, name


def test_a_sharded_student_with_a_sharded_teacher_takes_the_steps_of_whole_ones(
    chat_model: Path, tmp_path: Path
) -> None:
    """One process, ZeRO-2 beside ZeRO-3, bf16, the true command: the fused loss reads heads gathered for it."""
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    rows = [conversation(i, turns=1 + i % 3) for i in range(24)]
    config_on(tmp_path, chat_model, rows, rows[:5])
    kd = [f"teacher.path={teacher}", "distillation.alpha=0.6", "training.mixed_precision=bf16", "export.dtype=bfloat16"]
    plans = {"whole": [], "sharded": ["deepspeed.student=zero2", "teacher.placement=zero3"]}
    losses = {}
    for name, plan in plans.items():
        settings = [word for setting in [*kd, *plan] for word in ("--set", setting)]
        done = forge("--config", tmp_path / "c.yaml", "--run_name", name, *settings)
        assert done.returncode == 0, done.stderr
        rows_of = read_json_lines(tmp_path / "outputs" / "c" / name / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows_of if "learning_rate" in row]
    assert len(losses["whole"]) == 4
    assert losses["sharded"] == pytest.approx(losses["whole"], rel=2e-2)
