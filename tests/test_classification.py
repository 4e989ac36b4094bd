"""Rows become batches and predictions become numbers: sources, columns, labels, truncation, metrics."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import pair_rows, write_rows
from datasets import ClassLabel, Dataset, DatasetDict
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from forge.config.task_schema import ClassificationTask
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.task import classification
from forge.task.classification import Classification, ClassificationMetrics, prepare


def load(tiny_model: Path, dataset: dict[str, Any], **settings: Any) -> Classification:
    columns = {"text": "premise", "text_pair": "hypothesis"}
    config = TypeAdapter(ClassificationTask).validate_python(
        {"type": "classification", "dataset": dataset, "columns": columns, "max_length": 32, **settings}
    )
    return prepare(config, AutoTokenizer.from_pretrained(tiny_model))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_of_any_kind_of_file_gives_the_same_rows(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list(pair_rows(9))
    for split, part in {"train": rows, "validation_near": rows.select(range(4)), "validation": rows}.items():
        write = {"jsonl": part.to_json, "csv": part.to_csv, "parquet": part.to_parquet}[kind]
        write(str(tmp_path / f"{split}.{kind}"))
    (tmp_path / "test.jsonl").write_text("not read\n")
    task = load(tiny_model, {"path": str(tmp_path)})

    assert {name: len(part) for name, part in task.validation.items()} == {"validation": 9, "near": 4}
    assert task.labels == ["0", "1", "2"]
    assert task.train[1]["input_ids"] == [2, 4, 9, 17, 4, 8, 4, 9, 17, 4, 8, 3, 4, 9, 17, 3]
    assert task.train[1]["token_type_ids"] == [0] * 12 + [1] * 4
    assert task.train[1]["label"] == 1


def test_the_hub_gives_its_own_label_names_and_splits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["entailment", "neutral", "contradiction"]
    rows = Dataset.from_list(pair_rows(6)).cast_column("label", ClassLabel(names=names))
    hub = DatasetDict(train=rows, validation_matched=rows, validation_mismatched=rows, test_matched=rows)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
    dataset = {"name": "nyu-mll/glue", "config": "mnli", "revision": "abc"}
    task = load(tiny_model, dataset)

    assert asked == [(("nyu-mll/glue", "mnli"), {"revision": "abc"})]
    assert list(task.validation) == ["matched", "mismatched"]
    assert task.labels == names
    assert list(load(tiny_model, {**dataset, "validation_splits": ["test_matched"]}).validation) == ["test_matched"]
    with pytest.raises(UsageError, match="numbers its labels as entailment, neutral, contradiction"):
        load(tiny_model, dataset, labels=["contradiction", "neutral", "entailment"])
    with pytest.raises(UsageError, match="has no split dev; it has: train, validation_matched"):
        load(tiny_model, {**dataset, "validation_splits": ["dev"]})


def test_no_evaluated_split_is_lost(tiny_model: Path, tmp_path: Path) -> None:
    for split in ("train", "validation_train", "validation-near"):
        write_rows(tmp_path / f"{split}.jsonl", pair_rows(6))
    dataset = {"path": str(tmp_path)}
    assert {name: len(rows) for name, rows in load(tiny_model, dataset).validation.items()} == {
        "near": 6,
        "validation_train": 6,  # not train, which is the split that is trained on
    }
    assert list(load(tiny_model, {**dataset, "train_split": "validation_train"}).validation) == ["near"]
    write_rows(tmp_path / "validation_near.jsonl", pair_rows(3))
    with pytest.raises(UsageError, match="validation-near and validation_near would both be near in the metrics"):
        load(tiny_model, dataset)
    for splits, reason in ((["train"], "trains on the split train, and"), (["near", "near"], "the split near twice")):
        with pytest.raises(ValueError, match=reason):
            load(tiny_model, {**dataset, "validation_splits": splits})


def test_single_sentences_with_named_labels_of_any_number(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"premise": f"the {noun}", "label": noun} for noun in ("dog", "cat", "man", "girl", "bird")]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows[:2])
    task = load(tiny_model, {"path": str(tmp_path)}, columns={"text": "premise"})

    assert task.labels == ["bird", "cat", "dog", "girl", "man"]
    assert task.train["label"][:] == [2, 1, 4, 3, 0]
    assert task.train[0]["input_ids"] == [2, 4, 8, 3]


def test_a_batch_is_padded_to_its_longest_row_and_speaks_the_models_labels(tiny_model: Path, data_folder: Path) -> None:
    from dataclasses import replace

    task = replace(load(tiny_model, {"path": str(data_folder)}), label_ids=[2, 0, 1])
    batch = task.collate([task.train[0], task.train[1], task.train[0]])

    assert batch["input_ids"].shape == (3, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [11, 16, 11]
    assert batch["input_ids"][0, 11:].tolist() == [0] * 5
    assert batch["labels"].tolist() == [2, 0, 2]
    assert batch["tokens"] == 38
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "tokens"}
    assert task.metrics("matched", None).names == ["1", "2", "0"]


def test_rows_that_are_cut_are_counted(tiny_model: Path, data_folder: Path) -> None:
    task = load(tiny_model, {"path": str(data_folder)}, max_length=16)

    assert task.truncated == {"train": 16, "matched": 4, "other": 3}
    assert max(task.train["length"][:]) == 16


def test_the_longer_sentence_is_cut(tiny_model: Path, tmp_path: Path) -> None:
    row = {"premise": "the dog", "hypothesis": "a " * 30, "label": "x"}
    write_rows(tmp_path / "train.jsonl", [row, {**row, "label": "y"}])
    write_rows(tmp_path / "validation.jsonl", [row])

    assert load(tiny_model, {"path": str(tmp_path)}, max_length=8).train[0]["input_ids"] == [2, 4, 8, 3, 5, 5, 5, 3]


def test_a_text_column_may_be_called_label_and_a_csv_cell_may_read_na(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("label,gold\ndog,yes\nNA,no\n")
    (tmp_path / "validation.csv").write_text("label,gold\ncat,no\n")
    task = load(tiny_model, {"path": str(tmp_path)}, columns={"text": "label", "label": "gold"})

    assert task.labels == ["no", "yes"]
    assert task.train["input_ids"][:] == [[2, 8, 3], [2, 1, 3]]
    assert task.train["label"][:] == [1, 0]


def test_tokens_of_one_kind_of_model_are_not_taken_for_those_of_another(tiny_model: Path, data_folder: Path) -> None:
    """DistilBERT's tokenizer is BERT's but for the inputs it names; both read one cache."""
    config = ClassificationTask(
        type="classification",
        dataset={"path": str(data_folder)},
        columns={"text": "premise", "text_pair": "hypothesis"},
        max_length=31,
    )
    like_distilbert = AutoTokenizer.from_pretrained(tiny_model)
    like_distilbert.model_input_names = ["input_ids", "attention_mask"]

    assert "token_type_ids" not in prepare(config, like_distilbert).train.column_names
    assert "token_type_ids" in prepare(config, AutoTokenizer.from_pretrained(tiny_model)).train.column_names


def test_a_quick_look_sees_every_label_of_sorted_rows(tiny_model: Path, tmp_path: Path) -> None:
    rows = sorted(pair_rows(90), key=lambda row: str(row["label"]))
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows)
    task = load(tiny_model, {"path": str(tmp_path), "max_rows": 6})

    assert task.train["label"][:] == [0, 0, 1, 1, 2, 2]


def test_the_fingerprint_follows_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    def fingerprint(rows: list[dict[str, object]]) -> str:
        write_rows(tmp_path / "train.jsonl", rows)
        write_rows(tmp_path / "validation.jsonl", pair_rows(3))
        return load(tiny_model, {"path": str(tmp_path)}).fingerprint

    rows = pair_rows(6)
    first = fingerprint(rows)
    assert fingerprint([*rows[:5], {**rows[5], "label": 0}]) != first
    assert fingerprint(rows[::-1]) != first
    assert fingerprint([{**row, "unused": 1} for row in rows]) == first


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"premise": "a", "hypothesis": "b", "label": 7}, "row 3 has the label 7"),
        ({"premise": "a", "hypothesis": "b", "label": -1}, "row 3 has the label -1"),
        ({"premise": None, "hypothesis": "b", "label": 1}, "row 3 has no text in the column premise"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, object], sentence: str, tiny_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*pair_rows(3), row])
    write_rows(tmp_path / "validation.jsonl", pair_rows(3))
    with pytest.raises(UsageError, match=sentence):
        load(tiny_model, {"path": str(tmp_path)}, labels=["e", "n", "c"])


def test_columns_that_are_not_text_and_labels_that_are_not_labels_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "validation.jsonl", pair_rows(3))
    write_rows(tmp_path / "train.jsonl", [{**row, "premise": 3} for row in pair_rows(3)])
    with pytest.raises(UsageError, match=r"the column premise \(task.columns.text\) holds .*int64.*, not text"):
        load(tiny_model, {"path": str(tmp_path)})
    write_rows(tmp_path / "train.jsonl", [{**row, "label": 0.5} for row in pair_rows(3)])
    with pytest.raises(UsageError, match=r"holds 0\.5; a label is a name or an integer"):
        load(tiny_model, {"path": str(tmp_path)})
    write_rows(tmp_path / "train.jsonl", [{**row, "label": [1]} for row in pair_rows(3)])
    with pytest.raises(UsageError, match=r"the column label \(task.columns.label\) holds .*, not names or integers"):
        load(tiny_model, {"path": str(tmp_path)})
    write_rows(tmp_path / "train.jsonl", [{**row, "label": 1} for row in pair_rows(3)])
    with pytest.raises(UsageError, match="the only label is 1; a classifier needs at least two"):
        load(tiny_model, {"path": str(tmp_path)})


def test_metrics_equal_their_definitions_on_counts_by_hand() -> None:
    """Labels a a a b b c, predicted a a b b c c, and one row that is not counted."""
    metrics = ClassificationMetrics(["a", "b", "c", "never"])
    labels = torch.tensor([0, 0, 0, 1, 1, 2, IGNORE])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    for part in (slice(0, 4), slice(4, 7)):  # in two updates
        metrics.update({"predictions": predicted[part]}, {"labels": labels[part]})

    f1_a, f1_b, f1_c = 2 * 2 / (3 + 2), 2 * 1 / (2 + 2), 2 * 1 / (1 + 2)
    assert metrics.compute() == {
        "accuracy": pytest.approx(4 / 6),
        "macro_f1": pytest.approx((f1_a + f1_b + f1_c) / 3),
        **{"labelled/a": 3, "predicted/a": 2, "correct/a": 2},
        **{"labelled/b": 2, "predicted/b": 2, "correct/b": 1},
        **{"labelled/c": 1, "predicted/c": 2, "correct/c": 1},
        **{"labelled/never": 0, "predicted/never": 0, "correct/never": 0},
    }


def test_macro_f1_counts_a_label_that_is_only_predicted_and_none_that_never_occurs() -> None:
    metrics = ClassificationMetrics(["a", "b", "never"])
    metrics.update({"predictions": torch.tensor([0, 0, 0, 1])}, {"labels": torch.tensor([0, 0, 0, 0])})
    assert metrics.compute()["macro_f1"] == pytest.approx((2 * 3 / (4 + 3) + 0) / 2)


def test_a_teacher_with_the_same_tokens_is_padded_on_the_students_side(tiny_model: Path, data_folder: Path) -> None:
    task = load(tiny_model, {"path": str(data_folder)})
    own = AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    own.model_input_names = ["input_ids", "attention_mask"]  # other inputs, such as DistilBERT's, of the same tokens
    taught = task.for_teacher(own)

    assert taught.same_tokens
    assert own.padding_side == "left"  # the caller's tokenizer stays as it was
    batch = taught.collate([taught.train[i] for i in range(6)])
    assert torch.equal(batch["teacher_attention_mask"], batch["attention_mask"])
    assert torch.equal(batch["teacher_input_ids"], batch["input_ids"])


def test_the_fingerprint_and_the_cache_follow_the_tokenizer_and_the_code(
    tiny_model: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (load(tiny_model, {"path": str(data_folder)}) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert first.train._fingerprint == again.train._fingerprint

    shutil.copytree(tiny_model, tmp_path / "other")
    state = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["dog"], vocabulary["cat"] = vocabulary["cat"], vocabulary["dog"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
    assert load(tmp_path / "other", {"path": str(data_folder)}).fingerprint != first.fingerprint

    (tmp_path / "changed.py").write_text(Path(str(classification.__file__)).read_text() + "# A change.\n")
    monkeypatch.setattr(classification, "__file__", str(tmp_path / "changed.py"))
    changed = load(tiny_model, {"path": str(data_folder)})
    assert changed.train._fingerprint != first.train._fingerprint
    assert changed.fingerprint == first.fingerprint
