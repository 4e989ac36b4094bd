"""What a data set of conversations must not lose in silence: parts of rows, the ends of replies, and special tokens."""

from pathlib import Path
from typing import Any

import pytest
from conversations import END, config_on, conversation, labels_as_text
from tokenizers import processors
from transformers import AutoTokenizer

from forge.data.stream import RowStream
from forge.errors import UsageError
from forge.task.causal_lm.chat import CHATML
from forge.task.causal_lm.task import load_causal_lm

THOUGHT = {
    "messages": [
        {"role": "user", "content": "say red"},
        {"role": "assistant", "reasoning_content": "blue", "content": "red"},
    ]
}
CALL = {
    "messages": [
        {"role": "user", "content": "say red"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "cat", "arguments": {"n": 1}}]},
        {"role": "tool", "content": "dog"},
        {"role": "assistant", "content": "dog"},
    ]
}
STREAM = ("task.dataset.streaming=true", "training.max_steps=2")


@pytest.mark.parametrize("row", [THOUGHT, CALL])
def test_a_row_of_which_the_template_drops_a_part_is_refused_with_its_number(load_lm: Any, row: dict[str, Any]) -> None:
    part = "tool_calls" if row is CALL else "reasoning_content"
    for split in ("train", "validation"):
        rows = {"train": [conversation(0)], "validation": [conversation(1)]}
        rows[split] = [*rows[split], row, row]
        with pytest.raises(UsageError) as refused:
            load_lm(rows["train"], rows["validation"])
        assert f"data, {split}: row 1 has {part} of message 1 (assistant), which the chat template does" in str(
            refused.value
        )
        assert str(refused.value).endswith("(2 of 3 rows)")


def test_rows_with_a_lost_part_are_left_out_or_accepted_and_counted(
    load_lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [conversation(0), THOUGHT, CALL]
    left = load_lm(rows, [conversation(1)], "task.unprinted=leave_out")
    assert left.train["row"][:] == [0]
    assert left.facts()["cut"]["train"]["unprinted"] == 2
    assert "2 of 3 rows are left out (task.unprinted)" in caplog.text
    accepted = load_lm(rows, [conversation(1)], "task.unprinted=accept")
    assert labels_as_text(accepted, list(accepted.train)) == [f"red 0{END}", f"red{END}", f"{END}dog{END}"]
    assert accepted.facts()["cut"]["train"]["unprinted"] == 2
    assert "2 of 3 rows are learned without a part of their messages" in caplog.text
    with pytest.raises(UsageError, match=r"validation: row 0 has reasoning_content .* \(1 of 1 rows\)"):
        load_lm(rows, [THOUGHT], "task.unprinted=leave_out")


def test_a_stream_refuses_or_leaves_out_such_rows_too(load_lm: Any) -> None:
    def first(*settings: str) -> tuple[list[Any], int]:
        task = load_lm([conversation(0), THOUGHT], [conversation(1)], *STREAM, *settings)
        assert isinstance(task.train, RowStream)
        return task.train.prepare(list(task.train.rows), [0, 1])

    with pytest.raises(UsageError, match=r"data, train: row 1 has reasoning_content of message 1 \(assistant\)"):
        first()
    rows, lost = first("task.unprinted=leave_out")
    assert ([row["row"] for row in rows], lost) == ([0], 1)
    assert len(first("task.unprinted=accept")[0]) == 2


def test_keys_of_messages_without_effect_are_reported_and_weights_are_honoured(
    load_lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    row = conversation(0, turns=2)
    row["messages"][1] |= {"weight": 0, "score": 3}
    row["messages"][3] |= {"weight": 1, "score": 4}
    task = load_lm([row, conversation(1)], [conversation(2)])

    assert labels_as_text(task, list(task.train)) == [f"green 0{END}", f"green 1{END}"]
    assert (
        "train: keys of messages that change nothing, since neither forge nor the chat template reads them: score "
        "(1 rows)" in caplog.messages
    )


def test_remove_text_and_the_notice_of_special_tokens_see_thoughts_and_calls(
    load_lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writes = CHATML.replace(
        "message['content'] + '<|im_end|>' }}{% endgen", "message.reasoning_content }}<|im_end|>{% endgen"
    )
    (tmp_path / "t.jinja").write_text(writes)
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "reasoning_content": "b<|pad|>"},
        ]
    }
    template = f"task.chat_template={tmp_path / 't.jinja'}"
    load_lm([row], [row], template)
    assert "train: 1 rows contain a special token of the tokenizer in their own text, such as <|pad|> in" in caplog.text
    cleaned = load_lm([row], [row], template, "task.remove_text=['<|pad|>']")
    assert labels_as_text(cleaned, list(cleaned.train)) == [f"b{END}"]


WITHOUT_END = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
OF_PIECES = CHATML.replace("<|im_end|>", "<|end of turn|>")
NEXT_TURN_ENDS = (  # as GLM's and Apertus's: what ends a reply is written with the next message
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}<|endoftext|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>{% endif %}"
)


@pytest.mark.parametrize(("template", "last"), [(WITHOUT_END, "0"), (OF_PIECES, ">"), (NEXT_TURN_ENDS, "0")])
def test_replies_at_whose_end_generation_does_not_stop_are_reported(
    load_lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, last: str
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    rows = [conversation(0, turns=2)]
    load_lm(rows, rows, f"task.chat_template={tmp_path / 't.jinja'}")
    assert (
        f"train: 2 of 2 replies end in a token at which generation does not stop ({last!r} in row 0), so the model "
        "does not learn to stop" in caplog.text
    )


def test_one_line_says_where_generation_stops(load_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    load_lm([conversation(0)], [conversation(1)])
    assert f"train: each reply ends in a token at which generation stops ({END})" in caplog.messages
    caplog.clear()
    load_lm([{"text": "red"}], [{"text": "red"}], "task.append_eos=false")  # as the user wants it
    assert "generation" not in caplog.text


@pytest.fixture
def with_bos(chat_model: Path, tmp_path: Path) -> str:
    """A tokenizer that puts <|im_start|> before every text and <|im_end|> after it."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", 2), (END, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    return f"model.tokenizer={tmp_path / 'bos'}"


@pytest.mark.parametrize("settings", [(), ("task.append_eos=false",), STREAM])
@pytest.mark.parametrize(
    "row",
    [
        {"text": f"<|im_start|>say red{END}"},
        {"prompt": "<|im_start|>say", "completion": f" red{END}"},
        {"text": "say red"},
    ],
)
def test_a_row_with_its_own_begin_and_end_gets_no_second_one(
    with_bos: str,
    chat_model: Path,
    tmp_path: Path,
    row: dict[str, str],
    settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = load_causal_lm(config_on(tmp_path, chat_model, [row], [row], with_bos, *settings))
    rows = task.train.prepare([row], [0])[0] if settings is STREAM else list(task.train)

    assert task.processing.decode(rows[0]["input_ids"]) == f"<|im_start|>say red{END}"
    own = "<|im_start|>" in str(row)
    assert ("rows have themselves the special token that begins the row or ends a reply" in caplog.text) == own
    assert "contain a special token" not in caplog.text


def test_a_reply_with_its_own_end_gets_no_second_one(load_lm: Any) -> None:
    row = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": f"red{END}"}]}
    task = load_lm([row], [row])
    assert labels_as_text(task, list(task.train)) == [f"red{END}"]
    twice = {"messages": [*row["messages"], *conversation(1)["messages"]]}
    task = load_lm([twice], [twice])
    assert labels_as_text(task, list(task.train)) == [f"red{END}green 1{END}"]


def test_the_notice_names_every_special_token_inside_a_text(
    with_bos: str, chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"text": f"<|im_start|>say{END} <|im_start|>red"}
    load_causal_lm(config_on(tmp_path, chat_model, [row], [row], with_bos))
    assert f"task.remove_text: {sorted(['<|im_start|>', END])!r}" in caplog.text


def test_tools_that_are_not_read_are_reported(load_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    load_lm([{**conversation(0), "tools": "[]"}], [conversation(1)])
    assert "data: the column tools is not read: each conversation is written as if it had no tools" in caplog.text


def test_conversations_in_the_columns_of_texts_get_a_way_out(load_lm: Any) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(
        UsageError, match=r"row 0 has messages in its columns prompt and completion, .*one column of mes"
    ):
        load_lm([row], [row])
