"""A run survives what `make faults` does to it: a choice of every kind, and a naive saver that must not survive."""

import logging
import re
from pathlib import Path

import pytest
from conftest import forge_on_two_ranks
from faults.contenders import at_once_trials, frozen_trials
from faults.corruption import DAMAGES, corruption_trials, none_left_trials, pointer_trials
from faults.crash import Event, chosen_points, crash_trial, events, random_trial
from faults.errors import error_trial
from faults.launchers import signal_trials
from faults.power import order_trials
from faults.samples import Plan, sample_trials
from faults.scene import Scene, Shape, ending, run_of
from faults.trials import Row, Trial, run_row, table

ONE, TWO, ONE_ASYNC = Shape(1), Shape(2), Shape(1, asynchronous=True)

# Where a save can break: (rank, pattern of the event, its how-manieth from 0, when, which ranks are killed).
AIMED = [
    (0, r"^write .*\.tmp-.*model\.safetensors", 3, "torn", (0,)),
    (0, r"^write .*\.tmp-.*state\.json", 1, "torn", (0,)),
    (0, r"^write .*manifest\.json", 1, "torn", (0,)),
    (0, r"^rename .*/checkpoint-4$", 0, "before", (0,)),
    (0, r"^rename .*/checkpoint-4$", 0, "after", (0,)),
    (0, r"^write .*/\.latest_checkpoint", 1, "torn", (0,)),
    (0, r"^rename .*/checkpoint-6$", 0, "after", (0,)),
    (0, r"^unlink .*\.trash-", 1, "before", (0,)),
    (0, r"^write .*/metrics\.jsonl", 4, "torn", (0,)),
    (0, r"^(replace|rename) .*/final$", 0, "before", (0,)),
]
AIMED_AT_TWO = [
    (1, r"^write .*\.tmp-.*rng-00001\.pt", 1, "torn", (1,)),
    (0, r"^write .*\.tmp-.*optimizer\.pt", 50, "torn", (0,)),
    (0, r"^rename .*/checkpoint-4$", 0, "before", (0, 1)),
]
# Where the naive saver must lose the run: it holds no whole checkpoint then, or a named half one.
NAIVE = [
    (0, r"^write .*checkpoint-2/model\.safetensors", 1, "torn", (0,)),
    (0, r"^write .*checkpoint-4/optimizer\.pt", 3, "torn", (0,)),
    (0, r"^write .*checkpoint-6/model\.safetensors", 1, "torn", (0,)),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("faults") / "scene")


@pytest.fixture(scope="module")
def recorded(scene: Scene) -> list[list[Event]]:
    return events(scene, ONE)


def survive(trials: list[Trial]) -> None:
    row = run_row(Row("a choice", trials), workers=2)
    assert row.failures == []
    assert row.survived == len(trials) > 0


@pytest.mark.multiprocess
def test_the_fork_server_runs_two_ranks_as_the_launcher_does(scene: Scene, tmp_path: Path) -> None:
    done = forge_on_two_ranks(*scene.arguments(TWO, tmp_path))

    assert done.returncode == 0, done.stderr
    assert scene.unbroken(TWO).difference(ending(run_of(tmp_path))) is None


def test_the_injector_sees_whatever_a_save_does(recorded: list[list[Event]]) -> None:
    seen = {(event.kind, re.sub(r"\d", "N", event.name)) for event in recorded[0]}
    staged = "tiny/run/.tmp-*-*/"

    for name in ("model.safetensors", "config.json", "optimizer.pt", "state.json", "rng-NNNNN.pt"):
        assert {(kind, staged + name) for kind in ("create", "write", "fsync")} <= seen
    assert ("replace", f"{staged}manifest.json") in seen
    assert ("rename", "tiny/run/checkpoint-N") in seen
    assert ("fsync", "tiny/run") in seen
    assert ("replace", "tiny/run/latest_checkpoint") in seen
    assert any(kind == "rename" and ".trash-" in name for kind, name in seen)
    assert any(kind == "rmdir" and ".trash-" in name for kind, name in seen)


def test_nothing_is_named_before_it_is_on_the_disk(recorded: list[list[Event]]) -> None:
    survive(order_trials(recorded))


@pytest.mark.parametrize(
    "name", ["/optimizer.pt", "/.tmp-*-*", "tiny/run", "/.manifest.json.*.tmp", "/.tmp-final-*/model.safetensors"]
)
def test_a_sync_that_is_left_out_is_found(name: str, recorded: list[list[Event]]) -> None:
    without = [event for event in recorded[0] if not (event.kind == "fsync" and event.name.endswith(name))]
    row = run_row(Row("order", order_trials([without])), 1)

    assert len(without) < len(recorded[0])
    assert row.failures


def test_a_run_killed_within_a_save_ends_like_the_unbroken_one(scene: Scene, recorded: list[list[Event]]) -> None:
    points = chosen_points(recorded, AIMED)
    survive([crash_trial(scene, ONE, point, again=100 if i == 4 else None) for i, point in enumerate(points)])


def test_a_save_of_two_ranks_survives_the_death_of_either_and_of_both(scene: Scene) -> None:
    survive([crash_trial(scene, TWO, point) for point in chosen_points(events(scene, TWO), AIMED_AT_TWO)])


def test_an_asynchronous_save_survives_too(scene: Scene) -> None:
    points = chosen_points(events(scene, ONE_ASYNC), [AIMED[i] for i in (0, 3, 4)])
    survive([crash_trial(scene, ONE_ASYNC, point) for point in points])


def test_a_naive_saver_does_not_survive_the_same_test(scene: Scene) -> None:
    naive = [("faults.naive_saver:install", {})]
    points = chosen_points(events(scene, ONE, naive), NAIVE)
    row = run_row(Row("naive", [crash_trial(scene, ONE, point, extra=naive) for point in points], must_fail=True), 2)

    assert row.good
    assert len(row.failures) == len(points), "the crash points let a naive saver through"


def test_random_kills_on_one_rank_and_on_two(scene: Scene) -> None:
    survive([random_trial(scene, ONE, 0), random_trial(scene, TWO, 0)])


def test_every_damage_to_the_newest_checkpoint_is_seen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    survive(corruption_trials(scene, ONE, 2 * len(DAMAGES), resume_every=19))
    survive(corruption_trials(scene, TWO, len(DAMAGES), resume_every=10_000, seed=1))


def test_pointers_are_hints_and_no_run_starts_afresh_where_checkpoints_were(scene: Scene) -> None:
    survive(pointer_trials(scene, ONE)[::9])
    survive(none_left_trials(scene, ONE, 1))


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_within_a_save_is_reported_and_costs_no_checkpoint(
    code: str, scene: Scene, recorded: list[list[Event]]
) -> None:
    points = chosen_points(recorded, [AIMED[0], (0, r"^fsync .*\.tmp-.*optimizer\.pt", 1, "before", (0,)), AIMED[3]])
    survive([error_trial(scene, ONE, point, code, lasting=code == "ENOSPC") for point in points])


def test_of_two_resumes_at_once_one_goes_on(scene: Scene) -> None:
    survive(at_once_trials(scene, ONE, 2))
    survive(at_once_trials(scene, TWO, 1))


def test_a_frozen_attempt_that_wakes_up_commits_nothing(scene: Scene) -> None:
    trials = {trial.name: trial for trial in frozen_trials(scene, ONE)}
    chosen = ("within a step", "before the manifest", "after the rename that commits")
    survive([trials[f"frozen {name}"] for name in chosen])


def test_a_signal_stops_all_ranks_at_one_step(scene: Scene) -> None:
    survive(signal_trials(scene, ONE, 2) + signal_trials(scene, TWO, 2))


def test_every_row_counts_once_over_all_attempts(scene: Scene) -> None:
    survive(
        sample_trials(
            scene,
            [
                Plan("in mid-accumulation", 4, 0, 2, (3 * 4 + 2,)),
                Plan("four times in one epoch", 1, 2, 1, (2, 1, 1, 1)),
                Plan("then one rank", 2, 0, 3, (4 * 2 + 1,), ranks=2, then_ranks=1),
            ],
        )
    )


def test_the_table_tells_a_lost_run_and_a_naive_saver_that_got_through() -> None:
    lost = run_row(Row("kills", [Trial("a", lambda: None), Trial("b", lambda: "lost")]), 1)
    raised = run_row(Row("raised", [Trial("c", lambda: str(1 / 0))]), 1)
    naive = run_row(Row("naive", [Trial("d", lambda: None)], must_fail=True), 1)

    assert (lost.percent, lost.good, lost.failures) == (50.0, False, [("b", "lost")])
    assert (raised.good, "ZeroDivisionError" in raised.failures[0][1]) == (False, True)
    assert (naive.percent, naive.good) == (0.0, False)
    assert not Row("empty", []).good
    assert "| kills | 2 | 50 % |" in table([lost])
