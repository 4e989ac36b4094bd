"""Writes the model card: what was trained, on what, the numbers before and after, and how to make it again."""

from collections.abc import Sequence
from typing import Any

import yaml

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def model_card(
    metadata: dict[str, Any], steps: int, config_yaml: str, before: dict[str, Any], after: dict[str, Any]
) -> str:
    """Markdown with the hub's front matter.

    metadata: the run's run_metadata.json. before and after: evaluations, empty where none was made.
    """
    model, data, task, attempt = metadata["model"], metadata["data"], metadata["task"], metadata["attempts"][-1]
    git = attempt["git"]
    code = f"commit {git['commit']}{' with changes' if git['dirty'] else ''}" if git["commit"] else "no git commit"
    # A hub id, which the hub links to; a local path says nothing to anybody else.
    hub_id = model["source"] == model["location"] and not model["source"].startswith("/")
    front = {
        "library_name": "transformers",
        "pipeline_tag": task["pipeline_tag"],
        "tags": ["forge"],
        **({"base_model": model["source"]} if hub_id else {}),
    }
    rows = "\n".join(f"| {name} | {a} | {b} |" for name, a, b in compare(before, after, task["headline"]))
    numbers = f"| | before | after |\n|---|---|---|\n{rows}" if rows else "It was not evaluated."
    labels = f"- Labels: {', '.join(model['labels'])}\n" if model["labels"] else ""
    sampled = any(name.endswith("/samples_of") for name in {**before, **after})
    note = "\nEvaluated on a sample of the rows (evaluation.max_samples), not on all of them.\n" if sampled else ""
    rows_read = f"{data['rows']['train']:,}" if "train" in data["rows"] else "a stream of unknown length"
    processing = task["auto_processing"].removeprefix("Auto").lower()
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {metadata["name"]}

{task["title"]} trained with forge: {model["source"]}, on {data["description"]}.

{numbers}
{note}
{labels}- Parameters: {model["parameters"]:,}; training rows: {rows_read}; optimizer steps: {steps:,}
- Data fingerprint (SHA-256 of the rows): `{data["fingerprint"]}`
- Run id: `{metadata["run_id"]}`; code: {code}
- Versions: {", ".join(f"{name} {attempt['packages'][name]}" for name in PACKAGES)}

## Use

```python
from transformers import {task["auto_model"]}, {task["auto_processing"]}

model = {task["auto_model"]}.from_pretrained("PATH OF THIS FOLDER")
{processing} = {task["auto_processing"]}.from_pretrained("PATH OF THIS FOLDER")
```

## Made with

    {attempt["command"]}

```yaml
{config_yaml.strip()}
```
"""


def compare(before: dict[str, Any], after: dict[str, Any], headline: Sequence[str]) -> list[tuple[str, str, str]]:
    """The headline metrics of two evaluations as text, `-` where one was not made: (name, before, after)."""
    names = [name for name in {**before, **after} if name.split("/")[-1] in (*headline, "samples")]

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"

    return [(name, text(before.get(name)), text(after.get(name))) for name in names]
