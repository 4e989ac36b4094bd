"""Steps of causal LMs with the loss from hidden states, in true trainers, against the same with whole logits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import forge_on_two_ranks, trainer_of
from conversations import config_on, conversation
from teachers import write_chat_teacher
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from forge.config.schema import LossConfig
from forge.losses import linear_kd as module
from forge.trainer.loop import LoopTrainer

LORA = ("model.lora.rank=4", "model.lora.target=[q_proj, v_proj]")
MODELS = {
    "all weights": (),
    "a tied head": (),
    "an adapter and a frozen head": LORA,
    "an adapter and a trained head": (*LORA, "model.lora.modules_to_save=[lm_head]"),
    "an adapter, a tied head and a trained one": (*LORA, "model.lora.modules_to_save=[lm_head]"),
}
# Without AdamW's usual epsilon, which blows rounding up where a gradient is nothing but that.
STEPS = ("training.max_steps=3", "training.adam_epsilon=1e-3", "evaluation.teacher=true")
PARTS = ("loss", "ce", "divergence", "grad_norm")
METRICS = ("validation/ce", "validation/kl", "validation/agreement", "validation/ece")


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(chat_model)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    """Its head is padded."""
    return write_chat_teacher(tmp_path_factory.mktemp("teacher"), chat_model, columns=384)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def config_of(folder: Path, model: Path, teacher: Path, *settings: str) -> Any:
    """Rows of unequal numbers of labels: 19 of them, so that a last step is not full either."""
    rows = [conversation(i, turns=1 + i % 3) for i in range(19)]
    given = (*STEPS, f"teacher.path={teacher}", "distillation.alpha=0.6", *settings)
    return config_on(folder, model, rows, rows[:5], *given)


def trajectory(trainer: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What the steps report, and the evaluations around them."""
    before = trainer.evaluate("baseline")
    trainer.train()
    return trainer.attempt.callbacks.reports, [before, trainer.evaluate("final")]


def assert_same(found: Any, expected: Any, rel: float) -> None:
    for rows, names, others in zip(found, (PARTS, METRICS), expected, strict=True):
        assert len(rows) == len(others) > 1
        for row, other in zip(rows, others, strict=True):
            for name in names:
                assert (name in row) == (name in other)
                if name in row:
                    assert row[name] == pytest.approx(other[name], rel=rel, abs=1e-7), name


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What linear_kd computed: of each call its needs and its Outputs."""
    seen: list[Any] = []
    real = module.computed

    def spy(inputs: Any, **options: Any) -> Any:
        seen.append((options["needs"], real(inputs, **options)))
        return seen[-1][1]

    monkeypatch.setattr(module, "computed", spy)
    return seen


@pytest.mark.parametrize("alpha", [0.6, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_steps_and_evaluations_are_those_of_whole_logits(
    name: str, alpha: float, tmp_path: Path, chat_model: Path, tied_model: Path, teacher: Path,
    monkeypatch: pytest.MonkeyPatch, outputs: list[Any],
) -> None:  # fmt: skip
    model = tied_model if "tied" in name else chat_model
    config = config_of(tmp_path, model, teacher, *MODELS[name], f"distillation.alpha={alpha}")
    trainer = trainer_of(config, tmp_path / "fused")
    found = trajectory(trainer)
    trained = trainer.student.head.linear.weight.requires_grad
    assert trained == ("frozen" not in name)
    steps = [(needs, got) for needs, got in outputs if needs.any]
    assert len(steps) >= 3
    assert all(needs.head == trained and (got.d_head.numel() > 0) == trained for needs, got in steps)
    assert all(got.d_head.numel() == got.d_hidden.numel() == 0 for needs, got in outputs if not needs.any)
    assert len(outputs) > len(steps)  # evaluations take the same way

    calls = len(outputs)
    monkeypatch.setattr(LoopTrainer, "_language_head", lambda self, model: None)
    whole = trainer_of(config, tmp_path / "whole")
    assert_same(found, trajectory(whole), rel=2e-5)
    assert len(outputs) == calls
    for (key, one), other in zip(trainer.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("distilled", [True, False])
def test_the_trainers_hand_the_configs_loss_on(
    distilled: bool, tmp_path: Path, chat_model: Path, teacher: Path
) -> None:
    given = [f"training.loss.{key}" for key in ("memory_budget_gib=0.25", "low_memory=true", "precision=fp32")]
    given += [f"teacher.path={teacher}", "distillation.alpha=0.6"] if distilled else []
    rows = [conversation(i) for i in range(8)]
    trainer = trainer_of(config_on(tmp_path, chat_model, rows, rows, *given), tmp_path)
    assert trainer.student.objective.computing == LossConfig(memory_budget_gib=0.25, low_memory=True, precision="fp32")
    assert trainer.student.objective.config.alpha == (0.6 if distilled else 0.0)


@pytest.mark.parametrize("setting", ["", "training.loss.low_memory=true"])
def test_keys_without_effect_on_whole_logits_are_told(
    setting: str, tmp_path: Path, chat_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["model.lora.rank=4", "model.lora.target=[lm_head]", *([setting] if setting else [])]
    rows = [conversation(i) for i in range(8)]
    trainer = trainer_of(config_on(tmp_path, chat_model, rows, rows, *given), tmp_path)
    assert trainer.student.head is None
    (told,) = (record.message for record in caplog.records if "whole logits" in record.message)
    no_effect = ", and training.loss has no effect" if setting else ""
    assert told == (
        f"the loss is computed from whole logits, which takes more memory{no_effect}: its head is "
        "peft.tuners.lora.layer.Linear"
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["a tied head", "an adapter and a trained head"])
def test_two_ranks_take_the_steps_of_one(
    name: str, tmp_path: Path, chat_model: Path, tied_model: Path, teacher: Path
) -> None:
    """Micro-batches of two rows, whose labels no two ranks have as many of."""
    model = tied_model if "tied" in name else chat_model
    settings = (*MODELS[name], "training.per_device_batch_size=2")
    config = config_of(tmp_path, model, teacher, *settings)
    expected = trajectory(trainer_of(config, tmp_path / "one"))
    given = (*STEPS, f"teacher.path={teacher}", "distillation.alpha=0.6", *settings)
    run = forge_on_two_ranks(
        *("--config", tmp_path / "c.yaml", "--run_name", "two"), *(part for s in given for part in ("--set", s))
    )
    assert run.returncode == 0, run.stderr + run.stdout
    (file,) = (tmp_path / "outputs").rglob("two/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    reports = [line for line in lines if "stage" not in line]
    evaluations = [line for line in lines if line.get("stage") in ("baseline", "final")]
    assert_same((reports, evaluations), expected, rel=1e-4)
