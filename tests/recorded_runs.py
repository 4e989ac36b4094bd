"""Writes run directories as forge leaves them, with numbers that a test chooses, without training."""

import copy
import json
from pathlib import Path
from typing import Any

from forge.config.explain import to_yaml
from forge.config.schema import Config
from forge.run.directory import RunDirectory
from forge.run.files import append_json_line, write_json
from forge.run.metadata import ModelFacts, TaskFacts
from forge.run.records import record_of
from forge.run.state import Stage, TrainingState

CONFIG: dict[str, Any] = {
    "task": {"type": "classification", "dataset": {"demo": "nli"}, "max_length": 64},
    "model": {"path": "student"},
    "teacher": {"path": "teacher"},
    "training": {"max_steps": 100, "batch_size": 32},
}
HEADLINE = ["ce", "accuracy", "macro_f1"]


def write_run(
    folder: Path,
    final: dict[str, Any] | None = None,
    *,
    baseline: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    seed: int = 1,
    settings: dict[str, Any] | None = None,
    config_file: str = "/here/configs/quickstart/sft.yaml",
    reports: list[dict[str, Any]] | None = None,
    state: dict[str, Any] | None = None,
    world: dict[str, Any] | None = None,
    fingerprint: str = "963c2d6e6018",
    headline: list[str] | None = None,
) -> RunDirectory:
    """A complete run of training.max_steps; final, baseline and teacher are evaluations by `split/metric`. settings:
    dotted keys."""
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    tree = copy.deepcopy(CONFIG)
    for key, value in {"training.seed": seed, **(settings or {})}.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    run.config_file.write_text(f"# The merged config of {run.name}\n\n{to_yaml(Config.model_validate(tree))}")
    metadata = metadata_of(run)
    metadata["config_file"] = config_file
    metadata["task"]["headline"] = headline or HEADLINE
    metadata["data"]["fingerprint"] = fingerprint
    metadata["world"] |= world or {}
    write_json(run.metadata_file, metadata)
    steps = tree["training"]["max_steps"] or 100
    complete: dict[str, Any] = {"stage": Stage.COMPLETE, "pipeline_complete": True, "step": steps, "total_steps": steps}
    values = complete | {"step_sizes": [[0, 32]]} | (state or {})
    record_of(TrainingState, {"run_id": f"id-{folder.name}", **values}).save(run.state_file)
    evaluations = {"baseline": baseline, "teacher": teacher}
    for stage, numbers in evaluations.items():
        if numbers is not None:
            append_json_line(run.metrics_file, {"step": 0, "stage": stage, **numbers})
    for report in reports or []:
        append_json_line(run.metrics_file, {"epoch": 0.1, "loss": 1.0, "learning_rate": 1e-4, **report})
    if final is not None:
        append_json_line(run.metrics_file, {"step": 100, "stage": "final", **final})
    return run


def metadata_of(run: RunDirectory, ranks: int = 1) -> dict[str, Any]:
    """The run_metadata.json of a run after its first attempt."""
    attempt = {
        "attempt": 1, "forge_version": "0.1.0", "command": "forge.py", "working_directory": "/here", "host": "node1",
        "user": "me", "python_version": "3.11.9", "platform": "Linux", "git": {"commit": "3b44745"}, "packages": {},
        "slurm": {}, "cuda_visible_devices": None, "ranks": ranks,
    }  # fmt: skip
    return {
        "run_id": f"id-{run.name}",
        "name": run.name,
        "created_at": "2026-11-23T00:00:00+00:00",
        "config_file": "/here/configs/sft.yaml",
        "task": {
            "type": "classification", "title": "A classifier", "pipeline_tag": "text-classification",
            "auto_model": "AutoModelForSequenceClassification", "auto_processing": "AutoTokenizer",
            "headline": HEADLINE,
        },
        "data": {"description": "rows", "fingerprint": "963c2d6e6018", "rows": {}},
        "model": {
            "source": "student", "location": "/here/student", "revision": None, "commit": None,
            "weights_sha256": "0" * 64, "location_sha256": "0" * 64, "adapters": [], "parameters": 21059,
        },
        "world": {"ranks": ranks, "device": "cpu", "mixed_precision": "no", "rows_per_step": 32},
        "attempts": [attempt],
    }  # fmt: skip


def task_facts(**changes: Any) -> TaskFacts:
    """What run_metadata.json records of a task."""
    return record_of(TaskFacts, metadata_of(RunDirectory(Path("run")))["task"] | changes)


def model_facts(**changes: Any) -> ModelFacts:
    """What run_metadata.json records of a model."""
    return record_of(ModelFacts, metadata_of(RunDirectory(Path("run")))["model"] | changes)


def of(split: str = "validation", rows: int = 1000, seconds: float = 0.5, **numbers: Any) -> dict[str, Any]:
    """An evaluation: of(ce=0.5, accuracy=0.8)."""
    counts = {"correct/neutral": 19, "rows": rows, "seconds": seconds}
    return {f"{split}/{name}": value for name, value in (numbers | counts).items()}


def shape(value: Any) -> Any:
    """A file's keys and types, for the comparison of a written file with a real one."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return type(value).__name__


def differs_from(real: Any, written: Any, place: str = "") -> list[str]:
    """Every key of the written file that a real one does not have, or has as another type."""
    if not isinstance(written, dict) or not isinstance(real, dict):
        return [] if shape(real) == shape(written) else [f"{place}: {shape(written)}, really {shape(real)}"]
    return [
        line
        for key, item in written.items()
        for line in (
            differs_from(real[key], item, f"{place}.{key}") if key in real else [f"{place}.{key}: not in a real run"]
        )
    ]


def read(file: Path) -> Any:
    return json.loads(file.read_text())
