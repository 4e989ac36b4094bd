"""The rendered lines: the same everywhere, none in both splits, and legible in every line that is drawn."""

import hashlib
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import forge.data.demo.lines as module
import forge.data.rows as rows_module
from forge.config.task_schema import DatasetConfig
from forge.data.demo.lines import HELD_OUT, LEXICON, Draw, Look, demo_lines, render

HELD_OUT_WORDS = {word[1:] for word in LEXICON.split() if word.startswith(HELD_OUT)}


def texts(split: str, rows: int, seed: int = 0) -> list[str]:
    return [str(row["text"]) for row in demo_lines(split, rows, seed)]


def image(row: dict[str, bytes | str]) -> Image.Image:
    assert isinstance(row["image"], bytes)
    return Image.open(BytesIO(row["image"]))


def test_the_first_texts_are_the_same_on_every_machine() -> None:
    digests = {
        split: hashlib.sha256("\n".join(texts(split, 300)).encode()).hexdigest() for split in ("train", "validation")
    }
    assert digests == {
        "train": "eb1234fdd731d9a38abf5424744fb1de7e995481d10b8cc4df64e64bd66ae2a2",
        "validation": "02fd96bb3370632ecb9214a2dc230cc4dfbb04880532358cc76591baaac9ad71",
    }


def test_fewer_rows_are_the_beginning_of_more_rows_to_the_pixel() -> None:
    assert demo_lines("train", 20) == demo_lines("train", 60)[:20]
    assert texts("train", 20, seed=1) != texts("train", 20)
    assert demo_lines("train", 0) == []


def test_chosen_rows_are_the_same_as_among_all_and_the_others_are_not_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = demo_lines("validation", 30)
    drawn: list[str] = []
    monkeypatch.setattr(module, "render", lambda text, look: drawn.append(text) or render(text, look))
    assert demo_lines("validation", 30, only=[0, 7, 29]) == [rows[0], rows[7], rows[29]]
    assert drawn == [rows[place]["text"] for place in (0, 7, 29)]


def test_a_small_demo_renders_few_lines_and_spreads_them_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows_module.DEMOS, "lines", (demo_lines, {"train": 40, "validation": 10}))
    train, validation = rows_module.load_rows(DatasetConfig(demo="lines", max_rows=3))
    everything = demo_lines("train", 40)
    assert train[:] == {name: [everything[place][name] for place in (0, 19, 39)] for name in ("image", "text")}
    assert len(validation["validation"]) == 3
    drawn: list[str] = []
    monkeypatch.setattr(module, "render", lambda text, look: drawn.append(text) or b"")
    rows_module.load_rows(DatasetConfig(demo="lines", max_rows=3))
    assert len(drawn) == 6


def test_no_line_is_in_both_splits_for_any_seeds() -> None:
    first, second = (texts("train", 800, seed) for seed in (0, 1))
    validation = {text for seed in (0, 1) for text in texts("validation", 300, seed)}
    assert len(first) == len(set(first)) == 800
    assert not {*first, *second} & validation


def test_the_words_of_validation_never_occur_in_train() -> None:
    in_train = {word for text in texts("train", 1000) for word in re.findall("[a-z]+", text.lower())}
    assert not in_train & HELD_OUT_WORDS
    words = [text for text in texts("validation", 500) if re.fullmatch("[A-Za-z]{4,}[:!.,]?", text)]
    assert len(words) > 100
    assert {re.sub("[^a-z]", "", word.lower()) for word in words} <= HELD_OUT_WORDS


def test_lines_are_printable_ascii_in_three_cases_and_of_several_lengths() -> None:
    lines = texts("train", 1000)
    assert all(character.isascii() and character.isprintable() for text in lines for character in text)
    assert all(text == text.strip() and 2 <= len(text) <= 16 for text in lines)
    letters = [text for text in lines if sum(map(str.isalpha, text)) > 2]
    for cased in (str.isupper, str.islower, str.istitle):
        assert sum(map(cased, letters)) > len(letters) / 6
    assert {"$", "%", "@", "/", "-", "#", ":", "."} <= set("".join(lines))


def test_an_image_shows_dark_ink_on_light_paper_as_wide_as_its_text() -> None:
    rows = demo_lines("train", 100)
    for row in rows:
        shown = image(row)
        assert shown.mode == "L"
        assert 12 <= shown.height <= 48
        pixels = np.asarray(shown)
        ink, paper = np.percentile(pixels, [1, 90])
        assert paper - ink > 40
        for edge in (pixels[:, 0], pixels[:, -1]):  # no letter is cut off
            assert edge.mean() - ink > 0.7 * (paper - ink)
    widths = [image(row).width / image(row).height for row in rows]
    assert np.corrcoef(widths, [len(str(row["text"])) for row in rows])[0, 1] > 0.6


def test_the_same_text_never_looks_the_same() -> None:
    draw = Draw("train", 0)
    assert len({render("TOTAL 1.00", Look(draw)) for _ in range(20)}) == 20


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test' is not one of train, validation"):
        demo_lines("test", 1)
