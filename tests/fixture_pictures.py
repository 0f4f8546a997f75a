"""The pictures of the made-up questions: shapes, words, bars (see make_fixtures)."""

from __future__ import annotations

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.Image import Image

COLOURS = {"red": "#dd2e44", "blue": "#226699", "green": "#78b159", "yellow": "#fdcb58", "purple": "#aa8ed6"}
SIDE = 96


def scene(*things: tuple[str, str, int, int]) -> Image:
    """Shapes of 28 pixels: (shape, colour, left, top)."""
    image = Pillow.new("RGB", (SIDE, SIDE), "#f2f0e6")
    draw = ImageDraw.Draw(image)
    for shape, colour, left, top in things:
        box = (left, top, left + 28, top + 28)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(left, top + 28), (left + 28, top + 28), (left + 14, top)], fill=COLOURS[colour])
    return image


def writing(*lines: str, ground: str = "white") -> Image:
    """Lines of text."""
    image = Pillow.new("RGB", (SIDE * 2, SIDE), ground)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=20)
    for number, line in enumerate(lines):
        draw.text((10, 8 + 28 * number), line, fill="black", font=font)
    return image


def bars(**heights: int) -> Image:
    """A bar chart with a label under each bar."""
    image = Pillow.new("RGB", (SIDE * 2, SIDE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for number, (label, height) in enumerate(heights.items()):
        left = 12 + 42 * number
        draw.rectangle((left, 76 - 6 * height, left + 26, 76), fill=list(COLOURS.values())[number])
        draw.text((left, 78), f"{label} {height}", fill="black", font=font)
    return image


PICTURES: dict[str, Image] = {
    "pair": scene(("circle", "red", 8, 34), ("square", "blue", 58, 34)),
    "swapped": scene(("square", "blue", 8, 34), ("circle", "red", 58, 34)),
    "triangles": scene(("triangle", "green", 6, 8), ("triangle", "green", 60, 58)),
    "tower": scene(("circle", "yellow", 34, 4), ("square", "purple", 34, 34), ("square", "purple", 34, 64)),
    "single": scene(("square", "green", 34, 34)),
    "sign": writing("STOP", ground="#dd8888"),
    "bill": writing("Tea   2.50", "Bread 4.00", "Total 6.50"),
    "formula": writing("x^2 + 1 = 5"),
    "chart": bars(May=4, June=8, July=6),
}
