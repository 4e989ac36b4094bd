"""Evaluates the student over all ranks: every row counts once, on exactly one of them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from forge.cluster.signals import in_loader_worker
from forge.losses.cross_entropy import count_labels
from forge.task.batches import FILLER, evaluated_rows, evaluation_batches, preparing, row_loader
from forge.task.task import Sample, Task


def evaluate(
    student: nn.Module,
    task: Task,
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_samples: int | None,
    seed: int,
    num_workers: int,
    between_batches: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """The task's metrics and the mean loss of each validation split, as `split/metric`; the same on every rank.

    The loss is in nats, the mean over all labels of the split. Beside the metrics, the samples of each split that has
    some. With max_samples the rows are drawn by the seed, and `split/samples_of` says how many there are.
    between_batches: called as often on every rank; may raise to break off.
    """
    student.eval()
    metrics: dict[str, Any] = {}
    samples: dict[str, list[Sample]] = {}
    try:
        for split, rows in task.validation.items():
            chosen = evaluated_rows(len(rows), max_samples, seed)
            values, shown = _evaluate_split(
                student, task, accelerator, split, chosen, batch_size, num_workers, between_batches
            )
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
            samples |= {split: shown} if shown else {}
    finally:
        student.train()
    return metrics, samples


@torch.no_grad()
def _evaluate_split(
    student: nn.Module,
    task: Task,
    accelerator: Accelerator,
    split: str,
    chosen: np.ndarray,
    batch_size: int,
    num_workers: int,
    between_batches: Callable[[], None],
) -> tuple[dict[str, Any], list[Sample]]:
    start = time.perf_counter()
    rows = task.validation[split]
    lengths = np.asarray(rows["length"][:])
    batches = evaluation_batches(lengths, chosen, batch_size, accelerator.num_processes)[accelerator.process_index]
    loader = row_loader(
        rows,
        batches,
        task.collate,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init=in_loader_worker,
    )
    counted = task.metrics(split, accelerator.unwrap_model(student).model)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    totals = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # rows, labels
    batches_left = iter(loader)
    for _ in range(len(batches)):
        with preparing(f"a batch of {split}"):
            cpu_batch = next(batches_left)
        batch = send_to_device(cpu_batch, accelerator.device, non_blocking=True)
        outputs = student(batch)
        counted.update(outputs, batch)
        loss_sum += outputs["ce_sum"]
        totals += torch.stack([(batch["ids"] != FILLER).sum(), count_labels(batch["labels"])])
        between_batches()
    counted.counts = accelerator.reduce(counted.counts.to(accelerator.device), "sum")
    loss_sum, totals = accelerator.reduce(loss_sum, "sum"), accelerator.reduce(totals, "sum")
    total, labels = totals.tolist()  # waits for the GPU
    if total != len(chosen):
        raise RuntimeError(f"evaluated {total} rows of {len(chosen)}; this is a bug in forge")
    metrics = {"loss": loss_sum.item() / labels, **counted.compute(), "samples": total}
    if len(chosen) < len(rows):
        metrics["samples_of"] = len(rows)
    metrics["seconds"] = round(time.perf_counter() - start, 3)
    return metrics, sorted(gather_object(counted.samples), key=lambda sample: sample.row)[: task.samples]
