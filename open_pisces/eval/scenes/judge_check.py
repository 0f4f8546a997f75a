"""How good the judges are: on real scenes, whose truth is exact, and on drawn pictures that a person labeled.

A judge's threshold is chosen before, on worn pictures of its own kind (`calibrate`), never on what is measured here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.data.images import open_image, to_pil
from open_pisces.data.order import stream
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import SIZE
from open_pisces.eval.drawing.detection import Detection
from open_pisces.eval.drawing.rules import relations
from open_pisces.eval.intervals import EvaluationError, mean_interval
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.frozen import FrozenScene
from open_pisces.eval.scenes.judge import COLORS, JUDGES, SceneJudge, classes, load_network, overlap
from open_pisces.eval.scenes.judge_training import compose, train, wear

THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(17))
LABELED = JUDGES / "labelled"
"""Drawn pictures and what a person saw in them: ``pictures.png``, a sheet without gaps, and ``labels.json``."""
PLAN = {"one-stage": (1, 3200), "two-stage": (2, 5000)}
"""Seed and steps of the judges in the package."""
CALIBRATED = 1000
"""Worn pictures on which a threshold is chosen."""
MEASURED = {"train": 1000, "style": 300}
"""Frozen scenes of each split on which a judge is measured; models never see the style of ``style``, judges do."""
_UNSEEN = 999  # seed of the pictures on which thresholds are chosen
_AT_ONCE = 100


def found_in(judge: SceneJudge, images: Sequence[Image], threshold: float | None = None) -> list[list[Detection]]:
    """What a judge finds above its threshold, in batches."""
    least = judge.threshold if threshold is None else threshold
    found = []
    for start in range(0, len(images), _AT_ONCE):
        for detections in judge.detect(images[start : start + _AT_ONCE]):
            found.append([one for one in detections if one.score > least])
    return found


def calibrate(judge: SceneJudge, cutouts: Cutouts, seed: int, count: int) -> float:
    """The threshold at which most worn pictures have exactly the right things found in them."""
    made = compose(cutouts, count, seed)
    worn = wear(torch.from_numpy(made.pixels_NHWC).permute(0, 3, 1, 2).float() / 255, stream(seed, "judge", "check"))
    every = found_in(judge, [to_pil(pixels) for pixels in worn.numpy()], 0.0)
    right = dict.fromkeys(THRESHOLDS, 0)
    for class_K, found in zip(made.class_NK, every, strict=True):
        truth = Counter(classes()[int(c)] for c in class_K if c >= 0)
        for threshold in THRESHOLDS:
            right[threshold] += _names(found, threshold) == truth
    best = [threshold for threshold in THRESHOLDS if right[threshold] == max(right.values())]
    return best[len(best) // 2]  # the middle: as far as can be from being worse


def _names(detections: Sequence[Detection], threshold: float = 0.0) -> Counter[str]:
    """How often each class was found above a threshold."""
    return Counter(one.name for one in detections if one.score > threshold)


def on_scenes(judge: SceneJudge, scenes: Sequence[FrozenScene], images: Sequence[Image]) -> dict[str, Any]:
    """Accuracy on true pictures of scenes.

    ``class``: share of objects in whose place (overlap at least a half) one of their class was found. ``count``:
    share of scenes in which each class was found as often as it is there, and no other. ``position``: share of pairs
    whose found objects stand in the true relation, by GenEval's rule, and in no opposite one. ``colour``: share of
    objects of one color that were found and given that color. Each with its interval and ``n``.
    """
    hits: dict[str, list[bool]] = {name: [] for name in ("class", "count", "position", "colour")}
    for scene, found in zip(scenes, found_in(judge, images), strict=True):
        truth = Counter(thing.concept for thing in scene.things)
        hits["count"].append(_names(found) == truth)
        matched: list[Detection | None] = []
        for thing in scene.things:
            # A half: what counts as the same box in Pascal VOC.
            near = [d for d in found if d.name == thing.concept and overlap(d.box, thing.box) >= 0.5]
            matched.append(near[0] if near else None)
            hits["class"].append(bool(near))
            if thing.colour in COLORS:
                hits["colour"].append(bool(near) and near[0].color == thing.colour)
        if scene.layout == "pair":
            first, second = matched
            true = first is not None and second is not None and relations(first.box, second.box) == (scene.relation,)
            hits["position"].append(true)
    return {name: {**mean_interval(values).rounded(), "n": len(values)} for name, values in hits.items()}


# -------------------------------------------------------------------------------------------- what a person saw


def labeled(folder: Path = LABELED) -> tuple[list[Image], list[dict[str, Any]]]:
    """Drawn pictures, and for each its caption and what a person saw: ``things`` as [concept, color or "", place].

    A place is one of nine, such as "top left" or "centre"; what could not be told is "?" and is not asked about.

    Raises:
        EvaluationError: if the sheet and the labels do not fit.
    """
    path = folder / "labels.json"
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file: the labels belong to the package, install it again")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["pictures"]
    sheet = open_image(folder / "pictures.png")
    columns = sheet.width // SIZE
    if columns * (sheet.height // SIZE) < len(rows):
        raise EvaluationError(f"{folder}: the sheet holds fewer pictures than the {len(rows)} labels")
    boxes = [((i % columns) * SIZE, (i // columns) * SIZE) for i in range(len(rows))]
    return [sheet.crop((x, y, x + SIZE, y + SIZE)) for x, y in boxes], rows


def write_sheet(images: Sequence[Image], path: Path, columns: int = 10) -> None:
    """A sheet without gaps of pictures of 64 x 64 pixels, for `labeled`."""
    sheet = Pillow.new("RGB", (columns * SIZE, -(-len(images) // columns) * SIZE))
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * SIZE, (i // columns) * SIZE))
    sheet.save(path, optimize=True)


def on_labeled(judge: SceneJudge, images: Sequence[Image], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Agreement with a person on drawn pictures.

    ``things``: share of pictures in which judge and person name the same things as often. ``class``: share of the
    person's nameable things that the judge finds too. ``colour`` and ``place`` of those that both name. What the
    person could not name ("?") the judge may call what it likes: it is left out of ``things`` on both sides.
    """
    hits: dict[str, list[bool]] = {name: [] for name in ("things", "class", "colour", "place")}
    for row, found in zip(rows, found_in(judge, images), strict=True):
        seen = [thing for thing in row["things"] if thing[0] != "?"]
        free = len(row["things"]) - len(seen)
        wanted = Counter(thing[0] for thing in seen)
        got = _names(found)
        extra = got - wanted
        hits["things"].append(not wanted - got and extra.total() <= free)
        left = list(found)
        for concept, color, place in seen:
            near = [d for d in left if d.name == concept]
            hits["class"].append(bool(near))
            if near:
                # Of several of one kind the one in the same place, so that the others are left for their own places.
                best = next((d for d in near if place_of(d) == place), near[0])
                left.remove(best)
                hits["place"].append(place_of(best) == place)
                if color in COLORS:
                    hits["colour"].append(best.color == color)
    return {name: {**mean_interval(values).rounded(), "n": len(values)} for name, values in hits.items() if values}


def place_of(detection: Detection) -> str:
    """One of nine places, by the middle of the box, in a picture of 64 x 64 pixels."""
    x, y = ((detection.box[i] + detection.box[i + 2]) / 2 / SIZE for i in (0, 1))
    across, down = (min(2, int(3 * value)) for value in (x, y))
    words = [("top", "", "bottom")[down], ("left", "", "right")[across]]
    return " ".join(word for word in words if word) or "centre"


def agreement(judges: Sequence[SceneJudge], images: Sequence[Image]) -> float:
    """Share of pictures in which two judges find the same things as often."""
    one, other = (found_in(judge, images) for judge in judges)
    return float(np.mean([_names(a) == _names(b) for a, b in zip(one, other, strict=True)]))


# ------------------------------------------------------------------------------------------------------ the card


def make(
    folder: str | Path, cutouts: Cutouts, plan: Mapping[str, tuple[int, int]] = PLAN, pictures: int = 100_000
) -> None:
    """Train both judges from nothing, and write them with their card.

    Args:
        folder: where to; nothing may be there yet.
        cutouts: the artwork.
        plan: seed and steps of each judge.
        pictures: composed for each judge.

    Raises:
        EvaluationError: if the folder holds something.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise EvaluationError(f"{folder} is not empty: name a new folder for the judges")
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (seed, steps) in plan.items():
        SceneJudge(kind, train(kind, cutouts, seed, steps, pictures), 0.0).save(folder)
    write_card(folder, cutouts, plan, pictures)


def write_card(
    folder: Path, cutouts: Cutouts, plan: Mapping[str, tuple[int, int]] = PLAN, pictures: int = 100_000
) -> dict[str, Any]:
    """Choose the thresholds of the judges in a folder, measure them, and write ``card.json``."""
    judges = [SceneJudge(kind, load_network(kind, folder), 0.0) for kind in plan]
    card: dict[str, Any] = {}
    for judge in judges:
        judge.threshold = judge.counting_threshold = calibrate(judge, cutouts, _UNSEEN, CALIBRATED)
        seed, steps = plan[judge.kind]
        parameters = sum(p.numel() for p in judge.network.parameters())
        trained = {"seed": seed, "steps": steps, "pictures": pictures, "parameters": parameters}
        card[judge.kind] = {"threshold": judge.threshold, "trained": trained, **measure(judge, cutouts)}
    images, _ = labeled()
    card["agreement on labelled pictures"] = round(agreement(judges, images), 4)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def measure(judge: SceneJudge, cutouts: Cutouts) -> dict[str, Any]:
    """A judge on frozen scenes (`MEASURED`) and on labeled drawings."""
    found: dict[str, Any] = {}
    for split, count in MEASURED.items():
        scenes = frozen_scenes.questions(count, split)
        images, _ = frozen_scenes.pictures(scenes, cutouts)
        found[f"real scenes, {split}"] = on_scenes(judge, scenes, images)
    return {**found, "labelled drawings": on_labeled(judge, *labeled())}
