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
        "samples_per_second": 12.0,  # rows of both ranks
        "tokens_per_second": 100.0,
        "peak_memory_mib": 700.0,
    }
    meter.add({"loss_sum": torch.tensor(1.0)}, torch.tensor(2), torch.tensor(0.25), counts=counted(1, 1, 3))
    clock.now += 0.5
    meter.settle()
    report = meter.metrics(rate=0.1)
    assert (report["samples_per_second"], report["truncated"]) == (4.0, 6)  # nothing of the first report is left


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


def test_the_ranks_of_one_seed_and_the_seeds_of_one_rank_draw_apart() -> None:
    from forge.cluster.ranks import rank_seed

    assert len({rank_seed(seed, rank) for seed in range(20) for rank in range(20)}) == 400
    assert rank_seed(42, 1) == rank_seed(42, 1)
