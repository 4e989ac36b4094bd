"""Images of a data set, which stay encoded: checks them once, decodes them for a batch, and fits them to a size."""

import hashlib
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from forge.data.rows import row_numbers
from forge.errors import UsageError

logger = logging.getLogger(__name__)

# What Pillow raises for bytes that are not an image, or only a part of one.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, OverflowError, Image.DecompressionBombError)
# Pillow warns about images of more than 89 million pixels, which are fine. For twice that it raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
CHECKED_AT_ONCE = 256  # images that are in memory at a time


def open_image(value: Any) -> Image.Image:
    """Return the decoded image, upright, in mode L (grey) or RGB. Raises one of BROKEN.

    value: a path, the encoded bytes, or {bytes, path}.
    """
    with Image.open(BytesIO(read_bytes(value))) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode in ("1", "LA") else "RGB")


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

    Adds the columns row, its number in the user's data, and image_hash, the SHA-256 of the encoded image. Every image
    is decoded once. Raises UsageError for the first broken image, unless skip_broken.
    """
    numbers = row_numbers(rows)
    rows = keep_encoded(rows, column, where)
    hashes: list[str] = []
    kept: list[int] = []
    broken: list[str] = []
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as threads:
        for first in range(0, len(rows), CHECKED_AT_ONCE):
            values = rows[first : first + CHECKED_AT_ONCE][column]
            for row, (digest, fault) in enumerate(threads.map(_check, values), start=first):
                if fault:
                    broken.append(f"row {numbers[row]}, image {_name(values[row - first])} ({fault})")
                else:
                    kept.append(row)
                    hashes.append(digest)
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UsageError(
            f"{where}: {broken[0]} cannot be read{more}; replace it, or leave out such rows with task.skip_broken: true"
        )
    if not kept:
        raise UsageError(f"{where}: none of its {len(rows)} images can be read, the first is {broken[0]}")
    if broken:
        logger.warning("%s: %d of %d images cannot be read and are left out: %s", where, len(broken), len(rows), broken)
    rows = rows.select(kept) if broken else rows  # what follows copies a selection
    return rows.add_column("row", [numbers[row] for row in kept]).add_column("image_hash", hashes), broken


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


def _check(value: Any) -> tuple[str, str]:
    """Return the SHA-256 of the encoded image, and what is wrong with it, or else an empty text."""
    try:
        data = read_bytes(value)
        open_image(data)
    except BROKEN as error:
        return "", _reason(error)
    return hashlib.sha256(data).hexdigest(), ""


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
