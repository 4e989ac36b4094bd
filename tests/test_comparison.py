"""Two runs are equal only if every bit is: each kind of difference is found, and named with both values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from forge.proof.compare import compare_bits

RANKS = 2


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two complete runs with the same numbers, the second with other speeds, times and attempts."""
    return a_run(tmp_path / "unbroken", 1.0), a_run(tmp_path / "killed", 2.0)


def a_run(run: Path, seconds: float) -> Path:
    generator = torch.Generator().manual_seed(7)
    weights = {f"layer.{i}.weight": torch.randn(4, 3, generator=generator) for i in range(2)}
    weights["half"] = torch.randn(5, generator=generator).to(torch.bfloat16)
    checkpoint, final = run / "checkpoint-4", run / "final"
    for folder in (checkpoint, final):
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "bert"}\n')
    (final / "README.md").write_text(f"# {run.name}\n")
    moments = {i: {"step": torch.tensor(4.0), "exp_avg": torch.full((4, 3), 0.5)} for i in range(2)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]
    torch.save({"optimizer": {"state": moments, "param_groups": groups}, "scaler": None}, checkpoint / "optimizer.pt")
    for rank in range(RANKS):
        torch.save(random_numbers(rank), checkpoint / f"rng-{rank:05d}.pt")
    write(
        checkpoint / "manifest.json",
        **{"format": 1, "run_id": run.name, "attempt": int(seconds), "step": 4, "epoch": 0.5, "samples": 32},
        **{"tokens": 640, "ranks": RANKS, "rows_per_step": 8, "config_hash": "c", "data_fingerprint": "d"},
        **{"created_at": f"at {seconds}", "files": {}, "digest": run.name},
    )
    state = {
        "run_id": run.name,
        "stage": "training",
        "step": 4,
        "attempts": int(seconds),
        "updated_at": f"at {seconds}",
    }
    write(checkpoint / "state.json", state=state, report={"losses": [1.25, 1.125], "seconds": seconds, "tokens": 20})
    rows: list[dict[str, Any]] = [{"step": 0, "stage": "baseline", "matched/ce": 1.5, "matched/seconds": seconds}]
    for step in range(1, 5):
        numbers = {"loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 0.25 * step}
        rows.append({"step": step, **numbers, "rows_per_second": 9 / seconds, "peak_memory_mib": 100 * seconds})
    rows.append({"step": 4, "stage": "final", "matched/ce": 0.5, "matched/seconds": seconds})
    write_rows(run, rows)
    return run


def random_numbers(rank: int) -> dict[str, Any]:
    state = np.random.RandomState(rank).get_state()
    numpy_state = {"keys": torch.from_numpy(state[1].astype(np.int64)), "position": state[2]}
    return {"python": (3, (1, 2, 3 + rank), None), "numpy": numpy_state, "torch": torch.arange(16, dtype=torch.uint8)}


def write(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(values))


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_rows(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        change(rows)
        write_rows(run, rows)

    return tamper


def change_weights(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        weights = load_file(run / folder / "model.safetensors")
        change(weights)
        save_file(weights, run / folder / "model.safetensors", metadata={"format": "pt"})

    return tamper


def change_saved(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        value = torch.load(run / "checkpoint-4" / name, weights_only=True)
        change(value)
        torch.save(value, run / "checkpoint-4" / name)

    return tamper


def change_json(name: str, *path: str, value: Any) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        file = run / "checkpoint-4" / name
        tree = node = json.loads(file.read_text())
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        write(file, **tree)

    return tamper


def flip_lowest_bit(tensor: torch.Tensor, *index: int) -> None:
    bits = tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])
    bits[index] ^= 1


def test_equal_runs_are_equal_and_the_counts_say_how_much_was_compared(runs: tuple[Path, Path]) -> None:
    comparison = compare_bits(*runs)

    assert comparison.difference is None
    assert [part.name for part in comparison.parts] == [
        *("curve", "data position", "model", "optimizer", "random numbers", "final model")
    ]
    counts = {part.name: part.counts for part in comparison.parts}
    assert counts["curve"] == {"rows": 6, "values": 2 * 3 + 4 * 4}
    assert counts["model"] == {"files": 2, "tensors": 3, "values": 12 + 12 + 5 + 23}
    assert counts["optimizer"] == {"files": 1, "tensors": 4, "values": 2 * (12 + 1) + 1 + 2 + 2 + 1}
    assert counts["random numbers"] == {"files": 2, "tensors": 4, "values": 2 * (5 + 624 + 1 + 16)}
    assert counts["final model"] == counts["model"]
    assert comparison.counts["tensors"] == 3 + 4 + 4 + 3
    assert compare_bits(runs[0], runs[0]).counts == comparison.counts


TAMPERED: dict[str, tuple[Callable[[Path], object], str, str, str, str]] = {
    "one loss": (
        change_rows(lambda rows: rows[2].update(loss=0.5000000000000001)),
        *("curve", "metrics.jsonl: the report of step 2: loss", "0.5", "0.5000000000000001"),
    ),
    "a number that is text": (
        change_rows(lambda rows: rows[2].update(grad_norm="nan")),
        *("curve", "metrics.jsonl: the report of step 2: grad_norm", "0.5", "'nan'"),
    ),
    "a missing number": (
        change_rows(lambda rows: rows[2].pop("grad_norm")),
        *("curve", "metrics.jsonl: the report of step 2: grad_norm", "present", "missing"),
    ),
    "a missing step": (
        change_rows(lambda rows: rows.pop(3)),
        *("curve", "metrics.jsonl: the report of step 3, its number of rows,", "1", "0"),
    ),
    "a repeated step": (
        change_rows(lambda rows: rows.insert(3, dict(rows[3]))),
        *("curve", "metrics.jsonl: the report of step 3, its number of rows,", "1", "2"),
    ),
    "one step more": (
        change_rows(lambda rows: rows.append({**rows[4], "step": 5})),
        *("curve", "metrics.jsonl: the report of step 5, its number of rows,", "0", "1"),
    ),
    "steps in another order": (
        change_rows(lambda rows: rows.insert(2, rows.pop(3))),
        *("curve", "metrics.jsonl: the step of a row, in the order of the file,", "2", "3"),
    ),
    "an evaluation": (
        change_rows(lambda rows: rows[5].update({"matched/ce": 0.25})),
        *("curve", "metrics.jsonl: the final evaluation at step 4: matched/ce", "0.5", "0.25"),
    ),
    "no curve": (
        lambda run: (run / "metrics.jsonl").unlink(),
        *("curve", "metrics.jsonl: the baseline evaluation at step 0, its number of rows,", "1", "0"),
    ),
    "the data position": (
        change_json("manifest.json", "samples", value=24),
        *("data position", "checkpoint-4/manifest.json: samples", "32", "24"),
    ),
    "what the next report has so far": (
        change_json("state.json", "report", "losses", value=[1.25, 1.0]),
        *("data position", "checkpoint-4/state.json: report.losses.1", "1.125", "1.0"),
    ),
    "a torn manifest": (
        lambda run: (run / "checkpoint-4" / "manifest.json").write_text("{"),
        *("data position", "checkpoint-4/manifest.json", "an object", "unreadable (JSONDecodeError)"),
    ),
    "one flipped bit of a weight": (
        change_weights("checkpoint-4", lambda weights: flip_lowest_bit(weights["layer.1.weight"], 2, 1)),
        *("model", "checkpoint-4/model.safetensors: layer.1.weight[2, 1]", "", ""),
    ),
    "one flipped bit of a half": (
        change_weights("checkpoint-4", lambda weights: flip_lowest_bit(weights["half"], 4)),
        *("model", "checkpoint-4/model.safetensors: half[4]", "", ""),
    ),
    "the sign of a zero": (
        change_saved("optimizer.pt", lambda saved: saved["optimizer"]["state"][1]["exp_avg"][3].fill_(-0.0)),
        *("optimizer", "checkpoint-4/optimizer.pt: optimizer.state.1.exp_avg[3, 0]", "0.5", "-0.0"),
    ),
    "a missing tensor": (
        change_weights("checkpoint-4", lambda weights: weights.pop("half")),
        *("model", "checkpoint-4/model.safetensors: half", "present", "missing"),
    ),
    "another shape": (
        change_weights("checkpoint-4", lambda weights: weights.update(half=weights["half"].reshape(1, 5).clone())),
        *("model", "checkpoint-4/model.safetensors: half, its type and shape,", "bfloat16 [5]", "bfloat16 [1, 5]"),
    ),
    "one byte of a config": (
        lambda run: (run / "checkpoint-4" / "config.json").write_text('{"model_type": "bart"}\n'),
        *("model", "checkpoint-4/config.json, byte 17,", "0x65", "0x61"),
    ),
    "one moment": (
        change_saved("optimizer.pt", lambda saved: saved["optimizer"]["state"][1]["exp_avg"].__setitem__((0, 2), 0.75)),
        *("optimizer", "checkpoint-4/optimizer.pt: optimizer.state.1.exp_avg[0, 2]", "0.5", "0.75"),
    ),
    "an optimizer's step": (
        change_saved("optimizer.pt", lambda saved: saved["optimizer"]["state"][0]["step"].add_(1)),
        *("optimizer", "checkpoint-4/optimizer.pt: optimizer.state.0.step", "4.0", "5.0"),
    ),
    "a rate": (
        change_saved("optimizer.pt", lambda saved: saved["optimizer"]["param_groups"][0].update(lr=2e-3)),
        *("optimizer", "checkpoint-4/optimizer.pt: optimizer.param_groups.0.lr", "0.001", "0.002"),
    ),
    "dropped moments": (
        change_saved("optimizer.pt", lambda saved: saved["optimizer"]["state"].clear()),
        *("optimizer", "checkpoint-4/optimizer.pt: optimizer.state.0", "present", "missing"),
    ),
    "a broken file": (
        lambda run: (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK"),
        *("optimizer", "checkpoint-4/optimizer.pt", "a dict", "'unreadable ("),
    ),
    "one byte of the second rank's random numbers": (
        change_saved("rng-00001.pt", lambda saved: saved["torch"].__setitem__(9, 8)),
        *("random numbers", "checkpoint-4/rng-00001.pt: torch[9]", "9", "8"),
    ),
    "one number of python's generator": (
        change_saved("rng-00000.pt", lambda saved: saved.update(python=(3, (1, 2, 4), None))),
        *("random numbers", "checkpoint-4/rng-00000.pt: python.1.2", "3", "4"),
    ),
    "a missing rank": (
        lambda run: (run / "checkpoint-4" / "rng-00001.pt").unlink(),
        *("random numbers", "checkpoint-4/rng-00001.pt", "present", "missing"),
    ),
    "a final weight": (
        change_weights("final", lambda weights: flip_lowest_bit(weights["layer.0.weight"], 0, 0)),
        *("final model", "final/model.safetensors: layer.0.weight[0, 0]", "", ""),
    ),
    "a missing final file": (
        lambda run: (run / "final" / "config.json").unlink(),
        *("final model", "final/config.json", "present", "missing"),
    ),
    "no final model": (
        lambda run: shutil.rmtree(run / "final"),
        *("final model", "final/model.safetensors", "present", "missing"),
    ),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoint-4"),
        *("checkpoint", "the newest checkpoint", "checkpoint-4", "absent"),
    ),
    "a later checkpoint": (
        lambda run: (run / "checkpoint-40").mkdir(),
        *("checkpoint", "the newest checkpoint", "checkpoint-4", "checkpoint-40"),
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_each_kind_of_difference_is_found_and_named(name: str, runs: tuple[Path, Path]) -> None:
    tamper, part, where, unbroken, killed = TAMPERED[name]
    tamper(runs[1])
    found = compare_bits(*runs).difference

    assert found is not None
    assert (found.part, found.where) == (part, where)
    assert found.unbroken.startswith(unbroken)
    assert found.killed.startswith(killed)
    assert found.unbroken != found.killed


def test_a_flipped_bit_is_shown_in_both_values(runs: tuple[Path, Path]) -> None:
    change_weights("final", lambda weights: weights["layer.0.weight"].fill_(1.0))(runs[0])
    change_weights("final", lambda weights: weights["layer.0.weight"].fill_(1.0))(runs[1])
    change_weights("final", lambda weights: flip_lowest_bit(weights["layer.0.weight"], 3, 2))(runs[1])

    assert str(compare_bits(*runs).difference) == (
        "final/model.safetensors: layer.0.weight[3, 2] is 1.0 in the unbroken run and 1.0000001192092896 in the "
        "killed one"
    )


def test_two_nans_with_other_bits_differ_and_are_told_apart(runs: tuple[Path, Path]) -> None:
    for run, bits in zip(runs, (0x7FC00000, 0x7FC00001), strict=True):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        change_weights("checkpoint-4", lambda weights, nan=nan: weights.update(half=nan.clone()))(run)
    found = compare_bits(*runs).difference

    assert found is not None
    assert (found.unbroken, found.killed) == ("nan (bytes 0000c07f)", "nan (bytes 0100c07f)")


def test_the_first_difference_is_the_first_of_the_run_and_every_part_tells_its_own(runs: tuple[Path, Path]) -> None:
    for name in ("a final weight", "one moment", "one loss"):
        TAMPERED[name][0](runs[1])
    comparison = compare_bits(*runs)

    assert comparison.difference is not None
    assert comparison.difference.part == "curve"
    assert [part.name for part in comparison.parts if part.difference] == ["curve", "optimizer", "final model"]


@pytest.mark.parametrize(
    ("absent", "part"),
    [("metrics.jsonl", "curve"), ("final", "final model"), ("checkpoint-4", "checkpoint")],
)
def test_two_runs_that_both_lack_a_part_are_not_equal(absent: str, part: str, runs: tuple[Path, Path]) -> None:
    for run in runs:
        shutil.rmtree(run / absent) if (run / absent).is_dir() else (run / absent).unlink()
    found = compare_bits(*runs).difference

    assert found is not None
    assert found.part == part


def test_a_rank_that_left_its_random_numbers_in_neither_run_is_missed(runs: tuple[Path, Path]) -> None:
    for run in runs:
        (run / "checkpoint-4" / "rng-00001.pt").unlink()
    found = compare_bits(*runs).difference

    assert found is not None
    assert found.where == "checkpoint-4: the number of ranks' random numbers, of 2 ranks,"
