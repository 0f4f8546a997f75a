"""Scenes composed from artwork cut-outs, 64 x 64 pixels, with exact ground truth.

A scene is a function of (seed, split, index). Splits: ``train``; ``pairs``, made of concept pairs that never meet in
``train``; ``style``, drawn in the one style that ``train`` never uses. One style holds for a whole scene.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Question, Sample
from open_pisces.data.order import stream
from open_pisces.data.shards import ShardError, data_path
from open_pisces.datasets.scenes.artwork import fit
from open_pisces.datasets.scenes.layout import SIZE, Layout, Split, Thing, vocabulary
from open_pisces.datasets.scenes.texts import (
    detailed_caption,
    many_questions,
    questions,
    short_caption,
    varied_caption,
)
from open_pisces.datasets.shard_writer import ShardWriter

HELD_OUT_STYLE = "twemoji"
DEFAULT_STYLE = "noto"
DEFAULT_STYLE_SHARE = 0.4
LAYOUTS = {"single": 0.45, "pair": 0.30, "count": 0.25}
SHAPE_SHARE = 0.2
"""Share of colored hearts, circles and squares among the things drawn."""
WHITE_SHARE = 0.4
CONTRAST = 70.0
"""Distance in RGB at which a pixel stands out from the ground; half of a drawing's pixels have to."""
CHUNK = 500  # scenes one process composes at a time

# Middles of the objects (x, y) in pixels. Those of pairs and counts leave room for the jitter without overlaps.
_EDGE = {"large": (18, 46), "small": (14, 50)}  # shaken and rounded, still in the outer thirds
_PAIR = {"left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}
_COUNTS: dict[str, tuple[tuple[int, ...], list[tuple[int, int]], list[str]]] = {
    # arrangement: (sizes), middles, places
    "pair": ((24, 25, 26), [(17, 32), (47, 32)], ["left", "right"]),
    "row": ((17, 18), [(12, 32), (32, 32), (52, 32)], ["left", "centre", "right"]),
    "triangle": ((24, 25, 26), [(32, 17), (17, 47), (47, 47)], ["top", "bottom left", "bottom right"]),
    "square": (
        (23, 24, 25, 26),
        [(17, 17), (47, 17), (17, 47), (47, 47)],
        ["top left", "top right", "bottom left", "bottom right"],
    ),
}
_SIZES = {("large", True): (40, 45), ("large", False): (34, 39), ("small", True): (24, 27), ("small", False): (24, 27)}
_OPPOSITE = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"),
             "below": ("bottom", "top")}  # fmt: skip


# ------------------------------------------------------------------------------------------------ cut-outs


@dataclass
class Cutouts:
    """Drawings by (style, concept, a shape's color or "") as trimmed RGBA; the word for each style in captions."""

    pictures: dict[tuple[str, str, str], Image]
    words: dict[str, str]
    licences: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A row of the licence table for each style."""
    _fitted: dict[tuple[str, Thing, int], Image] = field(default_factory=dict)
    _clear: dict[tuple[str, Thing], frozenset[str]] = field(default_factory=dict)

    def missing(self, styles: list[str]) -> list[str]:
        """Objects that one of the styles does not draw."""
        names = set()
        for style in styles:
            names |= {thing.name for thing in vocabulary().objects if not self.has(style, thing)}
        return sorted(names)

    def has(self, style: str, thing: Thing) -> bool:
        """Whether the style draws the thing (older styles lack some colors of shapes)."""
        key = _key(style, thing)
        return key in self.pictures and key not in vocabulary().left_out

    def fitted(self, style: str, thing: Thing, side: int) -> Image:
        """The drawing with its longer side at ``side`` pixels."""
        key = (style, thing, side)
        if key not in self._fitted:
            self._fitted[key] = fit(self.pictures[_key(style, thing)], side)
        return self._fitted[key]

    def grounds(self, style: str, thing: Thing) -> frozenset[str]:
        """The backgrounds on which the drawing can be seen; never one of its own color."""
        key = (style, thing)
        if key not in self._clear:
            pixels = np.asarray(self.fitted(style, thing, 32), dtype=np.float32)
            seen = pixels[pixels[..., 3] > 128][:, :3]
            self._clear[key] = frozenset(
                name
                for name, rgb in vocabulary().backgrounds.items()
                if name != thing.colour and (not thing.is_shape or _stands_out(seen, rgb))
                and (name == "white" or _stands_out(seen, rgb))  # emoji are drawn for white
            )  # fmt: skip
        return self._clear[key]


def _key(style: str, thing: Thing) -> tuple[str, str, str]:
    return style, thing.concept, thing.colour if thing.is_shape else ""


def _stands_out(pixels: np.ndarray, ground: tuple[int, int, int]) -> bool:
    distance = np.linalg.norm(pixels - np.asarray(ground, dtype=np.float32), axis=1)
    return bool((distance > CONTRAST).mean() > 0.5)


def load_cutouts(path: str | Path | None = None) -> Cutouts:
    """Read the cut-outs that ``pisces data build artwork`` wrote (default: ``artwork/cutouts`` in the data folder).

    Raises:
        ShardError: if they are missing.
    """
    folder = Path(path) if path is not None else data_path("artwork/cutouts")
    table = folder / "cutouts.json"
    if not table.is_file():
        raise ShardError(f"no cut-outs at {folder}: build them with `pisces data build artwork`")
    index = json.loads(table.read_text())
    pictures = {}
    for row in index["cutouts"]:
        with Pillow.open(folder / row["file"]) as image:
            pictures[row["style"], row["concept"], row["colour"]] = image.convert("RGBA")
    return Cutouts(pictures, index["words"], index["licences"])


# ----------------------------------------------------------------------------------------------- composing


class Composer:
    """Composes the scenes of one split; each is a function of (seed, split, index) and of the settings below.

    Args:
        cutouts: the drawings.
        split: which styles and pairs may be used.
        seed: of everything random.
        pairs: share of scenes with two different things, taken from the others in proportion; None is that of
            `LAYOUTS`. The split ``pairs`` holds nothing else.
        many: for training: ask about every thing of a scene (`many_questions`), and say it in other words too
            (`varied_caption`).
        plain: for the first lesson: the default style on white only.
        shapes: share of colored shapes among the things drawn.

    Raises:
        ShardError: for an unknown split, a share that is none, or cut-outs without the styles it needs.
    """

    def __init__(
        self,
        cutouts: Cutouts,
        split: Split = "train",
        seed: int = 0,
        pairs: float | None = None,
        many: bool = False,
        plain: bool = False,
        shapes: float = SHAPE_SHARE,
    ) -> None:
        if plain and split == "style":
            raise ShardError("plain scenes are of the default style, the split style has another: leave one out")
        if split not in ("train", "pairs", "style"):
            raise ShardError(f"unknown split {split!r}: choose train, pairs or style")
        self.cutouts = cutouts
        self.split = split
        self.seed = seed
        self.many = many
        self.plain = plain
        self.shapes = _share("colored shapes", shapes)
        self.layouts = LAYOUTS if pairs is None else _with_pairs(pairs)
        if not self._styles:
            raise ShardError(f"the cut-outs hold no style for the split {split!r}: build the artwork again")
        if missing := cutouts.missing(self._styles):
            raise ShardError(f"the cut-outs lack {', '.join(missing)}: build the artwork again")

    @property
    def licences(self) -> list[dict[str, Any]]:
        """The licence table of the styles this split is drawn in."""
        return [self.cutouts.licences[style] for style in self._styles if style in self.cutouts.licences]

    def scene(self, index: int) -> Sample:
        """The scene with this number."""
        rng = stream(self.seed, "scene", self.split, index)
        layout = self._layout(rng)
        while self.plain and (layout.style != DEFAULT_STYLE or layout.background != "white"):
            layout = self._layout(rng)
        picture, boxes = self._draw(layout, rng)
        word = self.cutouts.words[layout.style]
        return Sample(
            key=f"{self.split}-{index:07d}",
            images=(picture,),
            short=short_caption(layout, word),
            detailed=detailed_caption(layout, word, rng),
            questions=self._questions(layout, rng),
            source=f"scenes/{self.split}",
            facts=_facts(layout, boxes),
            # Last, so that the scenes are the same with and without.
            more_captions=(varied_caption(layout, word, rng),) if self.many else (),
        )

    def _questions(self, layout: Layout, rng: np.random.Generator) -> tuple[Question, ...]:
        if not self.many:
            return questions(layout, self._other(layout, rng), rng)
        others: list[Thing] = []
        while len(others) < len(layout.things):
            other = self._other(layout, rng)
            if other not in others:
                others.append(other)
        return many_questions(layout, tuple(others), rng)

    @cached_property
    def _styles(self) -> list[str]:
        held_out = self.split == "style"
        return sorted(style for style in self.cutouts.words if (style == HELD_OUT_STYLE) == held_out)

    @cached_property
    def _style_shares(self) -> np.ndarray:
        """The default style has its share, the others divide the rest evenly."""
        others = len(self._styles) - (DEFAULT_STYLE in self._styles)
        if others == len(self._styles) or not others:
            return np.full(len(self._styles), 1 / len(self._styles))
        rest = (1 - DEFAULT_STYLE_SHARE) / others
        shares = np.full(len(self._styles), rest)
        shares[self._styles.index(DEFAULT_STYLE)] = DEFAULT_STYLE_SHARE
        return shares

    def _layout(self, rng: np.random.Generator) -> Layout:
        style = self._styles[int(rng.choice(len(self._styles), p=self._style_shares))]
        kind = "pair" if self.split == "pairs" else str(rng.choice(list(self.layouts), p=list(self.layouts.values())))
        if kind == "pair":
            return self._pair(style, rng)
        thing = self._thing(style, rng)
        background = self._background(style, (thing,), rng)
        return _count(style, thing, background, rng) if kind == "count" else _single(style, thing, background, rng)

    def _pair(self, style: str, rng: np.random.Generator) -> Layout:
        things = self._two(style, rng)
        relation = list(_OPPOSITE)[int(rng.integers(4))]
        places = _OPPOSITE[relation]
        spots = tuple((*_shake(_PAIR[place], rng), int(rng.integers(26, 29))) for place in places)
        background = self._background(style, things, rng)
        return Layout(
            "pair", style, things, spots, places, "medium", background, relation, held_out=self.split == "pairs"
        )

    def _two(self, style: str, rng: np.random.Generator) -> tuple[Thing, Thing]:
        """Two different concepts that may meet in this split."""
        while True:
            if self.split == "pairs":
                names = self._pairs[int(rng.integers(len(self._pairs)))]
                # Both names before both things: another order of draws would be other scenes.
                order = rng.permutation(names)
                first = self._of_concept(style, str(order[0]), rng)
                second = self._of_concept(style, str(order[1]), rng)
            else:
                first = self._thing(style, rng)
                second = self._thing(style, rng)
            allowed = (frozenset((first.concept, second.concept)) in vocabulary().held_out_pairs) == (
                self.split == "pairs"
            )
            both = self.cutouts.grounds(style, first) & self.cutouts.grounds(style, second)
            if allowed and first.concept != second.concept and both:
                return first, second

    def _of_concept(self, style: str, concept: str, rng: np.random.Generator) -> Thing:
        """The object, or a shape of some color."""
        choice = [thing for thing in self._things(style) if thing.concept == concept]
        return choice[int(rng.integers(len(choice)))]

    @cached_property
    def _pairs(self) -> list[list[str]]:
        return sorted(sorted(pair) for pair in vocabulary().held_out_pairs)

    def _things(self, style: str) -> list[Thing]:
        known = chain(vocabulary().objects, vocabulary().shapes)
        return [thing for thing in known if self.cutouts.has(style, thing)]

    def _thing(self, style: str, rng: np.random.Generator) -> Thing:
        """An object, or now and then a shape, that the style can draw."""
        objects, shapes = self._choices[style]
        some = shapes if shapes and (not objects or rng.random() < self.shapes) else objects
        return some[int(rng.integers(len(some)))]

    @cached_property
    def _choices(self) -> dict[str, tuple[list[Thing], list[Thing]]]:
        both = {}
        for style in self._styles:
            things = self._things(style)
            both[style] = ([t for t in things if not t.is_shape], [t for t in things if t.is_shape])
        return both

    def _other(self, layout: Layout, rng: np.random.Generator) -> Thing:
        """A thing that is not in the scene, drawn as those in it are."""
        while True:
            drawn = self._two(layout.style, rng)[0] if layout.held_out else self._thing(layout.style, rng)
            if drawn not in layout.things:
                return drawn

    def _background(self, style: str, things: tuple[Thing, ...], rng: np.random.Generator) -> str:
        clear = frozenset.intersection(*(self.cutouts.grounds(style, thing) for thing in things))
        colors = [name for name in vocabulary().backgrounds if name in clear and name != "white"]
        if "white" in clear and (not colors or rng.random() < WHITE_SHARE):
            return "white"
        return colors[int(rng.integers(len(colors)))]

    def _draw(self, layout: Layout, rng: np.random.Generator) -> tuple[Image, list[list[int]]]:
        """The picture, and the box (x0, y0, x1, y1) of each object in pixels, x1 and y1 outside."""
        picture = Pillow.new("RGB", (SIZE, SIZE), vocabulary().backgrounds[layout.background])
        boxes = []
        for at, (x, y, side) in enumerate(layout.spots):
            cutout = self.cutouts.fitted(layout.style, layout.things[at % len(layout.things)], side)
            left = min(max(round(x - cutout.width / 2), 0), SIZE - cutout.width)
            top = min(max(round(y - cutout.height / 2), 0), SIZE - cutout.height)
            picture.paste(cutout, (left, top), cutout)
            boxes.append([left, top, left + cutout.width, top + cutout.height])
        return picture, boxes


def _with_pairs(share: float) -> dict[str, float]:
    """`LAYOUTS` with another share of pairs.

    Raises:
        ShardError: for a share that is none.
    """
    rest = (1 - _share("pairs", share)) / (1 - LAYOUTS["pair"])
    return {name: share if name == "pair" else rest * value for name, value in LAYOUTS.items()}


def _share(name: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise ShardError(f"a share of {name} of {share}: give one from 0 to 1")
    return share


def _single(style: str, thing: Thing, background: str, rng: np.random.Generator) -> Layout:
    size = ("large", "small")[int(rng.random() < 0.3)]
    edges = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
    place = "centre" if rng.random() < 0.5 else edges[int(rng.integers(8))]
    low, high = _EDGE[size]
    x = low if "left" in place else high if "right" in place else SIZE // 2
    y = low if "top" in place else high if "bottom" in place else SIZE // 2
    side = int(rng.integers(*_SIZES[size, place == "centre"]))
    return Layout("single", style, (thing,), ((*_shake((x, y), rng), side),), (place,), size, background)


def _count(style: str, thing: Thing, background: str, rng: np.random.Generator) -> Layout:
    number = int(rng.integers(2, 5))
    arrangement = {2: "pair", 3: ("row", "triangle")[int(rng.integers(2))], 4: "square"}[number]
    sides, middles, places = _COUNTS[arrangement]
    side = sides[int(rng.integers(len(sides)))]
    shake = 1 if arrangement == "row" else 2
    spots = tuple((*_shake(middle, rng, shake), side) for middle in middles)
    return Layout("count", style, (thing,), spots, tuple(places), "small", background, arrangement=arrangement)


def _shake(middle: tuple[int, int], rng: np.random.Generator, most: int = 2) -> tuple[int, int]:
    x, y = rng.integers(-most, most + 1, 2)
    return middle[0] + int(x), middle[1] + int(y)


def _facts(layout: Layout, boxes: list[list[int]]) -> dict[str, Any]:
    """The ground truth kept beside the picture; ``colour`` is "" where a drawing has no single one."""
    things = [layout.things[at % len(layout.things)] for at in range(len(boxes))]
    objects = [
        {"concept": thing.concept, "style": layout.style, "colour": thing.colour, "box": box, "size": layout.size,
         "place": place}
        for thing, box, place in zip(things, boxes, layout.places, strict=True)
    ]  # fmt: skip
    facts: dict[str, Any] = {"background": layout.background, "layout": layout.kind, "objects": objects}
    if layout.kind == "pair":
        facts["relation"] = layout.relation
    if layout.kind == "count":
        facts["arrangement"] = layout.arrangement
    return facts


# ---------------------------------------------------------------------------------------------- the dataset


def build(
    out: str | Path | None = None,
    count: int = 40_000,
    seed: int = 0,
    split: Split = "train",
    cutouts: str | Path | None = None,
    processes: int = 2,
    pairs: float | None = None,
    many: bool = False,
    plain: bool = False,
    shapes: float = SHAPE_SHARE,
) -> Path:
    """Compose scenes 0 to ``count`` of a split into shards (default: ``scenes/SPLIT`` in the data folder).

    The dataset does not depend on the number of processes. The settings from ``pairs`` on are those of `Composer`.

    Raises:
        ShardError: without cut-outs, or for an unknown split.
    """
    folder = Path(out) if out is not None else data_path(f"scenes/{split}")
    composer = Composer(load_cutouts(cutouts), split, seed, pairs, many, plain, shapes)
    with ShardWriter(folder, licences=composer.licences) as writer:
        for sample in _compose(composer, count, processes):
            writer.write(sample)
    return folder


def _compose(composer: Composer, count: int, processes: int) -> Iterator[Sample]:
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if processes < 2 or len(chunks) < 2:
        yield from map(composer.scene, range(count))
        return
    with ProcessPoolExecutor(processes, initializer=_keep, initargs=(composer,)) as pool:
        for samples in pool.map(_chunk, chunks):
            yield from samples


_kept: list[Composer] = []  # a worker process's composer, so that its cut-outs travel once


def _keep(composer: Composer) -> None:
    _kept[:] = [composer]


def _chunk(indices: range) -> list[Sample]:
    return [_kept[0].scene(index) for index in indices]
