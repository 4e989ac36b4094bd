"""A run resumes from its newest sound checkpoint; what is not sound is set aside and what is foreign is left alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from forge.checkpoint.manifest import (
    FORMAT,
    MODEL_FILES,
    OPTIMIZER_FILE,
    STATE_FILE,
    BadCheckpoint,
    Manifest,
    digest,
    rng_file,
    store,
    verify,
)
from forge.checkpoint.selection import checkpoints, remove_leftovers, select
from forge.errors import TrainingError
from forge.run.directory import RunDirectory
from forge.run.files import read_json
from forge.run.state import TrainingState

STATE = TrainingState(run_id="mine", latest_checkpoint="checkpoint-10")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with checkpoints of the steps 8, 9 and 10."""
    run = RunDirectory(tmp_path)
    for step in (8, 9, 10):
        write_checkpoint(run, step)
    run.latest_checkpoint_file.write_text("checkpoint-10\n")
    return run


def write_checkpoint(run: RunDirectory, step: int, run_id: str = "mine") -> Path:
    folder = run.checkpoint(step)
    folder.mkdir()
    names = (*MODEL_FILES, OPTIMIZER_FILE, STATE_FILE, rng_file(0))
    files = {name: store(folder / name, lambda file: file.write(b"bytes")) for name in names}  # type: ignore[arg-type,return-value]
    Manifest(
        format=FORMAT, run_id=run_id, attempt=1, step=step, epoch=0.5, samples=8 * step, tokens=80 * step, ranks=1,
        rows_per_step=8, mixed_precision="no", config={"training": {"seed": 1}}, config_hash="0", data_fingerprint="0",
        base=None, git_commit=None, versions={}, created_at="2026-11-23T00:00:00+00:00", files=files,
    ).write(folder)  # fmt: skip
    return folder


def test_the_newest_by_its_step_is_selected(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    selected = select(run, STATE)
    assert selected is not None
    folder, manifest = selected
    assert (folder.name, manifest.step, manifest.samples) == ("checkpoint-10", 10, 80)
    assert caplog.records == []
    assert [path.name for path in checkpoints(run)] == ["checkpoint-10", "checkpoint-9", "checkpoint-8"]


def test_a_damaged_one_is_renamed_with_its_reason_and_the_one_before_it_is_selected(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    (run.checkpoint(10) / OPTIMIZER_FILE).write_bytes(b"bites")
    selected = select(run, STATE)
    assert selected is not None
    assert selected[0].name == "checkpoint-9"
    aside = run.path / ".bad-checkpoint-10"
    assert "optimizer.pt" in read_json(aside / "quarantine.json")["reason"]
    assert "latest_checkpoint names checkpoint-10; resuming from checkpoint-9" in caplog.text
    write_checkpoint(run, 10, run_id="another")
    select(run, STATE)
    assert (run.path / ".bad-checkpoint-10-2").is_dir()


def test_a_checkpoint_of_another_run_or_step_is_bad(run: RunDirectory) -> None:
    write_checkpoint(run, 11, run_id="another")
    with pytest.raises(BadCheckpoint, match="another run, another"):
        verify(run.checkpoint(11), "mine")
    run.checkpoint(10).rename(run.checkpoint(12))
    with pytest.raises(BadCheckpoint, match="step 10"):
        verify(run.checkpoint(12), "mine")


def test_a_state_that_does_not_belong_to_the_checkpoints_is_refused_and_nothing_changes(run: RunDirectory) -> None:
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(TrainingError, match=r"belongs to the run theirs, but .* the run mine"):
        select(run, TrainingState(run_id="theirs"))
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_a_run_that_had_checkpoints_does_not_start_again_when_none_is_usable(run: RunDirectory) -> None:
    for folder in checkpoints(run):
        (folder / STATE_FILE).unlink()
    with pytest.raises(TrainingError, match=r"\.bad-checkpoint-10, \.bad-checkpoint-8, \.bad-checkpoint-9"):
        select(run, STATE)
    empty = RunDirectory(run.path / "empty")
    with pytest.raises(TrainingError, match="checkpoint-10 is gone"):
        select(empty, STATE)
    assert select(empty, TrainingState(run_id="mine")) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "10"}, "step is '10'"),
        ({"files": {"model.safetensors": {"bytes": 5}}}, "files.model.safetensors.sha256 is missing"),
    ],
)
def test_a_manifest_with_other_keys_or_types_is_bad_though_its_checksum_matches(
    change: dict[str, Any], words: str, run: RunDirectory
) -> None:
    file = run.checkpoint(10) / "manifest.json"
    values = {**json.loads(file.read_text()), **change}
    del values["digest"]
    file.write_text(json.dumps({**values, "digest": digest(values)}))
    with pytest.raises(BadCheckpoint, match=words):
        Manifest.read(run.checkpoint(10))


@pytest.mark.parametrize("change", [{"colour": "red"}, {"files": {"model.safetensors": {"bytes": 5, "colour": "red"}}}])
def test_a_manifest_with_a_key_of_a_newer_forge_is_left_alone(change: dict[str, Any], run: RunDirectory) -> None:
    """Set aside as bad it would be lost to the forge that wrote it, and the run would go back to an older one."""
    file = run.checkpoint(10) / "manifest.json"
    values = {**json.loads(file.read_text()), **change}
    del values["digest"]
    file.write_text(json.dumps({**values, "digest": digest(values)}))
    with pytest.raises(TrainingError, match=r"checkpoint-10 was written by a newer forge: .*colour of its manifest"):
        select(run, STATE)
    assert run.checkpoint(10).is_dir()


def test_the_config_in_a_manifest_of_an_earlier_forge_has_the_keys_of_today(run: RunDirectory) -> None:
    manifest = Manifest.read(run.checkpoint(10))
    manifest.model_copy(update={"config": {"evaluation": {"max_samples": 5}}}).write(run.checkpoint(10))
    assert Manifest.read(run.checkpoint(10)).config == {"evaluation": {"max_rows": 5}}
    assert verify(run.checkpoint(10), "mine").step == 10


def test_a_manifest_is_written_as_it_was_read_byte_for_byte(run: RunDirectory) -> None:
    file = run.checkpoint(10) / "manifest.json"
    before = file.read_bytes()
    Manifest.read(run.checkpoint(10)).write(run.checkpoint(10))
    assert file.read_bytes() == before


def test_what_killed_attempts_left_half_written_is_deleted_and_a_link_is_not_followed(run: RunDirectory) -> None:
    for folder in (run.attempts, run.final, run.samples / ".tmp-step-8", run.path / ".trash-checkpoint-4-ab"):
        folder.mkdir(parents=True)
    for folder in (run.path, run.final, run.attempts):
        (folder / ".state.json.0123.tmp").write_text("{")
    (run.attempts / "1.json").write_text("{}")
    kept = run.path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (run.path / ".tmp-12-1-ab").symlink_to(kept)
    remove_leftovers(run)
    left = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if "checkpoint-" not in str(path))
    assert left == ["attempts", "attempts/1.json", "final", "kept", "kept/file", "latest_checkpoint", "samples"]
