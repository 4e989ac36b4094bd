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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(module, "_peak_memory_mib", lambda device: 700.0)
    return clock


def test_a_report_covers_the_time_and_the_labels_since_the_last_one(clock: SimpleNamespace) -> None:
    meter = StepMeter(TwoEqualRanks())  # type: ignore[arg-type]
    for ce_sum, labels, norm in ((3.0, 8, 1.5), (1.0, 4, 0.5)):  # labels of both ranks, losses of this one
        meter.add(torch.tensor(ce_sum), torch.tensor(labels), torch.tensor(norm), tokens=50)
        clock.now += 1.0
    with meter.paused():
        clock.now += 100.0

    assert meter.losses().tolist() == [6 / 8, 2 / 4]
    assert meter.grad_norms().tolist() == [1.5, 0.5]
    assert meter.metrics(rate=0.1) == {
        "loss": pytest.approx(8 / 12),
        "learning_rate": 0.1,
        "grad_norm": 0.5,
        "samples_per_second": 6.0,
        "tokens_per_second": 100.0,
        "peak_memory_mib": 700.0,
    }
    meter.add(torch.tensor(1.0), torch.tensor(2), torch.tensor(0.25), tokens=1)
    clock.now += 0.5
    assert meter.metrics(rate=0.1)["samples_per_second"] == 4.0  # nothing of the first report is left


def test_the_ranks_of_one_seed_and_the_seeds_of_one_rank_draw_apart() -> None:
    from forge.cluster.ranks import rank_seed

    assert len({rank_seed(seed, rank) for seed in range(20) for rank in range(20)}) == 400
    assert rank_seed(42, 1) == rank_seed(42, 1)
