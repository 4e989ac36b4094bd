"""Compares two runs of one config bit by bit: the logged curve, the newest checkpoint and the final model."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from forge.proof.findings import BitComparison, ComparedPart, Difference
from forge.run.directory import RunDirectory
from forge.run.metrics import read_metrics

CARD = "README.md"  # the model card names the run and the time
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Numbers of metrics.jsonl and state.json that depend on the machine and not on what was computed.
SPEED = re.compile(r"(^|[/_])(seconds|second|s|mib)$")
# Which attempt of which run wrote a checkpoint, and when.
ATTEMPT = frozenset(("run_id", "attempt", "attempts", "preemptions", "error", "created_at", "updated_at"))
# Keys of manifest.json. Not config_hash: a resumed run has absolute paths in its config.
POSITION = ("step", "epoch", "samples", "tokens", "ranks", "rows_per_step", "data_fingerprint")


def compare_bits(unbroken: Path, killed: Path) -> BitComparison:
    """Compare two complete run directories. Speeds, times, memory and the model card may differ, nothing else.

    A file that is missing or broken is a difference, and not an error.
    """
    ones, others = RunDirectory(unbroken), RunDirectory(killed)
    parts = [_part("curve", lambda counts: _compare_curves(ones.metrics_file, others.metrics_file, counts))]
    steps = [_newest_step(run.path) for run in (ones, others)]
    if steps[0] != steps[1] or steps[0] is None:
        names = ["absent" if step is None else f"checkpoint-{step}" for step in steps]
        found = Difference(part="checkpoint", where="the newest checkpoint", unbroken=names[0], killed=names[1])
        return BitComparison([*parts, ComparedPart("checkpoint", {}, found)])
    left, right = (run.checkpoint(steps[0]) for run in (ones, others))
    return BitComparison(
        [
            *parts,
            _part("data position", lambda counts: _compare_positions(left, right, counts)),
            _part("model", lambda counts: _compare_folders(left, right, _is_model, counts)),
            _part("optimizer", lambda counts: _compare_folders(left, right, _is_optimizer, counts)),
            _part("random numbers", lambda counts: _compare_random_numbers(left, right, counts)),
            _part("final model", lambda counts: _compare_folders(ones.final, others.final, _is_not_card, counts)),
        ]
    )


class _Differs(Exception):
    """Ends the comparison of a part at its first difference."""

    def __init__(self, where: str, unbroken: str, killed: str):
        super().__init__(where)
        self.where, self.unbroken, self.killed = where, unbroken, killed


def _part(name: str, work: Callable[[Counter[str]], None]) -> ComparedPart:
    """Return what the work finds. It counts what it compares, and raises _Differs."""
    counts: Counter[str] = Counter()
    try:
        work(counts)
        if not counts:  # two empty folders are equal but prove nothing
            raise _Differs("everything", "absent", "absent")
    except _Differs as found:
        difference = Difference(part=name, where=found.where, unbroken=found.unbroken, killed=found.killed)
        return ComparedPart(name, dict(counts), difference)
    return ComparedPart(name, dict(counts), None)


def _is_not_card(name: str) -> bool:
    return name != CARD


def _is_optimizer(name: str) -> bool:
    return name.startswith("optimizer")


def _is_random_numbers(name: str) -> bool:
    return name.startswith("rng-")


def _is_model(name: str) -> bool:
    """True for the files of a checkpoint that no other part compares."""
    return not (_is_optimizer(name) or _is_random_numbers(name)) and name not in ("manifest.json", "state.json")


def _newest_step(run: Path) -> int | None:
    steps = [int(found[1]) for path in run.glob("checkpoint-*") if (found := CHECKPOINT.fullmatch(path.name))]
    return max(steps, default=None)


def _compare_curves(left: Path, right: Path, counts: Counter[str]) -> None:
    """Both have every report and evaluation once, in the same order, with the same numbers."""
    rows: list[dict[tuple[Any, Any], list[dict[str, Any]]]] = []
    for file in (left, right):
        rows.append({})
        for row in read_metrics(file):
            rows[-1].setdefault((row.get("step"), row.get("stage")), []).append(row)
    unbroken, killed = rows
    for key in [*unbroken, *(key for key in killed if key not in unbroken)]:
        step, stage = key
        where = f"{left.name}: the " + (
            f"report of step {step}" if stage is None else f"{stage} evaluation at step {step}"
        )
        ones, others = unbroken.get(key, []), killed.get(key, [])
        if len(ones) != 1 or len(others) != 1:
            _differ(f"{where}, its number of rows,", len(ones), len(others))
        _compare_trees(_without_speed(ones[0]), _without_speed(others[0]), f"{where}: ", counts)
        counts["rows"] += 1
    for (step, _), (other, _) in zip(unbroken, killed, strict=True):
        if step != other:
            _differ(f"{left.name}: the step of a row, in the order of the file,", step, other)


def _without_speed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not SPEED.search(name)}


def _compare_positions(left: Path, right: Path, counts: Counter[str]) -> None:
    """Both saved at the same position in the data, with the same numbers collected for the next report."""
    manifests = _read_objects(left / "manifest.json", right / "manifest.json")
    chosen = [{name: manifest[name] for name in POSITION if name in manifest} for manifest in manifests]
    _compare_trees(chosen[0], chosen[1], f"{left.name}/manifest.json: ", counts)
    states = _read_objects(left / "state.json", right / "state.json")
    _compare_trees(_without_attempt(states[0]), _without_attempt(states[1]), f"{left.name}/state.json: ", counts)
    counts["files"] += 2


def _without_attempt(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_attempt(item) for key, item in value.items() if key not in ATTEMPT and not SPEED.search(key)
        }
    return value


def _read_objects(left: Path, right: Path) -> list[dict[str, Any]]:
    values: list[Any] = []
    for file in (left, right):
        try:
            values.append(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            values.append(f"unreadable ({type(error).__name__})")
    if not all(isinstance(value, dict) for value in values):
        where = f"{left.parent.name}/{left.name}"
        _differ(where, *("an object" if isinstance(value, dict) else str(value) for value in values))
    return values


def _compare_random_numbers(left: Path, right: Path, counts: Counter[str]) -> None:
    """Both have the same random number states, of every rank."""
    _compare_folders(left, right, _is_random_numbers, counts)
    ranks = _read_objects(left / "manifest.json", right / "manifest.json")[0].get("ranks")
    if ranks != counts["files"]:
        _differ(
            f"{left.name}: the number of ranks' random numbers, of {ranks} ranks,", counts["files"], counts["files"]
        )


def _compare_folders(left: Path, right: Path, wanted: Callable[[str], bool], counts: Counter[str]) -> None:
    """Both folders have the same files: tensors are compared by name and value, other files by their bytes."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and wanted(path.name)}
        for folder in (left, right)
    ]
    for name in sorted(names[0] | names[1], key=lambda name: (not name.endswith(".safetensors"), name)):
        present = [name in found for found in names]
        if not all(present):
            _differ(f"{left.name}/{name}", _presence(present[0]), _presence(present[1]))
        _compare_files(left / name, right / name, f"{left.name}/{name}", counts)
        counts["files"] += 1


def _compare_files(left: Path, right: Path, where: str, counts: Counter[str]) -> None:
    if left.suffix == ".safetensors":
        _compare_safetensors(left, right, where, counts)
    elif left.suffix == ".pt":
        _compare_trees(_load(left), _load(right), f"{where}: ", counts)
    else:
        contents = [file.read_bytes() for file in (left, right)]
        counts["values"] += len(contents[0])
        if contents[0] != contents[1]:
            _differ_in_bytes(contents[0], contents[1], where)


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
        return f"unreadable ({' '.join(str(error).split())[:200]})"


def _compare_safetensors(left: Path, right: Path, where: str, counts: Counter[str]) -> None:
    try:
        with safe_open(left, "pt") as ones, safe_open(right, "pt") as others:
            names = [set(file.keys()) for file in (ones, others)]
            for name in sorted(names[0] | names[1]):
                present = [name in found for found in names]
                if not all(present):
                    _differ(f"{where}: {name}", _presence(present[0]), _presence(present[1]))
                _compare_tensors(ones.get_tensor(name), others.get_tensor(name), f"{where}: {name}", counts)
    except (OSError, SafetensorError) as error:
        _differ(where, *(f"unreadable ({error})" if not _opens(file) else "whole" for file in (left, right)))
    contents = [file.read_bytes() for file in (left, right)]
    if contents[0] != contents[1]:  # the tensors are equal, so the header differs
        _differ_in_bytes(contents[0], contents[1], where)


def _opens(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return False


def _compare_trees(left: Any, right: Any, where: str, counts: Counter[str]) -> None:
    """Compare dicts, lists, tuples, tensors and plain values, to any depth."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        left, right = torch.from_numpy(left), torch.from_numpy(right)
    if type(left) is not type(right):
        _differ(where.rstrip(": ."), _shown(left), _shown(right))
    if isinstance(left, torch.Tensor):
        _compare_tensors(left, right, where.rstrip("."), counts)
    elif isinstance(left, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            if key not in left or key not in right:
                _differ(f"{where}{key}", _presence(key in left), _presence(key in right))
            _compare_trees(left[key], right[key], f"{where}{key}.", counts)
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            _differ(f"the length of {where}".rstrip(": ."), len(left), len(right))
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            _compare_trees(one, other, f"{where}{index}.", counts)
    else:
        counts["values"] += 1
        if repr(left) != repr(right):  # not ==: 0.0 and -0.0 differ, nan and nan do not
            _differ(where.rstrip(": ."), _shown(left), _shown(right))


def _compare_tensors(left: torch.Tensor, right: torch.Tensor, where: str, counts: Counter[str]) -> None:
    kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (left, right)]
    if kinds[0] != kinds[1]:
        _differ(f"{where}, its type and shape,", *kinds)
    counts["tensors"] += 1
    counts["values"] += left.numel()
    ones, others = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    if torch.equal(ones, others):
        return
    flat = int((ones != others).nonzero()[0]) // left.element_size()
    index = [int(i) for i in np.unravel_index(flat, left.shape)] if left.dim() else []
    values = [repr(tensor.reshape(-1)[flat].item()) for tensor in (left, right)]
    if values[0] == values[1]:  # two NaNs
        size = left.element_size()
        values = [
            f"{value} (bytes {bytes(raw[flat * size : (flat + 1) * size].tolist()).hex()})"
            for value, raw in zip(values, (ones, others), strict=True)
        ]
    _differ(f"{where}{index if index else ''}", *values)


def _differ_in_bytes(left: bytes, right: bytes, where: str) -> NoReturn:
    shorter = min(len(left), len(right))
    first = next((i for i in range(shorter) if left[i] != right[i]), None)
    if first is None:
        _differ(f"{where}, its size,", f"{len(left)} bytes", f"{len(right)} bytes")
    _differ(f"{where}, byte {first},", f"0x{left[first]:02x}", f"0x{right[first]:02x}")


def _shown(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, dict | list | tuple | torch.Tensor) else repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _presence(there: bool) -> str:
    return "present" if there else "missing"


def _differ(where: str, unbroken: object, killed: object) -> NoReturn:
    raise _Differs(where, str(unbroken), str(killed))
