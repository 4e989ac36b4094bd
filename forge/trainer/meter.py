"""Measures training between two reports: loss, gradient norm, speed and memory, over all ranks."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

COUNTED = ("rows", "tokens", "truncated")  # in addition to the labels, over which the loss is a mean


class StepMeter:
    """What has happened since the last report. Adding waits for nothing; settling waits for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.restart()

    def restart(self, progress: dict[str, Any] | None = None) -> None:
        """Start again, or continue from where `progress` was taken."""
        # Settled: one entry for each step since the last report, over all ranks.
        self._loss_sums: list[float] = []
        self._label_counts: list[int] = []
        self._norms: list[float] = []
        self._parts: dict[str, list[float]] = {}  # sums that the loss is made of, by name
        self._counts = dict.fromkeys(COUNTED, 0)
        seconds = 0.0
        if progress is not None:
            self._loss_sums, self._label_counts = list(progress["loss_sums"]), list(progress["labels"])
            self._norms, seconds = list(progress["grad_norms"]), progress["seconds"]
            self._parts = {name: list(sums) for name, sums in progress.get("parts", {}).items()}
            self._counts = {name: progress[name] for name in COUNTED}
        self._forget_steps()
        self._start = time.perf_counter() - seconds

    def add(self, sums: dict[str, Tensor], labels: Tensor, grad_norm: Tensor, counts: dict[str, int]) -> None:
        """Add a step, without waiting for the device.

        Args:
            sums: This rank's loss_sum and, if the loss has several, its parts, the same ones in each step: () float32.
            labels: Labels of the step over all ranks: () int64.
            grad_norm: The gradient norm before clipping: ().
            counts: This rank's counts, by the names in COUNTED.
        """
        self._step_sums.append(sums)
        self._step_labels.append(labels)
        self._step_norms.append(grad_norm)
        for name in COUNTED:
            self._step_counts[name] += counts[name]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        entered = time.perf_counter()
        yield
        self._start += time.perf_counter() - entered

    def settle(self) -> int:
        """Add up over the ranks what came since the last call; return its tokens. All ranks call it together."""
        if not self._step_sums:
            return 0
        counts = torch.tensor([self._step_counts[name] for name in COUNTED], device=self._accelerator.device)
        new = dict(zip(COUNTED, self._accelerator.reduce(counts, "sum").tolist(), strict=True))
        names = list(self._step_sums[0])
        stacked = torch.stack([torch.stack([sums[name] for sums in self._step_sums]) for name in names])
        of_all_ranks = self._accelerator.reduce(stacked, "sum").double().tolist()
        for name, values in zip(names, of_all_ranks, strict=True):
            (self._loss_sums if name == "loss_sum" else self._parts.setdefault(name, [])).extend(values)
        self._label_counts += torch.stack(self._step_labels).tolist()
        self._norms += torch.stack([norm.double() for norm in self._step_norms]).tolist()
        self._counts = {name: self._counts[name] + new[name] for name in COUNTED}
        self._forget_steps()
        return int(new["tokens"])

    def progress(self) -> dict[str, Any]:
        """What the next report has so far, for a checkpoint. After settle."""
        return {
            "loss_sums": list(self._loss_sums),  # copies: training continues while they are written
            "labels": list(self._label_counts),
            "grad_norms": list(self._norms),
            "parts": {name: list(sums) for name, sums in self._parts.items()},
            **self._counts,
            "seconds": time.perf_counter() - self._start,
        }

    @property
    def labels(self) -> int:
        """Labels since the last report, over all ranks. After settle."""
        return sum(self._label_counts)

    def losses(self) -> Tensor:
        """The mean loss of each step since the last report, float64 on the CPU. After settle."""
        sums = torch.tensor(self._loss_sums, dtype=torch.float64)
        return sums / torch.tensor(self._label_counts, dtype=torch.float64).clamp(min=1)  # 0 for a step without labels

    def grad_norms(self) -> Tensor:
        """The gradient norm of each step since the last report, before clipping, float64. After settle."""
        return torch.tensor(self._norms, dtype=torch.float64)

    def metrics(self, rate: float) -> dict[str, Any]:
        """loss, and what it is made of: nats, means over the labels since the last report; grad_norm: the last step's,
        before clipping."""
        device = self._accelerator.device
        peak = self._accelerator.gather(torch.tensor([_peak_memory_mib(device)], device=device)).max().item()
        seconds = time.perf_counter() - self._start
        labels = sum(self._label_counts)
        metrics = {
            "loss": sum(self._loss_sums) / labels,
            **{
                name.removesuffix("_sum"): sum(sums) / labels
                for name, sums in self._parts.items()
                if len(sums) == len(self._loss_sums)  # else a resume has changed what the loss is made of
            },
            "learning_rate": rate,
            "grad_norm": self._norms[-1],
            "rows_per_second": round(self._counts["rows"] / seconds, 2),
            "tokens_per_second": round(self._counts["tokens"] / seconds, 1),
            "peak_memory_mib": round(peak, 1),
        }
        if self._counts["truncated"]:  # of rows that are tokenized as they come; others are counted before training
            metrics["truncated"] = self._counts["truncated"]
        self.restart()
        return metrics

    def _forget_steps(self) -> None:
        self._step_sums: list[dict[str, Tensor]] = []  # float32 scalars, this rank's
        self._step_labels: list[Tensor] = []  # int64 scalars, of all ranks
        self._step_norms: list[Tensor] = []
        self._step_counts = dict.fromkeys(COUNTED, 0)


def _peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has held: on the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
