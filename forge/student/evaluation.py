"""Evaluates the student over all ranks: every row counts once, on exactly one of them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from forge.cluster.signals import in_loader_worker
from forge.data.batches import FILLER, Batch, Loading, evaluated_rows, evaluation_batches, preparing, row_loader
from forge.losses.cross_entropy import count_labels
from forge.ranks.deepspeed import bare
from forge.task.task import Sample, Task
from forge.teacher.teacher import TeacherOutputs

CALIBRATION_BINS = 15


def evaluate(
    student: nn.Module,
    task: Task,
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_rows: int | None,
    seed: int,
    num_workers: int,
    teacher_outputs: Callable[[Batch, str], TeacherOutputs | None],
    between_batches: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """The task's metrics and those of any task, of each validation split, as `split/metric`; the same on every rank.

    ce: cross-entropy in nats, the mean over all labels of the split. ece: the expected calibration error of the
    probability of the likeliest label, in 15 bins (Guo et al. 2017, arXiv 1706.04599). With a teacher also agreement,
    the share of labels where it has the same likeliest one, and kl, KL(teacher || student) at temperature 1, nats a
    label; of a teacher's top k instead kl_top_k, the KL over its k tokens and all others as one, which is at most that.
    Beside the metrics, the samples of each split that has some. With max_rows the rows are drawn by the seed,
    and `split/rows_of` says how many there are.

    teacher_outputs: of a batch and its split; None where there is no teacher. between_batches: called as often on every
    rank; may raise to break off.
    """
    student.eval()
    metrics: dict[str, Any] = {}
    samples: dict[str, list[Sample]] = {}
    try:
        for split, rows in task.validation.items():
            chosen = evaluated_rows(len(rows), max_rows, seed)
            values, shown = _evaluate_split(
                student, task, accelerator, split, chosen, batch_size, num_workers, teacher_outputs, between_batches
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
    teacher_outputs: Callable[[Batch, str], TeacherOutputs | None],
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
        Loading(num_workers, accelerator.device.type == "cuda", in_loader_worker),
    )
    counted = task.metrics(split, bare(student).model)
    device = accelerator.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, KL
    totals = torch.zeros(3, dtype=torch.int64, device=device)  # rows, labels, those that the teacher agrees on
    calibration = torch.zeros(CALIBRATION_BINS, 2, dtype=torch.float64, device=device)  # right ones, confidence
    kl_name: str | None = None  # with a teacher
    batches_left = iter(loader)
    for _ in range(len(batches)):
        with preparing(f"a batch of {split}"):
            cpu_batch = next(batches_left)
        batch = send_to_device(cpu_batch, device, non_blocking=True)
        teacher = teacher_outputs(batch, split)
        if teacher is not None:
            kl_name = "kl_top_k" if "top_log_probs" in teacher else "kl"
        outputs = student(batch, teacher)
        counted.update(outputs, batch)
        none = totals.new_zeros(())
        sums += torch.stack([outputs["ce_sum"].double(), outputs.get("kl_sum", none).double()])
        rows_here = (batch["ids"] != FILLER).sum()
        totals += torch.stack([rows_here, count_labels(batch["labels"]), outputs.get("agreed", none)])
        _calibrate(calibration, outputs, batch)
        between_batches()
    counted.counts = accelerator.reduce(counted.counts.to(device), "sum")
    sums, totals, calibration = (accelerator.reduce(found, "sum") for found in (sums, totals, calibration))
    ce_sum, kl_sum = sums.tolist()  # waits for the GPU
    total, labels, agreed = totals.tolist()
    if total != len(chosen):
        raise RuntimeError(f"evaluated {total} rows of {len(chosen)}; this is a bug in forge")
    right, confidence = calibration.unbind(dim=1)
    metrics = {"ce": ce_sum / labels, **counted.compute(), "ece": ((right - confidence).abs().sum() / labels).item()}
    if kl_name is not None:
        metrics |= {"agreement": agreed / labels, kl_name: kl_sum / labels}
    metrics["rows"] = total
    if len(chosen) < len(rows):
        metrics["rows_of"] = len(rows)
    metrics["seconds"] = round(time.perf_counter() - start, 3)
    return metrics, sorted(gather_object(counted.samples), key=lambda sample: sample.row)[: task.shown_texts]


def _calibrate(bins: Tensor, outputs: dict[str, Tensor], batch: Batch) -> None:
    """Adds each label's prediction to its bin of confidence: is it right, and how sure was it?

    bins: (CALIBRATION_BINS, 2) float64. No sync with the device.
    """
    confidences, positions = outputs["confidences"], batch["positions"]
    right = (outputs["predictions"].flatten()[positions] == batch["labels"].flatten()[positions]).double()
    # A NaN is no index; the loss beside it tells of it.
    which = (confidences.nan_to_num(0.0) * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    bins.index_add_(0, which, torch.stack([right, confidences.double()], dim=1))
