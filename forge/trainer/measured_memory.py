"""Trains, and writes into the run's metadata what memory that was predicted to take and what it took."""

import ctypes
import logging
import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor

from forge.config.plans import read_plan
from forge.memory.meta import job_of, row_shape
from forge.memory.totals import GIB, Parts, Setting, memory_of
from forge.model.load import LoadedModel
from forge.ranks.agreement import gather_values, on_rank_0
from forge.run.metadata import Memory, amend_metadata
from forge.teacher.teacher import ModelTeacher
from forge.trainer.components import Parts as RunParts
from forge.trainer.distillation import DistillationTrainer
from forge.trainer.loop import FinetuningTrainer

logger = logging.getLogger(__name__)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ON_CUDA = "torch.cuda.max_memory_allocated over training, evaluations in it among it; the rank that took the most"
ON_CPU = (
    "peak resident set over training minus the resident set at its start, plus the weights and the optimizer's state "
    "that were there; the rank that took the most"
)


def train_measured(trainer: FinetuningTrainer, parts: RunParts) -> None:
    """trainer.train(), with `memory` in run_metadata.json at its end, unless no step was left to be taken. Raises what
    training raises, and then writes nothing."""
    device, first = trainer.accelerator.device, trainer.state.step
    start = _begin(device, _held(trainer))
    trainer.train()
    if trainer.state.step == first:
        return
    measured = [_gib(value) for value in gather_values(_measured(device, start))]
    predicted = _predicted(trainer, parts)
    facts = Memory(
        device=device.type,
        predicted_gib=None if predicted is None else _gib(predicted.total),
        measured_gib=max(measured),
        measured=ON_CUDA if device.type == "cuda" else ON_CPU,
        measured_gib_by_rank=measured,
        predicted_parts=None if predicted is None else predicted.as_gib(),
    )
    run, guard = trainer.run, trainer.lock.check

    def record() -> None:
        amend_metadata(run, guard, memory=facts)

    on_rank_0(trainer.accelerator, record)
    told = "not known" if predicted is None else f"{_gib(predicted.total):.2f} GiB"
    logger.info("memory: %.2f GiB measured at most, %s predicted", facts.measured_gib, told)


def _predicted(trainer: FinetuningTrainer, parts: RunParts) -> Parts | None:
    """As `forge plan` counts, with the longest row that there is; None, and a warning, for a model that it cannot
    read: a run does not fail by that."""
    config, accelerator, student = trainer.config, trainer.accelerator, parts.student.model
    teacher = parts.teacher.model if isinstance(parts.teacher, LoadedModel) else None
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED and config.deepspeed.student is not None
    ranks = accelerator.num_processes
    rows = trainer.task.train
    longest = int(np.asarray(rows["length"][:]).max()) if isinstance(rows, Dataset) else None
    try:
        shape = row_shape(config, student.config, longest)
        half, on_cpu = accelerator.mixed_precision != "no", accelerator.device.type == "cpu"
        job = job_of(config, student, teacher, shape, half=half, on_cpu=on_cpu)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.warning("the memory of %s cannot be predicted (%s)", type(student).__name__, error)
        return None
    if not job.student.stacks:
        logger.warning("the memory of %s cannot be predicted: its layers are in no list", type(student).__name__)
        return None
    setting = Setting(
        read_plan(str(config.deepspeed.student)) if sharded else None,
        read_plan(config.deepspeed.teacher) if config.teacher.placement == "zero3" else None,
        ranks,
        int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
    )
    return memory_of(job, setting, config.training.micro_batch_rows(ranks))


def _held(trainer: FinetuningTrainer) -> int:
    """Bytes of the weights and of the optimizer's state in this process's memory: a resumed run has both."""
    tensors: list[Tensor] = [*trainer.student.parameters(), *trainer.student.buffers()]
    if isinstance(trainer, DistillationTrainer) and isinstance(trainer.teacher, ModelTeacher):
        tensors += trainer.teacher.model.parameters()
    states: Iterable[Any] = trainer.optimizer.state.values()
    tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    here = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]  # an offloaded one is there
    storages = {storage.data_ptr(): storage.nbytes() for storage in here}
    return sum(storages.values())


def _begin(device: torch.device, held: int) -> int:
    """What a later reading is compared with; sets the peak back to what there is now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: what is free goes back to the system
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")  # Linux: the peak resident set is from here on
    except OSError:
        logger.info("the peak of the resident set cannot be set back here: it is that of the whole process")
    return _status("VmRSS") - held


def _measured(device: torch.device, start: int) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return (_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - start


def _status(name: str) -> int:
    """Bytes, from /proc; 0 where there is none."""
    if not STATUS.exists():
        return 0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def _gib(size: int) -> float:
    return round(size / GIB, 6)
