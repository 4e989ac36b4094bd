"""Rows become tokens: what is cut, left out or refused, and what the cached tokens of a row are named by."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conversations import END, LONG, LOST, config_on, conversation, labels_as_text, whole_length
from tokenizers import processors
from transformers import AutoTokenizer

from forge.config.loader import load_config
from forge.data.fingerprints import tokenizer_hash
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.task import fixed_date
from forge.task.causal_lm import chat, documents, forms, unprinted
from forge.task.causal_lm.task import load_causal_lm


def test_rows_that_are_too_long_are_cut_counted_and_reported(load_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = load_lm([conversation(0), LONG, LOST, LOST], [conversation(1)])

    assert len(task.train) == 2
    assert max(task.train["length"]) == 64
    whole = whole_length(task, LONG)
    assert task.facts()["cut"]["train"] == {
        **{"rows": 1, "tokens": whole - 64, "left_out": 2, "first_left_out": 2, "unprinted": 0}
    }
    assert set(task.facts()["cut"]["validation"].values()) == {0, None}
    assert task.facts()["rows"] == {"train": 2, "validation": 1}
    assert f"train: 1 rows are cut to task.max_length 64 and lose {whole - 64} tokens in all" in caplog.messages
    assert (
        "train: 2 rows are left out, the first is row 2: they have nothing to learn, or not within task.max_length 64"
        in caplog.messages
    )


def test_long_rows_are_left_out_or_refused_where_that_is_asked_for(load_lm: Any) -> None:
    rows = [conversation(0), LONG]
    left = load_lm(rows, [conversation(1)], "task.truncation=leave_out")

    assert left.train["row"][:] == [0]
    assert list(left.facts()["cut"]["train"].values()) == [0, 0, 1, 1, 0]
    with pytest.raises(UsageError) as refused:
        load_lm(rows, [conversation(1)], "task.truncation=refuse")
    length = whole_length(left, LONG)
    assert str(refused.value).endswith(
        f"data, train: row 1 has {length} tokens, more than task.max_length 64; raise it, or set task.truncation: cut "
        f"or leave_out (1 such rows, the longest of {length})"
    )


def test_a_split_of_which_nothing_is_left_is_refused(load_lm: Any) -> None:
    with pytest.raises(UsageError, match=r"validation: no row has a reply within task.max_length 64 tokens; raise it"):
        load_lm([conversation(0)], [LOST])


def test_a_special_token_in_the_text_is_reported_with_a_remedy(load_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red<|endoftext|>"}]
    rows = [conversation(0), {"messages": messages}]
    load_lm(rows, [conversation(1)])

    (warned,) = [message for message in caplog.messages if "special token" in message]
    assert "train: 1 rows" in warned
    assert "<|endoftext|> in row 1" in warned
    assert "task.remove_text: ['<|endoftext|>']" in warned
    caplog.clear()
    cleaned = load_lm(rows, [conversation(1)], "task.remove_text=['<|endoftext|>']")
    assert labels_as_text(cleaned, list(cleaned.train)) == [f"red 0{END}", f"red{END}"]
    assert "special token" not in caplog.text


def test_an_empty_text_is_left_out_and_counted_with_any_tokens_around_it(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", 2), (END, end)]
    )
    tokenizer.save_pretrained(tmp_path / "own")
    rows = [{"text": "red"}, {"text": ""}, {"text": "blue"}]
    for own in ((), (f"model.tokenizer={tmp_path / 'own'}",)):
        for settings in (own, (*own, "task.append_eos=false")):
            settings = (*settings, "task.empty=leave_out")
            task = load_causal_lm(config_on(tmp_path, chat_model, rows, rows[:1], *settings))
            assert task.train["row"][:] == [0, 2], settings
            assert task.facts()["cut"]["train"]["left_out"] == 1


def test_the_labels_of_a_row_are_those_of_its_batch_and_the_first_token_is_none(load_lm: Any) -> None:
    texts = [{"text": "one two three"}, {"text": "red"}]
    for rows in (texts, [conversation(0, turns=2), conversation(1)]):
        task = load_lm(rows, rows)
        for row in task.train:
            assert row["labels"] == (task.collate([row])["labels"] != IGNORE).sum()
    assert load_lm(texts, texts).train["labels"][:] == [length - 1 for length in load_lm(texts, texts).train["length"]]


CHAT_ROWS = [conversation(0, turns=2), conversation(1)]
PAIRS = [{"prompt": "say red:", "completion": " red"}, {"prompt": "say blue:", "completion": " blue blue"}]
TEMPLATE = "task.chat_template=TEMPLATE"


@pytest.mark.parametrize(
    ("rows", "setting"),
    [
        (CHAT_ROWS, "task.max_length=24"),
        (CHAT_ROWS, "task.remove_text=[re]"),
        (CHAT_ROWS, TEMPLATE),
        (PAIRS, "task.append_eos=false"),
    ],
)
def test_tokens_of_another_setting_are_not_taken_from_the_cache(
    load_lm: Any, tmp_path: Path, rows: list[dict[str, Any]], setting: str
) -> None:
    (tmp_path / "t.jinja").write_text(
        chat.CHATML.replace("assistant\\n' }}", "assistant: ' }}").replace("'\\n'", "' '")
    )
    before = load_lm(rows, rows)
    setting = setting.replace("TEMPLATE", str(tmp_path / "t.jinja"))
    after = load_causal_lm(load_config(tmp_path / "c.yaml", (setting,)).config)  # of the very same files

    columns = {name: [row[name] for row in rows] for name in after.encoder.form.columns}
    fresh = after.encoder.encode(columns, range(len(rows)), "x")
    assert after.train["input_ids"][:] == fresh["input_ids"] != before.train["input_ids"][:]


@pytest.mark.parametrize("module", [chat, forms, documents, unprinted, fixed_date])
def test_tokens_of_other_code_are_not_taken_from_the_cache(
    load_lm: Any, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_lm(CHAT_ROWS, CHAT_ROWS).encoder
    before = encoder.key
    assert encoder.key == before
    (tmp_path / "changed.py").write_text(Path(str(module.__file__)).read_text() + "# A change.\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))

    assert encoder.key != before


def test_the_hash_of_a_tokenizer_sees_other_ids_and_not_its_use(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    before = tokenizer_hash(tokenizer)
    tokenizer(["red", "red blue"], truncation=True, max_length=1, padding=True)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(AutoTokenizer.from_pretrained(other_digits(chat_model, tmp_path / "other"))) != before
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer_hash(tokenizer) != before


def test_other_tokens_of_the_same_rows_are_another_fingerprint(load_lm: Any, chat_model: Path, tmp_path: Path) -> None:
    other = other_digits(chat_model, tmp_path / "other")
    own, again = (load_lm(CHAT_ROWS, CHAT_ROWS).fingerprint for _ in range(2))

    assert own == again != load_lm(CHAT_ROWS, CHAT_ROWS, f"model.tokenizer={other}").fingerprint


def test_another_file_of_a_stream_is_another_fingerprint(load_lm: Any) -> None:
    settings = ("task.dataset.streaming=true", "training.max_steps=2")
    first, again = (load_lm(CHAT_ROWS, CHAT_ROWS[:1], *settings).fingerprint for _ in range(2))

    assert first == again != load_lm(CHAT_ROWS[:1], CHAT_ROWS[:1], *settings).fingerprint


def other_digits(model: Path, folder: Path) -> Path:
    """The tokenizer of a model with the ids of its digits reversed."""
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    ids = [vocabulary[digit] for digit in "0123456789"]
    vocabulary.update(zip("0123456789", reversed(ids), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder
