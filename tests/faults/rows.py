"""The rows of the table: what each kind of fault is made of, and how many trials it has."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from faults.corruption import corruption_trials, none_left_trials, pointer_trials
from faults.crash import crash_trials, random_trial
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


ROWS: dict[str, Callable[[Scene, Size], dict[str, Any]]] = {
    "crash points, 1 rank": _crash(ONE, 10_000),
    "crash points, 2 ranks": _crash(TWO, 250),
    "crash points, 1 rank, asynchronous": _crash(ONE_ASYNC, 120),
    "crash points, 2 ranks, asynchronous": _crash(TWO_ASYNC, 60),
    "random kills, 1 rank": _random(ONE, 80),
    "random kills, 2 ranks": _random(TWO, 40),
    "random kills, 1 rank, asynchronous": _random(ONE_ASYNC, 20),
    "corruptions, 1 rank": _corrupt(ONE, 600),
    "corruptions, 2 ranks": _corrupt(TWO, 400),
    "lying pointers": lambda scene, size: {"trials": pointer_trials(scene, ONE)[:: 1 if size is not Size.QUICK else 6]},
    "no checkpoint left": lambda scene, size: {"trials": none_left_trials(scene, ONE, size.of(12))},
}
