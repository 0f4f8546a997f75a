"""Frozen scenes: what v1 holds, that reading gives what was frozen, and what is refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as Pillow

from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.eval.drawing.prompts import CATEGORIES, Unwanted, Wanted
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.scenes import frozen, placement
from open_pisces.eval.scenes import vqa as scenes
from open_pisces.eval.scenes.freeze import freeze

V1 = "65f808ab8387f426"


@pytest.fixture(scope="module")
def cutouts() -> Cutouts:
    """Squares of many colours in place of artwork."""
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        for style in ("noto", "fluent-flat", "twemoji"):
            key = (style, thing.concept, thing.colour if thing.is_shape else "")
            pictures[key] = Pillow.new("RGBA", (32, 24 + number % 8), (7 * number % 256, 90, 200 - number, 255))
    return Cutouts(pictures, {"noto": "", "fluent-flat": "flat", "twemoji": "twemoji"})


def test_the_first_version_is_what_it_was() -> None:
    assert hashlib.sha256((frozen.FROZEN / "v1.jsonl.gz").read_bytes()).hexdigest()[:16] == V1


def test_what_the_first_version_holds() -> None:
    drawing = frozen.load("drawing/train")
    assert Counter(scene.category for scene in drawing) == dict.fromkeys(CATEGORIES, 60)
    assert Counter(s.category for s in frozen.load("drawing/pairs")) == {"two_object": 60, "position": 60}
    assert {split: len(frozen.load(f"questions/{split}")) for split in ("train", "pairs", "style")} == {
        "train": 1000,
        "pairs": 300,
        "style": 300,
    }
    for scene in (*drawing, *frozen.load("drawing/pairs")):
        names = {thing.concept for thing in scene.things}
        shapes = [thing for thing in scene.things if thing.is_shape]
        wanted = {
            "single_object": len(scene.things) == 1 and not shapes,
            "colors": len(scene.things) == len(shapes) == 1,
            "counting": 2 <= len(scene.things) <= 4 and len(names) == 1,
            "two_object": len(scene.things) == len(names) == 2,
            "position": len(scene.things) == len(names) == 2 and bool(scene.relation),
            "color_attr": len(shapes) == 2 and shapes[0].colour != shapes[1].colour,
        }
        assert wanted[scene.category], scene
        assert all(name[:-2] in scene.detailed.lower() and name[:-2] in scene.short for name in names)  # plurals
    held_out = vocabulary().held_out_pairs
    meeting = [frozenset(t.concept for t in s.things) for s in drawing if s.layout == "pair"]
    assert not [pair for pair in meeting if pair in held_out]
    assert all(frozenset(t.concept for t in s.things) in held_out for s in frozen.load("drawing/pairs"))


def test_scenes_are_prompts_of_geneval() -> None:
    by_category = {scene.category: scene for scene in frozen.load("drawing/train")}
    two, place = by_category["two_object"], by_category["position"]
    assert two.prompt().include == tuple(Wanted(thing.concept) for thing in two.things)
    first, second = (thing.concept for thing in place.things)
    assert place.prompt().include == (Wanted(second), Wanted(first, position=(place.relation, 0)))
    assert f"{first} {place.relation} " in place.short and place.short.index(second) > place.short.index(first)
    many = by_category["counting"]
    name, count = many.things[0].concept, len(many.things)
    assert many.prompt().include == (Wanted(name, count),) and many.prompt().exclude == (Unwanted(name, count + 1),)
    both = by_category["color_attr"]
    assert both.prompt().include == tuple(Wanted(t.concept, color=t.colour) for t in both.things)
    assert (
        by_category["colors"].prompt().include[0].color and not by_category["single_object"].prompt().include[0].color
    )
    assert both.prompt().prompt == both.short and both.prompt(detailed=True).prompt == both.detailed


def test_frozen_questions_are_shared_out_among_the_types() -> None:
    found = Counter(scene.asked().kind for scene in frozen.questions(20))
    assert found == {"what": 4, "how_many": 4, "which_colour": 3, "where": 3, "is_there": 3, "left_or_right": 3}
    assert "how_many" not in {scene.asked().kind for scene in frozen.questions(300, "pairs")}
    assert frozen.questions(600)[:5] == frozen.questions(1000)[:5]


def test_freezing_and_reading_give_the_composed_scenes(
    cutouts: Cutouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(tmp_path / "v9.jsonl.gz", cutouts, {"train": 12}, {"train": 2, "pairs": 2}, {"train": 6}, seed=3)
    monkeypatch.setattr(frozen, "FROZEN", tmp_path)
    monkeypatch.setattr(frozen, "VERSION", "v9")
    read = frozen.load("questions/train", "v9")
    fresh = scenes.balanced_scenes(scenes.fresh_scenes("train", 3, cutouts), 12, 3)
    images, differ = frozen.pictures(read, cutouts)
    assert differ == 0 and [image.tobytes() for image in images] == [s.images[0].tobytes() for s, _ in fresh]
    assert [scene.asked() for scene in read] == [question for _, question in fresh]
    placed = frozen.load("placement/train", "v9")
    assert [s.key for s in placed] == [s.key for s in placement.single_objects(6, 3, "train", cutouts)]
    other = Cutouts({key: picture.rotate(90) for key, picture in cutouts.pictures.items()}, cutouts.words)
    assert frozen.pictures(read, other)[1] > 0  # artwork that changed is counted
    with pytest.raises(EvaluationError, match="what is frozen stays"):
        freeze(tmp_path / "v9.jsonl.gz", cutouts, {}, {}, {})
    assert (tmp_path / "v9.jsonl.gz").read_bytes() == _again(tmp_path, cutouts)


def _again(folder: Path, cutouts: Cutouts) -> bytes:
    """The same version made once more, elsewhere."""
    freeze(folder / "again.jsonl.gz", cutouts, {"train": 12}, {"train": 2, "pairs": 2}, {"train": 6}, seed=3)
    return (folder / "again.jsonl.gz").read_bytes()


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(EvaluationError, match="no frozen scenes 'v0': choose one of v1"):
        frozen.load("drawing/train", "v0")
    with pytest.raises(EvaluationError, match="no part 'drawing/style': choose one of drawing/pairs, drawing/train"):
        frozen.load("drawing/style")
    with pytest.raises(EvaluationError, match="limit = 1001: the frozen scenes v1 hold 1000 questions"):
        frozen.questions(1001)
    with pytest.raises(EvaluationError, match="the artwork lacks"):
        frozen.load("drawing/train")[0].picture(Cutouts({}, {}))
    with pytest.raises(EvaluationError, match="has no question"):
        frozen.load("drawing/train")[0].asked()
