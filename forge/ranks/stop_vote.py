"""StopVote: lets all ranks learn, at the same place of the program, that one of them was asked to stop."""

from typing import Any

import torch
from accelerate import Accelerator

from forge.cluster.signals import StopRequest
from forge.ranks.agreement import agreement_group, gather_values


class StopVote:
    """The vote of the ranks on whether to stop, and on whether all of them are ready for something else."""

    def __init__(self, accelerator: Accelerator, request: StopRequest):
        self.request = request
        self._ranks = accelerator.num_processes
        self._votes = torch.zeros(2, dtype=torch.int64)  # ranks that want to stop, ranks that are ready
        self._in_progress: Any = None

    def cast(self, ready: bool = True) -> tuple[bool, bool]:
        """Vote at a step boundary, on every rank. Returns (any rank wants to stop, all ranks were ready).

        With several ranks the answer is that of the previous boundary, and this boundary's votes are sent along: they
        are summed while the step computes, so neither the device nor another rank is waited for.
        """
        if self._ranks == 1:
            return self.request.reason is not None, ready
        stop, all_ready = False, False
        if self._in_progress is not None:
            self._in_progress.wait()
            stop, all_ready = bool(self._votes[0] > 0), int(self._votes[1]) == self._ranks
            self._in_progress = None
        if not stop:  # the same on all ranks, so no rank is left with a vote that nobody counts
            self._votes = torch.tensor([int(self.request.reason is not None), int(ready)])
            self._in_progress = torch.distributed.all_reduce(self._votes, group=agreement_group(), async_op=True)
        return stop, all_ready

    def now(self) -> bool:
        """True if any rank wants to stop; waits for all ranks. For the boundaries between stages."""
        return any(gather_values(self.request.reason is not None))

    def reason(self) -> str:
        """Return what asked the ranks to stop, for the log. Called on every rank at once."""
        return next((reason for reason in gather_values(self.request.reason) if reason), "a signal")
