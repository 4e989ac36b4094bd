"""Makes a disk access fail: the run reports it, keeps what it has, and ends right or not at all."""

import random
import shutil

from faults.attempts import wait
from faults.crash import Event, Point, events, injector
from faults.injector import NEEDS_SPACE
from faults.scene import Scene, Shape, closed, last_words, leftovers, run_of, unsound
from faults.trials import Trial

DISK_FULL, BROKEN_DISK = "ENOSPC", "EIO"


def error_trials(scene: Scene, shape: Shape, at_most: int, seed: int = 0) -> list[Trial]:
    """Return trials in which each file's first creation, write, sync and rename fails, once or for good."""
    points: list[tuple[Point, str, bool]] = []
    seen: dict[tuple[str, str, str], int] = {}
    for event in (event for rank in events(scene, shape) for event in rank):
        if not event.name:
            continue
        key = (event.kind, event.name, str(event.rank))
        turn = seen[key] = seen.get(key, -1) + 1
        if turn > 2:
            continue
        code = DISK_FULL if event.kind in NEEDS_SPACE and turn != 1 else BROKEN_DISK
        when = "torn" if event.kind == "write" and turn != 1 else "before"
        points.append((Point(event, when, (event.rank,)), code, turn != 2 and code == DISK_FULL))
    generator = random.Random(seed)
    if len(points) > at_most:
        points = sorted(generator.sample(points, at_most), key=lambda point: point[0].event.number)
    return [error_trial(scene, shape, *point) for point in points]


def error_trial(scene: Scene, shape: Shape, point: Point, code: str, lasting: bool) -> Trial:
    """lasting: everything that needs space fails from then on."""

    def run() -> str | None:
        root = scene.new_root()
        setup = [injector(root, rank) for rank in range(shape.ranks)]
        aimed = {"at": point.event.number, "when": point.when, "action": code, "lasting": lasting}
        setup[point.event.rank] = injector(root, point.event.rank, **aimed)
        ended = wait(scene.begin(shape, root, setup))
        problem = _judge(scene, shape, root, ended.codes, ended.text, ended.forced)
        return closed(problem, root)

    return Trial(f"{code} {point.when} {_name(point.event)}" + ", and from then on" * lasting, run)


def _judge(scene: Scene, shape: Shape, root: object, codes: list[int], text: str, hung: bool) -> str | None:
    run = run_of(root)  # type: ignore[arg-type]
    if hung:
        return "a rank hung"
    if "Traceback" in text or "bug in forge" in text:
        return f"a traceback instead of a message: {last_words(text)}"
    if run.exists() and (problem := unsound(run)):
        return problem
    if set(codes) == {0}:
        difference = scene.difference_but_checkpoints(shape, root)  # type: ignore[arg-type]
        return difference and f"it ended with 0, and {difference}"
    if not set(codes) <= {0, 1, 2}:
        return f"it ended with {codes}: {last_words(text)}"
    if "ERROR" not in text:
        return f"it ended with {codes} without an error message: {last_words(text)}"
    if not (run / "training_state.json").exists():
        shutil.rmtree(run, ignore_errors=True)  # no run was created: the next attempt is the first
    problem, _ = scene.finish(shape, root)  # type: ignore[arg-type]
    return problem and f"ended with {codes}; when the disk works again {problem}; left {leftovers(run)}"


def _name(event: Event) -> str:
    return f"{event.kind} {event.name} (rank {event.rank}, event {event.number})"
