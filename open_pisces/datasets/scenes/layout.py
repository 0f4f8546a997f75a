"""A scene before it is drawn: its things, where they stand; and the vocabulary of ``concepts.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

SIZE = 64
"""Side of a scene in pixels."""
Split = Literal["train", "pairs", "style"]


@dataclass(frozen=True)
class Thing:
    """What can be in a scene: an object, or a shape of one color."""

    concept: str
    colour: str
    is_shape: bool
    kind_plural: str

    @property
    def name(self) -> str:
        """As captions call it: "cat", "red heart"."""
        return f"{self.colour} {self.concept}" if self.is_shape else self.concept

    @property
    def plural(self) -> str:
        """As captions call several."""
        return f"{self.colour} {self.kind_plural}" if self.is_shape else self.kind_plural


@dataclass(frozen=True)
class Layout:
    """A scene before it is drawn: what, where, how large, on what ground."""

    kind: Literal["single", "pair", "count"]
    style: str
    things: tuple[Thing, ...]
    """One thing, or the two of a pair."""
    spots: tuple[tuple[int, int, int], ...]
    """Middle x, middle y and longer side of each object, in pixels."""
    places: tuple[str, ...]
    size: str
    background: str
    relation: str = ""
    arrangement: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tables of ``concepts.yaml``."""

    objects: tuple[Thing, ...]
    shapes: tuple[Thing, ...]
    left_out: frozenset[tuple[str, str, str]]
    """Drawings (style, concept, color) that would teach a wrong color word."""
    held_out_pairs: frozenset[frozenset[str]]
    backgrounds: dict[str, tuple[int, int, int]]


@cache
def vocabulary() -> Vocabulary:
    """Concepts, held-out pairs and grounds."""
    table = yaml.safe_load((Path(__file__).parent / "concepts.yaml").read_text())
    objects = [
        Thing(name, row.get("colour", ""), False, row.get("plural", f"{name}s"))
        for name, row in table["objects"].items()
    ]
    shapes: list[Thing] = []
    for name, row in table["shapes"].items():
        shapes += [Thing(name, color, True, f"{name}s") for color in row]
    return Vocabulary(
        tuple(objects),
        tuple(shapes),
        frozenset(map(tuple, table["left_out"])),
        frozenset(frozenset(pair) for pair in table["held_out_pairs"]),
        {name: tuple(rgb) for name, rgb in table["backgrounds"].items()},
    )
