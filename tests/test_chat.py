"""Conversations become text by chat templates of many shapes, and exactly the replies are learned."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from forge.config.task_schema import CausalLmTask
from forge.errors import UsageError
from forge.task.causal_lm.bpe import train_bpe
from forge.task.causal_lm.chat import CHATML, BadRow, ChatTemplate, check_roles, load_template
from forge.task.causal_lm.documents import build_encoder
from forge.task.causal_lm.forms import choose_form

TURNS = [("user", "Hi there"), ("assistant", "Hello!"), ("user", "And 2 + 2?"), ("assistant", "It is 4.")]
WITH_SYSTEM = [("system", "Be brief."), *TURNS]

# The shapes of well-known templates.
PLAIN_CHATML = (  # SmolLM2 and Qwen2.5, with a default system message
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MARKED = (  # as SmolLM3's and those that trl ships for training
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{%- else -%}"
    "{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
QWEN_3 = (  # the last reply gets thoughts, empty or not; earlier ones lose theirs
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
OPENS_WITH_A_THOUGHT = PLAIN_CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def said(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the turn tokens of every template above."""
    made = train_bpe([text for _, text in WITH_SYSTEM] * 20, 400, chat=False)
    turns = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": turns})
    return made


def encode(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of one row."""
    tokenizer.chat_template = template
    config = CausalLmTask.model_validate({"type": "causal_lm", "dataset": {"path": "x"}})
    encoder = build_encoder(config, tokenizer, choose_form(config, ["messages"], "x"))
    return {name: values[0] for name, values in encoder.encode({"messages": [messages]}, [0], "x, train").items()}


def learned_texts(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]]) -> list[str]:
    """The text of each run of learned tokens."""
    encoded = encode(tokenizer, template, messages)
    runs: list[list[int]] = []
    before = False
    for token, learned in zip(encoded["input_ids"], encoded["learned"], strict=True):
        if learned:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = learned
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (PLAIN_CHATML, TURNS, ["Hello!<|im_end|>", "It is 4.<|im_end|>"]),
        (PLAIN_CHATML, WITH_SYSTEM, ["Hello!<|im_end|>", "It is 4.<|im_end|>"]),
        (LLAMA_2, WITH_SYSTEM, [" Hello! </s>", " It is 4. </s>"]),
        (LLAMA_3, WITH_SYSTEM, ["Hello!<|eot_id|>", "It is 4.<|eot_id|>"]),
        (GEMMA, TURNS, ["Hello!<end_of_turn>", "It is 4.<end_of_turn>"]),
        (ZEPHYR, WITH_SYSTEM, ["Hello!</s>", "It is 4.</s>"]),
        (VICUNA, TURNS, [" Hello!</s>", " It is 4.</s>"]),
        (MARKED, WITH_SYSTEM, ["Hello!<|im_end|>", "It is 4.<|im_end|>"]),
        (CHATML, WITH_SYSTEM, ["Hello!<|im_end|>", "It is 4.<|im_end|>"]),
    ],
    ids=["chatml", "chatml-system", "llama-2", "llama-3", "gemma", "zephyr", "vicuna", "marked", "own"],
)
def test_the_replies_and_their_end_tokens_are_learned_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, template: str, turns: list[tuple[str, str]], expected: list[str]
) -> None:
    assert learned_texts(tokenizer, template, said(turns)) == expected


@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED])
def test_a_reply_that_repeats_the_question_or_holds_other_scripts_is_found_all_the_same(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    turns = [("user", "Hello!"), ("assistant", "Hello!"), ("user", "日本語?"), ("assistant", "  はい 👍🏽\n\n")]

    assert learned_texts(tokenizer, template, said(turns)) == ["Hello!<|im_end|>", "  はい 👍🏽\n\n<|im_end|>"]


def test_a_template_that_trims_is_followed(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", " Hi "), ("assistant", "\n Hello! \n"), ("user", "So"), ("assistant", " Yes ")]

    assert learned_texts(tokenizer, LLAMA_3, said(turns)) == ["Hello!<|eot_id|>", "Yes<|eot_id|>"]


def test_white_space_stays_where_no_token_ends_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "So"), ("assistant", "Yes")]

    assert learned_texts(tokenizer, VICUNA.replace(" + eos_token", ""), said(turns)) == [" Hello!\n", " Yes\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused_but_one_reply_is_taken(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert learned_texts(tokenizer, QWEN_3, said(TURNS[:2])) == ["<think>\n\n</think>\n\nHello!<|im_end|>"]
    with pytest.raises(UsageError) as refused:
        learned_texts(tokenizer, QWEN_3, said(TURNS))
    assert str(refused.value) == (
        "x, train: row 0 cannot be masked: the chat template writes message 1 differently once a later one follows "
        "(some templates drop earlier thoughts); give a template that marks the replies with {% generation %} and "
        "{% endgeneration %} by task.chat_template, or end each conversation at the one reply to learn"
    )


def test_a_template_whose_opening_is_not_what_it_writes_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=r"row 0 is not .* another text before message 1 than .*task.chat_template"):
        learned_texts(tokenizer, OPENS_WITH_A_THOUGHT, said(TURNS))


def test_a_template_that_refuses_is_quoted_with_row_and_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError) as refused:
        learned_texts(tokenizer, GEMMA, said(WITH_SYSTEM))
    assert str(refused.value) == (
        "x, train: row 0 is refused by the chat template (System role not supported); its roles are "
        "system, user, assistant, user, assistant"
    )


@pytest.mark.parametrize("broken", ["{{ messages[0]['content'] + 1 }}", "{{ nothing.there.at_all }}"])
def test_a_broken_template_is_one_sentence(tokenizer: PreTrainedTokenizerFast, broken: str) -> None:
    with pytest.raises(UsageError, match="x, train: row 0 is refused by the chat template"):
        learned_texts(tokenizer, broken, said(TURNS))


@pytest.mark.parametrize(
    "roles",
    [
        "user assistant",
        "system user assistant",
        "developer user assistant user assistant",
        "user assistant tool assistant",
        "user assistant tool tool assistant user assistant",
    ],
)
def test_good_orders_of_roles_pass(roles: str) -> None:
    check_roles([{"role": role, "content": "x"} for role in roles.split()])


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (
            "user user assistant",
            "has the role user after user (message 1) where assistant belongs; its roles are user, user",
        ),
        (
            "assistant user",
            "has the role assistant at the beginning (message 0) where system or developer or user belongs",
        ),
        ("user system assistant", "has the role system after user (message 1) where assistant belongs"),
        ("system assistant", "has the role assistant after system (message 1) where user belongs"),
        ("user assistant user", "ends with the role user and not with a reply; its roles are user, assistant, user"),
        ("user assistant tool", "ends with the role tool and not with a reply"),
        ("user human", "has the role human after user (message 1) where assistant belongs; its roles are user, human"),
        ("", "has no messages"),
    ],
)
def test_a_bad_order_of_roles_is_reported_with_all_roles(roles: str, expected: str) -> None:
    with pytest.raises(BadRow) as refused:
        check_roles([{"role": role, "content": "x"} for role in roles.split()])
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human", "value": "Hi"}, "has no role in message 0; each message is a mapping with role and content"),
        ({"role": "user", "content": None}, "has no text as the content of message 0 (user)"),
        ({"role": "user", "content": [{"type": "text"}]}, "has no text as the content of message 0 (user)"),
        ("Hi", "has no role in message 0; each message is a mapping with role and content"),
    ],
)
def test_a_message_without_role_or_text_is_named(message: Any, expected: str) -> None:
    with pytest.raises(BadRow) as refused:
        check_roles([message, {"role": "assistant", "content": "x"}])
    assert str(refused.value) == expected


def test_a_call_of_a_tool_may_have_no_text_and_keys_of_other_rows_do_not_count(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = CHATML.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{% for call in message.tool_calls %}{{ call.name }}{% endfor %}"
        "{{ (message.content or '') + '<|im_end|>' }}{% endgeneration %}",
    )
    row = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    messages = Dataset.from_list([{"messages": row}])[0]["messages"]  # a table gives tool_calls to every message
    assert messages[0]["tool_calls"] is None

    assert learned_texts(tokenizer, template, messages) == ["add<|im_end|>", "It is 4.<|im_end|>"]


CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
TOOL_ROW = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
WRITES_CALLS = (  # as Qwen 2.5's
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}{{ {'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_are_given_to_the_template_without_the_nulls_of_a_table(tokenizer: PreTrainedTokenizerFast) -> None:
    assert learned_texts(tokenizer, WRITES_CALLS, TOOL_ROW) == [
        '{"name": "add", "arguments": {"a": 2}}<|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert encode(tokenizer, WRITES_CALLS, TOOL_ROW)["unprinted"] == ""


NO_TOOL = "{% for message in messages if message.role != 'tool' %}"
THOUGHT = [{"role": "user", "content": "4"}, {"role": "assistant", "reasoning_content": "4", "content": "4"}]
IN_CONTENT = said([("user", "Hi"), ("assistant", "<think>\nWell.\n</think>\n\nHello!")])
CUTS_THOUGHTS = WRITES_CALLS.replace("message.content }}", "message.content.split('</think>') | last | trim }}")
AS_JSON = WRITES_CALLS.replace("message.content }}", "message.content | tojson }}")
WRITES_THOUGHTS = WRITES_CALLS.replace("{{ message.content", "{{ message.reasoning_content }} {{ message.content")


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (WRITES_CALLS.replace("call.function.arguments", "'{}'"), TOOL_ROW, "tool_calls of message 1 (assistant)"),
        (WRITES_CALLS.replace("message.tool_calls", "[]"), TOOL_ROW, "tool_calls of message 1 (assistant)"),
        (WRITES_CALLS.replace("{% for message in messages %}", NO_TOOL), TOOL_ROW, "content of message 2 (tool)"),
        (PLAIN_CHATML, THOUGHT, "reasoning_content of message 1 (assistant)"),
        (WRITES_THOUGHTS, THOUGHT, ""),
        (WRITES_THOUGHTS, [THOUGHT[0], {"thinking": "So", "reasoning": "So", **said([("assistant", "4")])[0]}], ""),
        (CUTS_THOUGHTS, IN_CONTENT, "content of message 1 (assistant)"),
        (CUTS_THOUGHTS, said(TURNS), ""),
        (AS_JSON, said([("user", "Hi"), ("assistant", 'Größe: "4"\n日')]), ""),
        (LLAMA_3, said([("user", " Hi \n"), ("assistant", "\n\n Hello!  ")]), ""),
    ],
)
def test_what_a_message_holds_and_the_text_does_not_is_found_even_if_its_words_are_elsewhere(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]], lost: str
) -> None:
    assert encode(tokenizer, template, messages)["unprinted"] == lost


def test_a_template_that_checks_what_is_said_is_asked_for_the_words_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{% if messages[0].content != 'Hi' %}{{ raise_exception('no') }}{% endif %}" + PLAIN_CHATML
    thought = {"role": "assistant", "reasoning_content": "So.", "content": "Hello!"}

    assert encode(tokenizer, strict, [TURN_ONE, thought])["unprinted"] == "reasoning_content of message 1 (assistant)"
    assert encode(tokenizer, strict, [TURN_ONE, *said([("assistant", "Hello!")])])["unprinted"] == ""


TURN_ONE = {"role": "user", "content": "Hi"}


def weighted(weights: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, **weights.get(i, {})} for i, message in enumerate(said(TURNS))]


@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED])
@pytest.mark.parametrize(
    ("weights", "learned"),
    [
        ({1: {"weight": 0}, 3: {"weight": 1}}, ["It is 4.<|im_end|>"]),
        ({3: {"weight": 0.0}}, ["Hello!<|im_end|>"]),
        ({1: {"train": False}, 3: {"train": None}}, ["It is 4.<|im_end|>"]),
        ({1: {"weight": 0}, 3: {"train": False}}, []),
    ],
)
def test_a_reply_that_its_message_excludes_is_read_and_not_learned(
    tokenizer: PreTrainedTokenizerFast, template: str, weights: dict[int, Any], learned: list[str]
) -> None:
    assert learned_texts(tokenizer, template, weighted(weights)) == learned
    assert (
        encode(tokenizer, template, weighted(weights))["input_ids"]
        == encode(tokenizer, template, said(TURNS))["input_ids"]
    )


def test_a_weight_that_is_none_is_refused_and_one_that_changes_nothing_is_noted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(UsageError, match=r"row 0 has the weight 0.5 in message 1; it must be 0 or false .*, or 1 or"):
        encode(tokenizer, MARKED, weighted({1: {"weight": 0.5}}))
    with pytest.raises(UsageError, match=r"row 0 has the train 'no' in message 1"):
        encode(tokenizer, MARKED, weighted({1: {"train": "no"}}))
    noted = encode(tokenizer, PLAIN_CHATML, weighted({0: {"train": True, "id": "a"}, 2: {"weight": 0}}))
    assert noted["without_effect"] == ("train of user messages", "id")
    named = PLAIN_CHATML.replace("message['content']", "(message.name or '') + message['content']")
    assert encode(tokenizer, named, weighted({0: {"name": "Bo", "id": "a"}}))["without_effect"] == ("id",)


def test_a_reply_that_cannot_be_found_between_the_markers_is_not_guessed(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = "{% generation %}" + PLAIN_CHATML + "{% endgeneration %}"
    assert encode(tokenizer, whole, said(TURNS))["learned"][0]
    with pytest.raises(
        UsageError, match=r"row 0 has a reply that is not to be learned \(message 1\), but forge cannot"
    ):
        encode(tokenizer, whole, weighted({1: {"weight": 0}}))


def test_a_template_comes_from_a_file_before_the_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    tokenizer.chat_template = PLAIN_CHATML
    (tmp_path / "own.jinja").write_text(MARKED)

    assert load_template(tokenizer, None).text == PLAIN_CHATML
    assert load_template(tokenizer, str(tmp_path / "own.jinja")).text == MARKED
    (tmp_path / "own.jinja").write_text("\ufeff" + MARKED)
    assert load_template(tokenizer, str(tmp_path / "own.jinja")).text == MARKED
    tokenizer.chat_template = "\ufeff" + PLAIN_CHATML
    assert load_template(tokenizer, None).text == PLAIN_CHATML
    with pytest.raises(UsageError, match=r"task.chat_template is .*none.jinja, which cannot be read"):
        load_template(tokenizer, str(tmp_path / "none.jinja"))


def test_a_tokenizer_without_a_template_says_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"has no chat template; .*task.chat_template"):
        load_template(tokenizer, None)


def test_a_template_with_todays_date_writes_the_same_on_every_day(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    by_variable = "{% set form = '%d %b' %}{% set now = strftime_now %}{{ 'Now: ' + now(form + ' %Y') + '\\n' }}"
    tokenizer.chat_template = by_variable + MARKED
    assert load_template(tokenizer, None).write(said(TURNS)).text.startswith("Now: 26 Jul 2024\n<|im_start|>user")
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + MARKED
    template = load_template(tokenizer, None)

    assert template.write(said(TURNS)).text.startswith("Today: 26 Jul 2024\n<|im_start|>user\nHi there")
    assert "2024-07-26" in caplog.text


def test_the_prompt_of_a_reply_is_the_text_before_it() -> None:
    template = ChatTemplate(PLAIN_CHATML, {}, ("<|im_end|>",))
    written = template.write(said(TURNS))

    assert template.prompt(said(TURNS[:3])) == written.text[: written.spans[1][0]]
    assert written.text[slice(*written.spans[1])] == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ 1 / 0 }}", "is refused by the chat template (division by zero); its roles are user, assistant"),
        (
            "{% macro again(n) %}{{ again(n) }}{% endmacro %}{{ again(1) }}",
            "is refused by the chat template (maximum recursion depth exceeded",
        ),
    ],
)
def test_any_error_of_a_template_is_reported_with_the_row(text: str, expected: str) -> None:
    with pytest.raises(BadRow) as refused:
        ChatTemplate(text, {}, ()).write(said(TURNS[:2]))
    assert str(refused.value).startswith(expected)


def test_a_template_that_is_not_jinja_is_not_blamed_on_a_row() -> None:
    with pytest.raises(UsageError, match=r"^the chat template is not valid Jinja: .*, in its line 2; "):
        ChatTemplate("{{ 1 }}\n{{ messages }", {}, ()).write(said(TURNS[:2]))
