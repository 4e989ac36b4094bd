"""The ranks of a run: the Accelerator that they share, what they were asked by signals, and their vote on stopping."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import release_memory

from forge.cluster.signals import StopRequest, stopped_early
from forge.config.schema import Config
from forge.ranks.agreement import agreement_group, on_every_rank, on_rank_0, rank_0_first
from forge.ranks.deepspeed import accelerator_of, restore_environment
from forge.ranks.stop_vote import StopVote

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """What every rank of a run holds of the others."""

    accelerator: Accelerator
    stop: StopRequest  # what this process was asked
    vote: StopVote

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Run work on rank 0 and give its result, or its error, to every rank."""
        return on_rank_0(self.accelerator, work)

    def rank_0_first(self, work: Callable[[], T]) -> T:
        """Run work, which a signal may interrupt, on rank 0 and then on the others, which find its caches warm."""
        return rank_0_first(self.accelerator, lambda: self.stop.breaks(work))

    def on_every_rank(self, work: Callable[[], T]) -> T:
        """Run work, which a signal may interrupt, on all ranks at once; an error on any of them is raised on all."""
        return on_every_rank(lambda: self.stop.breaks(work))

    def stop_early_if_asked(self) -> None:
        """Raise Stopped on all ranks if any was asked to stop; nothing has been written yet."""
        if self.vote.now():
            raise stopped_early(self.vote.reason())


def join_ranks(config: Config, stop: StopRequest) -> Ranks:
    """Join the ranks, sharded as the config wants them.

    Raises:
        UsageError: Ranks did not start, or this device does not support the precision.
    """
    release_memory()  # an earlier run in this process (its control follows a run) leaves models in reference cycles
    accelerator = accelerator_of(config)
    return Ranks(accelerator, stop, StopVote(accelerator, stop))


def leave_ranks() -> None:
    """End the process group, if there is one, after the last run; this process may join ranks again."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        agreement_group.cache_clear()
    restore_environment()
