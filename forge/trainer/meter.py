"""Measures training between two reports: loss, gradient norm, speed and memory, over all ranks."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class StepMeter:
    """What has happened since the last report. Adding waits for nothing; reading waits for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.restart()

    def restart(self) -> None:
        self._sums: list[Tensor] = []  # float32 scalars, this rank's
        self._labels: list[Tensor] = []  # int64 scalars, of all ranks
        self._grad_norms: list[Tensor] = []
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, ce_sum: Tensor, labels: Tensor, grad_norm: Tensor, tokens: int) -> None:
        self._sums.append(ce_sum)
        self._labels.append(labels)
        self._grad_norms.append(grad_norm)
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        entered = time.perf_counter()
        yield
        self._start += time.perf_counter() - entered

    def losses(self) -> Tensor:
        """The mean loss of each step since the last report, float64 on the CPU."""
        return self._loss_sums() / torch.stack(self._labels).cpu()

    def grad_norms(self) -> Tensor:
        """The gradient norm of each step since the last report, before clipping, float64 on the CPU."""
        return torch.stack([norm.double() for norm in self._grad_norms]).cpu()

    def metrics(self, rate: float) -> dict[str, Any]:
        """loss: nats, mean over the labels since the last report; grad_norm: the last step's, before clipping."""
        labels = int(torch.stack(self._labels).sum())
        tokens = self._accelerator.reduce(torch.tensor(self._tokens, device=self._accelerator.device), "sum").item()
        peak = (
            self._accelerator.gather(
                torch.tensor([_peak_memory_mib(self._accelerator.device)], device=self._accelerator.device)
            )
            .max()
            .item()
        )
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": float(self._loss_sums().sum() / labels),
            "learning_rate": rate,
            "grad_norm": float(self._grad_norms[-1]),
            "samples_per_second": round(labels / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_mib": round(peak, 1),
        }
        self.restart()
        return metrics

    def _loss_sums(self) -> Tensor:
        return self._accelerator.reduce(torch.stack(self._sums), "sum").double().cpu()


def _peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has held: on the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
