"""Signals the launcher, or the parent of a run: no rank outlives it, and the run can be resumed."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from faults.attempts import start, wait
from faults.contenders import forge_code, state_of, true_command, wait_until
from faults.scene import Scene, Shape, checkpoint_names, drop, last_words, run_of, unsound
from faults.trials import Trial

LAST_RANK_S = 40.0  # an orphaned rank has 30 s to save
# Long enough, some seconds, for a signal to come in training.
SLOW = ("training.max_steps=400", "checkpoint.every_steps=40", "logging.every_steps=20")


def launcher_trials(scene: Scene) -> list[Trial]:
    """The true `accelerate launch`, stopped by a signal to the launcher alone."""
    return [
        _launcher(scene, Shape(2, settings=SLOW), number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
    ]


def parent_trials(scene: Scene) -> list[Trial]:
    """`python forge.py` as started by a command of forge that is then killed."""
    shape = Shape(1, settings=SLOW)

    def run() -> str | None:
        root = scene.new_root()
        parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        child = start(
            scene.arguments(shape, root), root.with_suffix(".out"), environment={"FORGE_PARENT": str(parent.pid)}
        )
        if not wait_until(lambda: bool(checkpoint_names(run_of(root))) or child.poll() is not None, 60):
            return f"no checkpoint came [{root}]"
        parent.kill()
        parent.wait()
        if not wait_until(lambda: child.poll() is not None, LAST_RANK_S):
            child.kill()
            return f"it outlived its parent [{root}]"
        return _resumed(scene, shape, root, child.text)

    return [Trial("SIGKILL to the parent", run)]


def signal_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """TERM, INT, USR1 or USR2 to any rank at any instant: all stop at one step with 75 and resume exactly."""

    def trial(seed: int) -> Trial:
        def run() -> str | None:
            generator = random.Random(seed)
            root = scene.new_root()
            number = generator.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
            children = scene.begin(shape, root)
            if seed % 3:
                wait_until(lambda: run_of(root).exists() or children[0].poll() is not None, 60)
            children[0].poll(generator.uniform(0, 0.35))
            children[generator.randrange(shape.ranks)].kill(number)
            ended = wait(children)
            # Before the run exists there is nothing to save, and a rank that waits for one that left handles no signal.
            if run_of(root).exists() and (set(ended.codes) not in ({0}, {75}) or ended.forced):
                return f"{number.name}: it ended with {ended.codes}: {last_words(ended.text)} [{root}]"
            problem, _ = scene.finish(shape, root)
            if problem is None:
                drop(root)
            return problem and f"{number.name}, {ended.codes}: {problem} [{root}]"

        return Trial(f"seed {seed}", run)

    return [trial(seed) for seed in range(count)]


def _launcher(scene: Scene, shape: Shape, number: signal.Signals) -> Trial:
    def run() -> str | None:
        root = scene.new_root()
        output = root.with_suffix(".out")
        launcher = true_command(shape.ranks, scene.arguments(shape, root), output)
        began = wait_until(lambda: bool(checkpoint_names(run_of(root))) or launcher.poll() is not None, 120)
        ranks = [child.pid for child in psutil.Process(launcher.pid).children(recursive=True)] if began else []
        if launcher.poll() is not None or len(ranks) < shape.ranks:
            return f"it never trained: {last_words(output.read_text())} [{root}]"
        os.kill(launcher.pid, number)
        launcher.wait(120)
        if not wait_until(lambda: not _alive(ranks), LAST_RANK_S):
            for pid in _alive(ranks):
                os.kill(pid, signal.SIGKILL)
            return f"ranks outlived their launcher by {LAST_RANK_S:.0f} s [{root}]"
        text = output.read_text()
        stopped = any("SIGTERM" in line or "launcher" in line or "SIGUSR1" in line for line in text.splitlines())
        if number != signal.SIGKILL and not stopped:
            return (
                f"no word of the stop: {last_words(text)}, code {forge_code(shape, launcher.returncode, text)} [{root}]"
            )
        return _resumed(scene, shape, root, text)

    return Trial(f"{number.name} to the launcher", run)


def _resumed(scene: Scene, shape: Shape, root: Path, text: str) -> str | None:
    if problem := unsound(run_of(root)):
        return f"{problem} [{root}]"
    problem, ended = scene.finish(shape, root)
    if problem is None and "from checkpoint-" not in ended.text:
        problem = "it did not resume from a checkpoint"
    if problem is None:
        drop(root)
    return problem and f"{problem}; the broken attempt said {last_words(text)} [{root}]"


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if state_of(pid) not in ("", "Z", "X")]
