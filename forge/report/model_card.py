"""Writes the model card: what was trained, on what, the numbers before and after, and how to make it again."""

from collections.abc import Sequence
from typing import Any

import yaml

from forge.config.explain import to_yaml
from forge.config.former_names import current_headline
from forge.config.schema import Config
from forge.model.layers import KeptLayers
from forge.model.origin import short
from forge.run.metadata import Ancestor, Merged, ModelFacts, RunMetadata, TaskFacts

PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# For a base that is tied, below an adapter that changes one of the two: merged, it would change the other too.
PARTED = (
    "head = model.get_output_embeddings()",
    "head.weight = nn.Parameter(head.weight.detach().clone())  # shared with the embeddings, until here",
    "config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False",
)


def model_card(
    metadata: RunMetadata,
    steps: int,
    config: Config,
    before: dict[str, Any],
    after: dict[str, Any],
    evidence_table: str | None = None,
) -> str:
    """Markdown with the hub's front matter.

    metadata: the run's run_metadata.json. before and after: evaluations, empty where none was made. evidence_table:
    where the run has a teacher to be compared with, what stands in their place.
    """
    model, data, task, attempt = metadata.model, metadata.data, metadata.task, metadata.attempts[-1]
    git = attempt.git
    code = f"commit {git.commit}{' with changes' if git.dirty else ''}" if git.commit else "no git commit"
    # A hub id, which the hub links to; a local path says nothing to anybody else.
    hub_id = model.location is not None and not model.location.startswith("/")
    front = {
        "library_name": "peft" if model.adapter else "transformers",
        "pipeline_tag": task.pipeline_tag,
        "tags": ["forge"],
        **({"base_model": model.location} if hub_id else {}),
    }
    lines = "\n".join(
        f"| {name} | {a} | {b} |" for name, a, b in compare(before, after, current_headline(task.headline))
    )
    numbers = f"| | before | after |\n|---|---|---|\n{lines}" if lines else "It was not evaluated."
    numbers = numbers if evidence_table is None else evidence_table or "It was not evaluated."
    labels = f"- Labels: {', '.join(model.labels)}\n" if model.labels else ""
    learned = _layers(model) + _distillation(metadata, config) + _adapter(model)
    sampled = any(name.endswith("/rows_of") for name in {**before, **after})
    note = "\nEvaluated on a sample of the rows (evaluation.max_rows), not on all of them.\n" if sampled else ""
    note = note if evidence_table is None else ""  # the table has its own
    rows_read = f"{data.rows['train']:,}" if "train" in data.rows else "a stream of unknown length"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {metadata.name}

{task.title} trained with forge: {model.source}, on {data.description}.

{numbers}
{note}
{labels}{learned}- Parameters: {model.parameters:,}; training rows: {rows_read}; optimizer steps: {steps:,}
- Data fingerprint (SHA-256 of the rows): `{data.fingerprint}`
- Run id: `{metadata.run_id}`; code: {code}
- Versions: {", ".join(f"{name} {attempt.packages[name]}" for name in PACKAGES)}

{_lineage(metadata.lineage)}## Use

{_use(model, task, metadata.merged)}

## Made with

    {attempt.command}

```yaml
{to_yaml(config).strip()}
```
"""


def compare(before: dict[str, Any], after: dict[str, Any], headline: Sequence[str]) -> list[tuple[str, str, str]]:
    """The headline metrics of two evaluations as text, `-` where one was not made: (name, before, after)."""
    names = [name for name in {**before, **after} if name.split("/")[-1] in (*headline, "rows")]

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    return [(name, text(before.get(name)), text(after.get(name))) for name in names]


def _layers(model: ModelFacts) -> str:
    """A line on the layers that a student was begun with; empty where it has all of its source."""
    if not model.kept_layers or model.layers_of is None:  # a run of an older forge does not record them
        return ""
    kept = KeptLayers(model.kept_layers, model.layers_of)
    return f"- Begun with {kept} of {model.source}, renumbered from 0, and with its other weights\n"


def _distillation(metadata: RunMetadata, config: Config) -> str:
    """Lines on the teacher and the loss; empty where nothing was learned from a teacher."""
    taught, loss = metadata.teacher, config.distillation
    if loss.alpha == 0 or not taught:
        return ""
    of_divergence = {"jsd": f" (beta {loss.beta:g})"}
    of_divergence |= dict.fromkeys(("skew_kl", "skew_reverse_kl"), f" (lambda {loss.skew:g})")
    terms = "".join(f" + {name} term" for name in ("hidden", "relations") if getattr(loss, name) is not None)
    control = metadata.control
    return (
        f"- Teacher: {taught.source}, weights `{short(taught.weights_sha256)}`, {config.teacher.placement}\n"
        f"- Loss: (1 - alpha) * CE + alpha * T^2 * D(teacher || student){terms}; "
        f"alpha {loss.alpha:g}, T {loss.temperature:g}, D {loss.divergence}{of_divergence.get(loss.divergence, '')}\n"
        + (f"- Control (alpha 0, as many steps, the same seed): run `{control.run_id}`\n" if control else "")
    )


def _adapter(model: ModelFacts) -> str:
    """A line on a LoRA adapter; empty where all weights were trained."""
    adapter = model.adapter
    if not adapter:
        return ""
    in_full = f", and {', '.join(adapter.trained_in_full)} in full" if adapter.trained_in_full else ""
    return (
        f"- LoRA adapter of rank {adapter.rank} (alpha {adapter.alpha:g}){in_full}: "
        f"{model.trained_parameters:,} parameters were trained\n"
        f"- Base: {model.location}, weights `{short(model.location_sha256)}` (base.json has all of the hash)\n"
    )


def _lineage(ancestors: list[Ancestor]) -> str:
    """The runs before this one, the oldest first."""
    if not ancestors:
        return ""
    lines = "\n".join(
        f"{number}. {run.name} ({run.config}, run `{run.run_id}`): {run.steps:,} steps, as {run.role}"
        for number, run in enumerate(ancestors, start=1)
    )
    return f"## Comes from\n\n{lines}\n\n"


def _use(model: ModelFacts, task: TaskFacts, merged: Merged | None) -> str:
    """How to load it, in Python, and to use it where the task says how."""
    usage = ["", *task.usage] if task.usage else []
    auto, processing, here = task.auto_model, task.auto_processing, '"PATH OF THIS FOLDER"'
    variable = processing.removeprefix("Auto").lower()
    load = f"{variable} = {processing}.from_pretrained({here})"
    if not model.adapter:
        return _python(
            f"from transformers import {auto}, {processing}",
            "",
            f"model = {auto}.from_pretrained({here})",
            load,
            *usage,
        )
    below = model.adapters[:-1] if model.adapter.continues else model.adapters
    revision = model.commit or model.revision
    pinned = f', revision="{revision}"' if revision else ""
    steps = [
        f"config = AutoConfig.from_pretrained({here})  # as it was trained, with the labels if there are any",
        f'model = {auto}.from_pretrained("{model.location}"{pinned}, config=config)',
        *(PARTED if model.untied else ()),
        *(f'model = PeftModel.from_pretrained(model, "{item.location}").merge_and_unload()' for item in below),
        f"model = PeftModel.from_pretrained(model, {here})",
    ]
    text = _python(
        *(["from torch import nn"] if model.untied else []),
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {auto}, {processing}",
        "",
        *steps,
        load,
        *usage,
    )
    if merged is None:
        return text
    return f"{text}\n\nOr without peft: `{auto}.from_pretrained` of the folder `merged`, in {merged.dtype}."


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
