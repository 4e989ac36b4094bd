"""The table of `forge plan`, a line for each DeepSpeed plan, and what to set so that a job fits: without torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from forge.config.plans import Plan, plan_names, read_plan
from forge.config.schema import Config
from forge.errors import UsageError
from forge.memory.totals import (
    GIB,
    Estimate,
    Job,
    Sharding,
    estimate_memory,
    fits,
    form_of,
    largest_rows,
    loss_chunks,
)

DDP = "none (DDP)"


@dataclass(frozen=True)
class Machine:
    """The GPUs that are asked about."""

    gpus: int  # of a node
    capacity: int  # bytes of each GPU
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Line:
    """What a job takes under one plan."""

    plan: str
    estimate: Estimate
    recomputed: Estimate  # with gradient checkpointing
    fits: bool
    largest_rows: int  # 0: not even one row fits
    refusal: str | None = None  # why the plan cannot be used, whatever the job's size


@dataclass(frozen=True)
class Advice:
    """What to set, and what the job then takes."""

    plan: str
    settings: tuple[str, ...]  # as --set takes them; none where the config fits as it is
    rows: int
    estimate: Estimate
    largest_rows: int
    chunks: tuple[int, int] | None  # rows of logits, and of their gradients, that the fused loss has at a time


def read_gpus(text: str, nodes: int) -> Machine:
    """Read --gpus: 8x80 is eight GPUs of 80 GiB on each node. Raises UsageError."""
    match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if match is None or int(match[1]) == 0 or float(match[2]) == 0:
        raise UsageError(f"--gpus is {text!r}; write the GPUs of a node and the GiB of each GPU, such as 8x80")
    return Machine(int(match[1]), round(float(match[2]) * GIB), nodes)


def shardings_of(config: Config, machine: Machine) -> dict[str, Sharding]:
    """Return by name: no plan, the plans of ds_configs/, and the config's own plan where that is another file."""
    own = config.deepspeed.student
    names = [*plan_names(), *([own] if own is not None and own not in plan_names() else [])]
    teacher = read_plan(config.deepspeed.teacher)

    def sharding(plan: Plan | None) -> Sharding:
        return Sharding(plan, teacher, machine.ranks, machine.gpus)

    return {DDP: sharding(None), **{name: sharding(read_plan(name)) for name in names}}


def table_of(job: Job, shardings: dict[str, Sharding], machine: Machine) -> list[Line]:
    """Return the lines of the table."""
    lines = []
    for name, sharding in shardings.items():
        estimate, refusal = estimate_memory(job, sharding), refusal_of(job, sharding)
        recomputed = estimate_memory(replace(job, checkpointing=True), sharding)
        fitting = refusal is None and fits(estimate, machine.capacity)
        most = 0 if refusal is not None else largest_rows(job, sharding, machine.capacity)
        lines.append(Line(name, estimate, recomputed, fitting, most, refusal))
    return lines


def refusal_of(job: Job, sharding: Sharding) -> str | None:
    """Return why the student's and the teacher's placement exclude each other; None if they do not."""
    if sharding.plan is None and job.teacher is not None and job.placement == "zero3":
        return "a zero3 teacher needs a plan"
    return None


def advise(job: Job, shardings: dict[str, Sharding], machine: Machine, *, own: str | None = None) -> Advice | None:
    """Return the first option that fits; None if nothing does.

    The config as it is comes first. Then, with the same rows, the plan that communicates least, layers recomputed, the
    teacher sharded or offloaded, and states in host memory; then all of that with half the rows, and so on.

    own: the config's plan.
    """
    rows = job.rows
    while rows:
        for name, changed, words in _options(replace(job, rows=rows), shardings, own):
            sharding = shardings[name]
            estimate = estimate_memory(changed, sharding)
            if refusal_of(changed, sharding) is None and fits(estimate, machine.capacity):
                if rows < job.rows:
                    words = (*words, f"training.per_device_batch_size={rows}")
                chunks = None
                if job.fused:
                    found = loss_chunks(changed, form_of(changed, sharding.plan), rows)
                    chunks = (found.rows, found.wide)
                most = largest_rows(changed, sharding, machine.capacity)
                return Advice(name, words, rows, estimate, most, chunks)
        rows //= 2
    return None


def _options(job: Job, shardings: dict[str, Sharding], own: str | None) -> Iterator[tuple[str, Job, tuple[str, ...]]]:
    """Yield the name of a plan, the job under it, and what to set for it."""
    in_memory = [name for name, s in shardings.items() if s.plan is None or not _offloads(s.plan)]
    on_host = [name for name, s in shardings.items() if s.plan is not None and _offloads(s.plan)]
    jobs: list[tuple[Job, tuple[str, ...]]] = [(job, ())]
    if not job.checkpointing:
        jobs.append((replace(job, checkpointing=True), ("training.gradient_checkpointing=true",)))
    placed = list(jobs)
    if job.teacher is not None and job.placement == "replicated":
        for placement in ("zero3", "offload"):
            placed += [(replace(j, placement=placement), (*w, f"teacher.placement={placement}")) for j, w in jobs]
    yield own or DDP, job, ()
    for names in (in_memory, on_host):
        for changed, words in placed:
            for name in names:
                plan = () if name == (own or DDP) else (f"deepspeed.student={'null' if name == DDP else name}",)
                yield name, changed, (*plan, *words)


def _offloads(plan: Plan) -> bool:
    return plan.offloads_optimizer or plan.offloads_weights


def as_json(lines: list[Line], advice: Advice | None) -> dict[str, Any]:
    """Return every number of the table, and the suggestion, for scripts."""
    plans = [
        {
            "plan": None if line.plan == DDP else line.plan,
            **line.estimate.as_gib(),
            "recomputed_activations_gib": line.recomputed.as_gib()["activations_gib"],
            "fits": line.fits,
            "largest_micro_batch": line.largest_rows,
            "refusal": line.refusal,
        }
        for line in lines
    ]
    suggestion = advice and {
        "plan": None if advice.plan == DDP else advice.plan,
        "settings": list(advice.settings),
        "micro_batch": advice.rows,
        "largest_micro_batch": advice.largest_rows,
        "loss_chunks": advice.chunks,
        **advice.estimate.as_gib(),
    }
    return {"plans": plans, "suggestion": suggestion}
