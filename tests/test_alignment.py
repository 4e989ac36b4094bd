"""Two tokenizers meet where both have written the same text of a reply, and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import WORDS, config_on, conversation
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from vocabularies import LLAMA_TEMPLATE, sentencepiece

from forge.errors import UsageError
from forge.task.causal_lm.alignment import (
    Reply,
    _by_bytes,
    _by_offsets,
    align_replies,
    align_rows,
    replies,
    token_bytes,
)
from forge.task.causal_lm.chat import CHATML
from forge.task.causal_lm.documents import build_encoder
from forge.task.causal_lm.forms import choose_form
from forge.task.causal_lm.task import CausalLm

Tokens = list[list[str]]


@pytest.fixture
def aligned(tmp_path: Path, chat_model: Path) -> Callable[..., list[tuple[str, str]]]:
    """The tokens before which both have read the same, as (student's, teacher's): aligned(row, student, teacher)."""

    def align(
        row: dict[str, Any], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *settings: str
    ) -> list[tuple[str, str]]:
        config = config_on(tmp_path, chat_model, [row], [row], *settings).task
        form = choose_form(config, list(row), "here")
        columns = {name: [row[name]] for name in form.columns}
        one, other = (build_encoder(config, item, form).spell(columns, [0], "here")[0] for item in (student, teacher))
        pairs = align_rows(replies(one, student), replies(other, teacher))
        assert pairs == sorted(pairs)
        return [
            (str(student.convert_ids_to_tokens(one.ids[i])), str(teacher.convert_ids_to_tokens(other.ids[j])))
            for i, j in pairs
        ]

    return align


@pytest.fixture
def bpe(chat_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


def said(*texts: str) -> dict[str, Any]:
    return {
        "messages": [
            message
            for text in texts
            for message in ({"role": "user", "content": "say"}, {"role": "assistant", "content": text})
        ]
    }


@pytest.mark.parametrize(
    "row",
    [
        said("green 12"),
        said("red 日é😀 cat", " dog\n\n dog"),
        {"prompt": "say red", "completion": " red\n"},
        {"text": "日 a"},
    ],
)
def test_one_tokenizer_is_aligned_with_itself_at_every_label(row: dict[str, Any], aligned: Any, bpe: Any) -> None:
    pairs = aligned(row, bpe, bpe)
    assert [mine for mine, _ in pairs] == [its for _, its in pairs]
    config_form = "messages" if "messages" in row else "text"
    count = {"messages": 0, "text": 0}[config_form]
    for reply in [m["content"] for m in row.get("messages", [])[1::2]] or [row.get("completion") or row["text"]]:
        count += len(bpe(reply, add_special_tokens=False)["input_ids"]) + 1  # and the end token
    assert len(pairs) == count
    assert sum(mine == "<|im_end|>" for mine, _ in pairs) == max(1, len(row.get("messages", [])) // 2)


def test_one_splits_words_that_the_other_does_not(aligned: Any, bpe: Any) -> None:
    words = sentencepiece([*WORDS, "say"])
    assert [bpe.decode(i) for i in bpe("green 12")["input_ids"]] == ["gree", "n", " ", "1", "2"]
    assert words.convert_ids_to_tokens(words(" green 12")["input_ids"])[1:] == ["▁green", "▁", "<0x31>", "<0x32>"]
    assert aligned(said("green 12"), bpe, words) == [
        ("gree", "▁green"),  # n is inside a word of the teacher's
        ("Ġ", "▁"),
        ("1", "<0x31>"),
        ("2", "<0x32>"),
        ("<|im_end|>", "</s>"),
    ]
    assert aligned(said("green 12"), words, bpe) == [(its, mine) for mine, its in aligned(said("green 12"), bpe, words)]


def test_a_character_of_several_bytes_may_be_split_by_both_or_by_one(aligned: Any, bpe: Any) -> None:
    assert aligned(said("日"), bpe, sentencepiece(WORDS)) == [
        ("æ", "<0xE6>"),  # after the space that only the teacher's template writes
        ("Ĺ", "<0x97>"),
        ("¥", "<0xA5>"),
        ("<|im_end|>", "</s>"),
    ]
    assert aligned(said("cat 日 cat"), bpe, sentencepiece([*WORDS, "日"])) == [
        ("cat", "▁cat"),
        ("Ġ", "▁日"),
        ("Ġcat", "▁cat"),
        ("<|im_end|>", "</s>"),
    ]


def test_a_tokenizer_that_changes_the_text_is_followed_by_its_characters(aligned: Any, bpe: Any) -> None:
    """NFKC writes the ligature of one character as two, and lower case is another text: token strings say nothing."""
    vocabulary = {"<unk>": 0, "<end>": 1, "say": 2, "red": 3, "fish": 4, ":": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", chat_template=LLAMA_TEMPLATE
    )
    row = said("Red ﬁsh  Red")
    pairs = aligned(row, bpe, words)
    assert [its for _, its in pairs] == ["red", "fish", "red", "<end>"]
    # the second gap has two spaces: the student cuts between them, where the teacher's token before has ended
    assert [mine for mine, _ in pairs][1:] == ["Ġ", "Ġ", "<|im_end|>"]
    # an unknown word is text, and not the end of a reply
    assert [its for _, its in aligned(said("Red 日"), bpe, words)] == ["red", "<unk>", "<end>"]


def reply(text: str, *lengths: int, ends: int = 1) -> Reply:
    """Tokens 10, 11, … before which so many bytes are read; the last `ends` of them end the reply."""
    full = len(text.encode())
    read = [*((length, 0) for length in lengths), (full, 0), *((full, n) for n in range(1, ends))]
    return Reply(text.encode(), list(range(10, 10 + len(read))), list(read))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (reply("abcd", 0, 2), reply("abcd", 0, 1, 2, 3), [(10, 10), (11, 12), (12, 14)]),
        (reply("ab", 0), reply("ab", 0, ends=3), [(10, 10), (11, 11)]),  # further ends have no like
        (reply("ab", 0, ends=2), reply("ab", 0, ends=2), [(10, 10), (11, 11), (12, 12)]),
        (reply("abXd", 0, 1, 2, 3), reply("abYd", 0, 1, 2, 3), [(10, 10), (11, 11)]),  # after 2 bytes they differ
        (reply("ab", 0, 1), reply("ab c", 0, 1, 2), [(10, 10), (11, 11)]),  # one ends where the other continues
        (reply(" ab", 0, 2), reply("ab", 0, 1), [(10, 10), (11, 11), (12, 12)]),
        (reply(" ab", 0, 1, 2), reply("ab", 0, 1), [(11, 10), (12, 11), (13, 12)]),  # a token of white space alone
        (reply(" ab", 0, 1), reply(" ab", 0, 1), [(10, 10), (11, 11), (12, 12)]),
        (reply("\n\nab", 0), reply(" ab", 0), [(10, 10), (11, 11)]),
    ],
)
def test_replies_meet_where_the_same_bytes_are_read(
    student: Reply, teacher: Reply, expected: list[tuple[int, int]]
) -> None:
    assert align_replies(student, teacher) == expected


def test_unknown_places_and_rows_with_other_replies_are_left_out() -> None:
    unknown = Reply(b"ab", [10, 11, 12], [(0, 0), None, (2, 0)])
    assert align_replies(unknown, reply("ab", 0, 1)) == [(10, 10), (12, 12)]
    assert align_rows([reply("a", 0)], [reply("a", 0), reply("b", 0)]) == []


def test_a_token_that_begins_before_the_reply_has_no_place_unless_it_is_white_space() -> None:
    assert _by_bytes(b"cat", [b"c", b"at"]) == [0, 1, 3]
    assert _by_bytes(b"cat", [b" c", b"at"]) == [0, 1, 3]
    assert _by_bytes(b"cat", [b":c", b"at"]) == [None, 1, 3]
    assert _by_bytes(b"cat", [b"c", b"at\n"]) == [0, 1, 4]  # the last one may end after the text
    assert _by_bytes(b"cat", [b"c", b"ot"]) is None
    assert _by_bytes(b"", []) == [0]


def test_a_character_that_tokens_share_is_read_when_all_of_them_are() -> None:
    assert _by_offsets("a日x", (1, 3), [(1, 2), (1, 2), (2, 3)]) == [0, None, 3, 4]
    assert _by_offsets("a b c", (2, 5), [(2, 3), (4, 5)]) == [0, 1, 3]
    assert _by_offsets("a b ", (2, 4), [(1, 3)]) == [0, 2]  # white space that no token stands for
    assert _by_offsets(":ab", (1, 3), [(0, 2), (2, 3)]) == [None, 1, 2]


def test_tokens_stand_for_their_bytes(bpe: Any) -> None:
    words = sentencepiece(WORDS)
    for tokenizer in (bpe, words):
        for text in ("red cat", "日é😀", "a\tb\n"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert b"".join(token_bytes(tokenizer, i) for i in ids).strip() == text.encode().strip()
    assert token_bytes(bpe, bpe.eos_token_id) == b"<|im_end|>"


def test_batches_point_into_the_logits_of_both(load_lm: Callable[..., CausalLm]) -> None:
    """What both have read of a reply, decoded by each tokenizer itself, is the same text before every aligned token."""
    rows = [conversation(i, turns=1 + i % 3) for i in range(7)]
    task = load_lm(rows, rows).for_teacher(sentencepiece([*WORDS, "say"]))
    assert task.teacher_tokenizer is not None
    assert not task.same_tokens
    chosen = [task.train[i] for i in (5, 0, 3)]
    batch = task.collate(chosen)
    width, wide = batch["input_ids"].shape[1], batch["teacher_input_ids"].shape[1]
    assert width != wide
    assert batch["teacher_attention_mask"].sum(1).tolist() == [len(row["teacher_input_ids"]) for row in chosen]
    compared = 0
    for mine, its in zip(batch["aligned"].tolist(), batch["teacher_aligned"].tolist(), strict=True):
        b = mine // width
        assert b == its // wide
        ours = task.processing.decode(batch["input_ids"][b, : mine % width + 1])
        theirs = task.teacher_tokenizer.decode(batch["teacher_input_ids"][b, : its % wide + 1])
        assert ours.split("<|im_start|>assistant\n")[-1] == theirs.split("[A]")[-1].lstrip()
        assert batch["labels"].flatten()[mine] != -100
        compared += 1
    assert compared == sum(len(row["aligned"]) for row in chosen) == 20
    facts = task.facts()["alignment"]
    assert facts == {
        "labels": sum(task.train["labels"]),
        "aligned": sum(map(len, task.train["aligned"])),
        "teacher_rows_cut": 0,
        "teacher_rows_unprinted": 0,
    }
    assert "aligned" not in task.validation["validation"].column_names
    assert "aligned" not in task.collate([task.validation["validation"][0]])


def test_a_row_that_the_teacher_cuts_is_aligned_up_to_there(load_lm: Callable[..., CausalLm]) -> None:
    """In bytes the teacher's rows are three times as long."""
    rows = [said("tree " * i + "cat") for i in (1, 6)]
    task = load_lm(rows, rows, "task.max_length=32").for_teacher(sentencepiece(["x"]))
    short, long = (task.train[i] for i in range(2))
    assert len(short["teacher_input_ids"]) < 32
    assert len(long["teacher_input_ids"]) == 32
    assert max(long["teacher_aligned"]) <= 31
    assert 0 < len(long["aligned"]) < long["labels"]
    assert len(short["aligned"]) == short["labels"]
    assert task.facts()["alignment"]["teacher_rows_cut"] == 1
    assert long["input_ids"][long["aligned"][-1] + 1] != task.processing.eos_token_id


def test_a_row_of_which_the_teachers_template_drops_a_part_is_refused_or_not_aligned(
    load_lm: Callable[..., CausalLm], tmp_path: Path
) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML.replace("{{ message['content']", "{{ message.reasoning_content }}{{ message['content']"))
    thought = said("red")
    thought["messages"][1]["reasoning_content"] = "blue"

    def aligned(unprinted: str) -> CausalLm:
        rows = [conversation(0), thought]
        settings = (f"task.chat_template={file}", f"task.unprinted={unprinted}")
        return load_lm(rows, rows[:1], *settings).for_teacher(sentencepiece([*WORDS, "say"]))

    with pytest.raises(
        UsageError, match=r"train: row 1 has reasoning_content of message 1 \(assistant\), which the tea"
    ):
        aligned("refuse")
    left = aligned("leave_out")
    assert [len(row["aligned"]) > 0 for row in left.train] == [True, False]
    assert left.facts()["alignment"]["teacher_rows_unprinted"] == 1
    assert left.train[1]["labels"] > 0  # it is learned, without the teacher
    assert aligned("accept").facts()["alignment"]["teacher_rows_unprinted"] == 1


def test_rows_that_were_left_out_take_nobody_elses_alignment(load_lm: Callable[..., CausalLm]) -> None:
    lost = {"messages": [{"role": "user", "content": "dog " * 60}, {"role": "assistant", "content": "red"}]}
    rows = [lost, conversation(3), lost, conversation(8)]
    task = load_lm(rows, [conversation(1)]).for_teacher(sentencepiece([*WORDS, "say"]))
    assert task.train["row"][:] == [1, 3]
    for row, word in zip(task.train, ("one 3", "bird 8"), strict=True):
        assert word in task.teacher_tokenizer.decode(row["teacher_input_ids"])
        assert len(row["aligned"]) >= 4


def test_places_lie_within_both_rows(load_lm: Callable[..., CausalLm]) -> None:
    """Of a text the first token is learned, and nothing predicts it; here the student's rows are cut."""
    rows = [{"text": "red cat 12 " * i} for i in (1, 9)]
    task = load_lm(rows, rows, "task.max_length=32").for_teacher(sentencepiece(["red", "cat", "12"]))
    for row in task.train:
        assert min(row["aligned"]) >= 0
        assert min(row["teacher_aligned"]) >= 0
        assert max(row["aligned"]) <= row["length"] - 2
        assert len(row["teacher_input_ids"]) < 32
    assert task.train["length"][:][1] == 32


def test_a_teacher_predicts_the_first_token_that_it_does_not_read(
    load_lm: Callable[..., CausalLm], chat_model: Path
) -> None:
    """One vocabulary, and a template that is longer: each label has its place until the teacher's row is cut, and one
    more. A student's cut token is no label, so there the row ends one earlier."""
    teacher = AutoTokenizer.from_pretrained(chat_model)
    prefix = "say say say"
    more = len(teacher(prefix)["input_ids"])
    teacher.chat_template = prefix + teacher.chat_template
    rows = [said("red " * 14 + "cat")]
    task = load_lm(rows, rows, "task.max_length=32").for_teacher(teacher)
    (row,) = task.train
    assert 32 - more < len(row["input_ids"]) <= 32 == len(row["teacher_input_ids"])
    assert row["teacher_aligned"][-3:] == [29, 30, 31]
    assert row["aligned"][-3:] == [29 - more, 30 - more, 31 - more]
    text = [{"text": "red cat tree " * 10}]
    (cut,) = load_lm(text, text, "task.max_length=32").for_teacher(AutoTokenizer.from_pretrained(chat_model)).train
    assert cut["aligned"] == cut["teacher_aligned"] == list(range(31))


def test_the_teachers_rows_are_in_its_own_template(load_lm: Callable[..., CausalLm], tmp_path: Path) -> None:
    ours = tmp_path / "ours.jinja"
    ours.write_text(LLAMA_TEMPLATE.replace("[Q]", "<us>"))
    rows = [conversation(3)]
    task = load_lm(rows, rows, f"task.chat_template={ours}").for_teacher(sentencepiece(WORDS))
    assert "<us>say one 3" in task.processing.decode(task.train[0]["input_ids"])
    assert "[Q]say one 3[A] one 3" in task.teacher_tokenizer.decode(task.train[0]["teacher_input_ids"])
