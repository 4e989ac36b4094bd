"""Proves that a config resumes exactly: kills a run of it repeatedly and compares its end with an unbroken run's."""

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

from rich.console import Console

from forge.attempt.control import wants_control
from forge.cluster.launch import SAVE_TIMEOUT_S, option_words, training_command
from forge.cluster.processes import Processes
from forge.config.explain import config_name
from forge.config.loader import load_config
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, ForgeError, UsageError
from forge.proof.certificate import Kill, Proof, conclusion, table, write_certificate
from forge.proof.findings import BitComparison, ComparedPart, Difference
from forge.proof.kill_points import Decision, KillTrigger, PlannedKill, Target, plan_kills
from forge.proof.watch import Snapshot, Timings, Watch
from forge.run.directory import RunDirectory, check_run_name, check_writable, start_name
from forge.run.registry import unregister

POLL_S = 0.002  # a tenth of the time that a tiny model's save takes
LAST_WORDS_S = SAVE_TIMEOUT_S + 30.0  # for processes that a kill left alive: a launcher's ranks may still save
LINGER_S = 60.0  # for a process whose run is complete
ROUNDS = 3  # how many runs are killed at most: kills that come too late for one are made in the next
# An attempt has failed if it takes PATIENCE times the whole unbroken run and PATIENCE_S more.
PATIENCE, PATIENCE_S = 5.0, 180.0

EXIT_INTERRUPTED = 130  # the shells' code for Ctrl-C: the runs are neither identical nor different

LINGERS = f"is complete, but its process has not ended {LINGER_S:.0f} s later"

# Returns the command line and the environment that train with these arguments on so many processes.
TrainingCommand = Callable[[list[str], int], tuple[list[str], dict[str, str]]]


def prove_resume(args: argparse.Namespace) -> int:
    """Run the proof and return the exit code: 0 if the runs are identical, 1 if they are not.

    Raises UsageError before anything runs, and ForgeError if the unbroken run fails.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return Procedure(args, console, training_command).run()


def saving_override(every_steps: int | None, total_steps: int, kills: int) -> int | None:
    """Return the checkpoint.every_steps with which a run makes progress between the kills; None: the config's own."""
    needed = kills + 2 if kills else 1
    if every_steps is not None and math.ceil(total_steps / every_steps) >= needed:
        return None
    return max(1, total_steps // needed)


class Procedure:
    """The unbroken run, the killed runs and the comparison."""

    def __init__(self, args: argparse.Namespace, console: Console, command: TrainingCommand):
        """command: starts a training; tests pass another one. Raises UsageError if an argument is wrong."""
        _check_numbers(args)
        named = {"max_steps": args.max_steps, "epochs": args.epochs, "output_root": args.output_root}
        self.loaded = load_config(Path(args.config), args.set, **named)
        self.config = self.loaded.config
        self.arguments = option_words(config=args.config, set=args.set, **named)
        self.place = Path(self.config.output_root) / config_name(self.loaded.file)
        self.stamp = start_name()
        check_writable(Path(self.config.output_root))
        for kind in ("unbroken", "killed"):
            check_run_name(Path(self.config.output_root), config_name(self.loaded.file), f"{self.stamp}-{kind}")
        self.kills, self.processes, self.seed = args.kills, args.processes, args.seed
        self.console, self.command = console, command
        self.timings = Timings()

    def run(self) -> int:
        """Run the whole procedure, report it on the console, and return the exit code."""
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
            what = f"these runs are kept: {', '.join(there)}" if there else "nothing was created"
            self._say(f"interrupted: all processes have ended, {what}")
            return EXIT_INTERRUPTED
        self.console.print(table(self.proof))
        for file in write_certificate(self.proof):
            self._say(f"certificate: {file}")
        self._say(conclusion(self.proof))
        return EXIT_COMPLETE if self.proof.difference is None else EXIT_FAILED

    def _say(self, line: str) -> None:
        self.console.print(line)

    def _prepare(self) -> None:
        """Override what all runs need to have in common, as far as it is known by now."""
        if wants_control(self.config):
            self.proof.overrides.append("evaluation.control=null")
            self._say("evaluation.control is null in all runs: the control run would be another run")
        if self.config.tracking.wandb is not None:
            self.proof.overrides.append("tracking.wandb=null")
            self._say("tracking.wandb is null in all runs: runs of a proof are not results")
        if self.config.training.max_steps is not None:
            self._save_often_enough(self.config.training.max_steps)

    def _save_often_enough(self, total_steps: int) -> bool:
        """Override checkpoint.every_steps if the config saves too seldom. Returns True if it did."""
        self.proof.total_steps = total_steps
        configured = self.config.checkpoint.every_steps
        every = saving_override(configured, total_steps, self.kills)
        if every is None:
            return False
        self.proof.overrides.append(f"checkpoint.every_steps={every}")
        was = "null" if configured is None else configured
        self._say(
            f"checkpoint.every_steps is {every} instead of {was} in all runs: to be killed {self.kills} times in "
            f"{total_steps} steps, a run must save about {self.kills + 2} times"
        )
        return True

    def _new(self, run: RunDirectory) -> list[str]:
        """Return the arguments of a new run."""
        return [*self.arguments, *option_words(set=self.proof.overrides, run_name=run.name)]

    def _unbroken_run(self) -> None:
        run = self.proof.unbroken
        self._say(f"unbroken run: {run.path} (follow it in its {run.log_file.name})")
        while not self._runs_through(run):
            # Only the run itself knew its number of steps, and it saves too seldom for them: start it again.
            state = Watch(run).look().state
            shutil.rmtree(run.path)
            if state is not None:
                unregister(Path(self.config.output_root), state.run_id)
        seconds = self.timings.total_s()
        self.proof.seconds["unbroken_run"] = round(seconds, 3)
        self._say(f"unbroken run: complete, {self.proof.total_steps} steps in {seconds:.1f} s")

    def _runs_through(self, run: RunDirectory) -> bool:
        """Train to the end. Returns False if the run was stopped because it saves too seldom."""
        watch, self.timings, start, lingering = Watch(run), Timings(), time.monotonic(), _Lingering()
        with Processes(*self.command(self._new(run), self.processes)) as processes:
            while processes.exit_code is None:
                seen = watch.look()
                self.timings.add(seen, time.monotonic() - start)
                steps = seen.state.total_steps if seen.state is not None and self.proof.total_steps == 0 else 0
                if steps and self._save_often_enough(steps):
                    return False
                if lingering.too_long(seen):
                    raise ForgeError(f"the unbroken run {run.path} {LINGERS}")
                time.sleep(POLL_S)
            seen = watch.look()
            self.timings.add(seen, time.monotonic() - start)
            if seen.complete and processes.exit_code == EXIT_COMPLETE:
                return True
            sentence, code = _last_words(processes)
        if code == EXIT_USAGE:
            raise UsageError(f"the unbroken run did not start: {sentence}")
        left = f"; its directory is {run.path}" if run.path.exists() else ""
        raise ForgeError(f"the unbroken run failed (exit {code}): {sentence}{left}")

    def _killed_runs(self) -> str | None:
        """Kill one run as planned, and further runs if some kills came too late. Returns why it failed, or None."""
        evaluation, start = self.config.evaluation, time.monotonic()
        planned = plan_kills(
            *(self.kills, self.processes, self.proof.total_steps, self.seed),
            **{"baseline": evaluation.baseline, "final": evaluation.final},
        )
        failure = None
        for number in range(1, ROUNDS + 1):
            run = RunDirectory(self.place / f"{self.stamp}-killed{f'-{number}' if number > 1 else ''}")
            self.proof.killed.append(run)
            self._say(f"killed run: {run.path}")
            asked = len(planned)
            planned, failure = self._killed_run(run, planned)
            if failure is not None or not planned:
                break
            if number == ROUNDS or (number > 1 and len(planned) == asked):
                failure = f"complete before {len(planned)} of {self.kills} kills could be made, in {number} runs"
                break
            self._say(f"{len(planned)} of the kills came too late: they are made earlier, in another run")
            planned = [replace(kill, from_step=kill.from_step // 2, share=0.0) for kill in planned]
        self.proof.seconds["killed_runs"] = round(time.monotonic() - start, 3)
        return failure

    def _killed_run(self, run: RunDirectory, planned: list[PlannedKill]) -> tuple[list[PlannedKill], str | None]:
        """Train a run to its end through its kills. Returns those that came too late, and why it failed, or None."""
        waiting, missed, arguments = list(planned), list[PlannedKill](), self._new(run)
        while True:
            attempt = WatchedAttempt(self, run, waiting, missed)
            with Processes(*self.command(arguments, self.processes)) as processes:
                kill = attempt.run(processes)
                failure = None if kill is not None else attempt.failure(processes)
            if kill is None:
                return [*missed, *waiting], failure
            self.proof.kills.append(kill)
            self._say(kill.line(self.kills))
            arguments = option_words(resume=run.path)

    def _compare(self, failure: str | None) -> None:
        from forge.proof.compare import compare_bits  # imports torch, which a wrong command line need not wait for

        start = time.monotonic()
        self._say("comparing")
        self.proof.comparisons = [compare_bits(self.proof.unbroken.path, run.path) for run in self.proof.killed]
        if failure is not None:
            where = f"the end of {self.proof.killed[-1].name}"
            found = Difference(part="resume", where=where, unbroken="complete", killed=failure)
            self.proof.comparisons[-1] = BitComparison([ComparedPart("resume", {}, found)])
        if orphans := _orphans(self.proof.kills):
            self.proof.comparisons[-1] = BitComparison([orphans, *self.proof.comparisons[-1].parts])
        self.proof.seconds["comparison"] = round(time.monotonic() - start, 3)


class WatchedAttempt:
    """One attempt at the killed run, watched from outside until it is killed or ends."""

    def __init__(self, procedure: Procedure, run: RunDirectory, waiting: list[PlannedKill], missed: list[PlannedKill]):
        """waiting: the kills to make, removed as they are made or missed; missed: gets those that came too late."""
        self.procedure, self.run_directory, self.waiting, self.missed = procedure, run, waiting, missed
        self.watch = Watch(run)
        self.before = self.watch.look()
        self.start = time.monotonic()
        self.limit_s = PATIENCE_S + PATIENCE * procedure.timings.total_s()

    def run(self, processes: Processes) -> Kill | None:
        """Return the kill; None if the attempt ended by itself, or took too long."""
        opened, trigger, lingering = None, None, _Lingering()
        while processes.exit_code is None and self._seconds() < self.limit_s:
            seen = self.watch.look()
            if lingering.too_long(seen):
                return None
            if opened is None and seen.attempt > self.before.attempt:
                opened = self._seconds()
                processes.learn()
            if opened is not None and self.waiting:
                trigger = trigger or self._trigger()
                decision = trigger.decide(seen, self._seconds() - opened)
                if decision != Decision.WAIT:
                    planned, trigger = self.waiting.pop(0), None
                    kill = self._kill(planned, processes) if decision == Decision.KILL else None
                    if kill is not None:
                        return kill
                    self.missed.append(planned)
                    continue
            time.sleep(POLL_S)
        return None

    def failure(self, processes: Processes) -> str | None:
        """Return why the run is not complete; None if it is."""
        seen = self.watch.look()
        if seen.complete:
            return None if processes.exit_code is not None else LINGERS
        if processes.exit_code is None:
            return f"not complete {self._seconds():.0f} s after the start of attempt {seen.attempt}"
        sentence, code = _last_words(processes)
        return f"exit {code} in attempt {seen.attempt}: {sentence}"

    def _trigger(self) -> KillTrigger:
        procedure = self.procedure
        return KillTrigger(self.waiting[0], procedure.timings, self.before, procedure.proof.total_steps)

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def _kill(self, planned: PlannedKill, processes: Processes) -> Kill | None:
        """Return the kill; None if the run was complete by then."""
        victim = _kill_target(planned, processes)
        seconds = self._seconds()
        ended = processes.ended_within(LAST_WORDS_S)
        ended_s = self._seconds() - seconds
        processes.kill_all()
        seen = self.watch.look()
        if seen.state is None or seen.complete:
            return None
        return Kill(
            number=len(self.procedure.proof.kills) + 1,
            run=self.run_directory.name,
            attempt=seen.attempt,
            aimed_at=str(planned.point),
            victim=victim,
            stage=str(seen.state.stage),
            step=self.watch.reported_step(),
            on_disk=list(seen.saves),
            seconds=round(seconds, 3),
            all_ended_s=round(ended_s, 3) if ended else None,
        )


def _kill_target(planned: PlannedKill, processes: Processes) -> str:
    """Send the SIGKILL. Returns who was killed: all processes if the planned rank is not there."""
    if planned.target == Target.ONE_RANK and processes.kill_rank(planned.rank):
        return f"rank {planned.rank}"
    if planned.target == Target.LAUNCHER:
        processes.kill_launcher()
        return str(Target.LAUNCHER)
    processes.kill_all()
    return str(Target.ALL)


def _orphans(kills: list[Kill]) -> ComparedPart | None:
    """Return the first kill that left processes alive which did not end by themselves; None if there is none."""
    kill = next((kill for kill in kills if kill.all_ended_s is None), None)
    if kill is None:
        return None
    where = f"what kill {kill.number} left alive"
    found = Difference(part="orphans", where=where, unbroken="ended by itself", killed="had to be killed")
    return ComparedPart("orphans", {}, found)


class _Lingering:
    """Notices a process that does not end although its run is complete."""

    def __init__(self) -> None:
        self._since: float | None = None

    def too_long(self, seen: Snapshot) -> bool:
        if seen.complete and self._since is None:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since > LINGER_S


def _check_numbers(args: argparse.Namespace) -> None:
    problems = []
    if args.kills < 0:
        problems.append(f"--kills is {args.kills}; it must be positive, or 0 to compare two unbroken runs")
    if args.processes < 1:
        problems.append(f"--processes is {args.processes}; it must be positive")
    if args.debug:
        problems.append("--debug trains for two steps only, too few to kill a run in; use --max_steps instead")
    if problems:
        raise UsageError("\n".join(problems))


def _last_words(processes: Processes) -> tuple[str, int]:
    """Return the error that a training ended with, and forge's own exit code, not its launcher's."""
    output = processes.output()
    errors = [line.split("ERROR: ", 1)[1] for line in output.splitlines() if "ERROR: " in line]
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return errors[0] if errors else lines[-1], processes.forge_exit_code or EXIT_COMPLETE


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within it, TERM and HUP end the proof and its processes as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
