"""What a training saves and when, what it keeps, what it goes on from, and what no failure of a save costs."""

import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import trajectory

from forge.checkpoint.contents import restore, take_snapshot, write_snapshot
from forge.errors import Stopped, Superseded, TrainingError, UsageError
from forge.run.files import read_json, write_json
from forge.run.state import BestEvaluation

Build = Callable[..., Any]


def test_only_the_last_checkpoints_stay(build_trainer: Build) -> None:
    trainer = build_trainer("checkpoint.every_steps=1", "checkpoint.keep_last=2")
    trainer.train()

    assert checkpoint_names(trainer) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert trainer.attempt.run.latest_checkpoint_file.read_text() == "checkpoint-6\n"


def test_the_best_checkpoint_stays_beside_the_last(build_trainer: Build) -> None:
    trainer = build_trainer(
        *("evaluation.every_steps=1", "checkpoint.every_steps=null", "checkpoint.best_metric=matched/ce"),
        "checkpoint.keep_last=1",
    )
    values = iter([0.9, 0.5, 0.7, 0.6, 0.8])
    trainer.evaluate = lambda stage: {"matched/ce": next(values)}
    trainer.train()

    assert trainer.state.best_metric == BestEvaluation(name="matched/ce", value=0.5, step=2)
    assert [step for step, _ in trainer.attempt.callbacks.saves] == [1, 2]  # only where it got better
    assert [path.name for path in trainer.attempt.run.path.glob("checkpoint-*")] == ["checkpoint-2"]

    settings = ("evaluation.every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    trainer = build_trainer(*settings)
    values = iter([0.2, 0.9, 0.7, 0.9, 0.8])
    trainer.evaluate = lambda stage: {"matched/accuracy": next(values), "matched/ce": 0.0}
    trainer.train()
    assert trainer.state.best_metric == BestEvaluation(name="matched/accuracy", value=0.9, step=2)  # the first of two
    assert checkpoint_names(trainer) == [
        "checkpoint-2",
        "checkpoint-6",
    ]

    trainer = build_trainer(*settings, "checkpoint.keep_best=false")
    trainer.train()
    assert [path.name for path in trainer.attempt.run.path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_an_unknown_best_metric_is_named_beside_those_there_are(build_trainer: Build) -> None:
    trainer = build_trainer("evaluation.every_steps=1", "checkpoint.best_metric=matched/bleu")
    with pytest.raises(UsageError, match=r"best_metric is matched/bleu, .* matched/ce, matched/accuracy"):
        trainer.train()


def fail_to_write(monkeypatch: pytest.MonkeyPatch, steps: set[int], trainer: Any) -> None:
    import forge.checkpoint.contents as contents

    store = contents.store

    def failing(path: Any, write: Any) -> Any:
        stored = store(path, write)
        if trainer.state.step in steps and path.name == "optimizer.pt":
            raise OSError(28, "No space left on device")
        return stored

    monkeypatch.setattr(contents, "store", failing)


def test_a_save_that_fails_is_told_of_and_training_goes_on(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("checkpoint.every_steps=2", "checkpoint.keep_last=3")
    fail_to_write(monkeypatch, {4}, trainer)
    trainer.train()

    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "checkpoint-4" in error
    assert "No space left on device); the newest checkpoint is checkpoint-2" in error
    assert trainer.state.latest_checkpoint == "checkpoint-6"
    assert sorted(path.name for path in trainer.attempt.run.path.iterdir()) == [
        *(".lock", "attempts", "checkpoint-2", "checkpoint-6", "latest_checkpoint", "training_state.json"),
    ]


def test_three_saves_that_fail_in_a_row_end_the_run(build_trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer("checkpoint.every_steps=1")
    fail_to_write(monkeypatch, {2, 3, 4}, trainer)
    with pytest.raises(TrainingError, match=r"checkpoint-4 .*checkpoint-1, and 3 saves"):
        trainer.train()
    assert [path.name for path in trainer.attempt.run.path.glob("*checkpoint-*")] == ["checkpoint-1"]


def test_saves_that_fail_with_a_good_one_between_do_not_end_the_run(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer("checkpoint.every_steps=1")
    fail_to_write(monkeypatch, {1, 2, 4, 5}, trainer)
    trainer.train()
    assert trainer.state.latest_checkpoint == "checkpoint-6"


def test_a_save_that_fails_at_a_stop_is_no_clean_stop(build_trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer("checkpoint.every_steps=2")
    fail_to_write(monkeypatch, {3}, trainer)
    stop_at(trainer, 3)
    with pytest.raises(TrainingError, match=r"checkpoint-3 .*newest checkpoint is checkpoint-2"):
        trainer.train()


def test_a_checkpoint_that_would_not_fit_on_the_disk_is_not_begun(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("checkpoint.every_steps=3")
    usage = shutil.disk_usage(trainer.attempt.run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    trainer.train()

    assert "it needs 0.3 MiB and 0.3 MiB to spare, but only 0.4 MiB are free" in caplog.text
    assert trainer.state.latest_checkpoint is None
    assert not list(trainer.attempt.run.path.glob("*checkpoint*"))
    assert not list(trainer.attempt.run.path.glob(".tmp*"))


def checkpoint_names(trainer: Any) -> list[str]:
    return sorted(path.name for path in trainer.attempt.run.path.glob("checkpoint-*"))


def stop_at(trainer: Any, step: int) -> None:
    def stepped(state: Any) -> None:
        if state.step == step:
            trainer.attempt.ranks.stop.reason = "SIGTERM"

    trainer.attempt.callbacks.stepped = stepped


def test_a_stop_commits_the_step_it_comes_at_and_a_resume_ends_the_same(build_trainer: Build) -> None:
    """Off the grids of logging and checkpoints, with dropout: the report that was begun is part of what is kept."""
    settings = ("model.dropout=0.1", "logging.every_steps=4", "training.max_steps=10", "evaluation.every_steps=5")
    unbroken = build_trainer(*settings)
    losses, weights = trajectory(unbroken)

    stopped = build_trainer(*settings)
    stop_at(stopped, 5)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        stopped.train()
    assert stopped.state.latest_checkpoint == "checkpoint-5"
    assert stopped.attempt.callbacks.evaluations == []  # broken off
    assert (stopped.state.samples, stopped.state.evaluated_step) == (40, 0)
    before = [report["loss"] for report in stopped.attempt.callbacks.reports]
    run = stopped.attempt.run

    resumed = build_trainer(*settings)
    resumed.restore(run.path / "checkpoint-5")
    more, resumed_weights = trajectory(resumed)
    assert before + more == losses
    assert resumed_weights == weights
    assert resumed.attempt.callbacks.evaluations == [("training", 5)]  # made up for
    assert resumed.state.tokens == unbroken.state.tokens > 1000


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_restored_trainer_ends_where_the_unbroken_one_does(asynchronous: str, build_trainer: Build) -> None:
    """With dropout: the random numbers are part of what is restored."""
    settings = ("model.dropout=0.1", "checkpoint.every_steps=2", "checkpoint.keep_last=3")
    unbroken = build_trainer(*settings, f"checkpoint.asynchronous={asynchronous}")
    _, weights = trajectory(unbroken)
    assert [step for step, _ in unbroken.attempt.callbacks.saves] == [2, 4, 6]
    assert sorted(path.name for path in unbroken.attempt.run.path.glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-4", "checkpoint-6")
    ]

    resumed = build_trainer(*settings)
    resumed.restore(unbroken.attempt.run.path / "checkpoint-4")
    assert resumed.state.step == 4
    losses, resumed_weights = trajectory(resumed)
    assert losses == [report["loss"] for report in unbroken.attempt.callbacks.reports[4:]]
    assert resumed_weights == weights


def test_a_checkpoint_loads_with_from_pretrained_and_safetensors_reads_what_forge_streamed(
    build_trainer: Build,
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    trainer = build_trainer()
    trainer.train()
    folder = trainer.attempt.run.path / "checkpoint-6"
    own = trainer.model.state_dict()
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(own)
    assert all(torch.equal(saved[name], own[name]) for name in own)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[name], own[name]) for name in own)


def test_the_manifest_says_where_the_checkpoint_stands(build_trainer: Build) -> None:
    trainer = build_trainer("training.batch_size=20", "training.max_steps=4", "checkpoint.every_steps=4")
    trainer.train()
    manifest = read_json(trainer.attempt.run.path / "checkpoint-4" / "manifest.json")

    assert (manifest["step"], manifest["samples"], manifest["rows_per_step"]) == (4, 48 + 20, 20)
    assert manifest["tokens"] == trainer.state.tokens
    assert manifest["epoch"] == pytest.approx(68 / 48)
    assert manifest["data_fingerprint"] == trainer.task.fingerprint
    assert manifest["config"]["training"]["batch_size"] == 20
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "optimizer.pt", "state.json", "rng-00000.pt"}


def test_an_outdated_attempt_commits_and_reports_nothing(build_trainer: Build) -> None:
    trainer = build_trainer("checkpoint.every_steps=2", "logging.every_steps=100")

    def overtaken(state: Any) -> None:
        if state.step == 3:
            (trainer.attempt.run.attempts / "2.json").write_text("{}")

    trainer.attempt.callbacks.stepped = overtaken
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        trainer.train()
    assert [path.name for path in trainer.attempt.run.path.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert not list(trainer.attempt.run.path.glob(".tmp*"))


def slow_writer(monkeypatch: pytest.MonkeyPatch, trainer: Any, steps: int) -> None:
    """Lets the files of a save be written only once so many more steps are taken; they are waited for by name."""
    import forge.checkpoint.contents as contents

    store, begun = contents.store, trainer.state.step

    def slow(path: Any, write: Any) -> Any:
        if not is_main_thread():
            wanted = int(path.parent.name.split("-")[1]) + steps
            while trainer.state.step < min(wanted, trainer.total_steps):
                time.sleep(0.001)
        return store(path, write)

    assert begun == 0
    monkeypatch.setattr(contents, "store", slow)


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_an_asynchronous_save_holds_the_step_it_was_taken_at(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer is slower than the steps, and the report goes on while it writes."""
    settings = ("model.dropout=0.1", "logging.every_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    unbroken = build_trainer(*settings, "training.max_steps=8")
    losses, weights = trajectory(unbroken)
    trainer = build_trainer(*settings, "training.max_steps=8", "checkpoint.asynchronous=true")
    slow_writer(monkeypatch, trainer, steps=1)
    trainer.train()
    assert [step for step, _ in trainer.attempt.callbacks.saves] == [2, 4, 6, 8]
    run = trainer.attempt.run

    for step in (2, 6):
        resumed = build_trainer(*settings, "training.max_steps=8")
        resumed.restore(run.path / f"checkpoint-{step}")
        more, resumed_weights = trajectory(resumed)
        assert more == losses[step // 4 :]
        assert resumed_weights == weights


def test_a_writer_that_ends_in_an_unknown_way_commits_nothing(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import forge.checkpoint.contents as contents

    trainer = build_trainer("checkpoint.every_steps=2", "checkpoint.keep_last=1", "checkpoint.asynchronous=true")
    store = contents.store

    def out_of_memory(path: Any, write: Any) -> Any:
        if "-4-" in path.parent.name:
            raise MemoryError("no room")
        return store(path, write)

    monkeypatch.setattr(contents, "store", out_of_memory)
    trainer.train()
    assert "rank 0: MemoryError: no room" in caplog.text
    assert [path.name for path in trainer.attempt.run.path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_manifest_without_the_files_of_a_checkpoint_is_none(build_trainer: Build) -> None:
    from forge.checkpoint.manifest import BadCheckpoint, Manifest, verify

    trainer = build_trainer("checkpoint.every_steps=6")
    trainer.train()
    folder = trainer.attempt.run.path / "checkpoint-6"
    manifest = Manifest.read(folder)
    assert verify(folder, trainer.state.run_id) == manifest
    for name in manifest.files:
        files = {key: file for key, file in manifest.files.items() if key != name}
        manifest.model_copy(update={"files": files}).write(folder)
        with pytest.raises(BadCheckpoint, match=f"does not list {name}"):
            verify(folder, trainer.state.run_id)
    manifest.model_copy(update={"ranks": 2}).write(folder)
    with pytest.raises(BadCheckpoint, match=r"does not list rng-00001\.pt"):
        verify(folder, trainer.state.run_id)


def test_what_cannot_be_read_now_or_by_this_forge_is_not_called_bad(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import forge.checkpoint.manifest as manifests
    from forge.checkpoint.selection import select

    trainer = build_trainer("checkpoint.every_steps=3")
    trainer.train()
    run, state = trainer.attempt.run, trainer.state
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "sha256_of", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        with pytest.raises(TrainingError, match=r"cannot be read now \(Stale file handle\)"):
            select(run, state)
    manifest = manifests.Manifest.read(run.path / "checkpoint-6")
    for other in (1, 2, 4):
        manifest.model_copy(update={"format": other}).write(run.path / "checkpoint-6")
        with pytest.raises(TrainingError, match=rf"checkpoint-6 has format {other}, .*format 3"):
            select(run, state)
    assert sorted(path.name for path in run.path.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_the_old_best_stays_until_the_new_one_is_committed(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("evaluation.every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    trainer = build_trainer(*settings)
    values = iter([0.5, 0.1, 0.9, 0.2, 0.3])
    trainer.evaluate = lambda stage: {"matched/accuracy": next(values)}
    fail_to_write(monkeypatch, {3}, trainer)
    trainer.train()

    assert trainer.state.best_metric == BestEvaluation(name="matched/accuracy", value=0.9, step=3)
    assert trainer.state.kept_best == 1
    assert checkpoint_names(trainer) == [
        "checkpoint-1",
        "checkpoint-6",
    ]


def test_a_short_newest_checkpoint_does_not_count_as_kept(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("checkpoint.every_steps=2", "checkpoint.keep_last=2")
    trainer.train()
    assert trainer.attempt.checkpoints._outdated(trainer.state) == []
    shutil.copytree(trainer.attempt.run.path / "checkpoint-4", trainer.attempt.run.path / "checkpoint-2")
    assert [path.name for path in trainer.attempt.checkpoints._outdated(trainer.state)] == ["checkpoint-2"]

    (trainer.attempt.run.path / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut")
    assert trainer.attempt.checkpoints._outdated(trainer.state) == []
    assert "checkpoint-6 is not complete: optimizer.pt has 3 bytes" in caplog.text


def test_the_best_metric_and_the_evaluations_that_were_made_are_restored(build_trainer: Build) -> None:
    settings = ("evaluation.every_steps=2", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    trainer = build_trainer(*settings)
    values = iter([0.9, 0.5])
    trainer.evaluate = lambda stage: {"matched/accuracy": next(values)}
    trainer.train()
    run = trainer.attempt.run

    resumed = build_trainer(*settings)
    resumed.restore(run.path / "checkpoint-4")
    assert resumed.state.best_metric == BestEvaluation(name="matched/accuracy", value=0.9, step=2)
    assert (resumed.state.kept_best, resumed.state.evaluated_step) == (2, 4)
    resumed.train()
    assert resumed.attempt.callbacks.evaluations == []  # that of step 4 is made, that of step 6 follows at once


def test_an_existing_checkpoint_is_never_replaced(build_trainer: Build, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer("checkpoint.every_steps=3")
    (trainer.attempt.run.path / "checkpoint-3").mkdir()
    (trainer.attempt.run.path / "checkpoint-3" / "of a later attempt").touch()
    trainer.train()
    assert "checkpoint-3 exists already" in caplog.text
    assert (trainer.attempt.run.path / "checkpoint-3" / "of a later attempt").exists()
    assert not list(trainer.attempt.run.path.glob(".tmp*"))


def test_a_file_system_that_loses_bytes_without_a_word_gets_nothing_named(
    build_trainer: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import forge.checkpoint.commit as commit

    for name, told in (("manifest.json", "cannot be read"), ("optimizer.pt", "bytes instead of")):
        trainer = build_trainer("checkpoint.every_steps=3", "training.max_steps=3")
        write = commit.Manifest.write

        def losing(manifest: Any, folder: Any, name: str = name, write: Any = write) -> None:
            write(manifest, folder)
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(commit.Manifest, "write", losing)
            trainer.train()
        assert told in caplog.text
        assert not list(trainer.attempt.run.path.glob("*checkpoint-*"))
        caplog.clear()


def test_every_random_number_generator_is_restored(build_trainer: Build, tmp_path: Path) -> None:
    trainer = build_trainer()
    folder = tmp_path / "checkpoint-0"
    folder.mkdir()
    write_snapshot(take_snapshot(trainer.training, trainer.state, {}, copy=False), folder)
    drawn = draws()
    assert draws() != drawn
    for restored in range(2):
        restore(trainer.training, folder)
        assert draws() == drawn, restored


def test_a_rank_that_the_checkpoint_does_not_know_draws_numbers_of_its_own(build_trainer: Build) -> None:
    trainer = build_trainer("model.dropout=0.1", "checkpoint.every_steps=3", "checkpoint.keep_last=2")
    trainer.train()

    def drawn_by(rank: int, step: int) -> list[float]:
        accelerator = SimpleNamespace(process_index=rank, scaler=None)
        restore(replace(trainer.training, accelerator=accelerator), trainer.attempt.run.path / f"checkpoint-{step}")
        return torch.rand(4).tolist()

    numbers = [drawn_by(rank, step) for rank in range(3) for step in (3, 6)]
    assert len({tuple(drawn) for drawn in numbers}) == 6  # by rank and by step
    assert drawn_by(2, 6) == numbers[-1]


def test_a_state_of_a_newer_forge_in_a_checkpoint_is_refused(build_trainer: Build) -> None:
    trainer = build_trainer("checkpoint.every_steps=3")
    trainer.train()
    file = trainer.attempt.run.path / "checkpoint-6" / "state.json"
    values = read_json(file)
    assert list(values) == ["state", "progress"]
    write_json(file, values | {"state": values["state"] | {"colour": "red"}})
    with pytest.raises(UsageError, match=r"state\.json was written by a newer forge.*state\.colour"):
        trainer.restore(file.parent)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))
