"""A run that an earlier version started is read with its former names; a user's config with them is refused."""

import json
from pathlib import Path

import pytest
import yaml

from forge.checkpoint.manifest import FORMAT, MANIFEST_FILE, Manifest, StoredFile, digest
from forge.config.changes import changes
from forge.config.explain import effective, with_absolute_paths
from forge.config.former_names import KEYS, current_config, current_keys, current_metric, current_metrics
from forge.config.hints import all_keys
from forge.config.loader import load_config
from forge.errors import ConfigError
from forge.report.figures import read_config
from forge.run.directory import RunDirectory
from forge.run.metrics import read_metrics

START = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"
FORMER = START + "evaluation: {max_samples: 200, samples: 2}\n"
CURRENT = START + "evaluation: {max_rows: 200, shown_texts: 2}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "config.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def refused(text: str, *settings: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(write(text), settings)
    return raised.value.problems


def test_every_current_key_is_a_key_and_no_former_one_is() -> None:
    known = set(all_keys())
    assert set(KEYS.values()) <= known
    assert not set(KEYS) & known


@pytest.mark.parametrize("former", KEYS)
def test_a_former_key_in_a_users_config_is_refused_with_its_line_and_its_current_name(former: str) -> None:
    section, name = former.split(".")
    (problem,) = refused(f"{START}{section}:\n  {name}: 5\n")
    assert problem.startswith(f"config.yaml:4: {former} ")
    assert KEYS[former] in problem


@pytest.mark.parametrize("of_a_run", [False, True])
def test_a_former_key_on_the_command_line_is_refused_also_for_an_older_run(of_a_run: bool) -> None:
    if of_a_run:
        write("{}", "training_state.json")
    (problem,) = refused(CURRENT, "evaluation.max_samples=5")
    assert problem.startswith("--set evaluation.max_samples=5: ")
    assert "evaluation.max_rows" in problem


def test_the_config_of_an_older_run_is_read_with_its_lines() -> None:
    write("{}", "training_state.json")
    loaded = load_config(write(FORMER))
    assert (loaded.config.evaluation.max_rows, loaded.config.evaluation.shown_texts) == (200, 2)
    assert loaded.config == load_config(write(CURRENT, "new.yaml")).config
    assert str(loaded.origins["evaluation", "max_rows"]) == "config.yaml:3"
    assert ("evaluation", "max_samples") not in loaded.origins


def test_a_setting_replaces_the_former_key_of_an_older_run() -> None:
    write("{}", "training_state.json")
    loaded = load_config(write(FORMER), ["evaluation.max_rows=7"])
    assert (loaded.config.evaluation.max_rows, loaded.config.evaluation.shown_texts) == (7, 2)


def test_a_recorded_config_keeps_everything_but_the_names() -> None:
    recorded = {
        "evaluation": {"max_samples": 3, "samples": 1, "final": True},
        "checkpoint": {"best_metric": "matched/samples"},
        "model": {"config": {"samples": 4, "evaluation": {"max_samples": 5}}},
    }
    assert current_config(recorded) == {
        "evaluation": {"max_rows": 3, "shown_texts": 1, "final": True},
        "checkpoint": {"best_metric": "matched/rows"},
        "model": {"config": {"samples": 4, "evaluation": {"max_samples": 5}}},
    }
    assert list(current_config(recorded)["evaluation"]) == ["max_rows", "shown_texts", "final"]


def test_allowances_of_earlier_attempts_keep_their_values() -> None:
    assert current_keys({"evaluation.max_samples": "5", "training.seed": "1"}) == {
        "evaluation.max_rows": "5",
        "training.seed": "1",
    }


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("samples_per_second", "rows_per_second"),
        ("matched/samples", "matched/rows"),
        ("a/correct/samples", "a/correct/samples"),  # a label that is called samples
        ("samples", "samples"),  # not of a split
        ("matched/accuracy", "matched/accuracy"),
        ("step", "step"),
    ],
)
def test_a_metric_has_one_current_name(former: str, current: str) -> None:
    assert current_metric(former) == current
    assert current_metrics({former: 3}) == {current: 3}


def test_metrics_of_an_older_run_are_read_by_their_current_names() -> None:
    rows = [
        {"step": 0, "stage": "baseline", "matched/samples": 9, "matched/samples_of": 13},
        {"step": 2, "loss": 0.5, "samples_per_second": 3.5},
        {"step": 4, "loss": 0.4, "rows_per_second": 4.5},
    ]
    file = write("".join(f"{json.dumps(row)}\n" for row in rows), "metrics.jsonl")
    assert read_metrics(file) == [
        {"step": 0, "stage": "baseline", "matched/rows": 9, "matched/rows_of": 13},
        {"step": 2, "loss": 0.5, "rows_per_second": 3.5},
        {"step": 4, "loss": 0.4, "rows_per_second": 4.5},
    ]
    assert read_metrics(Path("absent.jsonl")) == []


def test_a_report_reads_an_older_runs_config() -> None:
    write(FORMER)
    found = read_config(RunDirectory(Path.cwd()))
    assert (found["evaluation.max_rows"], found["evaluation.shown_texts"]) == (200, 2)


def test_a_checkpoint_of_an_older_run_shows_no_change() -> None:
    """The names differ, the values do not; the manifest's own checksum holds for what was written."""
    config = with_absolute_paths(load_config(write(CURRENT)).config)
    recorded = effective(config)
    recorded["evaluation"] = yaml.safe_load(FORMER)["evaluation"] | {
        key: value for key, value in recorded["evaluation"].items() if key not in ("max_rows", "shown_texts")
    }
    values = {
        "format": FORMAT, "run_id": "mine", "attempt": 1, "step": 2, "epoch": 0.5, "samples": 16, "tokens": 99,
        "ranks": 1, "rows_per_step": 8, "mixed_precision": "no", "config": recorded, "config_hash": "0",
        "data_fingerprint": "0", "base": None, "git_commit": None, "versions": {},
        "created_at": "2026-11-23T00:00:00+00:00", "files": {"a": {"bytes": 1, "sha256": "0"}},
    }  # fmt: skip
    Path(MANIFEST_FILE).write_text(json.dumps(values | {"digest": digest(values)}))
    manifest = Manifest.read(Path.cwd())
    assert manifest.config == effective(config)
    assert manifest.files == {"a": StoredFile(bytes=1, sha256="0")}
    assert changes(manifest.config, config, rows_per_step_old=1, rows_per_step_new=1) == []
    changed = load_config(Path("config.yaml"), ["evaluation.max_rows=201"]).config
    (change,) = changes(manifest.config, changed, rows_per_step_old=1, rows_per_step_new=1)
    assert (change.key, change.old, change.new) == ("evaluation.max_rows", "200", "201")


def test_a_key_with_both_names_is_refused_since_one_of_them_would_be_lost() -> None:
    write("{}", "training_state.json")
    with pytest.raises(ConfigError) as caught:
        load_config(write(FORMER.replace("{max_samples", "{max_rows: 3, max_samples")))
    assert "evaluation.max_samples is now called evaluation.max_rows, which is set too" in str(caught.value)


def test_rows_without_a_step_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows: list[object] = [
        {"step": 1, "loss": 1.0},
        {"loss": 2.0},
        {"step": "2"},
        {"step": True},
        {"step": 3, "stage": []},
    ]
    file = write("".join(f"{json.dumps(row)}\n" for row in rows), "metrics.jsonl")
    assert read_metrics(file) == [{"step": 1, "loss": 1.0}]
    assert "4 rows without a step are left out" in caplog.text
