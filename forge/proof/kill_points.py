"""Where a run is killed when its resume is put to the test: drawn from a seed, and recognized from outside."""

import random
from dataclasses import dataclass
from enum import StrEnum

from forge.proof.watch import Sight, Tempo
from forge.run.state import Stage


class Aim(StrEnum):
    """The points at which a run is killed, in words."""

    BASELINE = "in the baseline evaluation"
    BEFORE_FIRST_SAVE = "in training, before the first checkpoint"
    SAVE_STARTS = "as a save begins"
    WITHIN_SAVE = "within a save"
    SAVED = "right after a save"
    RANDOM = "at a random instant"
    EXPORT = "in the export"
    FINAL = "in the final evaluation"


class Victim(StrEnum):
    """Who is killed. A machine that fails takes all; the others are what the system's memory killer does."""

    ALL = "all processes"
    ONE_RANK = "one rank"
    LAUNCHER = "the launcher"


class Decision(StrEnum):
    """What to do about a point at one instant."""

    WAIT = "wait"
    KILL = "kill"
    PAST = "past"  # the run has got beyond the point


# What is aimed at first where there are few kills; where there are more, the rest is drawn at random.
ENUMERATED = (
    *(Aim.SAVE_STARTS, Aim.WITHIN_SAVE, Aim.SAVED, Aim.EXPORT),
    *(Aim.BEFORE_FIRST_SAVE, Aim.FINAL, Aim.BASELINE),
)
# Random instants seldom meet a save, and a save is what breaks: every third of the rest is aimed at one.
REST = (Aim.RANDOM, Aim.RANDOM, Aim.WITHIN_SAVE)
STAGES = {Aim.BASELINE: Stage.BASELINE_EVALUATION, Aim.EXPORT: Stage.EXPORT, Aim.FINAL: Stage.FINAL_EVALUATION}
MARGIN = 0.7  # of what a stage took in the unbroken run: on a busy machine it may be over sooner


@dataclass(frozen=True)
class Point:
    """One kill that is to be."""

    aim: Aim
    victim: Victim = Victim.ALL
    rank: int = 0  # of ONE_RANK
    from_step: int = 0  # a save beyond this step; of a random instant, about where it lies
    share: float = 0.0  # of the time that the thing aimed at takes, before the kill


def plan_kills(kills: int, processes: int, total_steps: int, seed: int, *, baseline: bool, final: bool) -> list[Point]:
    """The kills in the order of the run. baseline, final: are these evaluations made?"""
    draw = random.Random(seed)
    absent = {*([] if baseline else [Aim.BASELINE]), *([] if final else [Aim.FINAL])}
    aims = [aim for aim in ENUMERATED if aim not in absent][:kills]
    aims += [REST[i % len(REST)] for i in range(kills - len(aims))]
    in_training = [aim for aim in aims if aim not in STAGES and aim != Aim.BEFORE_FIRST_SAVE]
    draw.shuffle(in_training)
    points: list[tuple[Aim, int]] = [(aim, 0) for aim in (Aim.BASELINE, Aim.BEFORE_FIRST_SAVE) if aim in aims]
    for i, aim in enumerate(in_training):
        # Each in a stretch of its own, so that the run gets on. A save is met in the second half of its stretch: also
        # after the only kill there is a checkpoint to resume from.
        share = draw.random() if aim == Aim.RANDOM else 0.5
        points.append((aim, int((i + share) * total_steps / len(in_training))))
    points += [(aim, 0) for aim in (Aim.EXPORT, Aim.FINAL) if aim in aims]
    victims = [Victim.ALL, Victim.ONE_RANK, Victim.ALL, Victim.LAUNCHER] if processes > 1 else [Victim.ALL]
    draw.shuffle(victims)
    return [
        Point(aim, victims[i % len(victims)], draw.randrange(processes), step, draw.random())
        for i, (aim, step) in enumerate(points)
    ]


class Marksman:
    """Tells the instant of a point, from what the run directory shows again and again during one attempt."""

    def __init__(self, point: Point, tempo: Tempo, before: Sight, total_steps: int):
        """tempo: of the unbroken run. before: the sight of the directory before the attempt began."""
        self._point, self._tempo, self._before, self._total_steps = point, tempo, before, total_steps
        self._since: float | None = None  # when the thing that is aimed at was first seen

    def decide(self, sight: Sight, seconds: float) -> Decision:
        """seconds: of any clock, since the attempt took the run over."""
        if sight.state is None:
            return Decision.WAIT
        if sight.state.pipeline_complete:
            return Decision.PAST
        aim, stage = self._point.aim, sight.state.stage
        if aim == Aim.RANDOM:
            return Decision.KILL if seconds >= self._random_instant_s() else Decision.WAIT
        wanted = STAGES.get(aim, Stage.TRAINING)
        if stage.order > wanted.order or (aim == Aim.BEFORE_FIRST_SAVE and sight.checkpoints):
            return Decision.PAST
        if self._since is None:
            if not self._begun(sight):
                return Decision.WAIT
            self._since = seconds
        return Decision.KILL if seconds - self._since >= self._delay_s() else Decision.WAIT

    def _begun(self, sight: Sight) -> bool:
        """Is the thing aimed at there?"""
        assert sight.state is not None
        aim, from_step = self._point.aim, self._point.from_step
        if aim == Aim.SAVED:
            known = max([from_step, *self._before.checkpoints])
            return any(step > known for step in sight.checkpoints)
        if aim in (Aim.SAVE_STARTS, Aim.WITHIN_SAVE):  # leftovers of the attempts before are none
            return any(step > from_step and name not in self._before.staging for name, step in sight.staging.items())
        return sight.state.stage == STAGES.get(aim, Stage.TRAINING)

    def _delay_s(self) -> float:
        tempo, aim = self._tempo, self._point.aim
        if aim in STAGES:
            return MARGIN * self._point.share * tempo.of_stage_s(STAGES[aim])
        if aim == Aim.BEFORE_FIRST_SAVE:
            return MARGIN * self._point.share * tempo.to_first_save_s()
        return self._point.share * tempo.of_save_s() if aim == Aim.WITHIN_SAVE else 0.0

    def _random_instant_s(self) -> float:
        steps = max(0, self._point.from_step - max(self._before.checkpoints, default=0))
        training_s = self._tempo.of_stage_s(Stage.TRAINING)
        return self._tempo.to_training_s() + training_s * steps / max(1, self._total_steps)
