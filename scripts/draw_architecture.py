"""Draw docs/architecture.png: the paper's figure (arXiv 2506.10395) with the names of our classes on its boxes.

    python scripts/draw_architecture.py --out docs/architecture.png

`CLASSES` says where each class is defined; `tests/test_examples.py` checks it against the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

CLASSES = {
    "UnderstandingEncoder": "model/encoders.py",
    "GenerationEncoder": "model/encoders.py",
    "VisualProjector": "model/bridge.py",
    "VisualTokenPooler": "model/bridge.py",
    "TargetStatistics": "model/bridge.py",
    "GenerationHead": "model/heads.py",
    "ImageDecoder": "model/decoder.py",
    "Pisces": "model/pisces.py",
}
"""Every class on the figure, with the file of open_pisces/ that defines it."""

WIDTH = 900
HEIGHT = 584
"""Size in CSS pixels: the coordinates below. The PNG has twice as many."""

Colors = tuple[str, str]
"""Of a line or a name, and of a face."""
Place = tuple[float, float, float, float]
"""x and y of the lower left corner, width, height."""
BLUE: Colors = ("#1f5fa8", "#dceafa")
ORANGE: Colors = ("#b9520a", "#fde7d3")
GRAY: Colors = ("#3b4148", "#eef0f2")
INK = "#1c2126"
PALE = "#59616a"
HEART = "#d3262f"

# 8 points are 11 pixels at a width of 900: the smallest that reads well on a forge's page.
SMALL = 8.0
NORMAL = 8.8


def text(axes: Axes, x: float, y: float, words: str, size: float = NORMAL, color: str = INK, **how: Any) -> None:
    """Words centered at (x, y)."""
    axes.text(x, y, words, **{"fontsize": size, "color": color, "ha": "center", "va": "center", **how})


def frame(axes: Axes, x: float, y: float, width: float, height: float, colors: Colors, frozen: bool = False) -> None:
    """A rounded rectangle whose lower left corner is (x, y); hatched if frozen."""
    style = f"round,pad=0,rounding_size={min(7.0, height / 4)}"
    edge, face = colors
    body: dict[str, Any] = {"boxstyle": style, "facecolor": face, "linewidth": 0, "zorder": 2}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **body))
    if frozen:
        hatching = {**body, "facecolor": "none", "edgecolor": edge, "alpha": 0.22, "hatch": "////"}
        axes.add_patch(FancyBboxPatch((x, y), width, height, **hatching))
    outline: dict[str, Any] = {"boxstyle": style, "facecolor": "none", "edgecolor": edge, "linewidth": 1.3, "zorder": 3}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **outline))


def box(axes: Axes, name: str, about: str, place: Place, colors: Colors, frozen: bool = False) -> None:
    """A class: its name, what it is, its file."""
    x, y, width, height = place
    frame(axes, x, y, width, height, colors, frozen)
    back = {"facecolor": colors[1], "edgecolor": "none", "pad": 0.8} if frozen else None
    middle = x + width / 2
    center = y + height / 2
    text(axes, middle, center + 18.5, name, NORMAL, colors[0], weight="bold", bbox=back, zorder=4)
    text(axes, middle, center, about, SMALL, bbox=back, zorder=4)
    text(axes, middle, center - 18, CLASSES[name], SMALL, PALE, bbox=back, zorder=4)


def token(axes: Axes, x: float, y: float, width: float, words: str, colors: Colors) -> None:
    """One element of a sequence."""
    axes.add_patch(Rectangle((x, y), width, 24, facecolor=colors[1], edgecolor=colors[0], linewidth=1.0, zorder=3))
    text(axes, x + width / 2, y + 11.5, words, SMALL, INK if colors == GRAY else colors[0], zorder=4)


def tokens(axes: Axes, x: float, y: float, row: list[tuple[str, float, Colors | None]]) -> None:
    """A sequence from left to right: words, width, colors (None draws no frame)."""
    for words, width, colors in row:
        if colors is None:
            text(axes, x + width / 2, y + 12, words)
        else:
            token(axes, x, y, width, words, colors)
        x += width + 4


def arrow(axes: Axes, points: list[tuple[float, float]], color: str, training: bool = False) -> None:
    """A line through points with a head at the last; dashed where only training goes."""
    (before_x, before_y), (x, y) = points[-2:]
    length = abs(x - before_x) + abs(y - before_y)  # lines run along the axes
    neck = (x - 6 * (x - before_x) / length, y - 6 * (y - before_y) / length)
    style = (0, (3, 2)) if training else "solid"
    axes.plot(*zip(*points[:-1], neck, strict=True), color=color, linewidth=1.5, linestyle=style, zorder=1)
    how: dict[str, Any] = {
        "arrowstyle": "-|>",
        "color": color,
        "linewidth": 0,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 13,
    }
    axes.annotate("", (x, y), neck, arrowprops=how, zorder=1)


def loss(axes: Axes, x: float, y: float, width: float, words: str) -> None:
    """A term of the loss, centered at (x, y)."""
    pill: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=11", "facecolor": INK, "edgecolor": INK, "zorder": 3}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 11), width, 22, **pill))
    text(axes, x, y - 0.5, words, SMALL, "white", weight="bold", zorder=4)


def picture(axes: Axes, x: float, y: float, colors: Colors) -> None:
    """A picture, centered at (x, y)."""
    side = 44
    place = (x - side / 2, y - side / 2)
    axes.add_patch(Rectangle(place, side, side, facecolor="white", edgecolor=colors[0], linewidth=1.4, zorder=3))
    text(axes, x, y - 1, "♥", 22, HEART, zorder=4)


def bracket(axes: Axes, left: float, right: float, y: float, height: float, color: str) -> None:
    """What gathers a row of vectors, open towards them: its ends point up for a positive height."""
    points = ([left, left, right, right], [y + height, y, y, y + height])
    axes.plot(*points, color=color, linewidth=1.5, solid_joinstyle="miter", zorder=2)


def draw_llm(axes: Axes) -> None:
    """The language model over both halves."""
    frame(axes, 20, 292, 684, 44, GRAY)
    text(axes, 363, 322, "one autoregressive LLM: Pisces.llm", NORMAL, weight="bold", zorder=4)
    text(axes, 363, 306, f"any causal LM, Llama-3.1-8B-Instruct at 8b; {CLASSES['Pisces']}", SMALL, PALE, zorder=4)


def draw_understanding(axes: Axes) -> None:
    """The left half: a picture and a question to an answer."""
    color = BLUE[0]
    picture(axes, 111, 44, BLUE)
    arrow(axes, [(111, 66), (111, 86)], color)
    box(axes, "UnderstandingEncoder", "SigLIP, not pooled", (22, 86, 178, 58), BLUE, frozen=True)
    arrow(axes, [(111, 144), (111, 162)], color)
    box(axes, "VisualProjector", "two-layer MLP", (22, 162, 178, 58), BLUE)
    arrow(axes, [(111, 220), (111, 237)], color)
    bracket(axes, 62, 160, 238, 5, color)
    row = [("[IMG]", 38, GRAY), ("u₁", 24, BLUE), ("u₂", 24, BLUE), ("…", 12, None), ("u$_N$", 26, BLUE)]
    tokens(axes, 20, 247, [*row, ("[/IMG]", 42, GRAY), ("question", 56, GRAY), ("answer", 50, GRAY)])
    arrow(axes, [(266, 336), (266, 366)], GRAY[0])
    text(axes, 266, 376, "answer", NORMAL, weight="bold")
    arrow(axes, [(266, 386), (266, 412)], GRAY[0], training=True)
    loss(axes, 266, 424, 108, "cross-entropy")
    text(axes, 266, 446, "on text, [IMG] and [/IMG]", SMALL, PALE)


def draw_generation(axes: Axes) -> None:
    """The right half: a caption to vectors, vectors to a picture."""
    color = ORANGE[0]
    row = [("prompt, caption", 100, GRAY), ("[IMG]", 38, GRAY), ("v₁", 28, ORANGE), ("v₂", 28, ORANGE)]
    tokens(axes, 350, 247, [*row, ("…", 14, None), ("v$_M$", 30, ORANGE), ("[/IMG]", 44, GRAY)])
    bracket(axes, 496, 608, 238, 5, color)
    box(axes, "VisualProjector", "two-layer MLP", (467, 162, 170, 58), ORANGE)
    arrow(axes, [(552, 220), (552, 237)], color)
    for x in (473, 510, 542):
        arrow(axes, [(x, 336), (x, 358)], color)
    box(axes, "GenerationHead", "two-layer MLP", (454, 358, 170, 58), ORANGE)
    arrow(axes, [(539, 416), (539, 430)], color)
    bracket(axes, 474, 604, 431, 5, color)
    tokens(axes, 474, 440, [("v̂₁", 30, ORANGE), ("v̂₂", 30, ORANGE), ("…", 20, None), ("v̂$_M$", 38, ORANGE)])
    bracket(axes, 474, 604, 473, -5, color)
    arrow(axes, [(539, 473), (539, 500)], color)
    box(axes, "ImageDecoder", "diffusion: U-Net, VAE", (454, 500, 170, 62), ORANGE, frozen=True)
    arrow(axes, [(624, 531), (677, 531)], color)
    picture(axes, 700, 531, ORANGE)
    draw_guidance(axes)


def draw_guidance(axes: Axes) -> None:
    """The decoder's unconditional context."""
    frame(axes, 200, 506, 186, 50, (ORANGE[0], "white"))
    text(axes, 293, 540, "null vectors", NORMAL, ORANGE[0], weight="bold", zorder=4)
    text(axes, 293, 522, "the LLM on an empty caption", SMALL, zorder=4)
    arrow(axes, [(386, 531), (453, 531)], ORANGE[0])
    text(axes, 418, 542, "guidance", SMALL, PALE)


def draw_feedback(axes: Axes) -> None:
    """At inference each vector is fed back before the next is predicted; in training the true ones are fed."""
    color = ORANGE[0]
    arrow(axes, [(604, 452), (718, 452), (718, 204), (638, 204)], color)
    text(axes, 667, 464, "fed back one by one", SMALL, PALE)
    text(axes, 680, 213, "inference", SMALL, PALE)
    arrow(axes, [(746, 267), (732, 267), (732, 178), (638, 178)], color, training=True)
    text(axes, 684, 168, "training", SMALL, PALE)


def draw_targets(axes: Axes) -> None:
    """The right column: what the LLM learns to write."""
    color, left, middle = ORANGE[0], 746, 818
    picture(axes, middle, 44, ORANGE)
    arrow(axes, [(middle, 66), (middle, 86)], color, training=True)
    box(axes, "GenerationEncoder", "gen-CLIP, a ViT", (left, 86, 144, 58), ORANGE, frozen=True)
    arrow(axes, [(middle, 144), (middle, 162)], color, training=True)
    box(axes, "VisualTokenPooler", "2-D average", (left, 162, 144, 58), ORANGE)
    arrow(axes, [(middle, 220), (middle, 238)], color, training=True)
    box(axes, "TargetStatistics", "standardize, at tiny", (left, 238, 144, 58), ORANGE)
    arrow(axes, [(middle, 296), (middle, 439)], color, training=True)
    text(axes, middle + 8, 366, "targets\nv₁ … v$_M$", SMALL, PALE, ha="left")
    arrow(axes, [(718, 452), (763, 452)], color, training=True)
    loss(axes, middle, 452, 108, "squared error")


def draw_legend(axes: Axes) -> None:
    """What colors, hatching and dashes mean."""
    left, top, step = 262, 122, 22
    words = (
        "understanding: N vectors a picture, 729 at 8b, 64 at tiny",
        "generation: M vectors a picture, 64 at 8b, 16 at tiny",
        "frozen while the LLM and the MLPs learn (stages 1 to 3)",
        "in training only",
    )
    for number, line in enumerate(words):
        text(axes, left + 38, top - number * step, line, SMALL, ha="left")
    frame(axes, left, top - 7, 26, 14, BLUE)
    frame(axes, left, top - step - 7, 26, 14, ORANGE)
    frame(axes, left, top - 2 * step - 7, 26, 14, GRAY, frozen=True)
    arrow(axes, [(left, top - 3 * step), (left + 27, top - 3 * step)], GRAY[0], training=True)


def draw(path: Path) -> None:
    """Write the figure."""
    plt.rcParams["font.family"] = "DejaVu Sans"
    plt.rcParams["hatch.linewidth"] = 0.9
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    draw_llm(axes)
    draw_understanding(axes)
    draw_generation(axes)
    draw_feedback(axes)
    draw_targets(axes)
    draw_legend(axes)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)  # a third of the bytes


def main() -> None:
    """Draw, and print where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/architecture.png"), help="the PNG to write")
    out = parser.parse_args().out
    draw(out)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
