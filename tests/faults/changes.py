"""Changes to the process under test that do not concern the disk: its clock, a record of its rows, a kill in a step."""

import datetime as datetime_module
import json
import os
import signal
import sys
import time
from typing import Any


def shift_clock(*, days: float) -> None:
    """Shift every wall clock by so many days; monotonic clocks stay right."""
    seconds = days * 86400
    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_time_ns() + int(seconds * 1e9)
    real = datetime_module.datetime

    class Shifted(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.now(tz) + datetime_module.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> Any:
            return real.now(datetime_module.UTC).replace(tzinfo=None) + datetime_module.timedelta(seconds=seconds)

    datetime_module.datetime = Shifted  # type: ignore[misc]
    for name, module in list(sys.modules.items()):
        if name.startswith("forge.") and getattr(module, "datetime", None) is real:
            module.datetime = Shifted  # type: ignore[attr-defined]


def in_a_step(*, forward: int, action: str = "kill") -> None:
    """Kill or freeze the process at that forward pass, counted from 0: in the middle of a step's accumulation."""
    from forge.student.student import Student

    original, count = Student.forward, [0]

    def counted(self: Any, *values: Any, **options: Any) -> Any:
        if self.training:
            if count[0] == forward:
                os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            count[0] += 1
        return original(self, *values, **options)

    Student.forward = counted


def record_samples(*, file: str) -> None:
    """Record the ids of the rows of every optimizer step, as a JSON line with the step from 0.

    The ids go through the loader with the rows, so they are those of the batch and not of a plan.
    """
    from forge.data import batches

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    start_at, next_step = batches.StepBatches.start_at, batches.StepBatches.next_step

    def started(self: Any, step: int) -> None:
        self._recorded_step = step
        start_at(self, step)

    def step(self: Any) -> Any:
        micro_batches = next_step(self)
        ids = [row for batch in micro_batches for row in batch["ids"].tolist() if row != batches.FILLER]
        os.write(descriptor, (json.dumps([self._recorded_step, ids]) + "\n").encode())
        self._recorded_step += 1
        return micro_batches

    batches.StepBatches.start_at = started
    batches.StepBatches.next_step = step
