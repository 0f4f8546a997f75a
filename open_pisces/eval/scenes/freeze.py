"""How a version of the frozen scenes is made; see `open_pisces.eval.scenes.frozen`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from open_pisces.batch import Question, Sample
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.eval.drawing.prompts import CATEGORIES
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.scenes.frozen import KINDS, FrozenScene, Thing, checksum
from open_pisces.eval.scenes.placement import single_objects
from open_pisces.eval.scenes.vqa import NEVER_ASKED, balanced_scenes, fresh_scenes

PAIRED = ("two_object", "position")
"""Categories of the split ``pairs``, in which no two shapes stand together."""
_SEARCHED = 500  # scenes looked through for each one wanted before giving up


def freeze(
    path: Path,
    cutouts: Cutouts,
    asked: dict[str, int],
    per_category: dict[str, int],
    placed: dict[str, int],
    seed: int = 0,
) -> None:
    """Write a version: fresh scenes of seed ``seed`` as they are composed today.

    Args:
        path: the file, ``.jsonl.gz``; it must not exist.
        cutouts: the artwork.
        asked: number of questions for each split.
        per_category: number of captions of each category for the splits to draw, ``train`` and ``pairs``.
        placed: number of single objects for each split, for the decoder's gate.
        seed: of `open_pisces.eval.scenes.vqa.fresh_scenes`.

    Raises:
        EvaluationError: if the file exists: what is frozen stays.
    """
    if path.exists():
        raise EvaluationError(f"{path} exists, and what is frozen stays: choose another version")
    rows: list[dict[str, Any]] = []
    for split, limit in asked.items():
        kinds = [kind for kind in KINDS if kind not in NEVER_ASKED.get(split, ())]
        scenes = balanced_scenes(fresh_scenes(split, seed, cutouts), limit, seed, kinds)  # type: ignore[arg-type]
        rows += [_as_row(f"questions/{split}", scene_of(sample, question)) for sample, question in scenes]
    for split, number in per_category.items():
        # Another seed than the questions': no scene is in both parts.
        fresh = fresh_scenes(split, seed + 1, cutouts)  # type: ignore[arg-type]
        rows += [_as_row(f"drawing/{split}", scene) for scene in by_category(fresh, number, split == "pairs")]
    for split, number in placed.items():
        objects = single_objects(number, seed, split, cutouts)  # type: ignore[arg-type]
        rows += [_as_row(f"placement/{split}", scene_of(sample)) for sample in objects]
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime=0: the same scenes give the same bytes, which a test compares.
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def by_category(fresh: Iterator[Sample], number: int, only_pairs: bool = False) -> list[FrozenScene]:
    """``number`` scenes for each category, in the order of the categories.

    Args:
        fresh: scenes to choose from.
        number: of each category.
        only_pairs: the categories of the split ``pairs`` alone.

    Raises:
        EvaluationError: if there are too few of a category.
    """
    wanted = {name: number for name in CATEGORIES if not only_pairs or name in PAIRED}
    found: dict[str, list[FrozenScene]] = {name: [] for name in wanted}
    for sample in islice(fresh, _SEARCHED * number):
        # The rarest category that a scene fits comes first, and each scene is used once.
        name = next((n for n in _categories(sample) if n in wanted and len(found[n]) < number), None)
        if name is not None:
            found[name].append(scene_of(sample, category=name))
    short = [name for name, rows in found.items() if len(rows) < number]
    if short:
        raise EvaluationError(f"too few scenes of {', '.join(short)}: build the artwork again")
    return list(chain.from_iterable(found.values()))


def _categories(sample: Sample) -> list[str]:
    """The categories that a scene fits, the rarest first."""
    facts = sample.facts or {}
    shapes = {thing.concept for thing in vocabulary().shapes}
    kinds = [thing["concept"] in shapes for thing in facts["objects"]]
    colours = [thing["colour"] for thing in facts["objects"]]
    if facts["layout"] == "count":
        return ["counting"]
    if facts["layout"] == "single":
        return ["colors" if kinds[0] else "single_object"]
    both = all(kinds) and colours[0] != colours[1]
    # Every other pair goes to each of the two, or the first would be filled before the second begins.
    turn = ["two_object", "position"] if int(sample.key.rpartition("-")[2]) % 2 else ["position", "two_object"]
    return [*(["color_attr"] if both else []), *turn]


def scene_of(sample: Sample, question: Question | None = None, category: str = "") -> FrozenScene:
    """A composed scene without its picture."""
    facts = sample.facts or {}
    shapes = {thing.concept for thing in vocabulary().shapes}
    things = []
    for thing in facts["objects"]:
        is_shape = thing["concept"] in shapes
        things.append(Thing(thing["concept"], thing["colour"], is_shape, tuple(thing["box"])))
    return FrozenScene(
        key=sample.key,
        style=facts["objects"][0]["style"],
        ground=vocabulary().backgrounds[facts["background"]],
        things=tuple(things),
        layout=facts["layout"],
        relation=facts.get("relation", ""),
        short=sample.short,
        detailed=sample.detailed,
        sha256=checksum(sample.images[0]),
        question=(question.question, question.answer, question.kind) if question else None,
        category=category,
    )


def _as_row(part: str, scene: FrozenScene) -> dict[str, Any]:
    return {"part": part, "scene": asdict(scene)}
