"""What all trials share: a tiny model, its data and config, the unbroken run, and what must be equal at the end."""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from conftest import write_data_folder, write_tiny_model

from faults.attempts import Child, Ended, Setup, start_ranks, wait
from forge.checkpoint.manifest import BadCheckpoint, verify

RUN_NAME = "run"
MAX_STEPS = 6
TIMES = ("rows_per_second", "tokens_per_second", "peak_memory_mib", "seconds")
LEFTOVERS = (".tmp-*", ".trash-*", "*.tmp")


@dataclass(frozen=True)
class Shape:
    """The kind of run that gets the fault."""

    ranks: int = 1
    asynchronous: bool = False
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}" + ", asynchronous" * self.asynchronous


@dataclass(frozen=True)
class Ending:
    """Everything in a finished run that must not depend on how often it was stopped."""

    final: dict[str, bytes]
    checkpoints: tuple[str, ...]  # the ones that retention kept
    newest: dict[str, bytes]  # the files of the last checkpoint that a resume reads
    curve: list[dict[str, Any]]
    stage: str

    def difference(self, other: "Ending") -> str | None:
        """Return the first thing that differs in another run; None if nothing does."""
        for what in ("final", "newest"):
            mine, its = getattr(self, what), getattr(other, what)
            for name in sorted(mine.keys() | its.keys()):
                if mine.get(name) != its.get(name):
                    return f"{what} {name} differs" if name in mine.keys() & its.keys() else f"{what} {name} is missing"
        # A stop commits the step at which it comes, and that checkpoint is kept: compare their number and the last.
        if (len(self.checkpoints), self.checkpoints[-1:]) != (len(other.checkpoints), other.checkpoints[-1:]):
            return f"checkpoints are {', '.join(other.checkpoints)} and not {', '.join(self.checkpoints)}"
        for mine, its in zip(self.curve, other.curve, strict=False):
            if mine != its:
                return f"metrics.jsonl has {its} for {mine}"
        if len(self.curve) != len(other.curve):
            return f"metrics.jsonl has {len(other.curve)} rows and not {len(self.curve)}"
        return None if self.stage == other.stage else f"the run ended in stage {other.stage} and not in {self.stage}"


class Scene:
    """Creates the model and the data once, starts attempts in folders of their own, and has the unbroken ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = write_tiny_model(_made(folder / "model"))
        self.data = write_data_folder(_made(folder / "data"))
        self._unbroken: dict[Shape, Path] = {}
        self._locks: dict[Shape, threading.Lock] = {}
        self._lock = threading.Lock()
        self._count = itertools.count(1)
        self.lock = threading.Lock()
        self.ledger: dict[int, list[int]] | None = None  # the rows of the unbroken run's steps

    @cached_property
    def config(self) -> Path:
        file = self.folder / "tiny.yaml"
        file.write_text(f"""
task:
  type: classification
  dataset: {{path: {self.data}}}
  columns: {{text: premise, text_pair: hypothesis, label: label}}
  labels: [entailment, neutral, contradiction]
  max_length: 32
model: {{path: {self.model}, dropout: 0.1}}
training: {{max_steps: {MAX_STEPS}, batch_size: 8, learning_rate: 3e-3, mixed_precision: no}}
logging: {{every_steps: 1}}
evaluation: {{baseline: false, final: false}}
checkpoint: {{every_steps: 2, keep_last: 2}}
""")
        return file

    def new_root(self) -> Path:
        """Return a new output root for a trial; siblings such as `.out` hold what the trial prints."""
        return _made(self.folder / "trials" / f"{next(self._count):05}")

    def arguments(self, shape: Shape, root: Path, name: str = RUN_NAME) -> list[str]:
        settings = list(shape.settings)
        if shape.asynchronous:
            settings.append("checkpoint.asynchronous=true")
        pairs = [part for setting in settings for part in ("--set", setting)]
        return ["--config", str(self.config), "--output_root", str(root), "--run_name", name, *pairs]

    def begin(self, shape: Shape, root: Path, setup: list[Setup] | None = None, name: str = RUN_NAME) -> list[Child]:
        """Start the first attempt of a run in an output root."""
        return start_ranks(shape.ranks, self.arguments(shape, root, name), _output(root), setup)

    def start_again(self, shape: Shape, root: Path, setup: list[Setup] | None = None, *more: str) -> list[Child]:
        """Start another attempt with `--resume`, or the first one again if no run was created."""
        run = run_of(root)
        if not (run / "training_state.json").exists():
            shutil.rmtree(run, ignore_errors=True)  # forge would report that it is not a run directory
            return self.begin(shape, root, setup)
        return start_ranks(shape.ranks, self.resume(root, *more), _output(root), setup)

    def resume(self, root: Path, *more: str) -> list[str]:
        """Return the arguments of another attempt."""
        return ["--resume", str(run_of(root)), "--output_root", str(root), *more]

    def unbroken(self, shape: Shape) -> Ending:
        """Return the end of the unbroken run, which is trained at the first call."""
        return ending(run_of(self.unbroken_root(shape)))

    def unbroken_root(self, shape: Shape) -> Path:
        with self._lock:
            lock = self._locks.setdefault(shape, threading.Lock())
        with lock:
            if shape not in self._unbroken:
                root = self.new_root()
                ended = wait(self.begin(shape, root))
                assert ended.code == 0, ended.text
                self._unbroken[shape] = root
            return self._unbroken[shape]

    def difference_but_checkpoints(self, shape: Shape, root: Path) -> str | None:
        """Return how a run differs in which a save failed, and which may keep checkpoints of other steps."""
        expected, found = self.unbroken(shape), ending(run_of(root))
        names = [name for name in found.checkpoints if name not in expected.checkpoints]
        if names and not found.checkpoints:
            return "no checkpoint is left"
        newest = found.newest if found.checkpoints[-1:] == expected.checkpoints[-1:] else expected.newest
        return expected.difference(replace(found, checkpoints=expected.checkpoints, newest=newest))

    def verdict(self, shape: Shape, root: Path) -> str | None:
        """Return what is wrong with a run that should have ended like the unbroken one."""
        run = run_of(root)
        if left := leftovers(run):
            return f"left behind: {', '.join(left)}"
        if problem := unsound(run):
            return problem
        return self.unbroken(shape).difference(ending(run))

    def finish(
        self, shape: Shape, root: Path, check: Callable[[Ended], str | None] | None = None
    ) -> tuple[str | None, Ended]:
        """Resume with the unmodified program to the end. Returns what is wrong, and how the attempt ended."""
        ended = wait(self.start_again(shape, root))
        problem = check(ended) if check is not None else None
        if problem is None and ended.hung:
            problem = "a rank of the resume hung"
        if problem is None and ended.code != 0:
            problem = f"the resume ended with {ended.codes}: {last_words(ended.text)}"
        return problem or self.verdict(shape, root), ended


def run_of(root: Path, name: str = RUN_NAME) -> Path:
    return root / "tiny" / name


def ending(run: Path) -> Ending:
    """Read the end of a run. Raises OSError if it has not ended."""
    state = json.loads((run / "training_state.json").read_text())
    names = checkpoint_names(run)
    final = {name: (run / "final" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    newest: dict[str, bytes] = {}
    for path in sorted((run / names[-1]).rglob("*")) if names else []:
        name = str(path.relative_to(run / names[-1]))
        if path.suffix in (".safetensors", ".pt", ".bin", ".pkl"):
            newest[name] = path.read_bytes()
    return Ending(final, tuple(names), newest, curve(run), state["stage"])


def curve(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what depends on the clock."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


def checkpoint_names(run: Path) -> list[str]:
    found = [path.name for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda name: int(name.removeprefix("checkpoint-")))


def leftovers(run: Path) -> list[str]:
    return sorted(path.name for pattern in LEFTOVERS for path in run.glob(pattern))


def unsound(run: Path) -> str | None:
    """Return the first folder that is named like a checkpoint but is not valid; there must never be one."""
    state_file = run / "training_state.json"
    run_id = json.loads(state_file.read_text())["run_id"] if state_file.exists() else ""
    for name in checkpoint_names(run):
        try:
            verify(run / name, run_id)
        except BadCheckpoint as error:
            return f"{name} is named as a checkpoint and is not whole: {error}"
    return None


def last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-2:])[-400:]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _output(root: Path) -> Path:
    return root.with_suffix(".out")


def closed(problem: str | None, root: Path) -> str | None:
    """Remove a trial that went well, and add to the problem of another where its files are."""
    if problem is None:
        drop(root)
        return None
    return f"{problem} [{root}]"


def drop(root: Path) -> None:
    """Remove a trial that went well."""
    shutil.rmtree(root, ignore_errors=True)
    for file in root.parent.glob(f"{root.name}.*"):
        if file.is_file():
            os.unlink(file)
