"""Evaluates the student over all ranks: every row counts once, on exactly one of them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn

from forge.losses.cross_entropy import count_labels
from forge.task.batches import evaluation_batches, row_loader
from forge.task.classification import Classification


def evaluate(
    student: nn.Module,
    task: Classification,
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_samples: int | None,
    seed: int,
    between_batches: Callable[[], None],
) -> dict[str, float]:
    """The task's metrics and the mean loss of each validation split, as `split/metric`; the same on every rank.

    With max_samples the rows are drawn by the seed, and `split/samples_of` says how many there are.
    between_batches: called as often on every rank; may raise to break off.
    """
    student.eval()
    metrics: dict[str, float] = {}
    try:
        for split, rows in task.validation.items():
            chosen = np.arange(len(rows))
            if max_samples is not None and max_samples < len(rows):
                chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_samples])
            values = _evaluate_split(student, task, accelerator, rows, chosen, batch_size, between_batches)
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
    finally:
        student.train()
    return metrics


@torch.no_grad()
def _evaluate_split(
    student: nn.Module,
    task: Classification,
    accelerator: Accelerator,
    rows: Dataset,
    chosen: np.ndarray,
    batch_size: int,
    between_batches: Callable[[], None],
) -> dict[str, Any]:
    start = time.perf_counter()
    lengths = np.asarray(rows["length"][:])
    batches = evaluation_batches(lengths, chosen, batch_size, accelerator.num_processes)[accelerator.process_index]
    loader = row_loader(rows, batches, task.collate, num_workers=0, pin_memory=accelerator.device.type == "cuda")
    counted = task.metrics()
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    samples = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for cpu_batch in loader:
        batch = send_to_device(cpu_batch, accelerator.device, non_blocking=True)
        outputs = student(batch)
        counted.update(outputs["logits"], batch["labels"])
        loss_sum += outputs["ce_sum"]
        samples += count_labels(batch["labels"])
        between_batches()
    counted.counts = accelerator.reduce(counted.counts.to(accelerator.device), "sum")
    loss_sum, samples = accelerator.reduce(loss_sum, "sum"), accelerator.reduce(samples, "sum")
    total = int(samples.item())  # waits for the GPU
    if total != len(chosen):
        raise RuntimeError(f"evaluated {total} rows of {len(chosen)}; this is a bug in forge")
    metrics = {"loss": loss_sum.item() / total, **counted.compute(), "samples": total}
    if len(chosen) < len(rows):
        metrics["samples_of"] = len(rows)
    metrics["seconds"] = round(time.perf_counter() - start, 3)
    return metrics
