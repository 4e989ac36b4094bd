"""Transcripts: normalisation, the character tokenizer, and edits as they are counted by hand."""

import pytest

from forge.config.schema import NormalizationConfig
from forge.task.characters import character_tokenizer
from forge.task.transcripts import EDIT_COUNTS, describe_normalization, edit_counts, normalize


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
