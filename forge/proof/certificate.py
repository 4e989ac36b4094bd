"""Reports what a proof of resume found: in lines, in a table, in a certificate and in the model card."""

import os
import re
import sys
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table

from forge.checkpoint.manifest import BadCheckpoint, Manifest
from forge.config.loader import LoadedConfig
from forge.proof.findings import BitComparison, Difference
from forge.proof.watch import Watch
from forge.run.directory import RunDirectory
from forge.run.files import write_atomically, write_json
from forge.run.metadata import read_metadata
from forge.run.provenance import GitFacts, provenance
from forge.run.records import Record
from forge.run.state import now

CERTIFICATE = "resume_certificate.json"
FORMAT = 1


class Kill(Record):
    """One kill that was made."""

    number: int
    run: str
    attempt: int
    aimed_at: str
    victim: str
    stage: str
    step: int  # the last one in the run's metrics
    on_disk: list[str]  # checkpoints, folders of saves, final
    seconds: float  # from the attempt's start
    all_ended_s: float | None  # from the kill; None: what it left alive did not end by itself

    def line(self, kills: int) -> str:
        """Return a line for the console."""
        left = "" if self.all_ended_s is not None else "; the processes it left alive had to be killed too"
        return (
            f"kill {self.number}/{kills}, {self.aimed_at}: {self.victim}, {self.seconds:.1f} s into attempt "
            f"{self.attempt}, in {self.stage.replace('_', ' ')}, step {self.step} reported; on disk: "
            f"{', '.join(self.on_disk) or 'no checkpoint'}{left}"
        )


class RunDifference(Difference):
    """A difference between the unbroken run and the killed run of this name."""

    run: str


class Machine(Record):
    """Where the proof ran."""

    host: str
    platform: str
    device: str
    mixed_precision: str
    cpus: int | None
    omp_num_threads: str | None
    cuda_visible_devices: str | None


class Certificate(Record):
    """resume_certificate.json, in every killed run."""

    format: int
    verdict: Literal["identical", "different"]
    created_at: str
    command: str
    config: str
    config_hash: str | None  # None: the unbroken run has no valid checkpoint
    overrides: list[str]
    seed: int
    processes: int
    total_steps: int
    unbroken_run: str
    killed_runs: list[str]
    kills_asked: int
    kills: list[Kill]
    compared: dict[str, dict[str, dict[str, int]]]  # run, part, what: how many
    difference: RunDifference | None  # the first one
    differences: list[RunDifference]
    versions: dict[str, str | None]
    git: GitFacts
    machine: Machine
    seconds: dict[str, float]


@dataclass
class Proof:
    """What is known so far."""

    loaded: LoadedConfig
    processes: int
    kills_asked: int
    seed: int
    unbroken: RunDirectory
    killed: list[RunDirectory] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # of the config, in all runs: key=value
    total_steps: int = 0
    kills: list[Kill] = field(default_factory=list)
    comparisons: list[BitComparison] = field(default_factory=list)  # of each killed run with the unbroken one
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def difference(self) -> Difference | None:
        """The first difference; None if all runs are identical."""
        return next((c.difference for c in self.comparisons if c.difference is not None), None)

    @property
    def circumstances(self) -> str:
        """The kills and the processes in words."""
        return f"after {count(len(self.kills), 'kill')} on {count(self.processes, 'process')}"


def table(proof: Proof) -> Table:
    """Return a table with a line for each part that was compared, and how much of it there was."""
    made = Table("compared", "how much", "result", title="killed and unbroken run", title_justify="left")
    for run, comparison in zip(proof.killed, proof.comparisons, strict=True):
        for part in comparison.parts:
            name = part.name if len(proof.killed) == 1 else f"{part.name} ({run.name})"
            much = ", ".join(count(number, word.removesuffix("s")) for word, number in part.counts.items())
            made.add_row(name, much or "-", "different" if part.difference else "identical")
    return made


def conclusion(proof: Proof) -> str:
    """Return the verdict as a sentence: the first difference, and what to try if the hardware may be its cause."""
    found = proof.difference
    if found is None:
        return f"identical: every bit is the unbroken run's {proof.circumstances}"
    device = read_metadata(proof.unbroken).world.device
    hint = ""
    if found.part != "resume" and device != "cpu" and not proof.loaded.config.training.deterministic:
        hint = (
            f". Two unbroken runs on {device} may differ too (`--kills 0` compares two); if they do, try "
            f"`--set training.deterministic=true`"
        )
    return f"different {proof.circumstances}: {found}{hint}"


def write_certificate(proof: Proof) -> list[str]:
    """Write the certificate into every killed run, add a line to its model card, and return the files."""
    certificate, written = certificate_of(proof), []
    for run in proof.killed:
        if run.path.is_dir():
            write_json(run.path / CERTIFICATE, certificate.model_dump())
            _add_to_card(proof, run)
            written.append(str(run.path / CERTIFICATE))
    return written


def certificate_of(proof: Proof) -> Certificate:
    """Return what the proof has found, and the circumstances that a reader needs to repeat it."""
    facts, world = provenance(None, sys.orig_argv), read_metadata(proof.unbroken).world
    compared = list(zip(proof.killed, proof.comparisons, strict=True))
    differences = [
        RunDifference(run=run.name, **part.difference.model_dump())
        for run, comparison in compared
        for part in comparison.parts
        if part.difference is not None
    ]
    return Certificate(
        format=FORMAT,
        verdict="different" if differences else "identical",
        created_at=now(),
        command=facts.command,
        config=str(proof.loaded.file),
        config_hash=_config_hash(proof.unbroken),
        overrides=proof.overrides,
        seed=proof.seed,
        processes=proof.processes,
        total_steps=proof.total_steps,
        unbroken_run=str(proof.unbroken.path),
        killed_runs=[str(run.path) for run in proof.killed],
        kills_asked=proof.kills_asked,
        kills=proof.kills,
        compared={run.name: {part.name: part.counts for part in comparison.parts} for run, comparison in compared},
        difference=differences[0] if differences else None,
        differences=differences,
        versions={"forge": facts.forge_version, "python": facts.python_version, **facts.packages},
        git=facts.git,
        machine=Machine(
            host=facts.host,
            platform=facts.platform,
            device=world.device,
            mixed_precision=world.mixed_precision,
            cpus=os.cpu_count(),
            omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
            cuda_visible_devices=facts.cuda_visible_devices,
        ),
        seconds=proof.seconds,
    )


def count(number: int, word: str) -> str:
    """Return `1 kill`, `2 kills` or `2 processes`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}{'es' if word.endswith('s') else 's'}"


def _config_hash(run: RunDirectory) -> str | None:
    steps = Watch(run).look().checkpoints
    try:
        return Manifest.read(run.checkpoint(steps[-1])).config_hash if steps else None
    except BadCheckpoint:  # reported as a difference by the comparison
        return None


def _add_to_card(proof: Proof, run: RunDirectory) -> None:
    card = run.final / "README.md"
    if not card.is_file():
        return
    result = "bit-identical" if proof.difference is None else "DIFFERENT"
    kills = sum(kill.run == run.name for kill in proof.kills)
    after = f"after {count(kills, 'kill')} on {count(proof.processes, 'process')}"
    line = f"- Resume proof: {result} {after} ({CERTIFICATE})\n"
    text = card.read_text()
    above = re.search(r"^- Versions: .*\n", text, re.MULTILINE)
    at = above.end() if above else len(text)
    write_atomically(card, text[:at] + line + text[at:])
