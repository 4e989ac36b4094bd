"""Evaluates a student over all ranks: every row counts once, on exactly one of them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a student, or a teacher in its place, on the validation splits of a task."""

    task: Task
    accelerator: Accelerator
    batch_size: int  # rows at once on one device
    max_rows: int | None  # of each split, drawn by the seed; None: all
    seed: int
    num_workers: int
    teacher_outputs: Callable[[Batch, str], TeacherOutputs | None]  # for a batch of a split; None without a teacher
    between_batches: Callable[[], None]  # called equally often on every rank; may raise to stop the evaluation

    def evaluate(self, student: nn.Module) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
        """Return the metrics by `split/metric`, the same on every rank, and the samples of each split that has any.

        The metrics, in addition to the task's own:

            ce         cross-entropy in nats, the mean over all labels of the split
            ece        expected calibration error of the argmax label's probability, in 15 bins (Guo et al. 2017,
                       arXiv 1706.04599)
            agreement  with a teacher: the share of labels where both have the same argmax
            kl         with a teacher: KL(teacher || student) at temperature 1, in nats per label
            kl_top_k   instead of kl for a teacher's top k: the KL over its k tokens and all others as one; at most kl
            rows       how many were evaluated; if those are not all, rows_of is how many there are
            seconds    that the split took
        """
        student.eval()
        metrics: dict[str, Any] = {}
        samples: dict[str, list[Sample]] = {}
        try:
            for split, rows in self.task.validation.items():
                chosen = evaluated_rows(len(rows), self.max_rows, self.seed)
                values, shown = self._evaluate_split(student, split, chosen)
                metrics |= {f"{split}/{name}": value for name, value in values.items()}
                samples |= {split: shown} if shown else {}
        finally:
            student.train()
        return metrics, samples

    @torch.no_grad()
    def _evaluate_split(
        self, student: nn.Module, split: str, chosen: np.ndarray
    ) -> tuple[dict[str, Any], list[Sample]]:
        start = time.perf_counter()
        counted = self.task.metrics(split, bare(student).model)
        device = self.accelerator.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, KL
        totals = torch.zeros(3, dtype=torch.int64, device=device)  # rows, labels, labels where the teacher agrees
        calibration = torch.zeros(CALIBRATION_BINS, 2, dtype=torch.float64, device=device)  # right labels, confidence
        kl_name: str | None = None  # with a teacher
        for batch in self._batches(split, chosen):
            teacher = self.teacher_outputs(batch, split)
            if teacher is not None:
                kl_name = "kl_top_k" if "top_log_probs" in teacher else "kl"
            outputs = student(batch, teacher)
            counted.update(outputs, batch)
            none = totals.new_zeros(())
            sums += torch.stack([outputs["ce_sum"].double(), outputs.get("kl_sum", none).double()])
            rows_here = (batch["ids"] != FILLER).sum()
            totals += torch.stack([rows_here, count_labels(batch["labels"]), outputs.get("agreed", none)])
            _calibrate(calibration, outputs, batch)
            self.between_batches()
        counted.counts = self.accelerator.reduce(counted.counts.to(device), "sum")
        sums, totals, calibration = (self.accelerator.reduce(x, "sum") for x in (sums, totals, calibration))
        ce_sum, kl_sum = sums.tolist()  # waits for the GPU
        total, labels, agreed = totals.tolist()
        if total != len(chosen):
            raise RuntimeError(f"evaluated {total} rows of {len(chosen)}; this is a bug in forge")
        right, confidence = calibration.unbind(dim=1)
        ece = ((right - confidence).abs().sum() / labels).item()
        metrics = {"ce": ce_sum / labels, **counted.compute(), "ece": ece}
        if kl_name is not None:
            metrics |= {"agreement": agreed / labels, kl_name: kl_sum / labels}
        metrics["rows"] = total
        if len(chosen) < len(self.task.validation[split]):
            metrics["rows_of"] = len(self.task.validation[split])
        metrics["seconds"] = round(time.perf_counter() - start, 3)
        shown = sorted(gather_object(counted.samples), key=lambda sample: sample.row)[: self.task.shown_texts]
        return metrics, shown

    def _batches(self, split: str, chosen: np.ndarray) -> Iterator[Batch]:
        """Yield this rank's batches of the chosen rows, on the device."""
        rows, accelerator = self.task.validation[split], self.accelerator
        lengths = np.asarray(rows["length"][:])
        ranks = evaluation_batches(lengths, chosen, self.batch_size, accelerator.num_processes)
        own = ranks[accelerator.process_index]
        loading = Loading(self.num_workers, accelerator.device.type == "cuda", in_loader_worker)
        batches = iter(row_loader(rows, own, self.task.collate, loading))
        for _ in range(len(own)):
            with preparing(f"a batch of {split}"):
                batch = next(batches)
            yield send_to_device(batch, accelerator.device, non_blocking=True)


def _calibrate(bins: Tensor, outputs: dict[str, Tensor], batch: Batch) -> None:
    """Add each prediction to the bin of its confidence: the number of right ones, and the sum of their confidences.

    bins: (CALIBRATION_BINS, 2) float64. Does not wait for the device.
    """
    confidences, positions = outputs["confidences"], batch["positions"]
    right = (outputs["predictions"].flatten()[positions] == batch["labels"].flatten()[positions]).double()
    # A NaN cannot be an index; the cross-entropy, which is then NaN too, reports it.
    which = (confidences.nan_to_num(0.0) * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    bins.index_add_(0, which, torch.stack([right, confidences.double()], dim=1))
