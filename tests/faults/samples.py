"""Checks which rows every optimizer step took over all attempts: those of the unbroken run, once."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from faults.attempts import Setup, wait
from faults.scene import Scene, Shape, closed, last_words
from faults.trials import Trial

STEPS = 14  # two epochs of six steps and part of a third
STEPS_PER_EPOCH = 6


@dataclass(frozen=True)
class Plan:
    """In which forward passes attempts are killed, counted from each attempt's start."""

    name: str
    micro_batches: int  # per step and rank
    workers: int
    save_every: int
    kills: tuple[int, ...]
    ranks: int = 1
    then_ranks: int | None = None  # ranks of the last attempt

    def shape(self, ranks: int) -> Shape:
        per_device = 8 // (self.micro_batches * ranks)
        settings = (
            *(f"training.max_steps={STEPS}", f"training.per_device_batch_size={per_device}"),
            *(f"training.num_workers={self.workers}", f"checkpoint.every_steps={self.save_every}"),
        )
        return Shape(ranks, settings=settings)


def plans() -> list[Plan]:
    """Return plans by forward pass: 3 * 4 + 2 is in the middle of the accumulation of an attempt's fourth step."""
    found = []
    for workers in (0, 2):
        found += [
            Plan("in mid-epoch", 1, workers, 2, (3,)),
            Plan("before the last step of an epoch", 1, workers, 5, (5,)),
            Plan("after the last step of an epoch", 1, workers, 6, (6,)),
            Plan("in the first step of an epoch, saved at its edge", 1, workers, 6, (6, 0)),
            Plan("in mid-accumulation", 4, workers, 2, (3 * 4 + 2,)),
            Plan("in mid-accumulation at the edge of an epoch", 4, workers, 3, (5 * 4 + 3, 2 * 4 + 1)),
            Plan("five times in one epoch", 1, workers, 1, (2, 1, 1, 1, 1)),
            Plan("five times in one epoch, in mid-accumulation", 2, workers, 1, (3, 3, 3, 3, 3)),
            Plan("with no step of progress", 2, workers, 3, (9, 2, 5, 1, 4)),
        ]
        found += [
            Plan("in mid-epoch", 1, workers, 2, (3,), ranks=2),
            Plan("in mid-accumulation", 2, workers, 3, (4 * 2 + 1, 1, 3 * 2 + 1), ranks=2),
        ]
    found += [
        Plan("then one rank", 1, 0, 2, (5,), ranks=2, then_ranks=1),
        Plan("then one rank, in mid-accumulation", 2, 0, 3, (4 * 2 + 1, 5), ranks=2, then_ranks=1),
        Plan("then two ranks", 4, 0, 3, (4 * 4 + 1,), ranks=1, then_ranks=2),
    ]
    return found


def random_plans(count: int, seed: int = 0) -> list[Plan]:
    generator = random.Random(seed)
    found = []
    for number in range(count):
        micro_batches, save_every = generator.choice([1, 2, 4]), generator.choice([1, 2, 3, 5])
        kills = tuple(generator.randrange(6 * micro_batches) for _ in range(generator.randint(2, 5)))
        found.append(Plan(f"at random, seed {seed}-{number}", micro_batches, number % 2 * 2, save_every, kills))
    return found


def sample_trials(scene: Scene, wanted: list[Plan]) -> list[Trial]:
    return [sample_trial(scene, plan) for plan in wanted]


def sample_trial(scene: Scene, plan: Plan) -> Trial:
    def run() -> str | None:
        shape = plan.shape(plan.ranks)
        root = scene.new_root()
        for number, forward in enumerate(plan.kills):
            victim = number % plan.ranks
            setup = [_recorder(root, rank, number) for rank in range(plan.ranks)]
            setup[victim] = [*setup[victim], ("faults.changes:in_a_step", {"forward": forward})]
            ended = wait(scene.start_again(shape, root, setup))
            if ended.hung or not (ended.killed or ended.code == 0):
                return f"attempt {number + 1} ended with {ended.codes}: {last_words(ended.text)} [{root}]"
        ranks = plan.then_ranks or plan.ranks
        setup = [_recorder(root, rank, len(plan.kills)) for rank in range(ranks)]
        ended = wait(scene.start_again(plan.shape(ranks), root, setup))
        if ended.hung or ended.code != 0:
            return f"the last attempt ended with {ended.codes}: {last_words(ended.text)} [{root}]"
        # With another number of ranks sums round differently: the rows must be the same, the weights cannot be.
        problem = scene.verdict(shape, root) if ranks == plan.ranks else None
        problem = problem or _difference(_unbroken_ledger(scene, plan), ledger(root))
        return closed(problem, root)

    ranks = f", {plan.ranks} rank{'s' * (plan.ranks > 1)}"
    return Trial(f"killed {plan.name}{ranks}, {plan.workers} loader workers", run)


def ledger(root: Path) -> dict[int, list[int]]:
    """Return the rows of each step over all ranks, from the attempt that counts: the last one that took the step."""
    taken: dict[int, tuple[int, list[int]]] = {}
    for file in sorted(root.parent.glob(f"{root.name}.rows-*")):
        attempt = int(file.name.split("-")[-2])
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            known = taken.get(step, (-1, []))
            if attempt == known[0]:
                taken[step] = (attempt, known[1] + rows)
            elif attempt > known[0]:
                taken[step] = (attempt, rows)
    return {step: sorted(rows) for step, (_, rows) in sorted(taken.items())}


def _recorder(root: Path, rank: int, attempt: int) -> Setup:
    return [("faults.changes:record_samples", {"file": f"{root}.rows-{attempt:03}-{rank}"})]


def _unbroken_ledger(scene: Scene, plan: Plan) -> dict[int, list[int]]:
    """Return the rows of an unbroken run with one rank and no worker: a step's rows depend on neither."""
    with scene.lock:
        if scene.ledger is None:
            shape = Plan("unbroken", 1, 0, 5, ()).shape(1)
            root = scene.new_root()
            ended = wait(scene.begin(shape, root, [_recorder(root, 0, 0)]))
            assert ended.code == 0, ended.text
            scene.ledger = ledger(root)
    for epoch in range(STEPS // STEPS_PER_EPOCH):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        rows = [row for step in steps for row in scene.ledger[step]]
        assert sorted(rows) == list(range(48)), "the unbroken run itself does not take every row once an epoch"
    return scene.ledger


def _difference(expected: dict[int, list[int]], found: dict[int, list[int]]) -> str | None:
    for step in range(STEPS):
        if expected.get(step) != found.get(step):
            return f"step {step} took the rows {found.get(step)} and not {expected.get(step)}"
    return None if expected.keys() == found.keys() else f"steps {sorted(found)} were taken"
