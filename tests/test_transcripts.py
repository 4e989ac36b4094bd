"""Transcripts: normalisation, the character tokenizer, and edits as they are counted by hand."""

import logging
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forge.config.task_schema import NormalizationConfig
from forge.errors import UsageError
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.transcripts import (
    EDIT_COUNTS,
    check_lossless,
    describe_normalization,
    edit_counts,
    normalize,
    warn_of_moved_spaces,
)


@pytest.mark.parametrize(
    ("how", "text", "normalized"),
    [
        ({}, "  Cafe\u0301 \t No.\u00a05 ", "Caf\u00e9 No. 5"),
        ({"unicode": "keep"}, "Cafe\u0301", "Cafe\u0301"),
        ({"unicode": "nfkc"}, "\ufb01n \uff15\u00bd", "fin 51\u20442"),
        ({"unicode": "nfc"}, "\ufb01n", "\ufb01n"),
        ({"case": "lower"}, "Total RM", "total rm"),
        ({"case": "upper"}, "Total rm", "TOTAL RM"),
        ({"whitespace": False}, " a  b", " a  b"),
    ],
)
def test_text_is_brought_to_one_form(how: dict[str, str], text: str, normalized: str) -> None:
    config = NormalizationConfig.model_validate(how)
    assert normalize(text, config) == normalized
    assert normalize(normalized, config) == normalized


@pytest.mark.parametrize(("case", "unicode"), [("upper", "nfkc"), ("lower", "nfc")])
def test_every_character_is_brought_to_one_form_at_once(case: str, unicode: str) -> None:
    how = NormalizationConfig.model_validate({"case": case, "unicode": unicode})
    once = [normalize(chr(code), how) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    assert [text for text in once if normalize(text, how) != text] == []


def test_the_metrics_say_what_was_done() -> None:
    how = NormalizationConfig(case="lower", unicode="nfkc", whitespace=False)
    assert describe_normalization(how).startswith("lower case, Unicode NFKC, whitespace kept; training transcripts")


@pytest.mark.parametrize(
    ("reference", "prediction", "character_edits", "word_edits"),
    [
        ("kitten", "sitting", 3, 1),
        ("a b c", "a c", 2, 1),
        ("total 9.50", "total 9.50", 0, 0),
        ("abc", "", 3, 1),
        ("", "abc d", 5, 2),
        ("", "", 0, 0),
        (" a", "a", 1, 0),
        ("a\nb", "a b", 1, 0),
        ("a  b", "a\tb c", 3, 1),
    ],
)
def test_edits_are_counted_for_characters_and_words(
    reference: str, prediction: str, character_edits: int, word_edits: int
) -> None:
    counts = dict(zip(EDIT_COUNTS, edit_counts(reference, prediction).tolist(), strict=True))
    assert counts == {
        "character_edits": character_edits,
        "characters": len(reference),
        "word_edits": word_edits,
        "words": len(reference.split()),
        "exact": int(reference == prediction),
        "rows": 1,
        "empty": int(not prediction),
    }


def test_characters_are_tokens_and_come_back() -> None:
    tokenizer = character_tokenizer(["na\u00efve \u20ac", "\u65e5\u672c"])
    text = "  <A>~ {b}\n na\u00efve \u65e5\u672c "
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) + 1
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert [ids[i] for i in range(len(text)) if text[i] == "\n"] == [tokenizer.unk_token_id]
    printable = text.replace("\n", "")
    assert tokenizer.decode(tokenizer(printable).input_ids, skip_special_tokens=True) == printable
    assert len(tokenizer) == 4 + 95 + 4
    assert character_tokenizer([]).get_vocab().items() <= tokenizer.get_vocab().items(), "ASCII has the same ids"
    assert tokenizer("\u00df").input_ids[0] == tokenizer.unk_token_id


def check(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[str]:
    tokens = tokenizer(list(texts), add_special_tokens=False).input_ids
    decoded = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens]
    ended = [[*ids, tokenizer.eos_token_id] for ids in tokens]
    check_lossless(texts, decoded, ended, tokenizer, range(7, 7 + len(texts)), "data")
    return decoded


def test_a_piece_that_the_tokenizer_does_not_know_is_lost_though_its_name_is_shown() -> None:
    tokenizer = character_tokenizer([])
    tokenizer.add_tokens("<unk>")  # no special one: decoding shows it
    ids = tokenizer("<unk>", add_special_tokens=False).input_ids
    with pytest.raises(UsageError, match="data: row 3 has a piece in its transcript '<unk>'"):
        check_lossless(["<unk>"], ["<unk>"], [ids], tokenizer, [3], "data")


def test_an_unknown_token_that_also_ends_texts_is_not_a_loss() -> None:
    """As GPT-2's, whose vocabulary of bytes knows everything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "<end>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert check(tokenizer, "total 9.50 \u20ac") == ["total 9.50 \u20ac"]
    with pytest.raises(UsageError, match="row 8 has a piece in its transcript 'a <end> b'"):
        check(tokenizer, "total", "a <end> b")


def test_spaces_that_a_tokenizer_moves_are_reported_with_what_they_cost(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "12", "50", ".", "tea", "##s"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")
    texts = ["teas", "12.50", "tea 50.12"]
    decoded = check(tokenizer, *texts)
    assert decoded == ["teas", "12 . 50", "tea 50 . 12"]
    with caplog.at_level(logging.WARNING):
        warn_of_moved_spaces(texts, decoded, NormalizationConfig(), [4, 5, 9], "data")
    assert "data: " in caplog.text
    assert "2 of 3 transcripts with other white space, such as '12 . 50'" in caplog.text
    assert "for '12.50' in row 5; without any other error the cer is 0.2222" in caplog.text  # 4 of 18 characters
    caplog.clear()
    warn_of_moved_spaces(texts, [" teas ", "12.50", "tea  50.12"], NormalizationConfig(), [4, 5, 9], "data")
    assert not caplog.text  # what is collapsed before texts are compared
