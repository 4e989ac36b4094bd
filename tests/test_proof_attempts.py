"""One attempt of a proof of resume, watched: when it is killed, who is killed, and what counts as a failure."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from recorded_runs import metadata_of

from forge.config.loader import load_config
from forge.proof import procedure
from forge.proof.certificate import Certificate, Kill, Proof, conclusion
from forge.proof.findings import BitComparison, ComparedPart, Difference
from forge.proof.kill_points import KillPoint, PlannedKill, Target
from forge.proof.procedure import WatchedAttempt
from forge.proof.watch import Timings
from forge.run.directory import RunDirectory
from forge.run.files import write_json

DIFFERENCE = Difference(part="model", where="model.safetensors: w", unbroken="1.0", killed="2.0")


@dataclass
class Training:
    """Stands for the processes of a training that runs until it is killed."""

    ranks: tuple[int, ...] = (0,)
    ends_by_itself: bool = True
    exit_code: int | None = None
    forge_exit_code: int | None = None
    said: str = ""
    done: list[str] = field(default_factory=list)

    def learn(self) -> None:
        self.done.append("learn")

    def kill_all(self) -> None:
        self.done.append("kill all")

    def kill_launcher(self) -> None:
        self.done.append("kill launcher")

    def kill_rank(self, rank: int) -> bool:
        self.done.append(f"kill rank {rank}")
        return rank in self.ranks

    def ended_within(self, timeout_s: float) -> bool:
        return self.ends_by_itself

    def output(self) -> str:
        return self.said


def attempt(folder: Path, planned: list[PlannedKill], stage: str = "training") -> WatchedAttempt:
    """An attempt that took over a run, which is in the stage by now."""
    run = RunDirectory(folder / "killed")
    run.path.mkdir(exist_ok=True)
    made = WatchedAttempt(
        SimpleNamespace(timings=Timings(), proof=SimpleNamespace(kills=[], total_steps=10)),  # type: ignore[arg-type]
        run,
        planned,
        [],
    )
    state = {"run_id": "r", "stage": stage, "attempts": 1, "pipeline_complete": stage == "complete"}
    write_json(run.state_file, state)
    return made


@pytest.mark.parametrize(
    ("target", "rank", "victim", "done"),
    [
        (Target.ALL, 0, "all processes", ["kill all"]),
        (Target.ONE_RANK, 1, "rank 1", ["kill rank 1"]),
        (Target.ONE_RANK, 7, "all processes", ["kill rank 7", "kill all"]),  # there is no such rank
        (Target.LAUNCHER, 0, "the launcher", ["kill launcher"]),
    ],
)
def test_the_target_alone_is_killed_and_then_what_it_left(
    target: Target, rank: int, victim: str, done: list[str], tmp_path: Path
) -> None:
    made = attempt(tmp_path, [PlannedKill(KillPoint.RANDOM, target, rank)])
    training = Training(ranks=(0, 1))
    kill = made.run(training)  # type: ignore[arg-type]

    assert kill is not None
    assert (kill.number, kill.victim, kill.stage, kill.aimed_at) == (1, victim, "training", "at a random instant")
    assert kill.all_ended_s is not None
    assert training.done == ["learn", *done, "kill all"]
    assert (made.waiting, made.missed) == ([], [])


def test_processes_that_a_kill_left_alive_are_a_difference(tmp_path: Path) -> None:
    made = attempt(tmp_path, [PlannedKill(KillPoint.RANDOM)])
    kill = made.run(Training(ends_by_itself=False))  # type: ignore[arg-type]

    assert kill is not None
    assert kill.all_ended_s is None
    part = procedure._orphans([kill.model_copy(update={"all_ended_s": 1.0, "number": 1}), kill])
    assert part is not None
    assert part.difference is not None
    assert (part.difference.part, part.difference.killed) == ("orphans", "had to be killed")
    assert procedure._orphans([kill.model_copy(update={"all_ended_s": 0.0})]) is None


def test_a_kill_is_missed_where_the_run_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedure, "LINGER_S", 0.01)
    planned = PlannedKill(KillPoint.EXPORT)
    made = attempt(tmp_path, [planned], "complete")

    assert made.run(Training()) is None  # type: ignore[arg-type]
    assert (made.waiting, made.missed) == ([], [planned])


def test_nothing_is_killed_before_the_attempt_has_taken_the_run_over(tmp_path: Path) -> None:
    """Until then the directory shows what an earlier attempt left, and no rank of this one is known."""
    made, training = attempt(tmp_path, [PlannedKill(KillPoint.RANDOM)]), Training()
    made.before = made.watch.look()
    made.limit_s = 0.05

    assert made.run(training) is None  # type: ignore[arg-type]
    assert (training.done, len(made.waiting), made.missed) == ([], 1, [])


def test_a_process_that_outlives_its_complete_run_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedure, "LINGER_S", 0.01)
    made, training = attempt(tmp_path, [], "complete"), Training()

    assert made.run(training) is None  # type: ignore[arg-type]
    assert made.failure(training) == procedure.LINGERS  # type: ignore[arg-type]
    training.exit_code = 0
    assert made.failure(training) is None  # type: ignore[arg-type]


def test_an_attempt_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    made, training = attempt(tmp_path, []), Training()
    made.limit_s = 0.01

    assert made.run(training) is None  # type: ignore[arg-type]
    assert made.failure(training) == "not complete 0 s after the start of attempt 1"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("a\n12:00 ERROR: no disk\nERROR: another rank failed\nlast\n", "no disk"),
        ("a\nlast\n\n", "last"),
        ("", "no output"),
    ],
)
def test_an_attempt_that_ended_too_early_says_why(said: str, sentence: str, tmp_path: Path) -> None:
    training = Training(exit_code=1, forge_exit_code=75, said=said)
    assert attempt(tmp_path, []).failure(training) == f"exit 75 in attempt 1: {sentence}"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "device", "settings", "hinted"),
    [
        ("model", "cuda", [], True),
        ("model", "cuda", ["training.deterministic=true"], False),
        ("model", "cpu", [], False),
        ("resume", "cuda", [], False),
    ],
)
def test_hardware_is_named_only_where_it_may_be_the_cause(
    part: str, device: str, settings: list[str], hinted: bool, config_file: Path, tmp_path: Path
) -> None:
    unbroken = RunDirectory(tmp_path / "unbroken")
    unbroken.path.mkdir()
    metadata = metadata_of(unbroken)
    metadata["world"]["device"] = device
    write_json(unbroken.metadata_file, metadata)
    proof = Proof(load_config(config_file, settings), 1, 1, 0, unbroken)
    found = DIFFERENCE.model_copy(update={"part": part})
    proof.comparisons = [BitComparison([ComparedPart("curve", {}, None), ComparedPart(part, {}, found)])]

    said = conclusion(proof)
    assert said.startswith(f"different after 0 kills on 1 process: {found}")
    assert ("training.deterministic=true" in said) == hinted


def test_a_certificate_is_checked_as_it_is_read() -> None:
    with pytest.raises(ValidationError, match="verdict"):
        Certificate.model_validate({"format": 1, "verdict": "perhaps"})
    with pytest.raises(ValidationError, match="seconds"):
        Kill.model_validate({"number": 1, "seconds": "soon"})
