"""Speed, memory and means between two reports, with a clock that the test winds."""

from types import SimpleNamespace

import pytest
import torch

from forge.trainer import meter as module
from forge.trainer.meter import StepMeter


class TwoEqualRanks:
    """An accelerator whose other rank has just the same numbers."""

    device = torch.device("cpu")

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor * 2

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor - 100, tensor])


def counted(rows: int, tokens: int, truncated: int = 0) -> dict[str, int]:
    return {"rows": rows, "tokens": tokens, "truncated": truncated}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(module, "_peak_memory_mib", lambda device: 700.0)
    return clock


def test_a_report_covers_the_time_and_the_labels_since_the_last_one(clock: SimpleNamespace) -> None:
    meter = StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    for ce_sum, labels, norm in ((3.0, 8, 1.5), (1.0, 4, 0.5)):  # labels of both ranks, losses of this one
        meter.add(
            {"loss_sum": torch.tensor(ce_sum)},
            torch.tensor(labels),
            torch.tensor(norm),
            counts=counted(6, 50),
        )
        clock.now += 1.0
    with meter.paused():
        clock.now += 100.0

    assert meter.settle() == 200  # tokens of both ranks
    assert meter.settle() == 0
    assert meter.losses().tolist() == [6 / 8, 2 / 4]
    assert meter.grad_norms().tolist() == [1.5, 0.5]
    assert meter.metrics(rate=0.1) == {
        "loss": pytest.approx(8 / 12),
        "learning_rate": 0.1,
        "grad_norm": 0.5,
        "rows_per_second": 12.0,  # rows of both ranks
        "tokens_per_second": 100.0,
        "peak_memory_mib": 700.0,
    }
    meter.add({"loss_sum": torch.tensor(1.0)}, torch.tensor(2), torch.tensor(0.25), counts=counted(1, 1, 3))
    clock.now += 0.5
    meter.settle()
    report = meter.metrics(rate=0.1)
    assert (report["rows_per_second"], report["truncated"]) == (4.0, 6)  # nothing of the first report is left


def test_a_report_that_a_checkpoint_parts_is_the_whole_one(clock: SimpleNamespace) -> None:
    steps = [(3.0, 8, 1.5, 50), (1.0, 4, 0.5, 20), (0.1, 2, 0.25, 7)]

    def run(meter: StepMeter, steps: list[tuple[float, int, float, int]]) -> None:
        for ce_sum, labels, norm, tokens in steps:
            meter.add(
                {"loss_sum": torch.tensor(ce_sum)},
                torch.tensor(labels),
                torch.tensor(norm),
                counts=counted(labels, tokens),
            )
            clock.now += 1.0
        meter.settle()

    whole = StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    run(whole, steps)
    expected = whole.metrics(rate=0.1)
    first, second = StepMeter(TwoEqualRanks()), StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    run(first, steps[:2])
    kept = first.progress()
    run(first, steps[2:])  # goes on after the checkpoint, and dies
    assert kept["loss_sums"] == [6.0, 2.0]
    clock.now += 100.0
    second.restart(kept)
    run(second, steps[2:])
    assert second.losses().tolist() == pytest.approx([6 / 8, 2 / 4, 0.2 / 2])
    assert second.metrics(rate=0.1) == expected


def step(meter: StepMeter, clock: SimpleNamespace, labels: int, **sums: float) -> None:
    losses = {name: torch.tensor(value) for name, value in sums.items()}
    meter.add(losses, torch.tensor(labels), torch.tensor(1.0), counts=counted(1, 1))
    clock.now += 1.0


def test_what_the_loss_is_made_of_is_reported_across_a_checkpoint(clock: SimpleNamespace) -> None:
    first, second = StepMeter(TwoEqualRanks()), StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    step(first, clock, 8, loss_sum=5.0, ce_sum=3.0, divergence_sum=1.0)
    first.settle()
    kept = first.progress()
    assert kept["parts"] == {"ce_sum": [6.0], "divergence_sum": [2.0]}
    step(first, clock, 8, loss_sum=5.0, ce_sum=3.0, divergence_sum=1.0)
    first.settle()
    assert kept["parts"] == {"ce_sum": [6.0], "divergence_sum": [2.0]}  # a copy
    second.restart(kept)
    step(second, clock, 4, loss_sum=2.0, ce_sum=1.0, divergence_sum=0.5)
    second.settle()
    report = second.metrics(rate=0.1)
    assert (report["loss"], report["ce"], report["divergence"]) == (14 / 12, 8 / 12, 3 / 12)
    step(second, clock, 2, loss_sum=1.0, ce_sum=0.5, divergence_sum=0.25)
    second.settle()
    report = second.metrics(rate=0.1)
    assert (report["loss"], report["ce"], report["divergence"]) == (1.0, 0.5, 0.25)  # of this report alone


@pytest.mark.parametrize(("before", "after"), [((), ("ce_sum",)), (("ce_sum",), ())])
def test_a_part_that_came_or_went_within_a_report_is_left_out(
    clock: SimpleNamespace, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """Its sum over some of the steps, divided by the labels of all, would be no mean."""
    first, second = StepMeter(TwoEqualRanks()), StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    step(first, clock, 4, loss_sum=2.0, **dict.fromkeys((*before, "hidden_sum"), 1.0))
    first.settle()
    second.restart(first.progress())
    step(second, clock, 4, loss_sum=4.0, **dict.fromkeys((*after, "hidden_sum"), 1.0))
    second.settle()
    report = second.metrics(rate=0.1)
    assert (report["loss"], report["hidden"]) == (12 / 8, 4 / 8)
    assert "ce" not in report


def test_the_ranks_of_one_seed_and_the_seeds_of_one_rank_draw_apart() -> None:
    from forge.ranks.accelerator import rank_seed

    assert len({rank_seed(seed, rank) for seed in range(20) for rank in range(20)}) == 400
    assert rank_seed(42, 1) == rank_seed(42, 1)
