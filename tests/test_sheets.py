"""Sheets: every picture whole, every word within its width, and as large as what is on them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from open_pisces import sheets
from open_pisces.data.images import ImageError
from open_pisces.sheets import Page, contact_sheet, fitted

SMOOTH = Image.Resampling.BICUBIC


def find(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels of a color."""
    rows, columns = np.nonzero((np.asarray(image) == color).all(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_sheet_shows_every_picture_and_caption() -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sheet = contact_sheet([Image.new("RGB", (64, 64), c) for c in colors], ["a", "b " * 40, "c"], columns=2, cell=64)
    blank = contact_sheet([Image.new("RGB", (64, 64), c) for c in colors], ["", "", ""], columns=2, cell=64)
    counts = {c: int((np.asarray(sheet) == c).all(-1).sum()) for c in colors}
    assert counts == dict.fromkeys(colors, 64 * 64)
    assert sheet.height > blank.height and sheet.width == blank.width  # captions wrap under the pictures
    assert (np.asarray(sheet).max(-1) < 120).sum() > 20 > (np.asarray(blank).max(-1) < 120).sum()
    with pytest.raises(ImageError, match="2 for 1"):
        contact_sheet([Image.new("RGB", (4, 4))], ["a", "b"], 2)


def test_small_pictures_are_enlarged_without_smoothing_on_a_contact_sheet() -> None:
    checks = Image.fromarray(np.uint8([[[0, 0, 0], [255, 0, 0]], [[255, 0, 0], [0, 0, 0]]]))
    sheet = contact_sheet([checks], [""], 1, cell=64)
    assert set(sheet.crop((8, 8, 60, 60)).getdata()) == {(0, 0, 0), (255, 0, 0)}


def test_wide_pictures_are_laid_on_white_and_not_cut() -> None:
    square = fitted(Image.new("RGB", (40, 20), (9, 9, 9)), 256, SMOOTH)
    assert square.size == (256, 256) and square.getpixel((128, 20)) == (255, 255, 255)
    assert find(square, (9, 9, 9)) == (0, 64, 256, 192)
    assert fitted(Image.new("RGB", (1024, 1024), (9, 9, 9)), 256, SMOOTH).getpixel((0, 0)) == (9, 9, 9)


def test_a_page_is_as_large_as_what_is_on_it() -> None:
    page = Page(margin=10, side=32, gap=4)
    page.show([Image.new("RGB", (8, 8), (9, 9, 9))] * 2, 10)
    page.down(32)
    assert page.image().size == (10 + 32 + 4 + 32 + 10, 42)
    assert find(page.image(), (9, 9, 9)) == (10, 10, 78, 42)
    height = page.write("one two three", 10, 30, 14)
    page.down(height)
    assert height >= 2 * page.write("one", 10, 30, 14) and page.image().size == (88, 42 + height)
    page.write("a long line beside the pictures", 60, 400, 14)
    assert page.image().width > 200 and Page(10, 32, width=300).image().width == 300


def test_an_empty_text_takes_a_line() -> None:
    page = Page(10, 32)
    assert page.write("", 10, 100, 14) == page.write("a", 10, 100, 14) > 0


@pytest.mark.parametrize("text", ["a cat", "x" * 400, "a very-" + "long-" * 60 + "word between", "i " * 200, "", "W"])
@pytest.mark.parametrize("width", [1, 40, 256])
def test_lines_keep_within_their_width_and_lose_nothing(text: str, width: int) -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = sheets._wrapped(text, font, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)
