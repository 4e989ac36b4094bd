"""Proves that a config resumes: kills a run of it again and again, and compares its end with the unbroken run's."""

import argparse
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from forge.attempt.control import wants_control
from forge.cluster.launch import SAVE_TIMEOUT_S, training_command
from forge.cluster.processes import Processes
from forge.config.explain import config_name
from forge.config.loader import load_config
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, ForgeError, UsageError
from forge.proof.kill_points import Decision, Marksman, Point, Victim, plan_kills
from forge.proof.watch import Sight, Tempo, Watch
from forge.run.directory import RunDirectory, check_run_name, check_writable, start_name
from forge.run.registry import unregister

if TYPE_CHECKING:
    from forge.proof.certificate import Kill

POLL_S = 0.002  # a save of a tiny model takes some ten times as long
LAST_WORDS_S = SAVE_TIMEOUT_S + 30.0  # for what a kill left alive: so long the ranks of a launcher may take to save
LINGER_S = 60.0  # for a process whose run is complete
ROUNDS = 3  # how often a run is begun anew for the kills that came too late
# An attempt that takes so much longer than the whole unbroken run is not going to end.
PATIENCE, PATIENCE_S = 5.0, 180.0

EXIT_INTERRUPTED = 130  # as shells have it: neither identical nor different

LINGERS = f"is complete, but its process has not ended {LINGER_S:.0f} s later"

# The command line and environment that train with these arguments on so many processes.
TrainingCommand = Callable[[list[str], int], tuple[list[str], dict[str, str]]]


def prove_resume(args: argparse.Namespace) -> int:
    """Runs the proof that the parsed arguments ask for: 0 identical, 1 not.

    Raises UsageError before anything runs, and ForgeError where the unbroken run does not come to its end.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return Procedure(args, console, training_command).run()


def saving_override(every_steps: int | None, total_steps: int, kills: int) -> int | None:
    """What checkpoint.every_steps must be so that a run that is killed so often still gets on; None: as it is."""
    needed = kills + 2 if kills else 1
    if every_steps is not None and math.ceil(total_steps / every_steps) >= needed:
        return None
    return max(1, total_steps // needed)


class Procedure:
    """The unbroken run, the killed ones, the comparison. `command` starts a training; tests give another one."""

    def __init__(self, args: argparse.Namespace, console: Console, command: TrainingCommand):
        """Raises UsageError for whatever can be known to be wrong before anything runs."""
        _check_numbers(args)
        named = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
        self.loaded = load_config(Path(args.config), args.set, **named)
        self.config = self.loaded.config
        self.arguments = ["--config", args.config, *(word for text in args.set for word in ("--set", text))]
        self.arguments += [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
        self.place = Path(self.config.output_root) / config_name(self.loaded.file)
        self.stamp = start_name()
        check_writable(Path(self.config.output_root))
        for kind in ("unbroken", "killed"):
            check_run_name(Path(self.config.output_root), config_name(self.loaded.file), f"{self.stamp}-{kind}")
        self.kills, self.processes, self.seed = args.kills, args.processes, args.seed
        self.console, self.command = console, command
        self.tempo = Tempo()

    def run(self) -> int:
        """The whole procedure; says what it does, and returns the exit code."""
        from forge.proof.certificate import Proof, conclusion, table, write_certificate

        unbroken = RunDirectory(self.place / f"{self.stamp}-unbroken")
        self.proof = Proof(self.loaded, self.processes, self.kills, self.seed, unbroken)
        try:
            with _signals_interrupt():
                self._prepare()
                self._unbroken_run()
                failure = self._killed_runs()
                self._compare(failure)
        except KeyboardInterrupt:
            there = [str(run.path) for run in (unbroken, *self.proof.killed) if run.path.exists()]
            what = f"the runs so far stay: {', '.join(there)}" if there else "nothing was created"
            self._say(f"interrupted; its processes have ended, {what}")
            return EXIT_INTERRUPTED
        self.console.print(table(self.proof))
        for file in write_certificate(self.proof):
            self._say(f"certificate: {file}")
        self._say(conclusion(self.proof))
        return EXIT_COMPLETE if self.proof.difference is None else EXIT_FAILED

    def _say(self, line: str) -> None:
        self.console.print(line)

    def _prepare(self) -> None:
        """What the runs have in common, as far as it is known by now."""
        if wants_control(self.config):
            self.proof.overrides.append("evaluation.control=null")
            self._say("evaluation.control is null in all runs: a control is a run of its own")
        if self.config.tracking.wandb is not None:
            self.proof.overrides.append("tracking.wandb=null")
            self._say("tracking.wandb is null in all runs: a proof is no result")
        if self.config.training.max_steps is not None:
            self._save_often_enough(self.config.training.max_steps)

    def _save_often_enough(self, total_steps: int) -> bool:
        """Overrides the config where that is needed."""
        self.proof.total_steps = total_steps
        configured = self.config.checkpoint.every_steps
        every = saving_override(configured, total_steps, self.kills)
        if every is None:
            return False
        self.proof.overrides.append(f"checkpoint.every_steps={every}")
        was = "null" if configured is None else configured
        self._say(
            f"checkpoint.every_steps is {every} instead of {was} in all runs: in {total_steps} steps, a run that is to "
            f"be killed {self.kills} times must save about {self.kills + 2} times"
        )
        return True

    def _new(self, run: RunDirectory) -> list[str]:
        """The arguments that begin a run."""
        overrides = [word for text in self.proof.overrides for word in ("--set", text)]
        return [*self.arguments, *overrides, "--run_name", run.name]

    def _unbroken_run(self) -> None:
        run = self.proof.unbroken
        self._say(f"unbroken run: {run.path} (follow it in its {run.log_file.name})")
        while not self._runs_through(run):
            # It would save too seldom, and only the run itself knew its number of steps: once more from its start.
            state = Watch(run).look().state
            shutil.rmtree(run.path)
            if state is not None:
                unregister(Path(self.config.output_root), state.run_id)
        seconds = self.tempo.total_s()
        self.proof.seconds["unbroken_run"] = round(seconds, 3)
        self._say(f"unbroken run: complete, {self.proof.total_steps} steps in {seconds:.1f} s")

    def _runs_through(self, run: RunDirectory) -> bool:
        """False where it was ended for another with more saves."""
        watch, self.tempo, start, lingers = Watch(run), Tempo(), time.monotonic(), _Lingering()
        with Processes(*self.command(self._new(run), self.processes)) as processes:
            while processes.exit_code is None:
                sight = watch.look()
                self.tempo.see(sight, time.monotonic() - start)
                steps = sight.state.total_steps if sight.state is not None and self.proof.total_steps == 0 else 0
                if steps and self._save_often_enough(steps):
                    return False
                if lingers.told(sight):
                    raise ForgeError(f"the unbroken run {run.path} {LINGERS}")
                time.sleep(POLL_S)
            sight = watch.look()
            self.tempo.see(sight, time.monotonic() - start)
            if sight.complete and processes.exit_code == EXIT_COMPLETE:
                return True
            sentence, code = _last_words(processes)
        if code == EXIT_USAGE:
            raise UsageError(f"the unbroken run was not begun: {sentence}")
        left = f"; its directory is {run.path}" if run.path.exists() else ""
        raise ForgeError(f"the unbroken run did not come to its end (exit {code}): {sentence}{left}")

    def _killed_runs(self) -> str | None:
        """One run with all its kills, and another if some came too late. Returns why they came to no end, if so."""
        evaluation, start = self.config.evaluation, time.monotonic()
        points = plan_kills(
            *(self.kills, self.processes, self.proof.total_steps, self.seed),
            **{"baseline": evaluation.baseline, "final": evaluation.final},
        )
        failure = None
        for number in range(1, ROUNDS + 1):
            run = RunDirectory(self.place / f"{self.stamp}-killed{f'-{number}' if number > 1 else ''}")
            self.proof.killed.append(run)
            self._say(f"killed run: {run.path}")
            asked = len(points)
            points, failure = self._killed_run(run, points)
            if failure is not None or not points:
                break
            if number == ROUNDS or (number > 1 and len(points) == asked):
                failure = f"complete before {len(points)} of {self.kills} kills could be made, {number} times over"
                break
            self._say(f"{len(points)} of the kills came too late: they are aimed earlier, at another run")
            points = [replace(point, from_step=point.from_step // 2, share=0.0) for point in points]
        self.proof.seconds["killed_runs"] = round(time.monotonic() - start, 3)
        return failure

    def _killed_run(self, run: RunDirectory, points: list[Point]) -> tuple[list[Point], str | None]:
        """Takes a run to its end through its kills. Returns those that came too late, and why it did not end, if so."""
        waiting, missed, arguments = list(points), list[Point](), self._new(run)
        while True:
            attempt = Attempt(self, run, waiting, missed)
            with Processes(*self.command(arguments, self.processes)) as processes:
                kill = attempt.run(processes)
                failure = None if kill is not None else attempt.failure(processes)
            if kill is None:
                return [*missed, *waiting], failure
            self.proof.kills.append(kill)
            self._say(kill.line(self.kills))
            arguments = ["--resume", str(run.path)]

    def _compare(self, failure: str | None) -> None:
        from forge.proof.compare import Comparison, Difference, Part, compare_runs

        start = time.monotonic()
        self._say("comparing")
        self.proof.comparisons = [compare_runs(self.proof.unbroken.path, run.path) for run in self.proof.killed]
        if failure is not None:
            found = Difference("resume", f"the end of {self.proof.killed[-1].name}", "complete", failure)
            self.proof.comparisons[-1] = Comparison([Part("resume", {}, found)])
        for number, kill in enumerate(self.proof.kills, start=1):
            if kill.all_ended_s is None:
                found = Difference("orphans", f"what kill {number} left alive", "ended by itself", "had to be killed")
                before = self.proof.comparisons[-1].parts
                self.proof.comparisons[-1] = Comparison([Part("orphans", {}, found), *before])
                break
        self.proof.seconds["comparison"] = round(time.monotonic() - start, 3)


class Attempt:
    """One start of the killed run, until it is killed or ends."""

    def __init__(self, procedure: Procedure, run: RunDirectory, waiting: list[Point], missed: list[Point]):
        """waiting: the points from the next one on, taken away as they are done with; missed: those that went by."""
        self.procedure, self.run_directory, self.waiting, self.missed = procedure, run, waiting, missed
        self.watch = Watch(run)
        self.before = self.watch.look()
        self.start = time.monotonic()
        self.limit_s = PATIENCE_S + PATIENCE * procedure.tempo.total_s()

    def run(self, processes: Processes) -> "Kill | None":
        """The kill; None where the attempt came to its own end, or to that of our patience."""
        opened, marksman, lingers = None, None, _Lingering()
        while processes.exit_code is None and self._seconds() < self.limit_s:
            sight = self.watch.look()
            if lingers.told(sight):
                return None
            if opened is None and sight.attempt > self.before.attempt:
                opened = self._seconds()
                processes.learn()
            if opened is not None and self.waiting:
                marksman = marksman or self._marksman()
                decision = marksman.decide(sight, self._seconds() - opened)
                if decision != Decision.WAIT:
                    point, marksman = self.waiting.pop(0), None
                    kill = self._kill(point, processes) if decision == Decision.KILL else None
                    if kill is not None:
                        return kill
                    self.missed.append(point)
                    continue
            time.sleep(POLL_S)
        return None

    def failure(self, processes: Processes) -> str | None:
        """Why the run is not complete; None if it is."""
        sight = self.watch.look()
        if sight.complete:
            return None if processes.exit_code is not None else LINGERS
        if processes.exit_code is None:
            return f"not complete {self._seconds():.0f} s after the start of attempt {sight.attempt}"
        sentence, code = _last_words(processes)
        return f"exit {code} in attempt {sight.attempt}: {sentence}"

    def _marksman(self) -> Marksman:
        procedure = self.procedure
        return Marksman(self.waiting[0], procedure.tempo, self.before, procedure.proof.total_steps)

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def _kill(self, point: Point, processes: Processes) -> "Kill | None":
        """None where the run was complete by then."""
        from forge.proof.certificate import Kill

        victim = str(point.victim)
        if point.victim == Victim.ONE_RANK and processes.kill_rank(point.rank):
            victim = f"rank {point.rank}"
        elif point.victim == Victim.LAUNCHER:
            processes.kill_launcher()
        else:
            victim = str(Victim.ALL)
            processes.kill_all()
        seconds = self._seconds()
        ended = processes.ended_within(LAST_WORDS_S)
        ended_s = self._seconds() - seconds
        processes.kill_all()
        sight = self.watch.look()
        if sight.state is None or sight.complete:
            return None
        return Kill(
            number=len(self.procedure.proof.kills) + 1,
            run=self.run_directory.name,
            attempt=sight.attempt,
            aimed_at=str(point.aim),
            victim=victim,
            stage=str(sight.state.stage),
            step=self.watch.reported_step(),
            on_disk=list(sight.saves),
            seconds=round(seconds, 3),
            all_ended_s=round(ended_s, 3) if ended else None,
        )


class _Lingering:
    """Notices a process that does not end although its run is complete."""

    def __init__(self) -> None:
        self._since: float | None = None

    def told(self, sight: Sight) -> bool:
        if sight.complete and self._since is None:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since > LINGER_S


def _check_numbers(args: argparse.Namespace) -> None:
    problems = []
    if args.kills < 0:
        problems.append(f"--kills is {args.kills}; it must be 1 or more, or 0 to compare two unbroken runs")
    if args.processes < 1:
        problems.append(f"--processes is {args.processes}; it must be 1 or more")
    if args.debug:
        problems.append("--debug takes two steps only, too few to be killed in; give --max_steps instead")
    if problems:
        raise UsageError("\n".join(problems))


def _last_words(processes: Processes) -> tuple[str, int]:
    """The sentence that a training ended with, and forge's own exit code, also where the launcher stands between."""
    output = processes.output()
    errors = [line.split("ERROR: ", 1)[1] for line in output.splitlines() if "ERROR: " in line]
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return errors[0] if errors else lines[-1], processes.forge_exit_code or EXIT_COMPLETE


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """TERM and HUP end the proof as Ctrl-C does, and its processes with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
