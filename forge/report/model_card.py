"""The model card: what was trained on what, the numbers before and after, and how to load and reproduce the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from forge.config.explain import to_yaml
from forge.config.schema import Config
from forge.model.layers import KeptLayers
from forge.model.origin import short
from forge.run.metadata import Ancestor, AttemptRecord, Merged, ModelFacts, RunMetadata, TaskFacts

PACKAGES = ("torch", "transformers", "accelerate", "datasets")
HERE = '"PATH OF THIS FOLDER"'
# For a base that ties its head to its embeddings, and an adapter that changes one of the two: merged while they are
# tied, it would change the other too.
UNTIE = (
    "head = model.get_output_embeddings()",
    "head.weight = nn.Parameter(head.weight.detach().clone())  # no longer shared with the embeddings",
    "config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False",
)


def model_card(
    metadata: RunMetadata,
    steps: int,
    config: Config,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    evidence_table: str | None = None,
) -> str:
    """Return the model card in Markdown, with the hub's front matter.

    Args:
        before, after: the metrics of the two evaluations; empty if one was not made.
        evidence_table: for a run with a teacher, the comparison that replaces the table of before and after; empty if
            nothing was evaluated.
    """
    task, model = metadata.task, metadata.model
    numbers = _numbers(before, after, task.headline) if evidence_table is None else evidence_table
    start = "with random initial weights" if model.location is None else f"starting from {model.source}"
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(task, model), sort_keys=False).strip()}\n---",
        f"# {metadata.name}",
        f"{task.title}, trained with forge on {metadata.data.description}, {start}.",
        numbers or "It was not evaluated.",
        "\n".join(f"- {fact}" for fact in _facts(metadata, steps, config)),
        *(["## Lineage", _lineage(metadata.lineage)] if metadata.lineage else []),
        "## Use",
        usage(task, model, metadata.merged),
        "## Reproduce",
        f"    {metadata.attempts[0].command}",
        f"```yaml\n{to_yaml(config).strip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def headline_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], headline: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Return the headline metrics of two evaluations as text, `-` if one was not made: (name, before, after)."""
    names = [name for name in {**before, **after} if name.split("/")[-1] in (*headline, "rows")]

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    return [(name, text(before.get(name)), text(after.get(name))) for name in names]


def usage(task: TaskFacts, model: ModelFacts, merged: Merged | None) -> str:
    """Return the Python code that loads the model, and runs it if the task says how."""
    auto, processing = task.auto_model, task.auto_processing
    loads = [f"{processing.removeprefix('Auto').lower()} = {processing}.from_pretrained({HERE})"]
    if task.usage:
        loads += ["", *task.usage]
    if model.adapter is None:
        return _python(
            f"from transformers import {auto}, {processing}", "", f"model = {auto}.from_pretrained({HERE})", *loads
        )
    merged_before = model.adapters[:-1] if model.adapter.continues else model.adapters
    revision = model.commit or model.revision
    pinned = f', revision="{revision}"' if revision else ""
    code = _python(
        *(["from torch import nn"] if model.untied else []),
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {auto}, {processing}",
        "",
        f'config = AutoConfig.from_pretrained({HERE} + "/base_config.json")  # as in training, with the labels if any',
        f'model = {auto}.from_pretrained("{model.location}"{pinned}, config=config)',
        *(UNTIE if model.untied else ()),
        *(f'model = PeftModel.from_pretrained(model, "{item.location}").merge_and_unload()' for item in merged_before),
        f"model = PeftModel.from_pretrained(model, {HERE})",
        *loads,
    )
    if merged is None:
        return code
    return f"{code}\n\nOr without peft: `{auto}.from_pretrained` with the folder `merged`, in {merged.dtype}."


def _front_matter(task: TaskFacts, model: ModelFacts) -> dict[str, Any]:
    # The hub links to a hub id; a local path means nothing to others.
    on_hub = model.location is not None and not model.location.startswith("/")
    return {
        "library_name": "transformers" if model.adapter is None else "peft",
        "pipeline_tag": task.pipeline_tag,
        "tags": ["forge"],
        **({"base_model": model.location} if on_hub else {}),
    }


def _numbers(before: Mapping[str, Any], after: Mapping[str, Any], headline: Sequence[str]) -> str:
    """Return the table of the numbers before and after; empty if neither evaluation was made."""
    lines = [f"| {name} | {a} | {b} |" for name, a, b in headline_rows(before, after, headline)]
    if not lines:
        return ""
    sampled = any(name.endswith("/rows_of") for name in {**before, **after})
    note = "\n\nEvaluated on a sample of the rows (evaluation.max_rows), not on all of them." if sampled else ""
    return "\n".join(["| | before | after |", "|---|---|---|", *lines]) + note


def _facts(metadata: RunMetadata, steps: int, config: Config) -> list[str]:
    model, data, attempt = metadata.model, metadata.data, metadata.attempts[-1]
    rows = f"{data.rows['train']:,}" if "train" in data.rows else "a stream of unknown length"
    return [
        *([f"Labels: {', '.join(model.labels)}"] if model.labels else []),
        *_initial_layers(model),
        *_distillation(metadata, config),
        *_adapter(model),
        f"Parameters: {model.parameters:,}; training rows: {rows}; optimizer steps: {steps:,}",
        f"Data fingerprint (SHA-256 of the rows): `{data.fingerprint}`",
        f"Run id: `{metadata.run_id}`; code: {_code(attempt)}",
        f"Versions: {', '.join(f'{name} {attempt.packages[name]}' for name in PACKAGES)}",
    ]


def _initial_layers(model: ModelFacts) -> list[str]:
    """Return the fact that a student has only some layers of its source."""
    if not model.kept_layers or model.layers_of is None:
        return []
    kept = KeptLayers(model.kept_layers, model.layers_of)
    return [f"Initialised from {kept} of {model.source}, renumbered from 0, and its other weights"]


def _distillation(metadata: RunMetadata, config: Config) -> list[str]:
    """Return the facts of the teacher, the loss and the control run, for a run that learned from a teacher."""
    teacher, loss, control = metadata.teacher, config.distillation, metadata.control
    if loss.alpha == 0 or teacher is None:
        return []
    of_divergence = {"jsd": f" (beta {loss.beta:g})"}
    of_divergence |= dict.fromkeys(("skew_kl", "skew_reverse_kl"), f" (lambda {loss.skew:g})")
    terms = "".join(f" + {name} term" for name in ("hidden", "relations") if getattr(loss, name) is not None)
    return [
        f"Teacher: {teacher.source}, weights `{short(teacher.weights_sha256)}`, {config.teacher.placement}",
        f"Loss: (1 - alpha) * CE + alpha * T^2 * D(teacher || student){terms}; "
        f"alpha {loss.alpha:g}, T {loss.temperature:g}, D {loss.divergence}{of_divergence.get(loss.divergence, '')}",
        *([f"Control (alpha 0, the same steps and seed): run `{control.run_id}`"] if control is not None else []),
    ]


def _adapter(model: ModelFacts) -> list[str]:
    """Return the facts of a LoRA adapter and of its base."""
    adapter = model.adapter
    if adapter is None:
        return []
    in_full = f", and {', '.join(adapter.trained_in_full)} in full" if adapter.trained_in_full else ""
    return [
        f"LoRA adapter of rank {adapter.rank} (alpha {adapter.alpha:g}){in_full}: "
        f"{model.trained_parameters:,} parameters were trained",
        f"Base: {model.location}, weights `{short(model.location_sha256)}` (base.json has the full hash)",
    ]


def _code(attempt: AttemptRecord) -> str:
    git = attempt.git
    return f"commit {git.commit}{' with changes' if git.dirty else ''}" if git.commit else "no git commit"


def _lineage(ancestors: Sequence[Ancestor]) -> str:
    """Return the runs that the model descends from as a numbered list, the oldest first."""
    return "\n".join(
        f"{number}. {run.name} ({run.config}, run `{run.run_id}`): {run.steps:,} steps, as {run.role}"
        for number, run in enumerate(ancestors, start=1)
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
