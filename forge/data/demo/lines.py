"""A generated data set for line recognition: short lines like those of a receipt, rendered with Pillow alone.

It needs no download, and a model of a million parameters learns to read most of it in minutes on a CPU. Equal arguments
give equal texts on every machine and Python version, and equal pixels with the same Pillow.

**Content**: words, labels with a price, dates, times, quantities and codes, in upper, lower and title case. Half of the
words in train are random letters: if every word were known, a model would learn to guess before it learns to read.
**Appearance**: Pillow's own font in several sizes, weights and margins; stretched, sheared, blurred, faint, noisy.

**Validation measures reading, not memory.** The words with a star (about a quarter) occur only in validation, and every
validation line with words has one of them. A line without words (a date, a code) is assigned to a split by its hash. So
no line is in both splits, for any seeds and sizes.
"""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SPLITS = ("train", "validation")
HELD_OUT = "*"
VALIDATION_SHARE = 5  # one in five lines without words is for validation
LETTERS = "abcdefghijklmnopqrstuvwxyz"

LEXICON = """
    total cash change tax invoice table *receipt date time amount *balance paid due *discount item price *unit
    qty no tel fax *counter cashier served by thank you *again please come open daily *closed sunday monday *friday
    card visa *debit credit *voucher member points *saved round off *rounding gst incl excl *vat net gross sub
    bread milk *butter egg eggs rice *noodle flour sugar *salt tea *coffee juice water *soda beer wine *cider
    apple *banana pear plum *grape lemon *mango onion potato *carrot corn bean *tofu beef pork *lamb chicken fish
    *prawn soup salad *curry pizza *burger toast cake *donut candy mint *cocoa jam honey *syrup oil *vinegar soap
    *shampoo brush towel *tissue paper pen *pencil book stamp *glue tape nail *hammer screw paint *varnish bulb
    *battery cable lamp *socket shirt *jacket shoe sock *glove hat *scarf bag *purse box *crate pack *dozen large
    *medium small extra *spicy hot *iced fresh *frozen red *yellow green *purple black white street *avenue road
    *plaza lane park *garden hall shop *market store mart *bakery cafe *kitchen hotel *garage city *town north
    *south east *west main *upper lower *centre floor *level lot block *tower gate quiz *fjord jumbo *zigzag oxygen
    *wax
"""

T = TypeVar("T")


def demo_lines(split: str, rows: int, seed: int = 0, only: Sequence[int] | None = None) -> list[dict[str, bytes | str]]:
    """Return `rows` distinct lines with the keys image (PNG, grey) and text; fewer rows are a prefix of more rows.

    only: the indices of the lines to render and return.
    """
    draw = Draw(split, seed)
    looks: dict[str, Look] = {}
    while len(looks) < rows:
        text = line(draw)
        if text not in looks:
            looks[text] = Look(draw)
    lines = list(looks.items())
    chosen = lines if only is None else [lines[place] for place in only]
    return [{"image": render(text, look), "text": text} for text, look in chosen]


class Draw:
    """Random choices and the words of one split."""

    def __init__(self, split: str, seed: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        self.validates = split == "validation"
        digest = hashlib.sha256(f"demo_lines {split} {seed}".encode()).digest()
        # The only method of random that is guaranteed to give the same numbers in every version of Python.
        self._random = random.Random(int.from_bytes(digest, "big")).random
        self._held_out = [word[1:] for word in LEXICON.split() if word.startswith(HELD_OUT)]
        common = [word for word in LEXICON.split() if not word.startswith(HELD_OUT)]
        self._own_words = self._held_out if self.validates else common

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def number(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def one_of(self, values: Sequence[T]) -> T:
        return values[int(self._random() * len(values))]

    def word(self) -> str:
        """Return a word that never occurs in the other split."""
        if not self.validates and self.number(0, 1):
            return self.letters(self.number(2, 7))
        return self.one_of(self._own_words)

    def letters(self, count: int) -> str:
        """Return random letters that are not a held-out word."""
        while (word := "".join(self.one_of(LETTERS) for _ in range(count))) in self._held_out:
            pass
        return word


def line(draw: Draw) -> str:
    """Return one line of text that belongs to the split of `draw`."""
    form = draw.one_of((_word, _word, _word, _word, _priced, _counted, _price, _date, _code))
    case = draw.one_of((str.upper, str.upper, str.lower, str.title))
    while True:
        text = case(form(draw))
        if form in (_word, _priced, _counted) or _for_validation(text) == draw.validates:
            return text


class Look:
    """The random appearance of one line."""

    def __init__(self, draw: Draw) -> None:
        self.size = draw.number(18, 30)
        self.weight = draw.one_of((0, 0, 1))
        self.margins = [draw.number(2, 6) for _ in range(4)]
        self.ink, self.paper = draw.number(0, 110), draw.number(180, 255)
        self.shear, self.stretch = draw.between(-0.25, 0.25), draw.between(0.75, 1.3)
        self.blur = draw.between(0, 1.0)
        self.noise_seed, self.noise = draw.number(0, 2**31 - 1), draw.between(0, 14)


def render(text: str, look: Look) -> bytes:
    """Return a grey PNG of the text: dark on light, 24 to 48 pixels high."""
    font, margins, shear = _face(look.size), look.margins, look.shear
    left, top, right, bottom = font.getbbox(text, stroke_width=look.weight)
    size = int(right - left) + margins[0] + margins[1], int(bottom - top) + margins[2] + margins[3]
    image = Image.new("L", size, look.paper)
    at = margins[0] - left, margins[2] - top
    ImageDraw.Draw(image).text(at, text, fill=look.ink, font=font, stroke_width=look.weight)

    lean = abs(shear) * size[1]
    wide = int((size[0] + lean) * look.stretch), size[1]
    # Maps points of the new image to the old one: x_old = x_new / stretch + shear * y - what leans out on the left.
    back = (1 / look.stretch, shear, -max(shear, 0) * size[1], 0, 1, 0)
    image = image.transform(wide, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=look.paper)
    image = image.filter(ImageFilter.GaussianBlur(look.blur))
    # The only generator of numpy that is guaranteed to give the same numbers in every version.
    noise = np.random.RandomState(look.noise_seed).normal(0, look.noise, (wide[1], wide[0]))
    pixels = (np.asarray(image, dtype=np.float64) + noise).clip(0, 255).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def _face(size: int) -> ImageFont.FreeTypeFont:
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)  # Pillow >= 10.1 with FreeType ships one
    return face


def _for_validation(text: str) -> bool:
    return hashlib.sha256(text.upper().encode()).digest()[0] % VALIDATION_SHARE == 0


def _word(draw: Draw) -> str:
    return f"{draw.word()}{draw.one_of(('', '', '', ':', '!', '.', ','))}"


def _priced(draw: Draw) -> str:
    return f"{draw.word()}{draw.one_of((' ', ' ', ': ', ' $'))}{draw.number(0, 99)}.{draw.number(0, 99):02d}"


def _counted(draw: Draw) -> str:
    return f"{draw.number(1, 24)} {draw.one_of(('x ', '', '@ '))}{draw.word()}"


def _price(draw: Draw) -> str:
    sign = draw.one_of(("", "", "", "$", "rm", "-"))
    return f"{sign}{draw.number(0, draw.one_of((9, 99, 999)))}.{draw.number(0, 99):02d}{draw.one_of(('', '', '', '%'))}"


def _date(draw: Draw) -> str:
    if draw.number(0, 1):
        return f"{draw.number(0, 23)}:{draw.number(0, 59):02d}"
    mark = draw.one_of(("/", "-", "."))
    return f"{draw.number(1, 31):02d}{mark}{draw.number(1, 12):02d}{mark}{draw.number(0, 29):02d}"


def _code(draw: Draw) -> str:
    letters, digits = draw.letters(draw.number(1, 3)), str(draw.number(0, 9999))
    return draw.one_of(("", "-", "/", "#", "(", "&", "*", "_")).join(
        draw.one_of(((letters, digits), (digits, letters)))
    )
