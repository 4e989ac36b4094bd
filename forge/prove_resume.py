"""Proves that a config resumes: kills a run of it again and again, and compares its end with the unbroken run's."""

import argparse
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from forge.cluster.processes import Processes
from forge.config.loader import LoadedConfig, load_config
from forge.config.placing import config_name
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, ForgeError, UsageError
from forge.run.directory import RunDirectory, check_run_name, check_writable, start_name
from forge.run.files import read_json, write_atomically, write_json
from forge.run.provenance import provenance
from forge.run.registry import unregister
from forge.run.state import Stage, now
from forge.run.watch import Sight, Tempo, Watch

if TYPE_CHECKING:
    from forge.checkpoint.comparison import Comparison

CERTIFICATE = "resume_certificate.json"
POLL_S = 0.001  # a save of a tiny model takes ten times as long
LAST_WORDS_S = 60.0  # for what a kill left alive: the launcher gives its ranks 30 s
ROUNDS = 3  # how often a run is started anew for the kills that came too late
# An attempt that takes so much longer than the whole unbroken run is not going to end.
PATIENCE = 5.0
PATIENCE_S = 120.0

TrainingCommand = Callable[[list[str], int], tuple[list[str], dict[str, str]]]


class Aim(StrEnum):
    """The points at which a run is killed, in words."""

    BASELINE = "in the baseline evaluation"
    BEFORE_FIRST_SAVE = "in training, before the first checkpoint"
    SAVE_STARTS = "as a save begins"
    WITHIN_SAVE = "within a save"
    SAVED = "right after a save"
    RANDOM = "at a random instant"
    EXPORT = "in the export"
    FINAL = "in the final evaluation"


# What is aimed at first where there are few kills; beyond these they are drawn at random.
ENUMERATED = (
    *(Aim.SAVE_STARTS, Aim.WITHIN_SAVE, Aim.SAVED, Aim.EXPORT, Aim.BEFORE_FIRST_SAVE, Aim.FINAL, Aim.BASELINE),
)
STAGES = {Aim.BASELINE: Stage.BASELINE_EVALUATION, Aim.EXPORT: Stage.EXPORT, Aim.FINAL: Stage.FINAL_EVALUATION}
ALL, ONE_RANK, LAUNCHER = "all processes", "one rank", "the launcher"


@dataclass(frozen=True)
class Point:
    """One kill that is to be: where, whom, and two numbers drawn from the seed."""

    aim: Aim
    victim: str  # ALL, ONE_RANK or LAUNCHER
    from_step: int = 0  # a save or a random instant after this step
    share: float = 0.0  # of the time that the thing aimed at takes, before the kill
    rank: int = 0  # of ONE_RANK


@dataclass
class Kill:
    """One kill that was: what stands in the certificate."""

    number: int
    run: str
    attempt: int
    aimed_at: str
    victim: str
    stage: str
    step: int  # the last one that the run's metrics tell of
    on_disk: list[str]
    seconds: float  # since the attempt's start
    all_ended_s: float | None  # after the kill; None: some had to be killed too


@dataclass(frozen=True)
class Request:
    """What the command line asked for, checked."""

    loaded: LoadedConfig
    kills: int
    processes: int
    seed: int
    arguments: list[str]  # of training: those that change the config


@dataclass
class Proof:
    """What is known so far."""

    request: Request
    unbroken: RunDirectory
    killed: list[RunDirectory] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    total_steps: int = 0
    tempo: Tempo = field(default_factory=Tempo)
    kills: list[Kill] = field(default_factory=list)
    failure: str | None = None  # why no whole killed run came to be
    seconds: dict[str, float] = field(default_factory=dict)


def prove_resume(args: argparse.Namespace) -> int:
    """Runs the proof as the parsed arguments say: 0 identical, 1 not. Raises UsageError before anything runs."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    request = _request(args)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    return prove(request, console, training_command)


def training_command(arguments: list[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """The true command of a training on so many processes of this machine, and its environment."""
    script = str(Path(__file__).resolve().parent / "train.py")
    environment = dict(os.environ)
    if processes == 1:
        return [sys.executable, script, *arguments], environment
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", str(port)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", script, *arguments]
    if not Path("/dev/nvidiactl").exists():
        environment["ACCELERATE_USE_CPU"] = "true"
    environment.setdefault("OMP_NUM_THREADS", "1")
    return command, environment


def prove(request: Request, console: Console, command: TrainingCommand) -> int:
    """The whole procedure; `command` gives the command line and environment of a training."""
    config, place = request.loaded.config, config_name(request.loaded.file)
    root, stamp = Path(config.output_root), start_name()
    for name in (f"{stamp}-unbroken", f"{stamp}-killed"):
        check_run_name(root, place, name)
    proof = Proof(request, RunDirectory(root / place / f"{stamp}-unbroken"))
    try:
        with _signals_interrupt():
            _unbroken_run(proof, console, command)
            _killed_runs(proof, root / place / f"{stamp}-killed", console, command)
            start = time.monotonic()
            from forge.checkpoint.comparison import Comparison, Difference, Part, compare_runs

            if proof.failure is None:
                comparisons = [compare_runs(proof.unbroken.path, run.path) for run in proof.killed]
            else:
                broken = Difference("resume", "the end of the run", "complete", proof.failure)
                comparisons = [Comparison([Part("resume", {}, broken)])]
            proof.seconds["comparison"] = round(time.monotonic() - start, 3)
    except KeyboardInterrupt:
        runs = [run.path for run in (proof.unbroken, *proof.killed) if run.path.exists()]
        there = f"; what there is of the runs stays: {', '.join(map(str, runs))}" if runs else "; nothing was created"
        console.print(f"interrupted, all processes ended{there}", soft_wrap=True)
        return EXIT_FAILED
    return _verdict(proof, comparisons, console)


def plan(request: Request, total_steps: int) -> list[Point]:
    """The kills in the order of the run, drawn from the seed."""
    draw, evaluation = random.Random(request.seed), request.loaded.config.evaluation
    possible = [
        aim
        for aim in ENUMERATED
        if (evaluation.baseline or aim != Aim.BASELINE) and (evaluation.final or aim != Aim.FINAL)
    ]
    aims = possible[: request.kills]
    # Random instants seldom meet a save, and a save is what breaks: every third of the rest is aimed at one.
    aims += [(Aim.RANDOM, Aim.RANDOM, Aim.WITHIN_SAVE)[i % 3] for i in range(request.kills - len(aims))]
    in_training = [aim for aim in aims if aim not in STAGES and aim != Aim.BEFORE_FIRST_SAVE]
    draw.shuffle(in_training)
    points = [(aim, 0) for aim in (Aim.BASELINE, Aim.BEFORE_FIRST_SAVE) if aim in aims]
    for i, aim in enumerate(in_training):  # each has its own stretch of the steps: so the run gets on
        step = (i + (draw.random() if aim == Aim.RANDOM else 0)) * total_steps / len(in_training)
        points.append((aim, int(step)))
    points += [(aim, 0) for aim in (Aim.EXPORT, Aim.FINAL) if aim in aims]
    victims = [ALL, ONE_RANK, ALL, LAUNCHER] if request.processes > 1 else [ALL]
    draw.shuffle(victims)
    return [
        Point(aim, victims[i % len(victims)], step, draw.random(), draw.randrange(request.processes))
        for i, (aim, step) in enumerate(points)
    ]


def saving_override(every_steps: int | None, total_steps: int, kills: int) -> int | None:
    """What checkpoint.every_steps must be so that a run that is killed so often still gets on; None: as it is."""
    needed = kills + 2 if kills else 1
    if every_steps is not None and math.ceil(total_steps / every_steps) >= needed:
        return None
    return max(1, total_steps // needed)


def _request(args: argparse.Namespace) -> Request:
    problems = []
    if args.kills < 0:
        problems.append(f"--kills is {args.kills}; it must be 0 (two unbroken runs are compared) or more")
    if args.processes < 1:
        problems.append(f"--processes is {args.processes}; it must be 1 or more")
    if args.debug:
        problems.append("--debug takes two steps, too few to be killed in; use --max_steps instead")
    if problems:
        raise UsageError("; ".join(problems))
    named = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
    loaded = load_config(Path(args.config), args.set, **named)
    check_writable(Path(loaded.config.output_root))
    arguments = ["--config", args.config, *(word for text in args.set for word in ("--set", text))]
    arguments += [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
    return Request(loaded, args.kills, args.processes, args.seed, arguments)


def _unbroken_run(proof: Proof, console: Console, command: TrainingCommand) -> None:
    config = proof.request.loaded.config
    if config.tracking.wandb is not None:
        proof.overrides.append("tracking.wandb=null")
        console.print("tracking.wandb is off in both runs: a proof is no result")
    if config.training.max_steps is not None:
        _save_often_enough(proof, config.training.max_steps, console)
    console.print(f"unbroken run: {proof.unbroken.path}", soft_wrap=True)
    while not _runs_through(proof, console, command):
        # Only the run itself knew its number of steps: from the start again, with more saves.
        state = Watch(proof.unbroken).look().state
        shutil.rmtree(proof.unbroken.path)
        if state is not None:
            unregister(Path(config.output_root), state.run_id)
    proof.seconds["unbroken run"] = round(proof.tempo.total, 3)
    console.print(f"unbroken run: complete, {proof.total_steps} steps, {proof.tempo.total:.1f} s")


def _runs_through(proof: Proof, console: Console, command: TrainingCommand) -> bool:
    """False where it was ended since it saves too seldom."""
    watch, proof.tempo, start = Watch(proof.unbroken), Tempo(), time.monotonic()
    arguments = [*_arguments(proof), "--run_name", proof.unbroken.name]
    with Processes(*command(arguments, proof.request.processes)) as processes:
        while processes.exit_code is None:
            sight = watch.look()
            proof.tempo.see(sight, time.monotonic() - start)
            if proof.total_steps == 0 and sight.state is not None and sight.state.total_steps > 0:
                if _save_often_enough(proof, sight.state.total_steps, console):
                    return False
            time.sleep(POLL_S)
        state = watch.look().state
        if processes.exit_code != EXIT_COMPLETE or state is None or not state.pipeline_complete:
            sentence, code = _last_words(processes)
            if code == EXIT_USAGE:
                raise UsageError(f"the unbroken run did not start: {sentence}")
            raise ForgeError(f"the unbroken run did not come to its end (exit {code}): {sentence}")
    proof.tempo.total = time.monotonic() - start
    return True


def _save_often_enough(proof: Proof, total_steps: int, console: Console) -> bool:
    """Adds an override where it is needed."""
    proof.total_steps = total_steps
    configured = proof.request.loaded.config.checkpoint.every_steps
    every = saving_override(configured, total_steps, proof.request.kills)
    if every is None:
        return False
    proof.overrides.append(f"checkpoint.every_steps={every}")
    console.print(
        f"checkpoint.every_steps is {every} in both runs instead of {configured}: {total_steps} steps with "
        f"{proof.request.kills} kills need {proof.request.kills + 2} saves to get on"
    )
    return True


def _arguments(proof: Proof) -> list[str]:
    return [*proof.request.arguments, *(word for text in proof.overrides for word in ("--set", text))]


def _killed_runs(proof: Proof, place: Path, console: Console, command: TrainingCommand) -> None:
    """One run with all its kills; and another where some came too late."""
    points, start = plan(proof.request, proof.total_steps), time.monotonic()
    for number in range(1, ROUNDS + 1):
        run = RunDirectory(place if number == 1 else place.with_name(f"{place.name}-{number}"))
        proof.killed.append(run)
        console.print(f"killed run: {run.path}", soft_wrap=True)
        landed = len(proof.kills)
        points = _killed_run(proof, run, points, console, command)
        if proof.failure is not None or not points:
            break
        if len(proof.kills) == landed:
            proof.failure = f"not killed: of {len(points)} kills none came before its end"
            break
        console.print(f"{len(points)} kills came too late, the run was complete: aimed again in another run")
        points = [replace(point, from_step=point.from_step // 2, share=0.0) for point in points]  # earlier
    else:
        proof.failure = f"killed {len(proof.kills)} times of {proof.request.kills}: the others came too late"
    proof.seconds["killed runs"] = round(time.monotonic() - start, 3)


def _killed_run(
    proof: Proof, run: RunDirectory, points: list[Point], console: Console, command: TrainingCommand
) -> list[Point]:
    """Takes the run to its end through all the kills; returns those that came too late."""
    missed: list[Point] = []
    arguments = [*_arguments(proof), "--run_name", run.name]
    while True:
        attempt = _Attempt(proof, run, points, missed)
        with Processes(*command(arguments, proof.request.processes)) as processes:
            outcome = attempt.run(processes)
        if not isinstance(outcome, Kill):
            proof.failure = outcome
            return [*missed, *points]
        proof.kills.append(outcome)
        _print_kill(outcome, proof.request.kills, console)
        arguments = ["--resume", str(run.path)]


class _Attempt:
    """One start of a run until it is killed or ends."""

    def __init__(self, proof: Proof, run: RunDirectory, points: list[Point], missed: list[Point]):
        self.proof, self.run_directory, self.points, self.missed = proof, run, points, missed
        self.watch = Watch(run)
        self.before = self.watch.look()  # what was there before it started
        self.since: float | None = None  # when the thing that is aimed at began
        self.opened: float | None = None  # when the attempt had taken the run
        self.start = time.monotonic()
        self.limit_s = PATIENCE_S + PATIENCE * proof.tempo.total

    def run(self, processes: Processes) -> Kill | str | None:
        """A kill; why there was none and the run did not end; or None for the run's end."""
        while processes.exit_code is None:
            sight, seconds = self.watch.look(), time.monotonic() - self.start
            if self.opened is None and self._attempts(sight) > self._attempts(self.before):
                self.opened = seconds
                processes.learn()
            while self.opened is not None and self.points and (decision := self._decision(sight, seconds)) != "wait":
                point, self.since = self.points.pop(0), None
                if decision == "past":
                    self.missed.append(point)
                elif (kill := self._kill(point, processes)) is not None:
                    return kill
                else:  # it was complete by then
                    self.missed.append(point)
                    return None
            if seconds > self.limit_s:
                return f"not complete {seconds:.0f} s after attempt {self._attempts(sight)} began"
            time.sleep(POLL_S)
        sight = self.watch.look()
        if processes.exit_code == EXIT_COMPLETE and sight.state is not None and sight.state.pipeline_complete:
            return None
        sentence, code = _last_words(processes)
        return f"exit {code} of attempt {self._attempts(sight)}: {sentence}"

    def _decision(self, sight: Sight, seconds: float) -> str:
        """Is it the instant of the next point: kill, wait, or past?"""
        point, tempo = self.points[0], self.proof.tempo
        assert sight.state is not None
        assert self.opened is not None
        stage = sight.state.stage
        if point.aim in STAGES:
            if stage != STAGES[point.aim]:
                return "wait" if stage.order < STAGES[point.aim].order else "past"
            return self._after(0.7 * point.share * tempo.of_stage(stage), seconds)
        if point.aim == Aim.RANDOM:
            if sight.state.pipeline_complete:
                return "past"
            steps = max(0, point.from_step - max(self.before.checkpoints, default=0))
            to_training = tempo.stages.get(Stage.TRAINING, tempo.opened) - tempo.opened
            delay = to_training + steps * tempo.of_stage(Stage.TRAINING) / max(1, self.proof.total_steps)
            return "kill" if seconds - self.opened >= delay else "wait"
        if stage.order > Stage.TRAINING.order:
            return "past"
        if point.aim == Aim.BEFORE_FIRST_SAVE:
            if sight.checkpoints:
                return "past"
            share = 0.9 * point.share * tempo.of_stage(Stage.TRAINING) / max(1, len(tempo.saves))
            return self._after(share, seconds) if stage == Stage.TRAINING else "wait"
        if point.aim == Aim.SAVED:
            known = max([point.from_step, *self.before.checkpoints])
            return "kill" if any(step > known for step in sight.checkpoints) else "wait"
        saving = [n for name, n in sight.staging.items() if name not in self.before.staging and n > point.from_step]
        if not saving and self.since is None:
            return "wait"
        return "kill" if point.aim == Aim.SAVE_STARTS else self._after(point.share * tempo.of_save, seconds)

    def _after(self, delay_s: float, seconds: float) -> str:
        """Kill so long after the first time that this was asked."""
        self.since = seconds if self.since is None else self.since
        return "kill" if seconds - self.since >= delay_s else "wait"

    def _kill(self, point: Point, processes: Processes) -> Kill | None:
        """None where the run was complete before."""
        victim = point.victim
        if victim == ONE_RANK and processes.kill_rank(point.rank):
            victim = f"rank {point.rank}"
        elif victim == LAUNCHER:
            processes.kill_launcher()
        else:
            victim = ALL
            processes.kill_all()
        instant = time.monotonic()
        ended = processes.ended_within(LAST_WORDS_S)
        ended_s = time.monotonic() - instant
        processes.kill_all()
        sight = self.watch.look()
        if sight.state is None or sight.state.pipeline_complete:
            return None
        return Kill(
            number=len(self.proof.kills) + 1,
            run=self.run_directory.name,
            attempt=sight.state.attempts,
            aimed_at=str(point.aim),
            victim=victim,
            stage=str(sight.state.stage),
            step=self.watch.reported_step(),
            on_disk=list(sight.saves),
            seconds=round(instant - self.start, 3),
            all_ended_s=round(ended_s, 3) if ended else None,
        )

    @staticmethod
    def _attempts(sight: Sight) -> int:
        return sight.state.attempts if sight.state is not None else 0


def _last_words(processes: Processes) -> tuple[str, int]:
    """The sentence that a training ended with, and forge's own exit code, also behind the launcher."""
    output = processes.output()
    errors = [line.split("ERROR: ", 1)[1] for line in output.splitlines() if "ERROR: " in line]
    lines = [line for line in output.splitlines() if line.strip()] or ["it said nothing"]
    code = processes.exit_code or EXIT_COMPLETE
    behind = re.search(r"exitcode\s*:\s*(-?\d+)", output)
    return errors[0] if errors else lines[-1].strip(), int(behind[1]) if behind and code == EXIT_FAILED else code


def _print_kill(kill: Kill, kills: int, console: Console) -> None:
    left = "" if kill.all_ended_s is not None else f"; what it left was killed after {LAST_WORDS_S:.0f} s"
    console.print(
        f"kill {kill.number}/{kills}: {kill.aimed_at}: {kill.victim}, {kill.seconds:.1f} s into attempt {kill.attempt}, "
        f"in {kill.stage.replace('_', ' ')}, step {kill.step} reported; on disk: {', '.join(kill.on_disk) or 'no save'}"
        f"{left}",
        soft_wrap=True,
    )


def _verdict(proof: Proof, comparisons: "list[Comparison]", console: Console) -> int:
    """The table, the certificate and the exit code."""
    difference = next((c.difference for c in comparisons if c.difference is not None), None)
    table = Table("compared", "how much", "result", title="unbroken and killed run", title_justify="left")
    for run, comparison in zip(proof.killed, comparisons, strict=False):
        for part in comparison.parts:
            counts = ", ".join(f"{count:,} {name}" for name, count in part.counts.items())
            name = part.name if len(comparisons) == 1 else f"{part.name} of {run.name}"
            table.add_row(name, counts or "-", "differs" if part.difference else "identical")
    console.print(table)
    certificate = _certificate(proof, comparisons)
    for run in proof.killed:
        if run.path.is_dir():
            write_json(run.path / CERTIFICATE, certificate)
            _add_to_card(run, proof, certificate["verdict"])
            console.print(f"certificate: {run.path / CERTIFICATE}", soft_wrap=True)
    circumstances = f"after {_count(len(proof.kills), 'kill')} on {_processes(proof)}"
    if difference is None:
        console.print(f"identical: every bit is the unbroken run's {circumstances}")
        return EXIT_COMPLETE
    console.print(f"different {circumstances}: {difference}{_hint(proof, difference.part)}", soft_wrap=True)
    return EXIT_FAILED


def _certificate(proof: Proof, comparisons: "list[Comparison]") -> dict[str, Any]:
    request, first = proof.request, proof.killed[0]
    facts = provenance(None, sys.orig_argv)
    differences = [asdict(part.difference) for c in comparisons for part in c.parts if part.difference is not None]
    world = read_json(proof.unbroken.metadata_file).get("world", {})
    return {
        "format": 1,
        "verdict": "different" if differences else "identical",
        "created_at": now(),
        "command": facts["command"],
        "config": str(request.loaded.file),
        "config_hash": _config_hash(proof.unbroken),
        "overrides": proof.overrides,
        "seed": request.seed,
        "processes": request.processes,
        "total_steps": proof.total_steps,
        "unbroken_run": str(proof.unbroken.path),
        "killed_runs": [str(run.path) for run in proof.killed],
        "kills_asked": request.kills,
        "kills": [asdict(kill) for kill in proof.kills],
        "compared": {part.name: part.counts for comparison in comparisons for part in comparison.parts},
        "difference": differences[0] if differences else None,
        "differences": differences,
        "versions": {"forge": facts["forge_version"], "python": facts["python_version"], **facts["packages"]},
        "git": facts["git"],
        "machine": {
            "platform": facts["platform"],
            "device": world.get("device"),
            "mixed_precision": world.get("mixed_precision"),
            "cpus": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "seconds": proof.seconds,
    }


def _config_hash(run: RunDirectory) -> str | None:
    """As the run's newest checkpoint has it."""
    steps = Watch(run).look().checkpoints
    if not steps:
        return None
    return read_json(run.checkpoint(steps[-1]) / "manifest.json").get("config_hash")


def _add_to_card(run: RunDirectory, proof: Proof, verdict: str) -> None:
    """One line below what the model card tells of the run."""
    card = run.final / "README.md"
    if not card.is_file():
        return
    result = "bit-identical" if verdict == "identical" else "different"
    kills = sum(kill.run == run.name for kill in proof.kills)
    line = f"- Resume proof: {result} after {_count(kills, 'kill')} on {_processes(proof)} ({CERTIFICATE})\n"
    text = card.read_text()
    versions = re.search(r"^- Versions: .*\n", text, re.MULTILINE)
    at = versions.end() if versions else len(text)
    write_atomically(card, text[:at] + line + text[at:])


def _hint(proof: Proof, part: str) -> str:
    """A difference may be the hardware's own: then two unbroken runs differ too."""
    world = read_json(proof.unbroken.metadata_file).get("world", {})
    deterministic = getattr(proof.request.loaded.config.training, "deterministic", False)
    if part == "resume" or world.get("device") == "cpu" or deterministic:
        return ""
    return (
        f". On {world.get('device')} two unbroken runs may differ too (`--kills 0` tells): "
        f"try `--set training.deterministic=true`"
    )


def _processes(proof: Proof) -> str:
    return _count(proof.request.processes, "process")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('s') else 's'}"


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """TERM and HUP end the proof as Ctrl-C does: the processes that it started end with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
