"""Runs the trials of each kind of fault side by side, and counts them in a table."""

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trial:
    """One fault. `run` returns what forge did wrong; None if nothing."""

    name: str
    run: Callable[[], str | None]


@dataclass
class Row:
    """A kind of fault. `must_fail`: these trials test the test, and at least one of them has to fail."""

    fault: str
    trials: list[Trial]
    must_fail: bool = False
    survived: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return bool(self.failures) if self.must_fail else bool(self.trials) and not self.failures

    @property
    def percent(self) -> float:
        if self.must_fail:
            return 100.0 if self.good else 0.0
        return 100.0 * self.survived / max(1, len(self.trials))


def run_row(row: Row, workers: int, report: Callable[[str], None] = lambda _: None) -> Row:
    """Run all trials of a row, `workers` at a time."""
    start, lock, done = time.monotonic(), threading.Lock(), itertools.count(1)

    def one(trial: Trial) -> None:
        try:
            problem = trial.run()
        except Exception as error:  # noqa: BLE001 - a broken trial has failed, and the others still run
            frames = traceback.extract_tb(error.__traceback__)
            problem = f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno})"
        with lock:
            number = next(done)
            if problem is None:
                row.survived += 1
            else:
                row.failures.append((trial.name, problem))
                if not row.must_fail:
                    report(f"  FAILED {row.fault}: {trial.name}: {problem}")
            if number % 50 == 0:
                report(f"  {row.fault}: {number} of {len(row.trials)}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, row.trials))
    row.seconds = time.monotonic() - start
    return row


def table(rows: Iterable[Row]) -> str:
    """Return the table as Markdown."""
    lines = ["| fault | trials | survived | seconds |", "|---|---:|---:|---:|"]
    for row in rows:
        result = f"{row.percent:.4g} %"
        if row.must_fail:
            result += f" (must lose the run: lost it {len(row.failures)} times)"
        lines.append(f"| {row.fault} | {len(row.trials)} | {result} | {row.seconds:.0f} |")
    return "\n".join(lines)
