"""Sets the clock and the time stamps of checkpoints wrong: the same checkpoint must be chosen."""

import os
import random

from faults.attempts import Setup, wait
from faults.corruption import Donors, flip_byte
from faults.crash import injector
from faults.scene import Scene, Shape, checkpoint_names, closed, run_of
from faults.trials import Trial

YEAR_DAYS = 365.25


def clock_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """Each attempt has a clock of another year and is killed at a write; all time stamps are shuffled in between."""

    def trial(seed: int) -> Trial:
        def run() -> str | None:
            generator = random.Random(seed)
            root = scene.new_root()
            years = [generator.uniform(-20, 20) for _ in range(3)]
            for number, year in enumerate(years):
                setup: list[Setup] = [[_clock(year)] for _ in range(shape.ranks)]
                if number < 2:
                    aimed = injector(
                        root, 0, only=r"^(write|rename) .*(metrics|checkpoint)", at=generator.randrange(4, 30)
                    )
                    setup[0] = setup[0] + aimed
                ended = wait(scene.start_again(shape, root, setup))
                if ended.hung or (number == 2 and ended.code != 0):
                    return f"attempt {number + 1} in year {year:+.0f} ended with {ended.codes} [{root}]"
                _shuffle_stamps(root, generator)
            problem = scene.verdict(shape, root)
            return closed(problem, root)

        return Trial(f"seed {seed}", run)

    return [trial(seed) for seed in range(count)]


def stamp_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """The newest valid checkpoint by step is chosen, whatever the time stamps are."""
    donors = Donors(scene, shape)

    def trial(seed: int) -> Trial:
        def run() -> str | None:
            generator = random.Random(seed)
            root = donors.copy()
            expected = "checkpoint-4"
            if seed % 2:
                flip_byte(run_of(root), generator, donors)
                expected = "checkpoint-2"
            _shuffle_stamps(root, generator)
            clock: list[Setup] = [[_clock(generator.uniform(-20, 20))] for _ in range(shape.ranks)]
            ended = wait(scene.start_again(shape, root, clock))
            if ended.code != 0 or f"from {expected}" not in ended.text:
                return f"it did not resume from {expected} [{root}]"
            problem = scene.verdict(shape, root)
            return closed(problem, root)

        return Trial(f"seed {seed}", run)

    return [trial(seed) for seed in range(count)]


def _clock(years: float) -> tuple[str, dict[str, float]]:
    return "faults.changes:shift_clock", {"days": years * YEAR_DAYS}


def _shuffle_stamps(root: object, generator: random.Random) -> None:
    run = run_of(root)  # type: ignore[arg-type]
    for name in checkpoint_names(run):
        for path in (run / name, *(run / name).iterdir()):
            stamp = generator.uniform(0, 2e9)
            os.utime(path, (stamp, stamp))
