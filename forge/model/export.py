"""Writes the final model: weights, tokenizer and model card, in a folder that from_pretrained loads."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells."""

    run_name: str
    run_id: str
    command: str
    base: str | None  # the model that training started from; None: from scratch
    data: str
    data_fingerprint: str
    rows: int  # of the training split
    labels: list[str]
    steps: int
    config_yaml: str
    versions: dict[str, str]
    code: str  # the commit of the code


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves safetensors and tokenizer. The folder gets its name only when it is whole."""
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    # Tokenizing leaves its truncation and padding behind in the tokenizer, and whoever loads it would truncate too.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def model_card(facts: CardFacts, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Markdown with the hub's front matter; before and after are evaluations, empty where none was made."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["forge"],
        **({"base_model": facts.base} if facts.base and facts.base.count("/") <= 1 and ":" not in facts.base else {}),
    }
    rows = "\n".join(f"| {name} | {a} | {b} |" for name, a, b in compare(before, after))
    quick = [name for name in after or before if name.endswith("/samples_of")]
    note = "\nEvaluated on a sample of the rows (evaluation.max_samples), not on all of them.\n" if quick else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {facts.run_name}

A sequence classifier trained with forge: {facts.base or "a model from scratch"} on {facts.data}.

| | before | after |
|---|---|---|
{rows}
{note}
- Labels: {", ".join(facts.labels)}
- Training rows: {facts.rows:,}; optimizer steps: {facts.steps:,}
- Data fingerprint (SHA-256 of the rows): `{facts.data_fingerprint}`
- Run id: `{facts.run_id}`; code: {facts.code}
- Versions: {versions}

## Use

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```

## Made with

    {facts.command}

```yaml
{facts.config_yaml.strip()}
```
"""


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline metrics of two evaluations as text, `-` where one was not made: (name, before, after)."""
    names = [name for name in {**before, **after} if name.split("/")[-1] in ("accuracy", "macro_f1", "loss", "samples")]

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    return [(name, text(before.get(name)), text(after.get(name))) for name in names]
