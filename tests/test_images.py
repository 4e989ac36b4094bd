"""Images of any kind are opened the same way, keep their proportions, and are checked without being kept decoded."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from forge.errors import UsageError
from forge.task.ocr.images import check_images, fit, open_image, png, refused_sizes


def square(mode: str = "L") -> Image.Image:
    """Black, with a white upper left quarter."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, :4] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("height", "width", "box"), [(20, 100, (20, 40)), (40, 40, (20, 40)), (5, 100, (5, 10))])
def test_padding_leaves_the_proportions(height: int, width: int, box: tuple[int, int]) -> None:
    shown = np.asarray(fit(Image.new("L", (20, 10), 0), height, width, fill=200))
    assert shown.shape == (height, width)
    assert (shown[: box[0], : box[1]] == 0).all()
    assert (shown[box[0] :] == 200).all()
    assert (shown[:, box[1] :] == 200).all()


def test_colours_stay_and_a_stretched_image_fills_everything() -> None:
    red = Image.new("RGB", (20, 10), (255, 0, 0))
    assert fit(red, 10, 40, fill=7).getpixel((39, 0)) == (7, 7, 7)
    assert fit(red, 10, 40, fill=7).getpixel((19, 9)) == (255, 0, 0)
    assert fit(red, 10, 40, fill=7, stretch=True).getpixel((39, 0)) == (255, 0, 0)


def test_a_line_of_a_thousand_to_one_still_has_a_row_of_pixels() -> None:
    assert fit(Image.new("L", (3000, 3), 0), 32, 128, fill=255).size == (128, 32)


def test_every_kind_of_image_is_opened_as_grey_or_colour(tmp_path: Path) -> None:
    for mode in ("L", "1", "LA"):
        assert open_image(png(square(mode))).convert("L").tobytes() == square().tobytes()
    for mode in ("RGB", "P", "RGBA"):
        shown = open_image(png(square(mode)))
        assert shown.mode == "RGB"
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((7, 7)) == (0, 0, 0)
    assert open_image(png(square())).mode == "L"
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16))
    assert np.asarray(open_image(png(deep))).tolist() == [[0, 100], [200, 255]]
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert open_image(png(clear)).getpixel((0, 0)) == (255, 255, 255), "what is transparent shows white paper"


def test_a_photograph_on_its_side_is_turned_upright() -> None:
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to the right
    Image.new("L", (30, 10)).save(file, "JPEG", exif=exif)
    assert open_image(file.getvalue()).size == (10, 30)


def test_paths_bytes_and_how_datasets_keeps_images_are_the_same_image(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(square()))
    for value in (str(file), file.read_bytes(), {"path": str(file), "bytes": None}, {"bytes": file.read_bytes()}):
        assert open_image(value).tobytes() == square().tobytes()
    hashes = []
    for column in (
        [str(file)],
        [file.read_bytes()],
        [{"bytes": file.read_bytes(), "path": None}],
    ):
        checked, broken = check_images(Dataset.from_dict({"image": column}), "image", "data", skip_broken=False)
        hashes += checked["image_hash"][:]
        assert not broken
    encoded = Dataset.from_dict({"image": [str(file)]}).cast_column("image", datasets.Image())
    checked, _ = check_images(encoded, "image", "data", skip_broken=False)
    assert len({*hashes, *checked["image_hash"][:]}) == 1
    assert checked[0]["image"] == {"bytes": None, "path": str(file)}, "it stays encoded"


def test_rows_keep_their_place_in_the_data_where_others_are_left_out() -> None:
    images = [png(square()), b"", None, b"GIF89a", png(square())[:60], png(square("RGB"))]
    checked, broken = check_images(Dataset.from_dict({"image": images}), "image", "data", skip_broken=True)
    assert checked["row"][:] == [0, 5]
    assert [fault.split(",")[0] for fault in broken] == ["row 1", "row 2", "row 3", "row 4"]
    assert broken[1] == "row 2, image null (there is none)"


def test_a_large_image_is_opened_without_a_warning_and_a_bomb_is_broken() -> None:
    code = (
        "from PIL import Image; from forge.task.ocr.images import BROKEN, open_image, png\n"
        "data = png(Image.new('L', (40, 40))); Image.MAX_IMAGE_PIXELS = 1000\n"
        "assert open_image(data).size == (40, 40)\n"
        "Image.MAX_IMAGE_PIXELS = 100\n"
        "try: open_image(data)\n"
        "except BROKEN as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("DecompressionBombError\n", "")


def test_a_column_of_something_else_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the column image \(task.columns.image\) holds .*int64.*, not images"):
        check_images(Dataset.from_dict({"image": [1, 2]}), "image", "data", skip_broken=False)


def tiff(values: object, dtype: type) -> bytes:
    file = BytesIO()
    Image.fromarray(np.array(values, dtype)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("values", "dtype", "shown"),
    [
        ([[0, 4095], [2048, 1024]], np.uint16, [[0, 255], [128, 64]]),  # 12 bits in 16
        ([[0, 200], [100, 50]], np.uint16, [[0, 200], [100, 50]]),  # 8 bits in 16
        ([[0, 65535], [32768, 257]], np.int32, [[0, 255], [128, 1]]),  # 16 bits in 32
        ([[0, 2**20], [2**19, 0]], np.int32, [[0, 255], [128, 0]]),  # its own range
        ([[-10, 10], [0, 10]], np.int32, [[0, 255], [128, 255]]),
        ([[0.0, 1.0], [0.5, 0.25]], np.float32, [[0, 255], [128, 64]]),
        ([[0.0, 255.0], [128.0, 64.0]], np.float32, [[0, 255], [128, 64]]),
        ([[-1.0, 1.0], [0.0, 1.0]], np.float32, [[0, 255], [128, 255]]),
        ([[0.0, 0.0]], np.float32, [[0, 0]]),
    ],
)
def test_more_than_8_bits_are_scaled_by_the_range_of_the_data(values: object, dtype: type, shown: object) -> None:
    image = open_image(tiff(values, dtype))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == shown


def test_what_is_done_to_deep_images_and_pages_gets_a_line(caplog: pytest.LogCaptureFixture) -> None:
    pages = BytesIO()
    square().save(pages, "TIFF", save_all=True, append_images=[square()])
    images = [tiff([[0, 4000]], np.uint16), tiff([[0, 3000]], np.uint16), pages.getvalue(), png(square())]
    checked, broken = check_images(Dataset.from_dict({"image": images}), "image", "data", skip_broken=False)
    assert not broken
    assert checked["image_size"][:] == [[2, 1], [2, 1], [8, 8], [8, 8]]
    assert "data: of 2 images, grey values from 0 to 4095 are scaled to 8 bits" in caplog.text
    assert "data: of 1 images, only the first of several pages or frames is read" in caplog.text


def test_values_that_are_not_numbers_are_refused() -> None:
    nan = tiff([[0.0, float("nan")]], np.float32)
    with pytest.raises(
        UsageError, match=r"row 0, image in the data itself .it has values that are not finite. cannot be"
    ):
        check_images(Dataset.from_dict({"image": [nan]}), "image", "data", skip_broken=False)


def test_a_deep_tiff_whose_white_is_zero_is_turned_round() -> None:
    file = BytesIO()
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(file, "TIFF", tiffinfo={262: 0})
    with Image.open(BytesIO(file.getvalue())) as written:
        white_is_zero = written.tag_v2[262] == 0
    expected = [[255, 0]] if white_is_zero else [[0, 255]]
    assert np.asarray(open_image(file.getvalue())).tolist() == expected


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "GIF"), ("YCbCr", "JPEG")])
def test_colours_of_other_kinds_are_the_same_picture(mode: str, form: str) -> None:
    file = BytesIO()
    square("RGB").resize((64, 64), Image.Resampling.NEAREST).convert(mode).save(file, form)
    shown = open_image(file.getvalue())
    assert shown.mode == "RGB"
    assert min(shown.getpixel((8, 8))) > 240
    assert max(shown.getpixel((56, 56))) < 15


def test_a_palette_with_transparency_and_premultiplied_alpha_show_white_paper() -> None:
    shown = Image.new("P", (2, 1), 1)
    shown.putpalette([0, 0, 0, 9, 9, 9])
    shown.putpixel((1, 0), 0)
    file = BytesIO()
    shown.save(file, "PNG", transparency=0)
    image = open_image(file.getvalue())
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == ((9, 9, 9), (255, 255, 255))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_every_format_with_an_orientation_is_turned_upright(form: str) -> None:
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 10)).save(file, form, exif=exif)
    assert open_image(file.getvalue()).size == (10, 30)


def test_sizes_that_a_processor_does_not_take_are_found_at_the_extremes() -> None:
    asked = []

    def refusal(size: tuple[int, int]) -> str | None:
        asked.append(size)
        width, height = size
        return "too wide" if width > 20 * height else "too small" if min(size) < 3 else None

    usual = [(100 + i, 50) for i in range(200)]
    sizes = [*usual, (1000, 10), (2000, 10), (30, 2), (401, 20), (399, 20)]
    assert refused_sizes(refusal, sizes) == {
        (2000, 10): "too wide",
        (1000, 10): "too wide",
        (30, 2): "too small",
        (401, 20): "too wide",
    }
    assert len(asked) < 12
    assert refused_sizes(lambda size: None, usual) == {}
