"""Kills ranks at every disk access, at every collective and at random instants, and checks that the run resumes."""

import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

from faults.attempts import Setup, wait
from faults.injector import KINDS_WITH_CONTENT
from faults.scene import Scene, Shape, closed, last_words, run_of, unsound
from faults.trials import Trial


@dataclass(frozen=True)
class Event:
    """One disk access or collective of a rank, as a dry run recorded it."""

    rank: int
    number: int
    kind: str
    name: str  # the file, relative to the output root; empty for a collective

    def __str__(self) -> str:
        return f"rank {self.rank} event {self.number} ({self.kind} {self.name})"


@dataclass(frozen=True)
class Point:
    event: Event
    when: str  # before, torn, after
    victims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.when} {self.event}, kills {' and '.join(map(str, self.victims))}"


def events(scene: Scene, shape: Shape, extra: Setup | None = None) -> list[list[Event]]:
    """Return every event of a whole unbroken run, by rank."""
    root = scene.new_root()
    files = [root.with_suffix(f".events{rank}") for rank in range(shape.ranks)]
    setup = [(extra or []) + injector(root, rank, record=str(file)) for rank, file in enumerate(files)]
    ended = wait(scene.begin(shape, root, setup))
    assert ended.code == 0, ended.text
    assert (problem := scene.verdict(shape, root)) is None, problem  # recording must change nothing
    return [
        [Event(rank, *json.loads(line)) for line in file.read_text().splitlines()] for rank, file in enumerate(files)
    ]


def injector(root: object, rank: int, **options: object) -> Setup:
    return [("faults.injector:install", {"below": str(root), "rank": rank, **options})]


def all_points(recorded: list[list[Event]]) -> Iterator[Point]:
    """Yield each event × (before, torn, after) × (each rank, all ranks)."""
    ranks = range(len(recorded))
    groups = [(rank,) for rank in ranks] + ([tuple(ranks)] if len(recorded) > 1 else [])
    for event in (event for rank in recorded for event in rank):
        for when in ("before", "torn", "after") if event.kind in KINDS_WITH_CONTENT else ("before", "after"):
            yield from (Point(event, when, victims) for victims in groups)


def distinct_points(recorded: list[list[Event]]) -> list[Point]:
    """Return the points that leave different disks: after one event is before the next.

    On several ranks the victims take turns: every event of a save, and every meeting, kills each rank and all of them
    at another save; what is far from a save kills one.
    """
    points = []
    for rank, found in enumerate(recorded):
        seen: dict[tuple[str, str, str], int] = {}
        for event in _few_writes(found):
            whens = ["before"] + ["torn"] * (event.kind in KINDS_WITH_CONTENT)
            if event is found[-1] or not event.name:
                whens.append("after")
            for when in whens:
                if len(recorded) == 1:
                    points.append(Point(event, when, (0,)))
                    continue
                key = (event.kind, _without_step(event.name), when)
                turn = seen[key] = seen.get(key, -1) + 1
                groups: list[tuple[int, ...]] = [(rank,), (0, 1), (1 - rank,)]
                points.append(Point(event, when, groups[turn % 3]))
    return points


def chosen_points(recorded: list[list[Event]], chosen: list[tuple[int, str, int, str, tuple[int, ...]]]) -> list[Point]:
    """Return points given as (rank, pattern of the event, its index among the matches, when, victims)."""
    points = []
    for rank, pattern, number, when, victims in chosen:
        matching = [event for event in recorded[rank] if re.search(pattern, f"{event.kind} {event.name}")]
        points.append(Point(matching[number], when, victims))
    return points


def crash_trial(
    scene: Scene,
    shape: Shape,
    point: Point,
    again: int | None = None,
    extra: Setup | None = None,
) -> Trial:
    """again: the event at which the first resume is killed too. extra: further changes in every attempt."""

    def run() -> str | None:
        root = scene.new_root()
        folder = root.with_suffix(".pids")
        folder.mkdir()
        setup = [(extra or []) + injector(root, rank, pids=str(folder)) for rank in range(shape.ranks)]
        aimed = {"at": point.event.number, "when": point.when, "victims": point.victims, "pids": str(folder)}
        setup[point.event.rank] = (extra or []) + injector(root, point.event.rank, **aimed)
        ended = wait(scene.begin(shape, root, setup))
        shutil.rmtree(folder)
        if ended.hung:
            return f"a rank outlived the other by {ended.codes}"
        if not extra and (problem := unsound(run_of(root))):
            return f"at the kill {problem} [{root}]"
        if not ended.killed and ended.code != 0:
            return f"the attempt ended by itself with {ended.codes}: {last_words(ended.text)}"
        if again is not None:
            hurt = [(extra or []) + injector(root, rank, at=again) for rank in range(shape.ranks)]
            if wait(scene.start_again(shape, root, hurt)).hung:
                return "a rank of the killed resume hung"
        if extra:
            wait(scene.start_again(shape, root, [extra] * shape.ranks))
            problem = scene.verdict(shape, root)
        else:
            problem, _ = scene.finish(shape, root)
        return closed(problem, root)

    return Trial(str(point) + (f", then the resume at its event {again}" if again is not None else ""), run)


def crash_trials(
    scene: Scene, shape: Shape, seed: int = 0, *, full: bool = False, at_most: int | None = None
) -> list[Trial]:
    """Return trials of the crash points of one shape of run; every seventh is killed again in its resume."""
    recorded = events(scene, shape)
    points = list(all_points(recorded)) if full else distinct_points(recorded)
    generator = random.Random(seed)
    if at_most is not None and len(points) > at_most:
        points = sorted(generator.sample(points, at_most), key=lambda point: (point.event.rank, point.event.number))
    longest = max(map(len, recorded))
    return [
        crash_trial(scene, shape, point, generator.randrange(longest) if i % 7 == 3 else None)
        for i, point in enumerate(points)
    ]


def naive_trials(scene: Scene, shape: Shape, at_most: int) -> list[Trial]:
    """The same with a naive saver in place of forge's: most of these trials must fail."""
    naive: Setup = [("faults.naive_saver:install", {})]
    recorded = [[event for event in found if _of_a_checkpoint(event)] for found in events(scene, shape, naive)]
    points = distinct_points(recorded)
    return [crash_trial(scene, shape, point, extra=naive) for point in points[:: max(1, len(points) // at_most)]]


def random_trial(scene: Scene, shape: Shape, seed: int) -> Trial:
    """Kill at up to three random instants, then resume."""

    def run() -> str | None:
        generator = random.Random(seed)
        root = scene.new_root()
        children = scene.begin(shape, root)
        for _ in range(generator.randint(1, 3)):
            victims = generator.choice([[0], [1], [0, 1]]) if shape.ranks > 1 else [0]
            # Half of the kills come between steps and saves, which start once the run directory exists.
            until = time.monotonic() + 30
            if generator.random() < 0.5:
                while not run_of(root).exists() and children[0].poll() is None and time.monotonic() < until:
                    time.sleep(0.002)
            children[0].poll(generator.uniform(0.0, 0.7))
            for rank in victims:
                children[rank].kill()
            if wait(children).hung:
                return f"a rank outlived the other [{root}]"
            children = scene.start_again(shape, root)
        ended = wait(children)
        if ended.hung or ended.code:
            return f"the last resume ended with {ended.codes}: {last_words(ended.text)} [{root}]"
        problem = scene.verdict(shape, root)
        return closed(problem, root)

    return Trial(f"seed {seed}", run)


def _few_writes(found: list[Event]) -> Iterator[Event]:
    """Keep the first, the middle and the last of many consecutive writes to one file."""
    for _, group in itertools.groupby(found, key=lambda event: (event.kind, event.name)):
        same = list(group)
        yield from same if len(same) <= 3 or same[0].kind != "write" else (same[0], same[len(same) // 2], same[-1])


def _of_a_checkpoint(event: Event) -> bool:
    return "checkpoint" in event.name or ".tmp-" in event.name


def _without_step(name: str) -> str:
    return "".join("N" if character.isdigit() else character for character in name)
