"""Says what a proof of resume has found: in lines, in a table, in a certificate and in the model card."""

import os
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from forge.checkpoint.manifest import BadCheckpoint, Manifest
from forge.config.loader import LoadedConfig
from forge.proof.compare import Comparison, Difference
from forge.proof.watch import Watch
from forge.run.directory import RunDirectory
from forge.run.files import write_atomically, write_json
from forge.run.metadata import read_metadata
from forge.run.provenance import provenance
from forge.run.state import now

CERTIFICATE = "resume_certificate.json"
FORMAT = 1


@dataclass(frozen=True)
class Kill:
    """One kill that was."""

    number: int
    run: str
    attempt: int
    aimed_at: str
    victim: str
    stage: str
    step: int  # the last one that the run's metrics tell of
    on_disk: list[str]  # checkpoints, folders of saves, final
    seconds: float  # since the attempt's start
    all_ended_s: float | None  # after the kill; None: what it left alive did not end by itself

    def line(self, kills: int) -> str:
        left = "" if self.all_ended_s is not None else "; it left processes that had to be killed too"
        return (
            f"kill {self.number}/{kills}, {self.aimed_at}: {self.victim}, {self.seconds:.1f} s into attempt "
            f"{self.attempt}, in {self.stage.replace('_', ' ')}, step {self.step} reported; on disk: "
            f"{', '.join(self.on_disk) or 'no checkpoint'}{left}"
        )


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
    comparisons: list[Comparison] = field(default_factory=list)  # of each killed run with the unbroken one
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def difference(self) -> Difference | None:
        return next((c.difference for c in self.comparisons if c.difference is not None), None)

    @property
    def circumstances(self) -> str:
        return f"after {count(len(self.kills), 'kill')} on {count(self.processes, 'process')}"


def table(proof: Proof) -> Table:
    """A line for each part that was compared, and how much of it there was."""
    made = Table("compared", "how much", "result", title="killed and unbroken run", title_justify="left")
    for run, comparison in zip(proof.killed, proof.comparisons, strict=True):
        for part in comparison.parts:
            name = part.name if len(proof.killed) == 1 else f"{part.name} ({run.name})"
            much = ", ".join(count(number, word.removesuffix("s")) for word, number in part.counts.items())
            made.add_row(name, much or "-", "different" if part.difference else "identical")
    return made


def conclusion(proof: Proof) -> str:
    """One sentence, with the first difference if there is one, and what to try where the hardware may be its cause."""
    found = proof.difference
    if found is None:
        return f"identical: every bit is the unbroken run's {proof.circumstances}"
    device = read_metadata(proof.unbroken).world.device
    hint = ""
    if found.part != "resume" and device != "cpu" and not proof.loaded.config.training.deterministic:
        hint = (
            f". Two unbroken runs on {device} may differ too (`--kills 0` tells); then try "
            f"`--set training.deterministic=true`"
        )
    return f"different {proof.circumstances}: {found}{hint}"


def write_certificate(proof: Proof) -> list[str]:
    """Into every killed run, with a line in its model card; returns the files."""
    certificate, written = _certificate(proof), []
    for run in proof.killed:
        if run.path.is_dir():
            write_json(run.path / CERTIFICATE, certificate)
            _add_to_card(proof, run)
            written.append(str(run.path / CERTIFICATE))
    return written


def count(number: int, word: str) -> str:
    """`1 kill`, `2 kills`, `2 processes`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}{'es' if word.endswith('s') else 's'}"


def _certificate(proof: Proof) -> dict[str, Any]:
    facts, world = provenance(None, sys.orig_argv), read_metadata(proof.unbroken).world
    differences = [
        {"run": run.name, **asdict(part.difference)}
        for run, comparison in zip(proof.killed, proof.comparisons, strict=True)
        for part in comparison.parts
        if part.difference is not None
    ]
    return {
        "format": FORMAT,
        "verdict": "different" if differences else "identical",
        "created_at": now(),
        "command": facts.command,
        "config": str(proof.loaded.file),
        "config_hash": _config_hash(proof.unbroken),
        "overrides": proof.overrides,
        "seed": proof.seed,
        "processes": proof.processes,
        "total_steps": proof.total_steps,
        "unbroken_run": str(proof.unbroken.path),
        "killed_runs": [str(run.path) for run in proof.killed],
        "kills_asked": proof.kills_asked,
        "kills": [asdict(kill) for kill in proof.kills],
        "compared": {
            run.name: {part.name: part.counts for part in comparison.parts}
            for run, comparison in zip(proof.killed, proof.comparisons, strict=True)
        },
        "difference": differences[0] if differences else None,
        "differences": differences,
        "versions": {"forge": facts.forge_version, "python": facts.python_version, **facts.packages},
        "git": facts.git.model_dump(),
        "machine": {
            "host": facts.host,
            "platform": facts.platform,
            "device": world.device,
            "mixed_precision": world.mixed_precision,
            "cpus": os.cpu_count(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "cuda_visible_devices": facts.cuda_visible_devices,
        },
        "seconds": proof.seconds,
    }


def _config_hash(run: RunDirectory) -> str | None:
    steps = Watch(run).look().checkpoints
    try:
        return Manifest.read(run.checkpoint(steps[-1])).config_hash if steps else None
    except BadCheckpoint:  # the comparison has told of it
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
