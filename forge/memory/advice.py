"""One row of numbers for each plan, and which of them to take: arithmetic alone, without torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from forge.config.plans import Plan, plan_names, read_plan
from forge.config.schema import Config
from forge.errors import UsageError
from forge.memory.totals import GIB, Job, Parts, Setting, fits, form_of, largest_rows, loss_chunks, memory_of

DDP = "none (DDP)"


@dataclass(frozen=True)
class Machine:
    """The GPUs that are asked about."""

    gpus: int  # of a node
    capacity: int  # bytes of each
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Row:
    """What one plan comes to."""

    plan: str
    parts: Parts
    recomputed: Parts  # with gradient checkpointing
    fits: bool
    largest_rows: int  # 0: not one row fits
    refusal: str | None = None  # why it cannot be run, whatever its size


@dataclass(frozen=True)
class Advice:
    """What to set, and what that comes to."""

    plan: str
    settings: tuple[str, ...]  # as --set takes them; none where the config fits as it is
    rows: int
    parts: Parts
    largest_rows: int
    chunks: tuple[int, int] | None  # rows of logits, and of their gradients, that the fused loss has at a time


def read_gpus(text: str, nodes: int) -> Machine:
    """8x80: eight GPUs of 80 GiB on each node. Raises UsageError."""
    match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if match is None or int(match[1]) == 0 or float(match[2]) == 0:
        raise UsageError(f"--gpus is {text!r}; write how many a node has and the GiB of each, such as 8x80")
    return Machine(int(match[1]), round(float(match[2]) * GIB), nodes)


def settings_of(config: Config, machine: Machine) -> dict[str, Setting]:
    """By the plan's name: no plan, those of ds_configs/, and the config's own where it is a file."""
    own = config.deepspeed.student
    names = [*plan_names(), *([own] if own is not None and own not in plan_names() else [])]
    teacher = read_plan(config.deepspeed.teacher)

    def setting(plan: Plan | None) -> Setting:
        return Setting(plan, teacher, machine.ranks, machine.gpus)

    return {DDP: setting(None), **{name: setting(read_plan(name)) for name in names}}


def rows_of(job: Job, settings: dict[str, Setting], machine: Machine) -> list[Row]:
    """The table."""
    rows = []
    for name, setting in settings.items():
        parts, refusal = memory_of(job, setting), refusal_of(job, setting)
        recomputed = memory_of(replace(job, checkpointing=True), setting)
        fitting = refusal is None and fits(parts, machine.capacity)
        most = 0 if refusal is not None else largest_rows(job, setting, machine.capacity)
        rows.append(Row(name, parts, recomputed, fitting, most, refusal))
    return rows


def refusal_of(job: Job, setting: Setting) -> str | None:
    """Why the two placements do not go together; None where they do."""
    if setting.plan is None and job.teacher is not None and job.placement == "zero3":
        return "a zero3 teacher needs a plan"
    return None


def advise(job: Job, settings: dict[str, Setting], machine: Machine, *, own: str | None = None) -> Advice | None:
    """The first that fits: what the config itself says; then, at the same rows, the plan that sends least, the layers
    recomputed, the teacher spread or offloaded, states in host memory; then the same with fewer rows. None: nothing
    does.

    own: the config's plan.
    """
    rows = job.rows
    while rows:
        for name, changed, words in _options(replace(job, rows=rows), settings, own):
            setting = settings[name]
            parts = memory_of(changed, setting)
            if refusal_of(changed, setting) is None and fits(parts, machine.capacity):
                if rows < job.rows:
                    words = (*words, f"training.per_device_batch_size={rows}")
                chunks = None
                if job.fused:
                    found = loss_chunks(changed, form_of(changed, setting.plan), rows)
                    chunks = (found.rows, found.wide)
                most = largest_rows(changed, setting, machine.capacity)
                return Advice(name, words, rows, parts, most, chunks)
        rows //= 2
    return None


def _options(job: Job, settings: dict[str, Setting], own: str | None) -> Iterator[tuple[str, Job, tuple[str, ...]]]:
    """The plan's name, the job under it, and what is to be set."""
    in_memory = [name for name, s in settings.items() if s.plan is None or not _offloads(s.plan)]
    on_host = [name for name, s in settings.items() if s.plan is not None and _offloads(s.plan)]
    again: list[tuple[Job, tuple[str, ...]]] = [(job, ())]
    if not job.checkpointing:
        again.append((replace(job, checkpointing=True), ("training.gradient_checkpointing=true",)))
    placed = list(again)
    if job.teacher is not None and job.placement == "replicated":
        for placement in ("zero3", "offload"):
            placed += [(replace(j, placement=placement), (*w, f"teacher.placement={placement}")) for j, w in again]
    yield own or DDP, job, ()
    for names, jobs in ((in_memory, placed), (on_host, placed)):
        for changed, words in jobs:
            for name in names:
                plan = () if name == (own or DDP) else (f"deepspeed.student={'null' if name == DDP else name}",)
                yield name, changed, (*plan, *words)


def _offloads(plan: Plan) -> bool:
    return plan.offloads_optimizer or plan.offloads_weights


def as_json(rows: list[Row], advice: Advice | None) -> dict[str, Any]:
    """Every number of the table, and the suggestion, for scripts."""
    plans = [
        {
            "plan": None if row.plan == DDP else row.plan,
            **row.parts.as_gib(),
            "recomputed_activations_gib": row.recomputed.as_gib()["activations_gib"],
            "fits": row.fits,
            "largest_micro_batch": row.largest_rows,
            "refusal": row.refusal,
        }
        for row in rows
    ]
    suggestion = advice and {
        "plan": None if advice.plan == DDP else advice.plan,
        "settings": list(advice.settings),
        "micro_batch": advice.rows,
        "largest_micro_batch": advice.largest_rows,
        "loss_chunks": advice.chunks,
        **advice.parts.as_gib(),
    }
    return {"plans": plans, "suggestion": suggestion}
