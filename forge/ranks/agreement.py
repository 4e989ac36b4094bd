"""Agreement of the ranks: work on rank 0 or on every rank, whose result or error all ranks get."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from forge.errors import AlreadyComplete, ForgeError, Stopped, Superseded, UsageError

T = TypeVar("T")

# Rank 0 downloads and tokenizes while the others wait, which can take longer than NCCL's ten minutes. Only agreements
# wait this long: the collectives of training keep the usual timeout.
WAIT_FOR_RANK_0 = timedelta(hours=2)


def rank_0_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run work on rank 0, then on the other ranks, which find its caches and do not repeat its warnings.

    An error on any rank is raised on all of them. Until then it travels as a value: an exception before a collective
    would leave the other ranks waiting.
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


def on_every_rank(work: Callable[[], T]) -> T:
    """Run work on all ranks at once; an error on any rank is raised on all. The work must contain no collective."""
    result, error = _attempt(work)
    _raise_agreed(error)
    return result  # type: ignore[return-value]


def on_rank_0(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run work on rank 0 only; its result is returned, or its error raised, on every rank."""
    result, error = _attempt(work) if accelerator.is_main_process else (None, None)
    result, sent = _from_rank_0((result, _as_value(error)))
    _raise(error, sent)
    return result  # type: ignore[return-value]


def gather_values(value: Any) -> list[Any]:
    """Return the value of every rank, in the order of the ranks; waits for all of them."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=agreement_group())
    return values


def lost_rank(error: BaseException) -> bool:
    """True if the error is what a rank sees when another one dies during a collective."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer", "gloo/"))
    )


@cache
def agreement_group() -> Any:
    """Return a group of all ranks, separate from that of training: on the CPU, and with a long timeout."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT_FOR_RANK_0)


def _from_rank_0(value: T) -> T:
    """Return rank 0's value. It is sent once to each rank: all_gather would send one that large from every rank."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=agreement_group())
    return values[0]


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
    """Raise on every rank the first error that any rank has; its own, with its traceback, if it has one."""
    _raise(error, next((sent for sent in gather_values(_as_value(error)) if sent is not None), None))


def _as_value(error: Exception | None) -> tuple[str, str, int | None] | None:
    """Return the error's kind, text and exit code, for the other ranks."""
    return None if error is None else (type(error).__name__, str(error), getattr(error, "exit_code", None))


def _raise(error: Exception | None, sent: tuple[str, str, int | None] | None) -> None:
    """Raise this rank's own error if it has one, else the one that another rank sent."""
    if error is not None:
        raise error
    if sent is not None:
        name, text, exit_code = sent
        for kind in (UsageError, AlreadyComplete, Stopped, Superseded):
            if name == kind.__name__ or (kind is UsageError and exit_code == UsageError.exit_code):
                raise kind(text)
        raise ForgeError(f"another rank failed with {name}: {text}")
