"""Which rank this process is, what the ranks agree on, and the Accelerator they share."""

import logging
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from forge.cluster.signals import StopRequest, parent_command
from forge.errors import AlreadyComplete, ForgeError, Stopped, Superseded, UsageError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Rank 0 downloads and tokenizes while the others wait, which can take longer than the ten minutes of NCCL. Only the
# agreements wait so long: the collectives of training keep the usual timeout.
WAIT_FOR_RANK_0 = timedelta(hours=2)
OTHER_FILES = 512  # open ones of a rank, beside its connections: libraries, data, sockets of a hub


def build_accelerator(mixed_precision: str, seed: int, *, deterministic: bool = False, **options: Any) -> Accelerator:
    """Joins the ranks. Raises UsageError for ranks that did not start and a precision this device has not.

    options: more of the Accelerator's.
    """
    check_started_ranks()
    _let_files_open(int(os.environ.get("WORLD_SIZE", "1")))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    precision = resolve_precision(mixed_precision)
    if trains_on_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which tells of what it misses
    accelerator = Accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False, **options)
    set_seed(seed)  # the same on every rank, so that new weights are; the trainer tells the ranks' dropout apart
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
    """32 bits that seed one rank's random numbers; seed + rank would give rank 1 those of the next seed's rank 0."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])


def rank_0_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs work on rank 0, then on the others (which find its caches warm); an error on any rank ends all of them. The
    others do not repeat the warnings.

    Errors travel as values: an exception raised before a collective would leave the other ranks waiting for it.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if accelerator.is_main_process:
        outcome = _attempt(work)
    _raise_agreed(outcome[1])
    if not accelerator.is_main_process:
        with _no_warnings():
            outcome = _attempt(work)
    _raise_agreed(outcome[1])
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs work on all ranks at once; an error on any rank ends all of them. Work must hold no collective."""
    result, error = _attempt(work)
    _raise_agreed(error)
    return result  # type: ignore[return-value]


def on_rank_0(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs work on rank 0 only and gives its result, or its error, to every rank."""
    result, error = _attempt(work) if accelerator.is_main_process else (None, None)
    result, told = _from_rank_0((result, _as_value(error)))
    _raise(error, told)
    return result  # type: ignore[return-value]


def gather_values(value: Any) -> list[Any]:
    """The value of every rank, in the order of the ranks; waits for all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=_agreement_group())
    return values


def _from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank. Sent once to each: gathered, each rank would be given one that large by each."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_agreement_group())
    return values[0]


class StopVote:
    """Lets all ranks learn, at the same place of the program, that one of them was asked to stop."""

    def __init__(self, accelerator: Accelerator, request: StopRequest):
        self.request = request
        self._ranks = accelerator.num_processes
        self._votes: torch.Tensor | None = None
        self._under_way: Any = None

    def cast(self, ready: bool = True) -> tuple[bool, bool]:
        """At every boundary, by every rank: (does any rank want to stop?, were all ready?).

        With several ranks it answers with the votes of the boundary before, and sends those of this one along: the
        sum is done while the step computes, and neither the device nor another rank is waited for.
        """
        if self._ranks == 1:
            return self.request.reason is not None, ready
        stop, all_ready = False, False
        if self._under_way is not None:
            assert self._votes is not None
            self._under_way.wait()
            stop, all_ready = bool(self._votes[0] > 0), int(self._votes[1]) == self._ranks
            self._under_way = None
        if not stop:  # on all ranks alike: none is left with a vote that nobody counts
            self._votes = torch.tensor([int(self.request.reason is not None), int(ready)])
            self._under_way = torch.distributed.all_reduce(self._votes, group=_agreement_group(), async_op=True)
        return stop, all_ready

    def now(self) -> bool:
        """The same without the delay, waiting for all ranks: for the seams between the stages."""
        return any(gather_values(self.request.reason is not None))

    def reason(self) -> str:
        """What the ranks were asked by, for the log. On every rank at once."""
        return next((reason for reason in gather_values(self.request.reason) if reason), "a signal")


def lost_rank(error: BaseException) -> bool:
    """Is this what a rank hears when another one has died in the midst of a collective?"""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer", "gloo/"))
    )


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - passed on as a value and raised by _raise_agreed on every rank
        return None, error


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _raise_agreed(error: Exception | None) -> None:
    """Raises on every rank the first error that any rank has; its own, with its traceback, where it has one."""
    _raise(error, next((told for told in gather_values(_as_value(error)) if told is not None), None))


def _as_value(error: Exception | None) -> tuple[str, str, int | None] | None:
    """Its kind, text and exit code, for the other ranks."""
    return None if error is None else (type(error).__name__, str(error), getattr(error, "exit_code", None))


def _raise(error: Exception | None, told: tuple[str, str, int | None] | None) -> None:
    """The rank's own error if it has one, else what it was told of another's."""
    if error is not None:
        raise error
    if told is not None:
        name, text, exit_code = told
        for kind in (UsageError, AlreadyComplete, Stopped, Superseded):
            if name == kind.__name__ or (kind is UsageError and exit_code == UsageError.exit_code):
                raise kind(text)
        raise ForgeError(f"another rank failed with {name}: {text}")


def _let_files_open(ranks: int) -> None:
    """A gloo group holds a connection to every rank open, of which a CPU run has two; many systems grant 1,024 files
    until they are asked for more."""
    needed = 2 * ranks + OTHER_FILES
    granted, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if granted == unlimited or granted >= needed:
        return
    asked = needed if most == unlimited else min(needed, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(granted, asked), most))
    if asked < needed:
        logger.warning(
            "%d ranks may need %d open files each, and the system grants %d; ask for more (ulimit -Hn) if the ranks "
            "fail to connect",
            ranks,
            needed,
            asked,
        )


@cache
def _agreement_group() -> Any:
    """A group of all ranks beside the one that training uses: on the CPU, and patient."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT_FOR_RANK_0)


def trains_on_cpu() -> bool:
    """Is there no GPU, or is none to be used?"""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    return asked or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu" or not torch.cuda.is_available()


def resolve_precision(mixed_precision: str) -> str:
    """bf16, fp16 or no, whatever auto comes to. Raises UsageError for what this device does not compute in."""
    on_gpu = not trains_on_cpu()
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if mixed_precision == "auto":
        return "bf16" if bf16 else "no"
    if mixed_precision == "fp16" and not on_gpu:
        raise UsageError("training.mixed_precision is fp16, which needs a GPU; set it to no or to bf16")
    if mixed_precision == "bf16" and on_gpu and not bf16:
        raise UsageError(
            "training.mixed_precision is bf16, which this GPU does not compute in; set it to fp16 or to no"
        )
    return mixed_precision


def check_started_ranks() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing of it: say it here."""
    if "WORLD_SIZE" in os.environ:
        return
    command = parent_command()
    asked = re.search(r"--num_processes[ =](\d+)", command) if "accelerate" in command else None
    if asked and int(asked[1]) > 1:
        raise UsageError(
            f"the launcher was asked for {asked[1]} processes and started one; on CPU use "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked[1]} …` (without --cpu)"
        )
