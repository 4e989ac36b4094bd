"""A missing value is not a value: no label is not a class, and no text is not learned from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import config_on, conversation
from datasets import ClassLabel, Dataset
from test_classification import load
from test_ocr import load as load_images
from test_ocr import write_images

from forge.errors import UsageError
from forge.task.causal_lm.task import load_causal_lm

COLUMNS = {"text": "premise", "text_pair": None}
Write = Callable[[list[dict[str, Any]]], dict[str, str]]


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Writes the same rows as both splits, in each kind of file."""

    def write(rows: list[dict[str, Any]]) -> dict[str, str]:
        table = Dataset.from_list(rows)
        for split in ("train", "validation"):
            save = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[request.param]
            save(str(tmp_path / f"{split}.{request.param}"))
        return {"path": str(tmp_path)}

    return write


ROWS = [{"premise": f"the {noun}", "label": i % 2} for i, noun in enumerate(("dog", "cat", "man", "girl"))]


@pytest.mark.parametrize(
    ("row", "lacks"),
    [
        ({"premise": "the bird", "label": None}, "no label in the column label"),
        ({"premise": None, "label": 1}, "no text in the column premise"),
        ({"premise": " ", "label": 1}, "no text in the column premise"),
        ({"premise": "the bird", "label": -1}, "the label -1, which usually means none"),
    ],
)
def test_a_row_that_lacks_something_is_an_error_or_left_out_and_counted(
    row: dict[str, Any], lacks: str, written: Write, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = written([*ROWS[:2], row, *ROWS[2:], row])
    with pytest.raises(UsageError) as refused:
        load(tiny_model, data, columns=COLUMNS)
    assert f"train: row 2 has {lacks}" in str(refused.value)
    assert "(2 such rows in all); fill it in, remove the row, or leave out such rows with task.empty: leave_out" in str(
        refused.value
    )
    task = load(tiny_model, data, columns=COLUMNS, empty="leave_out")
    assert task.labels == ["0", "1"]
    assert task.train["label"][:] == [0, 1, 0, 1]
    assert task.facts()["left_out"] == {"train": 2, "validation": 2}
    assert f"train: 2 of 6 rows are left out, the first because row 2 has {lacks}" in caplog.text


def test_the_place_of_a_row_is_that_in_the_data_where_max_rows_keeps_some(written: Write, tiny_model: Path) -> None:
    data = written([*ROWS, *ROWS, {"premise": "x", "label": None}])
    with pytest.raises(UsageError, match="train: row 8 has no label"):
        load(tiny_model, {**data, "max_rows": 4}, columns=COLUMNS)


def test_minus_one_is_a_class_where_it_is_named_or_one_of_two(written: Write, tiny_model: Path) -> None:
    data = written([{**row, "label": row["label"] * 2 - 1} for row in ROWS])
    task = load(tiny_model, data, columns=COLUMNS)
    assert (task.labels, task.train["label"][:]) == (["-1", "1"], [0, 1, 0, 1])
    data = written([*({**row, "label": row["label"] * 2 - 1} for row in ROWS), {"premise": "a bird", "label": 0}])
    task = load(tiny_model, data, columns=COLUMNS, labels=["-1", "0", "1"])
    assert task.train["label"][:] == [0, 2, 0, 2, 1]


def test_integers_are_names_where_all_are_named_else_places(written: Write, tiny_model: Path) -> None:
    stars = written([{"premise": "the dog", "label": star} for star in (1, 3, 2)])
    assert load(tiny_model, stars, columns=COLUMNS, labels=["1", "2", "3"]).train["label"][:] == [0, 2, 1]
    places = written([{"premise": "the dog", "label": place} for place in (0, 2, 1)])
    assert load(tiny_model, places, columns=COLUMNS, labels=["1", "2", "3"]).train["label"][:] == [0, 2, 1]
    assert load(tiny_model, places, columns=COLUMNS, labels=["bad", "fair", "good"]).train["label"][:] == [0, 2, 1]
    many = written([{"premise": "the dog", "label": i} for i in (10, 9, 2)])
    assert load(tiny_model, many, columns=COLUMNS).labels == ["2", "9", "10"]


def test_a_label_with_a_leading_zero_is_a_name_and_a_fraction_is_none(written: Write, tiny_model: Path) -> None:
    task = load(tiny_model, written([{**row, "label": f"0{row['label']}"} for row in ROWS]), columns=COLUMNS)
    assert task.labels == ["00", "01"]
    with pytest.raises(UsageError, match=r"holds 0\.5; a label is a name or an integer"):
        load(tiny_model, written([{**row, "label": row["label"] + 0.5} for row in ROWS]), columns=COLUMNS)


def test_a_hubs_own_label_of_minus_one_is_no_label(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([*ROWS, {"premise": "a bird", "label": -1}]).cast_column(
        "label", ClassLabel(names=["b", "a"])
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": rows, "validation": rows})
    with pytest.raises(UsageError, match="train: row 4 has the label -1, which usually means none"):
        load(tiny_model, {"name": "x/y"}, columns=COLUMNS)
    task = load(tiny_model, {"name": "x/y"}, columns=COLUMNS, empty="leave_out")
    assert (task.labels, task.train["label"][:]) == (["b", "a"], [0, 1, 0, 1])


def test_minus_one_in_validation_alone_is_no_label(tmp_path: Path, tiny_model: Path) -> None:
    """As SNLI has it."""
    for split, rows in {"train": ROWS, "validation": [*ROWS, {"premise": "x", "label": -1}]}.items():
        Dataset.from_list(rows).to_json(str(tmp_path / f"{split}.jsonl"))
    task = load(tiny_model, {"path": str(tmp_path)}, columns=COLUMNS, empty="leave_out")
    assert task.facts()["left_out"] == {"train": 0, "validation": 1}


def test_a_label_that_a_split_lacks_gets_a_line(tmp_path: Path, tiny_model: Path, caplog: Any) -> None:
    for split, count in {"train": 4, "validation": 1}.items():
        Dataset.from_list(ROWS[:count]).to_json(str(tmp_path / f"{split}.jsonl"))
    load(tiny_model, {"path": str(tmp_path)}, columns=COLUMNS)
    assert "validation: no row has the label 1 (1 in all): whether it is learned is not measured" in caplog.text
    load(tiny_model, {"path": str(tmp_path)}, columns=COLUMNS, labels=["no", "yes", "maybe"])
    assert "train: no row has the label maybe (1 in all): it cannot be learned" in caplog.text


def test_labels_that_differ_by_case_or_white_space_are_classes_and_get_a_line(
    written: Write, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = written([{"premise": "the dog", "label": label} for label in ("yes", "Yes", "no")])
    assert load(tiny_model, data, columns=COLUMNS).labels == ["Yes", "no", "yes"]
    assert "the labels 'Yes' and 'yes' differ only by case, white space, _ or -, and are two classes" in caplog.text


def test_a_text_without_a_token_is_refused(written: Write, tiny_model: Path) -> None:
    from tokenizers import normalizers, processors
    from transformers import AutoTokenizer

    from forge.task.classification import ClassificationTask, prepare

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("zzz", "")
    data = written([*ROWS, {"premise": "zzz", "label": 1}])
    config = ClassificationTask(type="classification", dataset=data, columns=COLUMNS, max_length=16)
    with pytest.raises(UsageError, match="train: 1 rows have a text that gives no token"):
        prepare(config, tokenizer)


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_transcript_that_is_missing(text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "validation"):
        write_images(tmp_path / split, ["a", "b", "c"])
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"a"', "null" if text is None else repr(text).replace("'", '"')))
    with pytest.raises(UsageError, match="train: row 0 has an empty transcript in the column text; fill it in"):
        load_images(tmp_path)
    task = load_images(tmp_path, {"empty": "leave_out"})
    assert (task.train["text"][:], task.train["row"][:]) == (["b", "c"], [1, 2])
    assert task.facts()["left_out"] == {"train": 1, "validation": 0}
    assert "train: 1 of 3 rows are left out, the first because row 0 has an empty transcript" in caplog.text


SILENT = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": " "}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "good", "lacks"),
    [
        (SILENT, conversation(1), "an empty reply (message 1)"),
        ({"messages": []}, conversation(1), "no messages in the column messages"),
        ({"messages": None}, conversation(1), "no messages in the column messages"),
        (
            {"prompt": "say", "completion": " "},
            {"prompt": "say", "completion": "red"},
            "no text in the column completion",
        ),
        ({"prompt": None, "completion": "x"}, {"prompt": "say", "completion": "red"}, "no text in the column prompt"),
        ({"text": "\n"}, {"text": "red"}, "no text in the column text"),
        ({"text": None}, {"text": "red"}, "no text in the column text"),
    ],
)
def test_a_row_of_a_language_model_that_lacks_what_is_learned(
    row: dict[str, Any], good: dict[str, Any], lacks: str, chat_model: Path, tmp_path: Path
) -> None:
    def loaded(*settings: str) -> Any:
        return load_causal_lm(config_on(tmp_path, chat_model, [good, row, good], [good], *settings))

    with pytest.raises(UsageError) as refused:
        loaded()
    assert f"train: row 1 has {lacks}; fill it in" in str(refused.value)
    task = loaded("task.empty=leave_out")
    assert task.train["row"][:] == [0, 2]
    assert task.facts()["cut"]["train"]["left_out"] == 1
    stream = loaded("task.dataset.streaming=true", "training.max_steps=1").train
    rows = list(stream.rows)
    with pytest.raises(UsageError, match="train: row 1 has"):
        stream.prepare(rows, [0, 1, 2])
    stream = loaded("task.dataset.streaming=true", "training.max_steps=1", "task.empty=leave_out").train
    prepared, left_out = stream.prepare(rows, [0, 1, 2])
    assert ([row["row"] for row in prepared], left_out) == ([0, 2], 1)


def test_a_new_tokenizer_is_not_trained_on_rows_that_are_left_out(tmp_path: Path) -> None:
    model = "{model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    settings = ("model.path=null", f"model.config={model}", "model.new_tokenizer={kind: bpe, vocab_size: 300}")
    rows = [{"text": "red red"}, {"text": None}, {"text": "blue blue"}]
    task = load_causal_lm(config_on(tmp_path, Path("unused"), rows, rows[:1], *settings, "task.empty=leave_out"))
    assert task.train["row"][:] == [0, 2]


def test_replies_with_a_call_or_a_thought_alone_are_not_empty() -> None:
    from forge.task.causal_lm.forms import RowForm, lacking

    form = RowForm("messages", ("messages",))
    for reply in (CALL, {"role": "assistant", "content": "", "reasoning_content": "hm"}):
        assert lacking(form, [[{"role": "user", "content": ""}, reply]]) is None
