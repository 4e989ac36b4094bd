"""The Accelerator: joins the ranks, on this machine's devices and in a precision that they support."""

import logging
import os
import re
import resource
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from forge.cluster.processes import MEETING_PLACE, world_size
from forge.cluster.signals import parent_command
from forge.errors import UsageError

logger = logging.getLogger(__name__)

OTHER_FILES = 512  # that a rank has open in addition to its connections: libraries, data, sockets of the hub


def build_accelerator(mixed_precision: str, seed: int, *, deterministic: bool = False, **options: Any) -> Accelerator:
    """Join the ranks.

    options: more of the Accelerator's. Raises UsageError if some ranks did not start, or for a precision that this
    device does not support.
    """
    check_started_ranks()
    _raise_file_limit(world_size())
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS requires it
        torch.use_deterministic_algorithms(True)
    precision = resolve_precision(mixed_precision)
    if trains_on_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which logs what it lacks
    if world_size() > 1:
        place = ":".join(os.environ.get(name, "?") for name in MEETING_PLACE)
        logger.info("joining %d ranks at %s", world_size(), place)  # it waits until all of them are there
    accelerator = Accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False, **options)
    set_seed(seed)  # the same on every rank, for equal new weights; the trainer gives each rank its own dropout
    logger.info(
        "%d rank%s on %s, mixed precision %s, %d CPU threads each",
        accelerator.num_processes,
        "" if accelerator.num_processes == 1 else "s",
        torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        precision + (" (auto)" if mixed_precision == "auto" else ""),
        torch.get_num_threads(),
    )
    return accelerator


def rank_seed(seed: int, rank: int) -> int:
    """Return a seed of 32 bits for one rank; seed + rank would give rank 1 the numbers of the next seed's rank 0."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])


def trains_on_cpu() -> bool:
    """True if there is no GPU, or none is to be used."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return asked or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu" or not torch.cuda.is_available()


def resolve_precision(mixed_precision: str) -> str:
    """Return bf16, fp16 or no, with auto resolved. Raises UsageError for one that this device does not support."""
    on_gpu = not trains_on_cpu()
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if mixed_precision == "auto":
        return "bf16" if bf16 else "no"
    if mixed_precision == "fp16" and not on_gpu:
        raise UsageError("training.mixed_precision is fp16, which needs a GPU; set it to no or bf16")
    if mixed_precision == "bf16" and on_gpu and not bf16:
        raise UsageError("training.mixed_precision is bf16, which this GPU does not support; set it to fp16 or no")
    return mixed_precision


def check_started_ranks() -> None:
    """Raise UsageError if the launcher started fewer processes than it was asked for.

    `accelerate launch --cpu --num_processes 2` starts one process without a warning.
    """
    if "WORLD_SIZE" in os.environ:
        return
    command = parent_command()
    asked = re.search(r"--num_processes[ =](\d+)", command) if "accelerate" in command else None
    if asked and int(asked[1]) > 1:
        raise UsageError(
            f"the launcher was asked for {asked[1]} processes but started one; on the CPU use "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked[1]} …` (without --cpu)"
        )


def _raise_file_limit(ranks: int) -> None:
    """Ask for as many open files as the ranks need.

    A gloo group keeps a connection to every rank open, and a CPU run has two groups; the usual limit is 1,024 files.
    """
    needed = 2 * ranks + OTHER_FILES
    granted, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if granted == unlimited or granted >= needed:
        return
    asked = needed if most == unlimited else min(needed, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(granted, asked), most))
    if asked < needed:
        logger.warning(
            "%d ranks may need %d open files each, but the system allows %d; raise the limit (ulimit -Hn) if the ranks "
            "cannot connect",
            ranks,
            needed,
            asked,
        )
