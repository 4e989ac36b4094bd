"""A teacher changes the loss by its formula and nothing else of the loop; without weight it changes nothing at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forge, forge_on_two_ranks
from conversations import config_on, conversation
from loss_oracle import divergence
from teachers import write_chat_teacher, write_classifier
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from forge.losses.cross_entropy import IGNORE
from forge.run.files import read_json_lines

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_classifier(tmp_path_factory.mktemp("teacher"), tiny_model)


def distilled(teacher: Path, *settings: str, alpha: float = 0.6) -> tuple[str, ...]:
    return (f"teacher.path={teacher}", f"distillation.alpha={alpha}", *settings)


def rows_of(name: str, student: Tensor, teacher: Tensor, temperature: float, parameter: float = 0.0) -> Tensor:
    """D of each row of logits."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([divergence(name, one, told, temperature, parameter) for one, told in pairs])


def trained(trainer: Any) -> tuple[list[dict[str, float]], list[float]]:
    """The reports and the final weights. Before the next build: Accelerate shares state."""
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer.attempt.callbacks.reports, weights.tolist()


def test_a_step_has_the_loss_of_the_formula_with_labels_matched_by_name(build_trainer: Build, teacher: Path) -> None:
    trainer = build_trainer(*distilled(teacher, "distillation.temperature=3", "training.max_steps=1"))
    trainer.batches.start_at(0)
    (batch,) = trainer.batches.next_step()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    own = AutoModelForSequenceClassification.from_pretrained(teacher)
    order = [own.config.label2id[name] for name in trainer.model.config.label2id]
    assert order == [1, 2, 0]
    with torch.no_grad():
        student, told = trainer.model(**inputs).logits, own(**inputs).logits[:, order]
    ce = cross_entropy(student, batch["labels"], reduction="sum").item()
    kl = rows_of("forward_kl", student, told, 3.0).sum().item()
    reports, _ = trained(trainer)

    assert reports[0]["ce"] == pytest.approx(ce / 8, rel=1e-5)
    assert reports[0]["divergence"] == pytest.approx(kl / 8, rel=1e-4)
    assert reports[0]["loss"] == pytest.approx((0.4 * ce + 0.6 * 9 * kl) / 8, rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"])
def test_each_divergence_is_the_one_that_the_config_names(build_trainer: Build, teacher: Path, name: str) -> None:
    settings = [f"distillation.divergence={name}", "training.max_steps=1", "training.warmup_steps=0"]
    settings += ["distillation.beta=0.3"] if name == "jsd" else []
    settings += ["distillation.skew=0.2"] if "skew" in name else []
    trainer = build_trainer(*distilled(teacher, *settings))
    trainer.batches.start_at(0)
    (batch,) = trainer.batches.next_step()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    own = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        student, told = trainer.model(**inputs).logits.double(), own(**inputs).logits[:, [1, 2, 0]].double()
    expected = rows_of(name, student, told, 2.0, 0.3 if name == "jsd" else 0.2).mean().item()
    reports, _ = trained(trainer)
    assert reports[0]["divergence"] == pytest.approx(expected, rel=1e-4)


def test_one_large_batch_and_many_micro_batches_take_the_same_steps(build_trainer: Build, teacher: Path) -> None:
    reports, weights = trained(build_trainer(*distilled(teacher), "training.per_device_batch_size=8"))
    for size in (1, 3):
        split, split_weights = trained(build_trainer(*distilled(teacher), f"training.per_device_batch_size={size}"))
        for name in ("loss", "ce", "divergence"):
            assert [r[name] for r in split] == pytest.approx([r[name] for r in reports], rel=1e-4)
        assert split_weights == pytest.approx(weights, abs=1e-5)


def test_alpha_0_is_plain_fine_tuning_to_the_last_bit_and_asks_the_teacher_in_evaluations_only(
    build_trainer: Build, teacher: Path
) -> None:
    plain, plain_weights = trained(build_trainer("evaluation.every_steps=2"))
    watched = build_trainer(f"teacher.path={teacher}", "evaluation.teacher=true", "evaluation.every_steps=2")
    asked: list[str | None] = []
    outputs = watched.teacher.outputs
    watched.teacher.outputs = lambda batch, split, T: asked.append(split) or outputs(batch, split, T)
    reports, weights = trained(watched)

    assert weights == plain_weights
    assert [report["loss"] for report in reports] == [report["loss"] for report in plain]
    assert "divergence" not in reports[0]
    assert set(asked) == {"matched", "other"}


def test_alpha_1_still_reports_the_cross_entropy_and_does_not_learn_from_it(
    build_trainer: Build, teacher: Path
) -> None:
    trainer = build_trainer(*distilled(teacher, "training.max_steps=150", alpha=1.0))
    before = trainer.evaluate("baseline")
    reports, _ = trained(trainer)
    after = trainer.evaluate("final")
    assert reports[0]["ce"] > 0.5
    assert reports[0]["loss"] == pytest.approx(4 * reports[0]["divergence"], rel=1e-6)
    assert after["matched/kl"] < 0.3 * before["matched/kl"]
    assert after["matched/agreement"] == 1.0
    assert after["matched/ce"] > before["matched/ce"]  # the teacher's labels are not the data's


def test_a_student_that_is_its_teacher_agrees_and_has_no_divergence(build_trainer: Build, teacher: Path) -> None:
    trainer = build_trainer(*distilled(teacher, f"model.path={teacher}"))
    metrics = trainer.evaluate("baseline")
    for split in ("matched", "other"):
        assert metrics[f"{split}/agreement"] == 1.0
        assert metrics[f"{split}/kl"] == pytest.approx(0.0, abs=1e-6)


def test_evaluation_tells_kl_at_temperature_1_agreement_and_calibration(build_trainer: Build, teacher: Path) -> None:
    trainer = build_trainer(*distilled(teacher, "distillation.temperature=5", "distillation.divergence=reverse_kl"))
    metrics = trainer.evaluate("baseline")
    own = AutoModelForSequenceClassification.from_pretrained(teacher)
    rows = trainer.task.validation["matched"]
    batch = trainer.task.collate([rows[i] for i in range(len(rows))])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        student, told = trainer.model(**inputs).logits.double(), own(**inputs).logits[:, [1, 2, 0]].double()
    assert metrics["matched/kl"] == pytest.approx(rows_of("forward_kl", student, told, 1.0).mean().item(), rel=1e-5)
    assert metrics["matched/agreement"] == pytest.approx((student.argmax(1) == told.argmax(1)).double().mean().item())
    confidence, predicted = student.softmax(1).max(1)
    right = (predicted == batch["labels"]).double()
    bins = (confidence * 15).long()
    gaps = [abs((right[bins == i] - confidence[bins == i]).sum().item()) for i in range(15)]
    assert metrics["matched/ece"] == pytest.approx(sum(gaps) / len(rows), rel=1e-5)


def test_an_offloaded_teacher_takes_the_same_steps(
    build_trainer: Build, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports, weights = trained(build_trainer(*distilled(teacher)))
    trainer = build_trainer(*distilled(teacher, "teacher.placement=offload"))
    assert "offload saves nothing here" in caplog.text
    assert {p.device.type for p in trainer.teacher.model.parameters()} == {"meta"}
    assert trained(trainer) == (reports_like(reports, trainer), weights)


def reports_like(reports: list[dict[str, float]], trainer: Any) -> list[dict[str, float]]:
    """The reports, with the speeds and the memory of the other training."""
    own = trainer.attempt.callbacks.reports
    measured = ("rows_per_second", "tokens_per_second", "peak_memory_mib")

    class Like(list):  # compared once the other has trained
        def __eq__(self, other: object) -> bool:
            return [{**r, **{m: o[m] for m in measured}} for r, o in zip(reports, own, strict=True)] == own

    return Like()


def test_a_teacher_in_half_precision_keeps_its_own_dtype(build_trainer: Build, teacher: Path) -> None:
    trainer = build_trainer(*distilled(teacher, "teacher.dtype=bfloat16"))
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())
    assert not trainer.teacher.model.training


@pytest.mark.parametrize("columns", [None, 400])
def test_a_language_model_learns_from_hidden_states_and_heads(
    tmp_path: Path, chat_model: Path, columns: int | None
) -> None:
    """Against whole logits of both, also where the teacher's head is padded."""
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model, columns=columns)
    rows = [conversation(i) for i in range(8)]
    config_on(tmp_path, chat_model, rows, rows[:4])
    settings = (f"teacher.path={teacher}", "distillation.alpha=0.7", "training.max_steps=1", "training.warmup_steps=0")
    run = forge(
        *("--config", tmp_path / "c.yaml", "--run_name", "kd", "--output_root", tmp_path / "runs"),
        *(part for setting in settings for part in ("--set", setting)),
    )
    assert run.returncode == 0, run.stderr + run.stdout
    (folder,) = (tmp_path / "runs").rglob("kd")
    lines = read_json_lines(folder / "metrics.jsonl")
    report = next(line for line in lines if "stage" not in line)
    baseline = next(line for line in lines if line.get("stage") == "baseline")

    from forge.config.loader import load_config
    from forge.task.causal_lm.task import load_causal_lm

    task = load_causal_lm(load_config(folder / "config.yaml").config)
    student, own = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (chat_model, teacher))

    def sums(split: Any, T: float) -> tuple[float, float, int]:
        batch = task.collate([split[i] for i in range(len(split))])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        counted = batch["labels"] != IGNORE
        with torch.no_grad():
            logits, told = (model(**inputs).logits[counted].double() for model in (student, own))
        ce = cross_entropy(logits, batch["labels"][counted], reduction="sum").item()
        kl = rows_of("forward_kl", logits, told, T).sum().item()
        return ce, kl, int(counted.sum())

    ce, kl, labels = sums(task.train, 2.0)
    assert report["ce"] == pytest.approx(ce / labels, rel=1e-4)
    assert report["divergence"] == pytest.approx(kl / labels, rel=1e-4)
    assert report["loss"] == pytest.approx((0.3 * ce + 0.7 * 4 * kl) / labels, rel=1e-4)
    _, kl, labels = sums(task.validation["validation"], 1.0)
    assert baseline["validation/kl"] == pytest.approx(kl / labels, rel=1e-4)


@pytest.mark.multiprocess
def test_two_ranks_take_the_steps_of_one(config_file: Path, tmp_path: Path, teacher: Path) -> None:
    settings = [part for setting in distilled(teacher) for part in ("--set", setting)]
    curves = []
    for name, start in (("one", forge), ("two", forge_on_two_ranks)):
        run = start("--config", config_file, "--run_name", name, *settings)
        assert run.returncode == 0, run.stderr + run.stdout
        (folder,) = (tmp_path / "outputs").rglob(name)
        curves.append(read_json_lines(folder / "metrics.jsonl"))
    one, two = curves
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "ce", "divergence", "matched/kl", "matched/ce", "matched/ece"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7)


def test_a_model_that_was_never_trained_for_the_task_is_no_teacher(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = [part for setting in distilled(tiny_model) for part in ("--set", setting)]
    run = forge("--config", config_file, *settings)
    assert run.returncode == 2
    assert "it was not trained for this task" in run.stdout + run.stderr
    assert not list((tmp_path / "outputs").rglob("training_state.json"))


def test_the_columns_of_other_labels_are_known_to_the_device_and_of_the_same_none(
    build_trainer: Build, teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A list would be brought to the device with each batch, and waited for."""
    columns = build_trainer(*distilled(teacher)).teacher.columns
    assert isinstance(columns, Tensor)
    assert columns.tolist() == [1, 2, 0]
    same = write_classifier(tmp_path / "same", tiny_model, names=["entailment", "neutral", "contradiction"])
    assert build_trainer(*distilled(same)).teacher.columns is None
