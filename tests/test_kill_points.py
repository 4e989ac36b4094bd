"""The points of the kills: drawn from the seed, in the order of the run, and recognized at their instant."""

from collections import Counter

import pytest

from forge.proof.kill_points import Decision, KillPoint, KillTrigger, PlannedKill, Target, plan_kills
from forge.proof.watch import Snapshot, Timings
from forge.run.state import Stage, TrainingState

WAIT, KILL, PAST = Decision.WAIT, Decision.KILL, Decision.PAST


def snapshot(
    stage: Stage, *, checkpoints: tuple[int, ...] = (), staging: int | None = None, name: str = "x"
) -> Snapshot:
    state = TrainingState(run_id="run", stage=stage, pipeline_complete=stage == Stage.COMPLETE, attempts=1)
    return Snapshot(state, {} if staging is None else {f".tmp-{staging}-{name}": staging}, checkpoints)


def timings() -> Timings:
    """Baseline from 1 s to 3 s, training to 23 s with saves of 0.4 s, export of 1 s, final evaluation of 2 s."""
    seen = Timings()
    seen.add(snapshot(Stage.SETUP), 0.5)
    seen.add(snapshot(Stage.BASELINE_EVALUATION), 1.0)
    seen.add(snapshot(Stage.TRAINING), 3.0)
    for step, begin in ((10, 8.0), (20, 13.0)):
        seen.add(snapshot(Stage.TRAINING, staging=step), begin)
        seen.add(snapshot(Stage.TRAINING, checkpoints=(step,)), begin + 0.4)
    seen.add(snapshot(Stage.EXPORT), 23.0)
    seen.add(snapshot(Stage.FINAL_EVALUATION), 24.0)
    seen.add(snapshot(Stage.COMPLETE), 26.0)
    return seen


def trigger(point: KillPoint, before: Snapshot | None = None, **options: float) -> KillTrigger:
    return KillTrigger(PlannedKill(point, **options), timings(), before or Snapshot(), 40)


def test_the_timings_are_what_was_seen() -> None:
    seen = timings()

    assert seen.until_training_s() == 2.5
    assert seen.until_first_save_s() == 5.0
    assert [seen.stage_s(stage) for stage in (Stage.BASELINE_EVALUATION, Stage.TRAINING, Stage.EXPORT)] == [2, 20, 1]
    assert seen.save_s() == pytest.approx(0.4)
    assert seen.total_s() == 26.0
    assert Timings().stage_s(Stage.EXPORT) == Timings().save_s() == Timings().until_training_s() == 0.0


def test_a_save_takes_the_median_of_those_seen() -> None:
    seen = Timings()
    for start, seconds in ((10.0, 0.1), (20.0, 5.0), (30.0, 0.3)):
        seen.add(snapshot(Stage.TRAINING, staging=int(start)), start)
        seen.add(snapshot(Stage.TRAINING), start + seconds)
    assert seen.save_s() == pytest.approx(0.3)


def test_ten_kills_take_every_enumerated_point_and_the_rest_at_random() -> None:
    kills = plan_kills(10, 1, 400, 0, baseline=True, final=True)

    assert Counter(kill.point for kill in kills) == {
        **dict.fromkeys(KillPoint, 1),
        **{KillPoint.RANDOM: 2, KillPoint.WITHIN_SAVE: 2},
    }
    order = [kill.point for kill in kills]
    assert order[:2] == [KillPoint.BASELINE, KillPoint.BEFORE_FIRST_SAVE]
    assert order[-2:] == [KillPoint.EXPORT, KillPoint.FINAL]
    steps = [kill.from_step for kill in kills[2:-2]]
    assert all(i * 400 // 6 <= step <= (i + 1) * 400 // 6 for i, step in enumerate(steps))
    assert all(0 <= kill.share < 1 for kill in kills)
    assert {kill.target for kill in kills} == {Target.ALL}


def test_few_kills_go_where_it_breaks_and_absent_evaluations_are_not_aimed_at() -> None:
    assert plan_kills(0, 1, 40, 0, baseline=True, final=True) == []
    few = plan_kills(3, 1, 40, 0, baseline=True, final=True)
    assert {kill.point for kill in few} == {KillPoint.SAVE_STARTS, KillPoint.WITHIN_SAVE, KillPoint.SAVED}
    (only,) = plan_kills(1, 1, 30, 0, baseline=True, final=True)  # with saves at 10, 20 and 30
    assert (only.point, only.from_step) == (KillPoint.SAVE_STARTS, 15)  # there is one to resume from
    none = plan_kills(30, 1, 40, 0, baseline=False, final=False)
    assert len(none) == 30
    assert {KillPoint.BASELINE, KillPoint.FINAL}.isdisjoint(kill.point for kill in none)


def test_the_seed_alone_decides_and_ranks_and_launcher_are_killed_too() -> None:
    one, same, other = (plan_kills(12, 4, 400, seed, baseline=True, final=True) for seed in (5, 5, 6))

    assert one == same
    assert one != other
    assert Counter(kill.target for kill in one) == {Target.ALL: 6, Target.ONE_RANK: 3, Target.LAUNCHER: 3}
    assert {kill.rank for kill in one} <= {0, 1, 2, 3}


def test_a_stage_is_waited_for_and_then_its_share_of_time() -> None:
    kill_trigger = trigger(KillPoint.EXPORT, share=0.5)  # at 0.7 * 0.5 * 1 s after it was first seen

    assert kill_trigger.decide(Snapshot(), 0.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING), 50.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.EXPORT), 60.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.EXPORT), 60.34) == WAIT
    assert kill_trigger.decide(snapshot(Stage.EXPORT), 60.36) == KILL
    assert kill_trigger.decide(snapshot(Stage.FINAL_EVALUATION), 60.36) == PAST


def test_a_save_beyond_the_step_is_met_as_it_begins_and_within() -> None:
    leftover = snapshot(Stage.TRAINING, staging=30, name="of a dead attempt", checkpoints=(20,))
    starts, within = (
        trigger(point, leftover, from_step=20, share=0.5) for point in (KillPoint.SAVE_STARTS, KillPoint.WITHIN_SAVE)
    )

    for kill_trigger in (starts, within):
        assert kill_trigger.decide(leftover, 1.0) == WAIT
        assert kill_trigger.decide(snapshot(Stage.TRAINING, staging=20), 2.0) == WAIT
    assert starts.decide(snapshot(Stage.TRAINING, staging=30), 3.0) == KILL
    assert within.decide(snapshot(Stage.TRAINING, staging=30), 3.0) == WAIT
    assert within.decide(snapshot(Stage.TRAINING, staging=30), 3.19) == WAIT
    assert within.decide(snapshot(Stage.TRAINING, checkpoints=(30,)), 3.21) == KILL  # this one was quicker
    assert starts.decide(snapshot(Stage.EXPORT), 4.0) == PAST


def test_a_new_checkpoint_is_met_but_not_an_old_one() -> None:
    kill_trigger = trigger(KillPoint.SAVED, snapshot(Stage.TRAINING, checkpoints=(10, 20)), from_step=15)

    assert kill_trigger.decide(snapshot(Stage.TRAINING, checkpoints=(10, 20)), 1.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING, checkpoints=(20, 30)), 2.0) == KILL
    assert trigger(KillPoint.SAVED, from_step=30).decide(snapshot(Stage.TRAINING, checkpoints=(20, 30)), 2.0) == WAIT


def test_before_the_first_checkpoint_means_before_it() -> None:
    kill_trigger = trigger(KillPoint.BEFORE_FIRST_SAVE, share=0.5)  # at 0.7 * 0.5 * 5 s of training

    assert kill_trigger.decide(snapshot(Stage.BASELINE_EVALUATION), 1.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING), 2.0) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING), 3.74) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING), 3.76) == KILL
    assert kill_trigger.decide(snapshot(Stage.TRAINING, checkpoints=(10,)), 3.76) == PAST


def test_a_random_instant_counts_the_steps_from_the_newest_checkpoint() -> None:
    newest = snapshot(Stage.TRAINING, checkpoints=(10, 20))
    kill_trigger = trigger(KillPoint.RANDOM, newest, from_step=30)  # at 2.5 s + 10 steps of 0.5 s

    assert kill_trigger.decide(snapshot(Stage.TRAINING), 7.4) == WAIT
    assert kill_trigger.decide(snapshot(Stage.TRAINING), 7.6) == KILL
    assert kill_trigger.decide(snapshot(Stage.FINAL_EVALUATION), 7.6) == KILL
    assert kill_trigger.decide(snapshot(Stage.COMPLETE), 7.6) == PAST
