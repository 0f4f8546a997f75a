"""Scenes and questions that scores are made of, kept as they were: later changes to the composer change no score.

A version is one file, ``sets/v1.jsonl.gz``, made once by `scenes.freeze` and never again. It holds what
was composed, not how: which drawing stands where, the captions, the questions. Its parts: ``questions/SPLIT`` (one
question a scene, the six types in turn), ``drawing/train`` (60 captions for each of GenEval's six categories),
``drawing/pairs`` (60 for each of two, with pairs of things that no training has seen together) and ``placement/SPLIT``
(single objects, as many in each third). Captions are all that drawing needs; true pictures are put together from the
artwork when they are asked for, and compared with the checksums in the file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Question
from open_pisces.datasets.scenes.artwork import fit
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import SIZE
from open_pisces.eval.drawing.prompts import Prompt, Unwanted, Wanted
from open_pisces.eval.intervals import EvaluationError

VERSION = "v1"
FROZEN = Path(__file__).parent / "sets"
KINDS = ("what", "how_many", "which_colour", "where", "is_there", "left_or_right")
"""The six types of questions, as `open_pisces.datasets.scenes.texts` names them."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object of a frozen scene."""

    concept: str
    colour: str
    """Its one color, "" if it has several."""
    is_shape: bool
    """Whether captions name its color."""
    box: Box
    """Left, top, right, bottom in pixels; right and bottom lie outside."""


@dataclass(frozen=True)
class FrozenScene:
    """A scene as it was composed, without its picture."""

    key: str
    style: str
    ground: tuple[int, int, int]
    things: tuple[Thing, ...]
    layout: str
    """``single``, ``pair`` or ``count``."""
    relation: str
    """Of a pair: ``left of``, ``right of``, ``above`` or ``below``."""
    short: str
    detailed: str
    sha256: str
    """The first sixteen digits of the true pixels' checksum."""
    question: tuple[str, str, str] | None = None
    """Question, answer and type, in the part ``questions``."""
    category: str = ""
    """GenEval's, in the part ``drawing``."""

    def picture(self, cutouts: Cutouts) -> Image:
        """The true picture, 64 x 64.

        Raises:
            EvaluationError: if the artwork lacks one of its drawings.
        """
        picture = Pillow.new("RGB", (SIZE, SIZE), self.ground)
        for thing in self.things:
            key = (self.style, thing.concept, thing.colour if thing.is_shape else "")
            if key not in cutouts.pictures:
                raise EvaluationError(f"the artwork lacks {' '.join(key).strip()}: `pisces data build artwork`")
            left, top, right, bottom = thing.box
            # The longer side decides: drawings keep their shape.
            drawing = fit(cutouts.pictures[key], max(right - left, bottom - top))
            picture.paste(drawing, (left, top), drawing)
        return picture

    def prompt(self, detailed: bool = False) -> Prompt:
        """It as a prompt of GenEval, by its short or its detailed caption.

        Two objects come with a relation here, for the scenes' captions have no other way to say them; the category
        "two_object" does not look at it.
        """
        color = {thing.concept: thing.colour for thing in self.things}
        names = list(color)
        colored = self.category in ("colors", "color_attr")
        wanted = [Wanted(name, color=color[name] if colored else "") for name in names]
        unwanted: tuple[Unwanted, ...] = ()
        if self.category == "counting":
            wanted = [Wanted(names[0], len(self.things))]
            unwanted = (Unwanted(names[0], len(self.things) + 1),)
        if self.category == "position":  # "A left of B": B first, as in the official file
            wanted = [Wanted(names[1]), Wanted(names[0], position=(self.relation, 0))]
        text = self.detailed if detailed else self.short
        return Prompt(self.key, self.category, text, tuple(wanted), unwanted)

    def asked(self) -> Question:
        """Its question."""
        if self.question is None:
            raise EvaluationError(f"{self.key} has no question: take scenes of the part `questions`")
        return Question(*self.question)


@cache
def load(part: str, version: str = VERSION) -> tuple[FrozenScene, ...]:
    """The scenes of a part, such as ``questions/train``, in their order.

    Raises:
        EvaluationError: for a part or version that does not exist.
    """
    path = FROZEN / f"{version}.jsonl.gz"
    if not path.is_file():
        found = ", ".join(sorted(file.name.partition(".")[0] for file in FROZEN.glob("*.jsonl.gz")))
        raise EvaluationError(f"no frozen scenes {version!r}: choose one of {found}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    chosen = [_scene(row["scene"]) for row in rows if row["part"] == part]
    if not chosen:
        parts = ", ".join(sorted({row["part"] for row in rows}))
        raise EvaluationError(f"the frozen scenes {version} have no part {part!r}: choose one of {parts}")
    return tuple(chosen)


def _scene(row: dict[str, Any]) -> FrozenScene:
    things = tuple(Thing(**{**thing, "box": tuple(thing["box"])}) for thing in row["things"])
    question = tuple(row["question"]) if row["question"] else None
    return FrozenScene(**{**row, "things": things, "ground": tuple(row["ground"]), "question": question})


def pictures(scenes: Sequence[FrozenScene], cutouts: Cutouts) -> tuple[list[Image], int]:
    """The true pictures, and how many of them are not what they were when the scenes were frozen.

    Other versions of the artwork or of Pillow may draw a pixel differently; a score says so if they do.
    """
    made = [scene.picture(cutouts) for scene in scenes]
    return made, sum(checksum(picture) != scene.sha256 for picture, scene in zip(made, scenes, strict=True))


def questions(limit: int, split: str = "train", version: str = VERSION) -> list[FrozenScene]:
    """``limit`` scenes with a question each, equally many of each type (the first types get the rest).

    Raises:
        EvaluationError: if ``limit`` is below the number of types, or above what was frozen.
    """
    every = load(f"questions/{split}", version)
    kinds = sorted({scene.asked().kind for scene in every}, key=KINDS.index)
    if not len(kinds) <= limit <= len(every):
        raise EvaluationError(
            f"limit = {limit}: the frozen scenes {version} hold {len(every)} questions of split {split!r}, of "
            f"{len(kinds)} types; ask for {len(kinds)} to {len(every)}, or give a seed for fresh scenes"
        )
    left = {kind: limit // len(kinds) + (place < limit % len(kinds)) for place, kind in enumerate(kinds)}
    chosen = []
    for scene in every:
        kind = scene.asked().kind
        if left[kind]:
            left[kind] -= 1
            chosen.append(scene)
    return chosen


def checksum(picture: Image) -> str:
    """The first sixteen digits of the sha256 of a picture's pixels."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()[:16]
