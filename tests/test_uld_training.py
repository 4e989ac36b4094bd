"""A causal LM learns from a teacher with other tokens: its loss by hand, its invariances, and what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer_of
from conversations import WORDS, config_on, conversation
from torch import Tensor
from transformers import AutoModelForCausalLM
from vocabularies import sentencepiece, write_llm

from forge.errors import ConfigError, UsageError
from forge.trainer import loop as finetuning

ROWS = [conversation(i, turns=1 + i % 3) for i in range(16)]
ULD = (
    "distillation.alpha=0.3",
    "distillation.temperature=1.5",
    "distillation.divergence=uld",
    "evaluation.shown_texts=0",
)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_llm(tmp_path / "teacher", sentencepiece([*WORDS, "say"]), width=24)


@pytest.fixture
def build(tmp_path: Path, chat_model: Path, teacher: Path) -> Callable[..., Any]:
    """The trainer of a config that distils with ULD: build("training.batch_size=4", …)."""

    def make(*settings: str, rows: list[dict[str, Any]] = ROWS) -> Any:
        config = config_on(tmp_path, chat_model, rows, rows[:3], *ULD, f"teacher.path={teacher}", *settings)
        return trainer_of(config, tmp_path)

    return make


def logits(model: Any, ids: list[int]) -> Tensor:
    """(T, V) float64, of one row alone."""
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return result


def by_hand(trainer: Any, rows: list[dict[str, Any]], teacher: Path, alpha: float, T: float) -> tuple[float, ...]:
    """loss, ce and divergence, means over the labels of these rows."""
    student = trainer.model.eval()
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    ce = divergence = 0.0
    labels = 0
    for row in rows:
        ours, theirs = logits(student, row["input_ids"]), logits(other, row["teacher_input_ids"])
        for place, (token, learned) in enumerate(zip(row["input_ids"][1:], row["learned"][1:], strict=True)):
            if learned:
                ce -= ours[place].log_softmax(-1)[token].item()
                labels += 1
        for mine, its in zip(row["aligned"], row["teacher_aligned"], strict=True):
            p = sorted((ours[mine] / T).softmax(-1).tolist(), reverse=True)
            q = sorted((theirs[its] / T).softmax(-1).tolist(), reverse=True)
            width = max(len(p), len(q))
            p, q = p + [0.0] * (width - len(p)), q + [0.0] * (width - len(q))
            divergence += sum(abs(a - b) for a, b in zip(p, q, strict=True))
    loss = (1 - alpha) * ce + alpha * T**2 * divergence
    return loss / labels, ce / labels, divergence / labels


def one_step(trainer: Any, rate: float = 0.0) -> dict[str, Any]:
    trainer.restore(None)
    trainer.batches.start_at(0)
    trainer.student.train()
    trainer.train_step(trainer.batches.next_step(), rate)
    trainer.meter.settle()
    metrics: dict[str, Any] = trainer.meter.metrics(rate)
    trainer.close()
    return metrics


@pytest.mark.parametrize("whole_logits", [False, True])
def test_a_step_has_the_loss_that_is_computed_by_hand(
    build: Callable[..., Any], teacher: Path, whole_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole_logits:
        monkeypatch.setattr(finetuning, "find_head", lambda model, options: "it is told so")
    trainer = build("training.batch_size=16")
    assert (trainer.student.head is None) == whole_logits
    loss, ce, divergence = by_hand(trainer, list(trainer.task.train), teacher, 0.3, 1.5)
    told = one_step(trainer)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    assert told["ce"] == pytest.approx(ce, rel=1e-5)
    assert told["divergence"] == pytest.approx(divergence, rel=1e-5)
    assert divergence > 0.1
    assert abs(told["loss"] - told["ce"]) > 0.1


def test_a_step_is_the_same_in_one_batch_and_in_four(build: Callable[..., Any]) -> None:
    """Labels and aligned places are not spread evenly over the micro-batches; the last one is a filler."""
    rows = ROWS[:3]
    norms, losses = [], []
    for accumulated in ("training.per_device_batch_size=8", "training.per_device_batch_size=2"):
        trainer = build("training.batch_size=8", accumulated, "training.max_grad_norm=null", rows=rows)
        told = one_step(trainer)
        norms.append(told["grad_norm"]), losses.append(told["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_its_gradient_reaches_the_student_and_draws_it_to_the_teacher(build: Callable[..., Any]) -> None:
    trainer = build("training.batch_size=16", "distillation.alpha=1.0", "training.max_steps=30")
    trainer.restore(None)
    trainer.train()
    values = [report["divergence"] for report in trainer.attempt.callbacks.reports]
    assert values[-1] < 0.7 * values[0]
    assert all(report["ce"] > 0 for report in trainer.attempt.callbacks.reports)
    assert all(not p.requires_grad and p.grad is None for p in trainer.teacher.model.parameters())


def test_a_teacher_may_have_fewer_tokens_than_the_student(build: Callable[..., Any], tmp_path: Path) -> None:
    few = write_llm(tmp_path / "few", sentencepiece(["x"]))
    trainer = build("training.batch_size=16", f"teacher.path={few}")
    assert trainer.teacher.model.config.vocab_size < trainer.model.config.vocab_size
    _, _, divergence = by_hand(trainer, list(trainer.task.train), few, 0.3, 1.5)
    assert one_step(trainer)["divergence"] == pytest.approx(divergence, rel=1e-5)


def test_an_evaluation_has_neither_agreement_nor_kl(build: Callable[..., Any]) -> None:
    metrics = build("training.batch_size=4").evaluate("baseline")
    assert metrics["validation/ce"] > 0
    assert not [name for name in metrics if name.endswith(("/agreement", "/kl"))]


def test_the_teacher_reads_its_own_tokens_and_the_share_that_is_aligned_is_told(
    build: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer = build("training.batch_size=4")
    task = trainer.task
    aligned, labels = sum(map(len, task.train["aligned"])), sum(task.train["labels"])
    line = f"train: the teacher reads its own tokens; {aligned} of {labels} labels ({100 * aligned / labels:.1f} %) are"
    assert line in caplog.text
    assert 0.7 < aligned / labels < 1
    assert task.facts()["alignment"]["aligned"] == aligned
    assert not any("columns" in record.message for record in caplog.records)


def test_uld_between_equal_tokenizers_is_taken_with_a_line(
    build: Callable[..., Any], chat_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build("training.batch_size=16", f"teacher.path={chat_model}", "distillation.temperature=1.0")
    assert "uld, but the teacher's tokenizer is the student's" in caplog.text
    assert all(len(row["aligned"]) == row["labels"] for row in trainer.task.train)
    assert one_step(trainer)["divergence"] == pytest.approx(0.0, abs=1e-5)  # it is its own teacher


def test_what_does_not_go_with_uld_is_refused(
    build: Callable[..., Any], teacher: Path, chat_model: Path, tmp_path: Path
) -> None:
    aligns = "distillation.divergence is uld, which aligns each row of student and teacher before training; "
    for key in ("task.packing", "task.dataset.streaming"):
        with pytest.raises(ConfigError) as refused:
            build(f"{key}=true")
        assert f"{aligns}set {key}: false" in str(refused.value)

    plain = sentencepiece(WORDS)
    plain.chat_template = None
    with pytest.raises(UsageError) as refused:
        build(f"teacher.path={write_llm(tmp_path / 'plain', plain)}")
    assert "the teacher's tokenizer has no chat template" in str(refused.value)
    assert "with teacher.tokenizer" in str(refused.value)
    short = sentencepiece(WORDS)
    short.model_max_length = 48
    with pytest.raises(UsageError, match=r"task\.max_length is 64, .* at most 48"):
        build(f"teacher.path={write_llm(tmp_path / 'short', short)}")

    other = sentencepiece(WORDS)
    other.chat_template = other.chat_template.replace("message['content'] + eos_token", "'#' + message['content']")
    with pytest.raises(UsageError, match="no label can be aligned with the teacher's tokens"):
        build(f"teacher.path={write_llm(tmp_path / 'other', other)}")
