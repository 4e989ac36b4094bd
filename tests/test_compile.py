"""Compiled layers compute what the layers compute."""

from pathlib import Path

import pytest
import torch
from conftest import trainer_of
from conversations import config_on, conversation
from teachers import write_chat_teacher

from forge.config.loader import load_config
from forge.errors import ConfigError


def test_a_compiled_run_takes_the_steps_of_the_plain_one(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher; rows of several lengths, and an evaluation. The graphs are captured, and run as they are:
    turning them into code takes minutes on a CPU."""
    capture = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: capture(layer, backend="eager"))
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    rows = [conversation(i, turns=1 + i % 3) for i in range(24)]
    config_on(tmp_path, chat_model, rows, rows[:5])
    settings = [f"teacher.path={teacher}", "distillation.alpha=0.6", "training.adam_epsilon=1e-3"]
    found = []
    for number, compiled in enumerate((False, True)):
        config = load_config(tmp_path / "c.yaml", [*settings, f"training.compile={compiled}"]).config
        trainer = trainer_of(config, tmp_path / str(number))
        for model in (trainer.model, trainer.teacher.model):
            assert [layer._compiled_call_impl is not None for layer in model.model.layers] == [compiled] * len(
                model.model.layers
            )
        trainer.train()
        losses = [report["loss"] for report in trainer.attempt.callbacks.reports]
        found.append((losses, trainer.evaluate("final")["validation/ce"]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_what_listens_within_the_layers_is_refused(config_file: Path) -> None:
    settings = ["teacher.path=t", "distillation.alpha=0.5", "distillation.relations.heads=2", "training.compile=true"]
    with pytest.raises(ConfigError, match=r"training\.compile is true, .* distillation\.relations"):
        load_config(config_file, settings)
