"""Pictures on one sheet for people to look at: a captioned grid, and a page that is written from top to bottom."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling
from PIL.ImageFont import FreeTypeFont

from open_pisces.data.images import ImageError

INK = "#1a1a1a"
PALE = "#5f6368"
FRAME = "#d0d0d0"
_PAPER = "#fafafa"
_LINE = 1.35  # of the size of the letters, from one line of a page to the next


def contact_sheet(images: Sequence[Image], captions: Sequence[str], columns: int, cell: int = 128) -> Image:
    """A labelled grid: each picture scaled to ``cell`` pixels, its caption wrapped underneath.

    Raises:
        ImageError: without pictures, or with a number of captions that is not the number of pictures.
    """
    if not images or len(images) != len(captions):
        raise ImageError(f"a sheet needs as many captions as pictures, found {len(captions)} for {len(images)}")
    height_of_text = max(10, cell // 11)
    font = ImageFont.load_default(size=height_of_text)
    line = math.ceil(height_of_text * 1.25)
    margin = max(4, cell // 16)
    # A letter of Pillow's default font is about 0.56 of its height wide.
    letters = max(8, int(cell / (height_of_text * 0.56)))
    wrapped = [textwrap.wrap(caption, letters) for caption in captions]
    columns = max(1, min(columns, len(images)))
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = []
    for row in rows:
        most_lines = max(len(wrapped[i]) for i in row)
        heights.append(cell + 2 * margin + line * most_lines)
    sheet = Pillow.new("RGB", (columns * (cell + margin) + margin, sum(heights) + margin), (244, 244, 244))
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = margin + place * (cell + margin)
            # Whole multiples without smoothing: pixel art of 32 or 64 pixels stays sharp.
            is_multiple = cell > max(images[i].size) and cell % max(images[i].size) == 0
            way = Resampling.NEAREST if is_multiple else Resampling.BICUBIC
            sheet.paste(fitted(images[i], cell, way), (left, top))
            for number, words in enumerate(wrapped[i]):
                draw.text((left, top + cell + 2 + number * line), words, fill=(20, 20, 20), font=font)
        top += height
    return sheet


class Page:
    """A sheet written from top to bottom; it becomes as large as what was put on it.

    Args:
        margin: pixels left free at the top, left and right.
        side: pixels of a picture's square.
        gap: pixels between pictures beside each other.
        width: at least so wide.
    """

    def __init__(self, margin: int, side: int, gap: int = 0, width: int = 0) -> None:
        self.top = margin
        self._margin = margin
        self._side = side
        self._gap = gap
        self._right = width - margin
        self._lines: list[tuple[tuple[int, int], str, int, str]] = []
        self._pictures: list[tuple[tuple[int, int], Image]] = []

    def down(self, pixels: int) -> None:
        """Go on ``pixels`` further below."""
        self.top += pixels

    def write(self, text: str, left: int, width: int, size: int, ink: str = INK) -> int:
        """Write ``text`` wrapped to ``width`` pixels; returns the height it takes, one line for an empty text."""
        font = _font(size)
        step = round(size * _LINE)
        lines = _wrapped(text, font, width)
        for number, line in enumerate(lines):
            self._lines.append(((left, self.top + number * step), line, size, ink))
            self._right = max(self._right, left + math.ceil(font.getlength(line)))
        return step * len(lines)

    def show(self, pictures: Sequence[Image], left: int) -> None:
        """Put pictures beside each other, each fitted into its square."""
        for number, picture in enumerate(pictures):
            corner = (left + number * (self._side + self._gap), self.top)
            way = Resampling.LANCZOS if max(picture.size) > self._side else Resampling.BICUBIC
            self._pictures.append((corner, fitted(picture, self._side, way)))
            self._right = max(self._right, corner[0] + self._side)

    def image(self) -> Image:
        """The sheet; pictures are framed so that white grounds stand out."""
        image = Pillow.new("RGB", (self._right + self._margin, self.top), _PAPER)
        draw = ImageDraw.Draw(image)
        for (left, top), picture in self._pictures:
            image.paste(picture, (left, top))
            draw.rectangle((left - 1, top - 1, left + self._side, top + self._side), outline=FRAME)
        for corner, line, size, ink in self._lines:
            draw.text(corner, line, ink, _font(size))
        return image


def fitted(picture: Image, side: int, way: Resampling) -> Image:
    """``picture`` as large as fits into a square of ``side`` pixels, in the middle of a white one."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    square = Pillow.new("RGB", (side, side), "white")
    square.paste(picture.convert("RGB").resize(size, way), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont)  # Pillow's default font has a size only with FreeType, which its wheels hold
    return font


def _wrapped(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; a word that is too long is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
        while font.getlength(lines[-1]) > width:
            last = lines.pop()
            fits = max(1, bisect_right(range(1, len(last)), float(width), key=lambda n: font.getlength(last[:n])))
            lines += [last[:fits], last[fits:]]
    return [line for line in lines if line] or [""]
