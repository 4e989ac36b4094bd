"""Starts two attempts at one run: at once, or one that was frozen and wakes up after the other took over."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import REPOSITORY

from faults.attempts import Child, Setup, free_port, start_ranks, wait
from faults.corruption import Donors
from faults.crash import injector
from faults.scene import MAX_STEPS, Scene, Shape, closed, last_words, run_of
from faults.trials import Trial

# Where an attempt is frozen: the pattern of the events that count, and the index of the one that it stops before.
FREEZES = {
    "within a step": ("", 2),
    "within the step after a save": ("", 4),
    "before the first file of a save": (r"^create .*\.tmp-.*model\.safetensors", 1),
    "within a file of a save": (r"^write .*\.tmp-.*optimizer\.pt", 25),
    "before the manifest": (r"^replace .*manifest\.json", 1),
    "before the rename that commits": (r"^rename .*/checkpoint-4", 0),
    "after the rename that commits": (r"^create .*latest_checkpoint", 1),
    "before the state that follows": (r"^create .*/\.training_state\.json", 4),
    "before it deletes an old one": (r"^rename .*\.trash-", 0),
    "while it deletes an old one": (r"^unlink .*\.trash-", 1),
    "before the export": (r"^mkdir .*final", 0),
    "before the export has its name": (r"^(replace|rename) .*/final$", 0),
}


def at_once_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """Two or three attempts at one run start together: exactly one trains, and it ends like the unbroken run."""
    donors = Donors(scene, shape)

    def trial(number: int) -> Trial:
        def run() -> str | None:
            root = donors.copy()
            attempts: list[list[Child]] = []
            for contender in range(2 + number % 2):
                output = root.with_suffix(f".out{contender}")
                attempts.append(start_ranks(shape.ranks, scene.resume(root), output))
                time.sleep((0.0, 0.002, 0.02, 0.1)[number % 4])  # waits for nothing: it shifts the starts
            problem = _one_trains([wait(attempt).codes for attempt in attempts], _texts(attempts))
            problem = problem or scene.verdict(shape, root)
            return closed(problem, root)

        return Trial(f"{2 + number % 2} at once, try {number}", run)

    return [trial(number) for number in range(count)]


def true_command_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """The same with the true commands, `python forge.py` and `accelerate launch`."""
    donors = Donors(scene, shape)

    def trial(number: int) -> Trial:
        def run() -> str | None:
            root = donors.copy()
            outputs = [root.with_suffix(f".out{contender}") for contender in range(2)]
            processes = [true_command(shape.ranks, scene.resume(root), output) for output in outputs]
            for process in processes:
                process.wait(240)
            texts = [output.read_text() for output in outputs]
            codes = [
                [forge_code(shape, process.returncode, text)] for process, text in zip(processes, texts, strict=True)
            ]
            problem = _one_trains(codes, texts) or scene.verdict(shape, root)
            return closed(problem, root)

        return Trial(f"try {number}", run)

    return [trial(number) for number in range(count)]


def frozen_trials(scene: Scene, shape: Shape) -> list[Trial]:
    """An attempt freezes, another one takes over and completes the run, the first wakes up: it changes nothing."""

    def trial(name: str, only: str, at: int, frozen_rank: int) -> Trial:
        def run() -> str | None:
            root = scene.new_root()
            setup: list[Setup] = [[] for _ in range(shape.ranks)]
            setup[frozen_rank] = injector(root, frozen_rank, only=only, at=at, action="freeze")
            if not only:
                setup[frozen_rank] = [("faults.changes:in_a_step", {"forward": at, "action": "freeze"})]
            first = scene.begin(shape, root, setup)
            if not _is_frozen(first[frozen_rank]):
                return f"it never came to {only}: {last_words(first[0].text)} [{root}]"
            ended = wait(start_ranks(shape.ranks, scene.resume(root, "--take-over"), root.with_suffix(".out2")))
            problem = None
            if ended.code != 0:
                problem = f"the take-over ended with {ended.codes}: {last_words(ended.text)}"
            problem = problem or scene.verdict(shape, root)
            before = contents(run_of(root))
            first[frozen_rank].kill(signal.SIGCONT)
            woken = wait(first)
            if problem is None and (changed := _changes(before, contents(run_of(root)))):
                problem = f"awake, it changed {changed}"
            if problem is None and (woken.code == 0 or woken.forced):
                problem = f"awake, it ended with {woken.codes}"
            if problem is None and "has taken over" not in woken.text:
                problem = f"awake, it said {last_words(woken.text)}"
            problem = problem or scene.verdict(shape, root)
            return closed(problem, root)

        return Trial(f"frozen {name}" + f", rank {frozen_rank}" * (shape.ranks > 1), run)

    return [trial(name, only, at, 0) for name, (only, at) in FREEZES.items()]


def true_command(ranks: int, arguments: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start `python forge.py` or, for several ranks, `accelerate launch`, in a new session."""
    command = [sys.executable, "forge.py", *arguments]
    values = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    if ranks > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        command += ["--num_machines", "1", "--main_process_port", str(free_port()), "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "forge/train.py", *arguments]
        values["ACCELERATE_USE_CPU"] = "true"
    with open(output, "wb") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=values,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def forge_code(shape: Shape, code: int, text: str) -> int:
    """Return forge's own exit code: the launcher's is 1 for every failure, but it prints the rank's."""
    if shape.ranks == 1 or code == 0:
        return code
    told = re.search(r"exitcode\s*:\s*(-?\d+)", text)
    return int(told[1]) if told else code


def contents(run: Path) -> dict[str, str]:
    """Return the hash of every file but the log, to which an outdated attempt may write."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "output.log")
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.relative_to(run).parts[0].startswith(".tmp-")
    }


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until the condition holds; False if it does not within timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def state_of(pid: int) -> str:
    """Return the letter of /proc: R, S, T for stopped, Z; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _is_frozen(child: Child) -> bool:
    wait_until(lambda: child.poll() is not None or state_of(child.pid) == "T", 60)
    return child.poll() is None and state_of(child.pid) == "T"


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return ", ".join(names[:5])


def _texts(attempts: list[list[Child]]) -> list[str]:
    return ["".join(child.text for child in attempt) for attempt in attempts]


def _one_trains(codes: list[list[int]], texts: list[str]) -> str | None:
    """Exactly one trains; the others are refused, or come when the run is complete."""
    trained = [text for text in texts if "stage: training" in text]
    if len(trained) != 1:
        return f"{len(trained)} attempts trained, they ended with {codes}: " + " // ".join(map(last_words, texts))
    for ended, text in zip(codes, texts, strict=True):
        # An attempt that comes after the end takes no step.
        if set(ended) != {0} and (text in trained or set(ended) != {2} or "is being trained by" not in text):
            return f"an attempt ended with {ended}: {last_words(text)}"
        if (
            set(ended) == {0}
            and text not in trained
            and not re.search(f"is complete|from checkpoint-{MAX_STEPS}", text)
        ):
            return f"an attempt that did not train ended with {ended}: {last_words(text)}"
    return None
