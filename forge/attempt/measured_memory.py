"""Measures the memory that training takes, next to what `forge plan` predicts for it, as a context."""

import ctypes
import logging
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from forge.attempt.attempt import Attempt
from forge.checkpoint.contents import Training
from forge.config.plans import read_plan
from forge.config.schema import Config
from forge.errors import UsageError
from forge.memory.meta import running_job
from forge.memory.totals import GIB, Estimate, Sharding, estimate_memory, form_for
from forge.ranks.agreement import gather_values, on_rank_0
from forge.run.metadata import Memory, amend_metadata

logger = logging.getLogger(__name__)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ON_CUDA = "torch.cuda.max_memory_allocated over training, including its evaluations; the rank that took the most"
ON_CPU = (
    "peak resident set over training minus the resident set at its start, plus the weights and the optimizer's state "
    "that were there; the rank that took the most"
)


@contextmanager
def measured_memory(attempt: Attempt, model: PreTrainedModel, training: Training) -> Iterator[None]:
    """Measure what the training within takes, and write that and the prediction into the run's metadata.

    For all ranks at once. Nothing is written if the training takes no step, or raises.

    model: the bare student. training: its optimizer, which a resumed run has state for.
    """
    accelerator, state = attempt.ranks.accelerator, attempt.state
    device, first = accelerator.device, state.step
    taught = attempt.components.teacher
    teacher = taught.model if taught is not None else None
    start = _begin(device, _bytes(_held(model, training, teacher)))
    yield
    if state.step == first:
        return
    measured = [_gib(value) for value in gather_values(_measured(device, start))]

    def record() -> None:
        predicted = predict_memory(attempt.config, accelerator, model, teacher, attempt.components.task.train)
        facts = Memory(
            device=device.type,
            predicted_gib=None if predicted is None else _gib(predicted.total),
            measured_gib=max(measured),
            measured=ON_CUDA if device.type == "cuda" else ON_CPU,
            measured_gib_by_rank=measured,
            predicted_parts=None if predicted is None else predicted.as_gib(),
        )
        amend_metadata(attempt.run, attempt.lock.check, memory=facts)
        known = "not predicted" if predicted is None else f"{_gib(predicted.total):.2f} GiB predicted"
        logger.info("memory: %.2f GiB measured at most, %s", max(measured), known)

    on_rank_0(accelerator, record)


def predict_memory(
    config: Config, accelerator: Accelerator, student: PreTrainedModel, teacher: PreTrainedModel | None, rows: Any
) -> Estimate | None:
    """Return what `forge plan` counts for this run, its rows as long as the longest row that there is.

    None, with a warning, for a model that cannot be counted: a run does not fail for that.

    student, teacher: the bare models; teacher is None also for a cached one. rows: those that are trained on. The
    longest row of a stream is not known, so task.max_length counts.
    """
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED and config.deepspeed.student is not None
    ranks = accelerator.num_processes
    longest = int(np.asarray(rows["length"][:]).max()) if isinstance(rows, Dataset) else None
    form = form_for(accelerator.mixed_precision != "no", accelerator.device.type == "cpu", sharded)
    micro_batch = config.training.micro_batch_rows(ranks)
    try:
        job = running_job(config, student, teacher, form=form, rows=micro_batch, longest=longest)
        uncounted = job.uncounted
    except (UsageError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        uncounted = str(error)
    if uncounted:
        logger.warning("the memory of %s cannot be predicted (%s)", type(student).__name__, uncounted)
        return None
    sharding = Sharding(
        read_plan(str(config.deepspeed.student)) if sharded else None,
        read_plan(config.deepspeed.teacher) if config.teacher.placement == "zero3" else None,
        ranks,
        int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
    )
    return estimate_memory(job, sharding)


def _held(model: PreTrainedModel, training: Training, teacher: PreTrainedModel | None) -> Iterator[Tensor]:
    """Yield the weights and the optimizer's state that are there."""
    yield from (*model.parameters(), *model.buffers())
    yield from () if training.projections is None else training.projections.parameters()
    yield from () if teacher is None else teacher.parameters()
    for state in training.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors in this process's memory; a weight that is offloaded is on the meta device."""
    here = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in here}
    return sum(storages.values())


def _begin(device: torch.device, held: int) -> int:
    """Reset the peak to what is there now, and return what a later reading is compared with."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: free memory goes back to the system
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")  # Linux: the peak of the resident set counts from here
    except OSError:
        logger.info("the peak of the resident set cannot be reset here, so it is that of the whole process")
    return _status("VmRSS") - held


def _measured(device: torch.device, start: int) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return (_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - start


def _status(name: str) -> int:
    """Return bytes from /proc; 0 where there is no /proc."""
    if not STATUS.exists():
        return 0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def _gib(size: int) -> float:
    return round(size / GIB, 6)
