"""Images of a data set, which stay encoded: checks them once, decodes them for a batch, and fits them to a size."""

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from forge.data.rows import row_numbers
from forge.errors import UsageError

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width and height in pixels

# What Pillow raises for bytes that are not an image, or only a part of one.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, OverflowError, Image.DecompressionBombError)
# Pillow warns about images of more than 89 million pixels, which are fine. For twice that it raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
WHITES = [255.0, 4095.0, 65535.0]  # the largest values of 8, 12 and 16 bits
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value; Pillow ignores it above 8 bits
CHECKED_AT_ONCE = 256  # images that are in memory at a time


def open_image(value: Any) -> Image.Image:
    """Return the decoded image, upright, in mode L (grey) or RGB. Raises one of BROKEN.

    value: a path, the encoded bytes, or {bytes, path}.
    """
    return _decoded(read_bytes(value))[0]


def _decoded(data: bytes) -> tuple[Image.Image, list[str]]:
    """Return the image, and in words what of the file cannot be shown as it is."""
    with Image.open(BytesIO(data)) as file:
        tags = getattr(file, "tag_v2", {})
        pages = file.format != "MPO" and getattr(file, "n_frames", 1) > 1  # MPO: a photograph with its preview
        notes = ["only the first of several pages or frames is read"] if pages else []
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I") or image.mode == "F":
        grey, how = _in_8_bits(image, bits=tags.get(BITS_PER_SAMPLE, (0,))[0])
        return (ImageOps.invert(grey) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey), [*notes, how]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB"), notes
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB"), notes


def _in_8_bits(image: Image.Image, bits: int) -> tuple[Image.Image, str]:
    """Return an image of more than 8 bits of grey in 8, and how; Pillow's own conversion clips it at 255.

    White is the end of the smallest range of WHITES that holds all values: data of 12 bits often come in 16. Negative
    values, and those beyond all ranges, are scaled from the image's own minimum to its own maximum.
    """
    values = np.asarray(image, dtype=np.float64)
    black, white = float(values.min()), float(values.max())
    if not np.isfinite([black, white]).all():
        raise ValueError("it has values that are not finite")
    whites = [4095.0] if bits == 12 else [1.0, *WHITES] if image.mode == "F" else WHITES
    fitting = [end for end in whites if white <= end] if black >= 0 else []
    how = (
        f"grey values from 0 to {fitting[0]:g} are scaled to 8 bits" if fitting else "grey values are scaled to 8 bits"
    )
    black, white = (0.0, fitting[0]) if fitting else (black, white)
    scaled = (values - black) / ((white - black) or 1.0) * 255
    return Image.fromarray(scaled.round().astype(np.uint8)), how


def read_bytes(value: Any) -> bytes:
    """Return the encoded image."""
    if isinstance(value, dict):  # the form in which datasets stores an image
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("there is none")
    return value if isinstance(value, bytes) else Path(value).read_bytes()


def fit(image: Image.Image, height: int, width: int, *, fill: int, stretch: bool = False) -> Image.Image:
    """Return the image scaled to fit, with its proportions kept, and padded at the right and bottom in grey `fill`.

    stretch: scale it to the whole size instead, changing its proportions.
    """
    if stretch:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    scale = min(height / image.height, width / image.width)
    size = max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale)))
    canvas = Image.new(image.mode, (width, height), fill if image.mode == "L" else (fill,) * 3)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS))
    return canvas


def fit_in_code(height: int, width: int, *, mode: str, fill: int, stretch: bool) -> list[str]:
    """Return what open_image and `fit` do as lines of Python for the model card, which set `image`."""
    opened = f'image = ImageOps.exif_transpose(Image.open("PATH OF AN IMAGE")).convert("{mode}")'
    if stretch:
        return [opened, f"image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)"]
    return [
        opened,
        f"scale = min({height} / image.height, {width} / image.width)  # its proportions are kept",
        f"size = max(1, min({width}, round(image.width * scale))), max(1, min({height}, round(image.height * scale)))",
        f'canvas = Image.new("{mode}", ({width}, {height}), {fill if mode == "L" else (fill,) * 3})',
        "canvas.paste(image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS))",
        "image = canvas",
    ]


def png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check_images(rows: Dataset, column: str, where: str, skip_broken: bool) -> tuple[Dataset, list[str]]:
    """Return the rows whose image can be decoded, and what is wrong with each of the others.

    Adds the columns row, its number in the user's data, image_hash, the SHA-256 of the encoded image, and image_size,
    its width and height. Every image is decoded once. Raises UsageError for the first broken image, unless skip_broken.
    """
    numbers = row_numbers(rows)
    rows = keep_encoded(rows, column, where)
    hashes: list[str] = []
    sizes: list[list[int]] = []
    kept: list[int] = []
    broken: list[str] = []
    notes: Counter[str] = Counter()
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as threads:
        for first in range(0, len(rows), CHECKED_AT_ONCE):
            values = rows[first : first + CHECKED_AT_ONCE][column]
            for row, found in enumerate(threads.map(_check, values), start=first):
                if found.fault:
                    broken.append(f"row {numbers[row]}, image {_name(values[row - first])} ({found.fault})")
                else:
                    kept.append(row)
                    hashes.append(found.digest)
                    sizes.append(list(found.size))
                    notes.update(found.notes)
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UsageError(
            f"{where}: {broken[0]} cannot be read{more}; replace it, or leave out such rows with task.skip_broken: true"
        )
    if not kept:
        raise UsageError(f"{where}: none of its {len(rows)} images can be read, the first is {broken[0]}")
    if broken:
        logger.warning("%s: %d of %d images cannot be read and are left out: %s", where, len(broken), len(rows), broken)
    for note, count in notes.items():
        logger.warning("%s: of %d images, %s", where, count, note)
    rows = rows.select(kept) if broken else rows  # what follows copies a selection
    rows = rows.add_column("row", [numbers[row] for row in kept]).add_column("image_hash", hashes)
    return rows.add_column("image_size", sizes), broken


def refused_sizes(refusal: Callable[[Size], str | None], sizes: Iterable[Size]) -> dict[Size, str]:
    """Return the sizes (width, height) that a model's processor does not take, each with its reason.

    refusal: the reason why a size is not taken, or None. Only extremes are tried: the widest, the tallest, the smallest
    and the largest, each kind until one is taken.
    """
    refused: dict[Size, str] = {}
    taken: set[Size] = set()
    distinct = set(sizes)
    orders: list[Callable[[Size], float]] = [lambda s: s[1] / s[0], lambda s: s[0] / s[1], min, lambda s: -s[0] * s[1]]
    for order in orders:
        for size in sorted(distinct - set(refused), key=order):
            reason = None if size in taken else refusal(size)
            if reason is None:
                taken.add(size)
                break
            refused[size] = reason
    return refused


def keep_encoded(rows: Dataset, column: str, where: str) -> Dataset:
    """Return the rows with images as bytes and paths. Raises UsageError for a column of anything else."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if getattr(feature, "dtype", "") in ("string", "large_string", "binary", "large_binary"):
        return rows
    if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        return rows
    raise UsageError(
        f"{where}: the column {column} (task.columns.image) holds {feature}, not images: neither encoded images, "
        "as datasets.Image stores them, nor paths of files"
    )


class _Checked(NamedTuple):
    """What an image is, or else what is wrong with it."""

    digest: str = ""  # the SHA-256 of the encoded image
    size: tuple[int, int] = (0, 0)  # width and height, upright
    notes: Sequence[str] = ()
    fault: str = ""


def _check(value: Any) -> _Checked:
    try:
        data = read_bytes(value)
        image, notes = _decoded(data)
    except BROKEN as error:
        return _Checked(fault=_reason(error))
    return _Checked(hashlib.sha256(data).hexdigest(), image.size, notes)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if "cannot identify image" in str(error):
        return "it is not an image that Pillow knows"
    return " ".join(str(error).split())[:120] or type(error).__name__


def _name(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path") or value.get("bytes")
    if value is None:
        return "null"
    return value if isinstance(value, str) else "in the data itself"
