"""The model card says what was trained, with which numbers, and how to load it and train it again."""

from pathlib import Path
from typing import Any

import yaml
from recorded_runs import metadata_of, model_facts, task_facts

from forge.config.schema import Config
from forge.report.model_card import headline_rows, model_card, usage
from forge.run.directory import RunDirectory
from forge.run.metadata import RunMetadata
from forge.run.records import record_of

PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "datasets": "5.2.0"}
ADAPTER = {"rank": 8, "alpha": 16, "trained_in_full": ["classifier"], "continues": None}
CONFIG = {"task": {"type": "classification", "dataset": {"demo": "nli"}}, "model": {"path": "student"}}
OTHER = {"name": "first", "location": "/here/first", "revision": None, "commit": None, "sha256": "2" * 64}


def card(
    *,
    model: dict[str, Any] | None = None,
    git: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    table: str | None = None,
    **metadata: Any,
) -> str:
    values = metadata_of(RunDirectory(Path("kd-1"))) | metadata
    values["model"] |= model or {}
    values["attempts"][-1] |= {"packages": PACKAGES, "git": {"commit": "3b44745", "dirty": False, **(git or {})}}
    values["data"] |= {"rows": {"train": 1200}}
    record = record_of(RunMetadata, values)
    return model_card(record, 1500, Config.model_validate(CONFIG | (config or {})), before or {}, after or {}, table)


def test_a_card_in_full() -> None:
    text = card(before={"v/ce": 1.5, "v/accuracy": 0.25, "v/rows": 1000}, after={"v/ce": 0.5, "v/rows": 1000})
    front, body = text.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["forge"],  # and no base_model: a path of this machine means nothing to others
    }
    assert (
        body.partition("```yaml")[0]
        == f"""
# kd-1

A classifier, trained with forge on rows, starting from student.

| | before | after |
|---|---|---|
| v/ce | 1.5000 | 0.5000 |
| v/accuracy | 0.2500 | - |
| v/rows | 1,000 | 1,000 |

- Parameters: 21,059; training rows: 1,200; optimizer steps: 1,500
- Data fingerprint (SHA-256 of the rows): `963c2d6e6018`
- Run id: `id-kd-1`; code: commit 3b44745
- Versions: {", ".join(f"{name} {version}" for name, version in PACKAGES.items())}

## Use

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```

## Reproduce

    forge.py

"""
    )
    assert yaml.safe_load(body.partition("```yaml")[2].rstrip("`\n"))["model"]["path"] == "student"


def test_a_hub_model_is_linked_and_a_model_from_scratch_has_no_source() -> None:
    assert "base_model: org/m\n" in card(model={"location": "org/m", "source": "org/m"})
    scratch = card(model={"location": None, "source": "from scratch"})
    assert "trained with forge on rows, with random initial weights.\n\nIt was not evaluated.\n" in scratch
    assert "base_model" not in scratch


def test_code_with_changes_or_without_a_commit_is_marked() -> None:
    assert "code: commit 3b44745 with changes\n" in card(git={"dirty": True})
    assert "code: no git commit\n" in card(git={"commit": None, "dirty": None})


def test_rows_that_were_sampled_are_marked_unless_the_table_says_so_itself() -> None:
    numbers = {"v/ce": 0.5, "v/rows": 50, "v/rows_of": 1000}
    note = "Evaluated on a sample of the rows (evaluation.max_rows)"
    assert note in card(before=numbers, after={})
    assert note in card(before={}, after=numbers)
    with_table = card(before=numbers, after=numbers, table="| the table |")
    assert "\n\n| the table |\n\n- " in with_table
    assert note not in with_table
    assert "It was not evaluated." in card(table="")


def test_a_shallower_student_names_its_layers() -> None:
    line = "- Initialised from layers 0 and 3 of 4 of student, renumbered from 0, and its other weights\n"
    assert line in card(model={"kept_layers": [0, 3], "layers_of": 4})
    assert "Initialised" not in card()


def test_a_distilled_run_names_teacher_loss_and_control() -> None:
    distillation = {"alpha": 0.9, "divergence": "jsd", "beta": 0.25, "temperature": 2.0}
    config = {"teacher": {"path": "teacher"}, "distillation": distillation}
    teacher = model_facts(source="teacher", weights_sha256="a" * 64).model_dump()
    text = card(config=config, teacher=teacher, control={"run_id": "c1", "name": "kd-1-sft"})
    assert f"- Teacher: teacher, weights `{'a' * 12}`, replicated\n" in text
    assert "- Loss: (1 - alpha) * CE + alpha * T^2 * D(teacher || student); alpha 0.9, T 2, D jsd (beta 0.25)\n" in text
    assert "- Control (alpha 0, the same steps and seed): run `c1`\n" in text
    skewed = {"distillation": distillation | {"divergence": "skew_kl", "skew": 0.125}}
    assert "D skew_kl (lambda 0.125)\n" in card(config=config | skewed, teacher=teacher)
    assert "Control" not in card(config=config, teacher=teacher)
    assert "Loss:" not in card(config=config | {"distillation": {"alpha": 0.0}}, teacher=teacher)


def test_an_adapter_names_its_base_and_its_ancestors() -> None:
    model = {"adapter": ADAPTER, "trained_parameters": 3939, "location_sha256": "b" * 64, "labels": ["no", "yes"]}
    ancestor = {"role": "base", "run_id": "r0", "name": "full", "path": "/p", "config": "nli/tiny"}
    text = card(model=model, lineage=[{**ancestor, "weights_sha256": None, "steps": 2000}])
    assert "library_name: peft\n" in text
    assert "- Labels: no, yes\n" in text
    assert "- LoRA adapter of rank 8 (alpha 16), and classifier in full: 3,939 parameters were trained\n" in text
    assert f"- Base: /here/student, weights `{'b' * 12}` (base.json has the full hash)\n" in text
    assert "## Lineage\n\n1. full (nli/tiny, run `r0`): 2,000 steps, as base\n\n## Use\n" in text


def test_a_continued_adapter_is_applied_once_and_earlier_ones_are_merged() -> None:
    top = {**OTHER, "location": "/here/top"}
    fresh = usage(task_facts(), model_facts(adapter=ADAPTER, adapters=[OTHER, top]), None)
    again = usage(task_facts(), model_facts(adapter=ADAPTER | {"continues": "top"}, adapters=[OTHER, top]), None)
    merged = [line for line in fresh.splitlines() if "merge_and_unload" in line]
    assert merged == [
        f'model = PeftModel.from_pretrained(model, "/here/{name}").merge_and_unload()' for name in ("first", "top")
    ]
    assert [line for line in again.splitlines() if "merge_and_unload" in line] == merged[:1]
    assert all('PeftModel.from_pretrained(model, "PATH OF THIS FOLDER")' in text for text in (fresh, again))


def test_headline_rows_leave_out_other_metrics() -> None:
    before, after = {"a/ce": 1.0, "a/kl": 3.0, "a/rows": 7}, {"a/ce": 0.25, "b/ce": 2.0}
    expected = [("a/ce", "1.0000", "0.2500"), ("a/rows", "7", "-"), ("b/ce", "-", "2.0000")]
    assert headline_rows(before, after, ["ce"]) == expected
