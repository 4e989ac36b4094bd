"""The points of the kills: drawn from the seed, in the order of the run, and recognized at their instant."""

from collections import Counter

import pytest

from forge.proof.kill_points import Aim, Decision, Marksman, Point, Victim, plan_kills
from forge.proof.watch import Sight, Tempo
from forge.run.state import Stage, TrainingState

WAIT, KILL, PAST = Decision.WAIT, Decision.KILL, Decision.PAST


def sight(stage: Stage, *, checkpoints: tuple[int, ...] = (), staging: int | None = None, name: str = "x") -> Sight:
    state = TrainingState("run", stage, pipeline_complete=stage == Stage.COMPLETE, attempts=1)
    return Sight(state, {} if staging is None else {f".tmp-{staging}-{name}": staging}, checkpoints)


def tempo() -> Tempo:
    """Baseline from 1 s to 3 s, training to 23 s with saves of 0.4 s, export of 1 s, final evaluation of 2 s."""
    seen = Tempo()
    seen.see(sight(Stage.SETUP), 0.5)
    seen.see(sight(Stage.BASELINE_EVALUATION), 1.0)
    seen.see(sight(Stage.TRAINING), 3.0)
    for step, begin in ((10, 8.0), (20, 13.0)):
        seen.see(sight(Stage.TRAINING, staging=step), begin)
        seen.see(sight(Stage.TRAINING, checkpoints=(step,)), begin + 0.4)
    seen.see(sight(Stage.EXPORT), 23.0)
    seen.see(sight(Stage.FINAL_EVALUATION), 24.0)
    seen.see(sight(Stage.COMPLETE), 26.0)
    return seen


def marksman(aim: Aim, before: Sight | None = None, **point: float) -> Marksman:
    return Marksman(Point(aim, **point), tempo(), before or Sight(), 40)


def test_the_tempo_is_what_was_seen() -> None:
    seen = tempo()

    assert seen.to_training_s() == 2.5
    assert seen.to_first_save_s() == 5.0
    assert [seen.of_stage_s(stage) for stage in (Stage.BASELINE_EVALUATION, Stage.TRAINING, Stage.EXPORT)] == [2, 20, 1]
    assert seen.of_save_s() == pytest.approx(0.4)
    assert seen.total_s() == 26.0
    assert Tempo().of_stage_s(Stage.EXPORT) == Tempo().of_save_s() == Tempo().to_training_s() == 0.0


def test_ten_kills_take_every_enumerated_point_and_the_rest_at_random() -> None:
    points = plan_kills(10, 1, 400, 0, baseline=True, final=True)

    assert Counter(point.aim for point in points) == {
        **dict.fromkeys(Aim, 1),
        **{Aim.RANDOM: 2, Aim.WITHIN_SAVE: 2},
    }
    order = [point.aim for point in points]
    assert order[:2] == [Aim.BASELINE, Aim.BEFORE_FIRST_SAVE]
    assert order[-2:] == [Aim.EXPORT, Aim.FINAL]
    steps = [point.from_step for point in points[2:-2]]
    assert all(i * 400 // 6 <= step <= (i + 1) * 400 // 6 for i, step in enumerate(steps))
    assert all(0 <= point.share < 1 for point in points)
    assert {point.victim for point in points} == {Victim.ALL}


def test_few_kills_go_where_it_breaks_and_absent_evaluations_are_not_aimed_at() -> None:
    assert plan_kills(0, 1, 40, 0, baseline=True, final=True) == []
    few = plan_kills(3, 1, 40, 0, baseline=True, final=True)
    assert {point.aim for point in few} == {Aim.SAVE_STARTS, Aim.WITHIN_SAVE, Aim.SAVED}
    (only,) = plan_kills(1, 1, 30, 0, baseline=True, final=True)  # with saves at 10, 20 and 30
    assert (only.aim, only.from_step) == (Aim.SAVE_STARTS, 15)  # there is one to resume from
    none = plan_kills(30, 1, 40, 0, baseline=False, final=False)
    assert len(none) == 30
    assert {Aim.BASELINE, Aim.FINAL}.isdisjoint(point.aim for point in none)


def test_the_seed_alone_decides_and_ranks_and_launcher_are_killed_too() -> None:
    one, same, other = (plan_kills(12, 4, 400, seed, baseline=True, final=True) for seed in (5, 5, 6))

    assert one == same
    assert one != other
    assert Counter(point.victim for point in one) == {Victim.ALL: 6, Victim.ONE_RANK: 3, Victim.LAUNCHER: 3}
    assert {point.rank for point in one} <= {0, 1, 2, 3}


def test_a_stage_is_waited_for_and_then_its_share_of_time() -> None:
    aimed = marksman(Aim.EXPORT, share=0.5)  # at 0.7 * 0.5 * 1 s after its first sight

    assert aimed.decide(Sight(), 0.0) == WAIT
    assert aimed.decide(sight(Stage.TRAINING), 50.0) == WAIT
    assert aimed.decide(sight(Stage.EXPORT), 60.0) == WAIT
    assert aimed.decide(sight(Stage.EXPORT), 60.34) == WAIT
    assert aimed.decide(sight(Stage.EXPORT), 60.36) == KILL
    assert aimed.decide(sight(Stage.FINAL_EVALUATION), 60.36) == PAST


def test_a_save_beyond_the_step_is_met_as_it_begins_and_within() -> None:
    leftover = sight(Stage.TRAINING, staging=30, name="of a dead attempt", checkpoints=(20,))
    starts, within = (marksman(aim, leftover, from_step=20, share=0.5) for aim in (Aim.SAVE_STARTS, Aim.WITHIN_SAVE))

    for aimed in (starts, within):
        assert aimed.decide(leftover, 1.0) == WAIT
        assert aimed.decide(sight(Stage.TRAINING, staging=20), 2.0) == WAIT
    assert starts.decide(sight(Stage.TRAINING, staging=30), 3.0) == KILL
    assert within.decide(sight(Stage.TRAINING, staging=30), 3.0) == WAIT
    assert within.decide(sight(Stage.TRAINING, staging=30), 3.19) == WAIT
    assert within.decide(sight(Stage.TRAINING, checkpoints=(30,)), 3.21) == KILL  # this one was quicker
    assert starts.decide(sight(Stage.EXPORT), 4.0) == PAST


def test_a_new_checkpoint_is_met_but_not_an_old_one() -> None:
    aimed = marksman(Aim.SAVED, sight(Stage.TRAINING, checkpoints=(10, 20)), from_step=15)

    assert aimed.decide(sight(Stage.TRAINING, checkpoints=(10, 20)), 1.0) == WAIT
    assert aimed.decide(sight(Stage.TRAINING, checkpoints=(20, 30)), 2.0) == KILL
    assert marksman(Aim.SAVED, from_step=30).decide(sight(Stage.TRAINING, checkpoints=(20, 30)), 2.0) == WAIT


def test_before_the_first_checkpoint_means_before_it() -> None:
    aimed = marksman(Aim.BEFORE_FIRST_SAVE, share=0.5)  # at 0.7 * 0.5 * 5 s of training

    assert aimed.decide(sight(Stage.BASELINE_EVALUATION), 1.0) == WAIT
    assert aimed.decide(sight(Stage.TRAINING), 2.0) == WAIT
    assert aimed.decide(sight(Stage.TRAINING), 3.74) == WAIT
    assert aimed.decide(sight(Stage.TRAINING), 3.76) == KILL
    assert aimed.decide(sight(Stage.TRAINING, checkpoints=(10,)), 3.76) == PAST


def test_a_random_instant_counts_the_steps_from_the_newest_checkpoint() -> None:
    aimed = marksman(Aim.RANDOM, sight(Stage.TRAINING, checkpoints=(10, 20)), from_step=30)  # 2.5 s + 10 of 0.5 s

    assert aimed.decide(sight(Stage.TRAINING), 7.4) == WAIT
    assert aimed.decide(sight(Stage.TRAINING), 7.6) == KILL
    assert aimed.decide(sight(Stage.FINAL_EVALUATION), 7.6) == KILL
    assert aimed.decide(sight(Stage.COMPLETE), 7.6) == PAST
