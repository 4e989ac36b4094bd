"""Names every kind of fault with its trials, and how many of them a size has."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from faults.clocks import clock_trials, stamp_trials
from faults.contenders import at_once_trials, frozen_trials, true_command_trials
from faults.corruption import corruption_trials, none_left_trials, pointer_trials
from faults.crash import crash_trials, naive_trials, random_trial
from faults.errors import error_trials
from faults.launchers import launcher_trials, parent_trials, signal_trials
from faults.power import power_trials
from faults.samples import plans, random_plans, sample_trials
from faults.scene import Scene, Shape

ONE, TWO = Shape(1), Shape(2)
ONE_ASYNC, TWO_ASYNC = Shape(1, asynchronous=True), Shape(2, asynchronous=True)


class Size(Enum):
    QUICK = 0.1
    USUAL = 1.0
    FULL = 100.0

    def of(self, usual: int) -> int:
        return max(1, round(usual * min(self.value, 1.0)))


def _crash(shape: Shape, at_most: int) -> Callable[[Scene, Size], dict[str, Any]]:
    def row(scene: Scene, size: Size) -> dict[str, Any]:
        if size is Size.FULL:
            return {"trials": crash_trials(scene, shape, full=True)}
        return {"trials": crash_trials(scene, shape, at_most=size.of(at_most))}

    return row


def _random(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": [random_trial(scene, shape, seed) for seed in range(size.of(count))]}


def _corrupt(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": corruption_trials(scene, shape, size.of(count), resume_every=40)}


def _errors(shape: Shape, at_most: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": error_trials(scene, shape, size.of(at_most))}


def _at_once(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": at_once_trials(scene, shape, size.of(count))}


def _true_command(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": true_command_trials(scene, shape, size.of(count))}


def _frozen(shape: Shape) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": frozen_trials(scene, shape)[:: 4 if size is Size.QUICK else 1]}


def _naive(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": naive_trials(scene, shape, size.of(count)), "must_fail": True}


def _samples(scene: Scene, size: Size) -> dict[str, Any]:
    wanted = [*plans(), *random_plans(24)]
    return {"trials": sample_trials(scene, wanted[:: 8 if size is Size.QUICK else 1])}


def _signals(shape: Shape, count: int) -> Callable[[Scene, Size], dict[str, Any]]:
    return lambda scene, size: {"trials": signal_trials(scene, shape, size.of(count))}


def _clocks(scene: Scene, size: Size) -> dict[str, Any]:
    return {"trials": clock_trials(scene, ONE, size.of(15)) + stamp_trials(scene, ONE, size.of(15))}


ROWS: dict[str, Callable[[Scene, Size], dict[str, Any]]] = {
    "crash points, 1 rank": _crash(ONE, 400),
    "crash points, 2 ranks": _crash(TWO, 200),
    "crash points, 1 rank, asynchronous": _crash(ONE_ASYNC, 80),
    "crash points, 2 ranks, asynchronous": _crash(TWO_ASYNC, 40),
    "random kills, 1 rank": _random(ONE, 80),
    "random kills, 2 ranks": _random(TWO, 30),
    "random kills, 1 rank, asynchronous": _random(ONE_ASYNC, 20),
    "corruptions, 1 rank": _corrupt(ONE, 600),
    "corruptions, 2 ranks": _corrupt(TWO, 400),
    "lying pointers": lambda scene, size: {"trials": pointer_trials(scene, ONE)[:: 1 if size is not Size.QUICK else 6]},
    "no checkpoint left": lambda scene, size: {"trials": none_left_trials(scene, ONE, size.of(12))},
    "naive saver, 1 rank": _naive(ONE, 40),
    "naive saver, 2 ranks": _naive(TWO, 20),
    "named only when it is on the disk": lambda scene, size: {
        "trials": power_trials(scene, ONE) + power_trials(scene, TWO) + power_trials(scene, ONE_ASYNC)
    },
    "errors of the disk, 1 rank": _errors(ONE, 110),
    "errors of the disk, 2 ranks": _errors(TWO, 40),
    "errors of the disk, 1 rank, asynchronous": _errors(ONE_ASYNC, 40),
    "two resumes at once, 1 rank": _at_once(ONE, 20),
    "two resumes at once, 2 ranks": _at_once(TWO, 6),
    "two true commands at once, 1 rank": _true_command(ONE, 2),
    "two true commands at once, 2 ranks": _true_command(TWO, 1),
    "frozen and taken over, 1 rank": _frozen(ONE),
    "frozen and taken over, 2 ranks": _frozen(TWO),
    "frozen and taken over, 1 rank, asynchronous": _frozen(ONE_ASYNC),
    "jumping clocks, shuffled time stamps": _clocks,
    "rows of every step": _samples,
    "stopped by a signal, 1 rank": _signals(ONE, 40),
    "stopped by a signal, 2 ranks": _signals(TWO, 20),
    "stopped by a signal, 1 rank, asynchronous": _signals(ONE_ASYNC, 20),
    "death of the launcher": lambda scene, size: {"trials": launcher_trials(scene)[:: 2 if size is Size.QUICK else 1]},
    "death of the parent": lambda scene, size: {"trials": parent_trials(scene)},
}
