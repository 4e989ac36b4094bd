"""What a run writes of its memory: the growth of the resident set on a CPU, and the prediction."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from forge.attempt import measured_memory as module
from forge.attempt.measured_memory import measured_memory
from forge.memory.totals import GIB, Estimate
from forge.run.metadata import Memory

MIB = 2**20
PREDICTED = Estimate(1 * MIB, 2 * MIB, 3 * MIB, 0, 4 * MIB, 5 * MIB, 0, 7 * MIB)


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "predict_memory", lambda *given: PREDICTED)
    written: dict[str, Any] = {}

    def amend(run: Any, check: Any, *, memory: Memory) -> None:
        check()
        written.update(memory.model_dump())

    monkeypatch.setattr(module, "amend_metadata", amend)
    return SimpleNamespace(
        config=None,
        ranks=SimpleNamespace(accelerator=Accelerator(cpu=True)),
        state=SimpleNamespace(step=4),
        components=SimpleNamespace(teacher=None, task=SimpleNamespace(train=None)),
        run=None,
        written=written,
        lock=SimpleNamespace(check=lambda: None),
    )


def training(model: torch.nn.Module) -> Any:
    return SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()), projections=None)


def test_growth_and_prediction_are_recorded(attempt: Any) -> None:
    model: Any = torch.nn.Linear(2048, 4096)  # 32 MiB, there from the start
    with measured_memory(attempt, model, training(model)):
        attempt.state.step += 1
        taken = torch.ones(96 * MIB // 4)
        del taken
    memory = attempt.written
    assert 120 * MIB < memory["measured_gib"] * GIB < 180 * MIB
    assert memory["measured_gib_by_rank"] == [memory["measured_gib"]]
    assert (memory["device"], memory["predicted_gib"]) == ("cpu", round(15 * MIB / GIB, 6))  # without the host's
    assert memory["predicted_parts"]["host_gib"] == round(7 * MIB / GIB, 6)


def test_what_cannot_be_predicted_is_null(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "predict_memory", lambda *given: None)
    model: Any = torch.nn.Linear(2, 2)
    with measured_memory(attempt, model, training(model)):
        attempt.state.step += 1
    memory = attempt.written
    assert (memory["predicted_gib"], memory["predicted_parts"]) == (None, None)
    assert memory["measured_gib"] >= 0


def test_nothing_is_recorded_without_a_step_or_after_an_error(attempt: Any) -> None:
    model: Any = torch.nn.Linear(2, 2)
    with measured_memory(attempt, model, training(model)):
        pass

    def fails() -> None:
        with measured_memory(attempt, model, training(model)):
            attempt.state.step += 1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not attempt.written


def test_the_optimizers_state_is_held_from_the_start_of_a_resumed_run(attempt: Any) -> None:
    model: Any = torch.nn.Linear(2048, 4096)
    parts = training(model)
    found = {}
    for name in ("new", "resumed"):
        if name == "resumed":
            model(torch.ones(1, 2048)).sum().backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        with measured_memory(attempt, model, parts):
            attempt.state.step += 1
        found[name] = attempt.written["measured_gib"] * GIB
    assert found["resumed"] - found["new"] == pytest.approx(2 * 32 * MIB, abs=12 * MIB)  # two moments
