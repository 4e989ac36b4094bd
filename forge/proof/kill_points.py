"""Plans at which points of a run a proof of resume kills it, and recognises those points from outside."""

import random
from dataclasses import dataclass
from enum import StrEnum

from forge.proof.watch import Snapshot, Timings
from forge.run.state import Stage


class KillPoint(StrEnum):
    """A point of a run at which it can be killed, as the certificate names it."""

    BASELINE = "in the baseline evaluation"
    BEFORE_FIRST_SAVE = "in training, before the first checkpoint"
    SAVE_STARTS = "as a save begins"
    WITHIN_SAVE = "within a save"
    SAVED = "right after a save"
    RANDOM = "at a random instant"
    EXPORT = "in the export"
    FINAL = "in the final evaluation"


class Target(StrEnum):
    """The processes that are killed: all when a machine fails, one when the system is out of memory."""

    ALL = "all processes"
    ONE_RANK = "one rank"
    LAUNCHER = "the launcher"


class Decision(StrEnum):
    """What to do about a planned kill at one instant."""

    WAIT = "wait"
    KILL = "kill"
    PAST = "past"  # the run has gone beyond the point


# The first few kills go to these points, in this order.
ENUMERATED = (
    *(KillPoint.SAVE_STARTS, KillPoint.WITHIN_SAVE, KillPoint.SAVED, KillPoint.EXPORT),
    *(KillPoint.BEFORE_FIRST_SAVE, KillPoint.FINAL, KillPoint.BASELINE),
)
# Further kills repeat this. Random instants rarely hit a save, which is what breaks, so every third goes to one.
REST = (KillPoint.RANDOM, KillPoint.RANDOM, KillPoint.WITHIN_SAVE)
STAGES = {
    KillPoint.BASELINE: Stage.BASELINE_EVALUATION,
    KillPoint.EXPORT: Stage.EXPORT,
    KillPoint.FINAL: Stage.FINAL_EVALUATION,
}
MARGIN = 0.7  # of a stage's time in the unbroken run: a stage may be over sooner this time


@dataclass(frozen=True)
class PlannedKill:
    """One kill that is to be made."""

    point: KillPoint
    target: Target = Target.ALL
    rank: int = 0  # for Target.ONE_RANK
    from_step: int = 0  # a save counts if its step is greater; a random instant is near this step
    share: float = 0.0  # how much of the stage or save passes before the kill, from 0 to 1


def plan_kills(
    kills: int, processes: int, total_steps: int, seed: int, *, baseline: bool, final: bool
) -> list[PlannedKill]:
    """Return the kills in the order in which the run reaches them.

    Args:
        kills: how many there are to be.
        processes: how many ranks train; with more than one, single ranks and the launcher are targets too.
        total_steps: of the whole run.
        seed: decides everything that is drawn.
        baseline: whether the run has a baseline evaluation.
        final: whether it has a final evaluation.
    """
    draw = random.Random(seed)
    absent = {*([] if baseline else [KillPoint.BASELINE]), *([] if final else [KillPoint.FINAL])}
    chosen = [point for point in ENUMERATED if point not in absent][:kills]
    chosen += [REST[i % len(REST)] for i in range(kills - len(chosen))]
    in_training = [point for point in chosen if point not in STAGES and point != KillPoint.BEFORE_FIRST_SAVE]
    draw.shuffle(in_training)
    places: list[tuple[KillPoint, int]] = [
        (point, 0) for point in (KillPoint.BASELINE, KillPoint.BEFORE_FIRST_SAVE) if point in chosen
    ]
    for i, point in enumerate(in_training):
        # One kill in each of equal stretches of training, so that the run makes progress in between. A save is hit in
        # the second half of its stretch: then a single kill too comes after a checkpoint to resume from.
        share = draw.random() if point == KillPoint.RANDOM else 0.5
        places.append((point, int((i + share) * total_steps / len(in_training))))
    places += [(point, 0) for point in (KillPoint.EXPORT, KillPoint.FINAL) if point in chosen]
    targets = [Target.ALL, Target.ONE_RANK, Target.ALL, Target.LAUNCHER] if processes > 1 else [Target.ALL]
    draw.shuffle(targets)
    return [
        PlannedKill(point, targets[i % len(targets)], draw.randrange(processes), step, draw.random())
        for i, (point, step) in enumerate(places)
    ]


class KillTrigger:
    """Decides when to make a planned kill, from the snapshots of one attempt."""

    def __init__(self, kill: PlannedKill, timings: Timings, before: Snapshot, total_steps: int):
        """timings: of the unbroken run. before: the snapshot from before this attempt."""
        self._kill, self._timings, self._before, self._total_steps = kill, timings, before, total_steps
        self._since: float | None = None  # when the stage or save in question was first seen

    def decide(self, snapshot: Snapshot, seconds: float) -> Decision:
        """Return what to do now. seconds: since the attempt took the run over."""
        if snapshot.state is None:
            return Decision.WAIT
        if snapshot.state.pipeline_complete:
            return Decision.PAST
        point, stage = self._kill.point, snapshot.state.stage
        if point == KillPoint.RANDOM:
            return Decision.KILL if seconds >= self._random_instant_s() else Decision.WAIT
        wanted = STAGES.get(point, Stage.TRAINING)
        if stage.order > wanted.order or (point == KillPoint.BEFORE_FIRST_SAVE and snapshot.checkpoints):
            return Decision.PAST
        if self._since is None:
            if not self._reached(snapshot, stage):
                return Decision.WAIT
            self._since = seconds
        return Decision.KILL if seconds - self._since >= self._delay_s() else Decision.WAIT

    def _reached(self, snapshot: Snapshot, stage: Stage) -> bool:
        """True if the stage or save in question has begun."""
        point, from_step = self._kill.point, self._kill.from_step
        if point == KillPoint.SAVED:
            known = max([from_step, *self._before.checkpoints])
            return any(step > known for step in snapshot.checkpoints)
        if point in (KillPoint.SAVE_STARTS, KillPoint.WITHIN_SAVE):  # not what earlier attempts have left
            staging = snapshot.staging.items()
            return any(step > from_step and name not in self._before.staging for name, step in staging)
        return stage == STAGES.get(point, Stage.TRAINING)

    def _delay_s(self) -> float:
        timings, point, share = self._timings, self._kill.point, self._kill.share
        if point in STAGES:
            return MARGIN * share * timings.stage_s(STAGES[point])
        if point == KillPoint.BEFORE_FIRST_SAVE:
            return MARGIN * share * timings.until_first_save_s()
        return share * timings.save_s() if point == KillPoint.WITHIN_SAVE else 0.0

    def _random_instant_s(self) -> float:
        steps = max(0, self._kill.from_step - max(self._before.checkpoints, default=0))
        training_s = self._timings.stage_s(Stage.TRAINING)
        return self._timings.until_training_s() + training_s * steps / max(1, self._total_steps)
