"""`forge plan`: prints whether a config fits on the given GPUs, and what to set if it does not."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge.cli.arguments import Overrides
from forge.cli.console import table_console
from forge.config.schema import Config
from forge.errors import EXIT_COMPLETE
from forge.memory.advice import DDP, Advice, Line, Machine, advise, as_json, read_gpus, shardings_of, table_of
from forge.memory.totals import GIB, RESERVED, Job, ModelSizes

if TYPE_CHECKING:
    from rich.console import Console


def plan(args: argparse.Namespace) -> int:
    """Print the table, or the JSON, and return the exit code. Raises ForgeError."""
    machine = read_gpus(args.gpus, args.nodes)  # refused before a config is read, and both before any heavy import
    config = Overrides.of(args).load(Path(args.config)).config

    from forge.memory.meta import meta_job
    from forge.model.source import with_run_paths

    config = with_run_paths(config)
    job = replace(meta_job(config), rows=config.training.micro_batch_rows(machine.ranks))
    shardings = shardings_of(config, machine)
    lines, advice = table_of(job, shardings, machine), advise(job, shardings, machine, own=config.deepspeed.student)
    models = {"student": sizes_text(job.student)}
    if job.teacher is not None or job.placement == "cached":
        models["teacher"] = "outputs read from files" if job.teacher is None else sizes_text(job.teacher)
    if args.json:
        print(json.dumps({**_facts(job, machine, models), **as_json(lines, advice)}, indent=2, allow_nan=False))
    else:
        _print(config, job, machine, models, lines, advice, table_console())
    return EXIT_COMPLETE


def sizes_text(sizes: ModelSizes) -> str:
    """Describe a model in a few words."""
    if sizes.trained in (0, sizes.parameters):
        return f"{sizes.architecture}, {sizes.parameters / 1e6:,.1f} M parameters"
    return (
        f"{sizes.architecture}, {sizes.parameters / 1e6:,.1f} M parameters ({sizes.trained / 1e6:,.1f} M trained, "
        f"{sizes.frozen / 1e6:,.1f} M frozen)"
    )


def suggestion(job: Job, machine: Machine, advice: Advice | None) -> list[str]:
    """Return what to set, in one or two lines."""
    if advice is None:
        return ["suggestion: nothing fits, not even one row with everything sharded or offloaded; use more GPUs"]
    rows = f"{advice.rows} row{'s' * (advice.rows > 1)}"
    line = f"suggestion: {advice.plan}, {_gib(advice.estimate.total)} of {machine.capacity / GIB:g} GiB with {rows}"
    line += f", at most {advice.largest_rows:,}" if advice.largest_rows > advice.rows else ""
    line += f"; {_gib(advice.estimate.host)} GiB of each host" if advice.estimate.host else ""
    if advice.chunks is not None:
        line += f"; the loss takes logits of {advice.chunks[0]:,} labels at a time, gradients of {advice.chunks[1]:,}"
    if not advice.settings:
        return [line, "            keep the config as it is"]
    return [line, f"            {' '.join(f'--set {shlex.quote(words)}' for words in advice.settings)}"]


def _facts(job: Job, machine: Machine, models: dict[str, str]) -> dict[str, object]:
    return {
        "gpus_per_node": machine.gpus,
        "gib_per_gpu": machine.capacity / GIB,
        "nodes": machine.nodes,
        "reserved_gib": RESERVED / GIB,
        **models,
        "parameters": job.student.parameters,
        "trained_parameters": job.student.trained,
        "frozen_parameters": job.student.frozen,
        "teacher_parameters": None if job.teacher is None else job.teacher.parameters,
        "micro_batch": job.rows,
        "tokens_per_row": job.tokens,
        "half_precision": job.half,
        "gradient_checkpointing": job.checkpointing,
    }


def _print(
    config: Config,
    job: Job,
    machine: Machine,
    models: dict[str, str],
    lines: Sequence[Line],
    advice: Advice | None,
    console: "Console",
) -> None:
    from rich.table import Table

    for name, text in models.items():
        placed = f"; {config.teacher.placement}" if name == "teacher" else ""
        console.print(f"{name}: {text}{placed}", highlight=False)
    where = f"{machine.ranks} GPU{'s' * (machine.ranks > 1)} of {machine.capacity / GIB:g} GiB"
    where += f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    precision = "bf16" if job.half else "float32"
    console.print(
        f"{where}: micro-batches of {job.rows} rows of at most {job.tokens:,} tokens, {precision}; GiB per GPU, of "
        f"which {RESERVED / GIB:g} are reserved for CUDA and NCCL\n",
        highlight=False,
    )
    shown = ["weights", "gradients", "optimizer", *(["teacher"] if "teacher" in models else []), "activations"]
    header = ["plan", *shown, "recomputed", "loss", "buffers", "total", "fits", "largest", "host/node"]
    table = Table(box=None)
    for name in header:
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    stored = table_of(replace(job, checkpointing=False), shardings_of(config, machine), machine)
    for line, plain in zip(lines, stored, strict=True):
        estimate = line.estimate
        cells = [_gib(getattr(plain.estimate if name == "activations" else estimate, name)) for name in shown]
        cells += [_gib(line.recomputed.activations)]
        cells += [_gib(value) for value in (estimate.loss, estimate.buffers, estimate.total)]
        largest = f"{line.largest_rows:,}" if line.largest_rows else "-"
        table.add_row(line.plan, *cells, "yes" if line.fits else "no", largest, _gib(estimate.host))
    console.print(table)
    counted = "recomputed" if job.checkpointing else "activations"
    console.print(f"\ntotal: with the column {counted}; largest: the largest micro-batch that fits", highlight=False)
    for refusal in dict.fromkeys(line.refusal for line in lines if line.refusal is not None):
        console.print(f"{DDP}: {refusal}", highlight=False)
    if job.uncounted:
        console.print(f"activations are not counted: {job.student.architecture} cannot be run without memory "
                      f"({job.uncounted})", highlight=False)  # fmt: skip
    for text in suggestion(job, machine, advice):
        console.print(text, highlight=False, soft_wrap=True)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
