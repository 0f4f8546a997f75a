"""The scenes' judges: what they are shown, what they learn from, what their figures mean; and those in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from PIL.Image import Image

from open_pisces.data.order import stream
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import SIZE, vocabulary
from open_pisces.eval.drawing.detection import Detection, DetectorError
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes import judge as judges
from open_pisces.eval.scenes import judge_check as check
from open_pisces.eval.scenes import judge_training as training
from open_pisces.eval.scenes.frozen import FrozenScene, Thing


@pytest.fixture(scope="module")
def cutouts() -> Cutouts:
    """Discs and squares of many colours in place of artwork."""
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        picture = Pillow.new("RGBA", (48, 40), (0, 0, 0, 0))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if number % 2 else draw.rectangle)((0, 0, 47, 39), fill=(5 * number % 256, 60, 250 - number, 255))
        pictures["noto", thing.concept, thing.colour if thing.is_shape else ""] = picture
    return Cutouts(pictures, {"noto": ""})


# ------------------------------------------------------------------------------------------------ what they learn from


def test_a_picture_depends_on_seed_and_number_alone(cutouts: Cutouts) -> None:
    few, more = training.compose(cutouts, 4, 7), training.compose(cutouts, 12, 7)
    assert all((a == b[:4]).all() for a, b in zip(few, more, strict=True))
    assert (training.compose(cutouts, 4, 8).pixels_NHWC != few.pixels_NHWC).any()


def test_pictures_hold_what_is_said_of_them(cutouts: Cutouts) -> None:
    made = training.compose(cutouts, 200, 3)
    numbers = (made.class_NK >= 0).sum(1)
    assert set(numbers.tolist()) == {0, 1, 2, 3, 4, 5}
    for i, k in zip(*np.nonzero(made.class_NK >= 0), strict=True):
        left, top, right, bottom = made.box_NK4[i, k].astype(int)
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
        name = judges.classes()[made.class_NK[i, k]]
        declared = {t.colour for t in (*vocabulary().objects, *vocabulary().shapes) if t.concept == name}
        color = judges.COLORS[made.color_NK[i, k]] if made.color_NK[i, k] >= 0 else ""
        assert color in declared
    inside = made.pixels_NHWC[numbers == 1][0]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) > 1


def test_wear_keeps_shape_range_and_a_part_of_the_pictures() -> None:
    pixels = torch.rand(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    worn = training.wear(pixels, stream(0, "test"))
    assert worn.shape == pixels.shape and worn.min() >= 0 and worn.max() <= 1
    same = (worn == pixels).flatten(1).all(1).float().mean()
    assert 0.1 < same < 0.4
    assert torch.equal(worn, training.wear(pixels, stream(0, "test")))


def test_a_plain_picture_stays_plain_but_for_grain() -> None:
    grey = torch.full((32, 3, SIZE, SIZE), 0.5)
    worn = training.wear(grey, stream(1, "test"))
    assert (worn.mean((2, 3)) - 0.5).abs().max() < 0.2 and worn.flatten(1).std(1).max() < 0.15


def test_targets_decode_to_the_boxes_they_were_made_of() -> None:
    box = torch.tensor([[[4.0, 6.0, 24.0, 30.0], [40.0, 35.0, 62.0, 63.0]]])
    want = training.wanted(box, torch.tensor([[3, 5]]))
    tops = torch.nonzero(want.heat_BHW[0] == 1)
    assert tops.tolist() == [[4, 3], [12, 12]]  # middles (14, 18) and (51, 49): cells of 4 pixels, (row, column)
    cell = tops[:, 0] * judges.GRID + tops[:, 1]
    raw = want.raw_BHW4[0][tops[:, 0], tops[:, 1]]
    assert torch.allclose(judges.boxes(raw[None], cell[None]), box, atol=1e-4)
    assert want.index_BHW[0, 4, 3] == 0 and want.index_BHW[0, 12, 12] == 1 and want.index_BHW[0, 0, 15] == -1


def test_nothing_is_wanted_of_an_empty_picture() -> None:
    want = training.wanted(torch.zeros(2, 5, 4), torch.full((2, 5), -1))
    assert want.heat_BHW.max() == 0 and (want.index_BHW == -1).all()


@pytest.mark.parametrize("kind", judges.NETWORKS)
def test_a_few_steps_lower_the_loss(cutouts: Cutouts, kind: str) -> None:
    said: list[str] = []
    network = training.train(kind, cutouts, 0, 12, 32, batch_size=16, say=said.append)
    made = training.compose(cutouts, 32, 0)
    torch.manual_seed(0)
    untrained = judges.NETWORKS[kind]()
    losses = []
    for net in (untrained, network):
        pixels = torch.from_numpy(made.pixels_NHWC).permute(0, 3, 1, 2).float() / 255
        losses.append(training.LOSSES[kind](net, pixels, *(torch.from_numpy(part) for part in made[1:])).item())
    assert losses[1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------------------------- the networks


def test_peaks_stand_above_their_neighbours() -> None:
    heat = torch.zeros(1, 1, judges.GRID, judges.GRID)
    heat[0, 0, 2, 3], heat[0, 0, 2, 4], heat[0, 0, 9, 9] = 0.8, 0.7, 0.5
    score, cell = judges.peaks(heat)
    assert score[0, :3].tolist() == pytest.approx([0.8, 0.5, 0.0])  # (2, 4) is no peak: its neighbour is higher
    assert cell[0, :2].tolist() == [2 * judges.GRID + 3, 9 * judges.GRID + 9]


def test_a_cut_holds_its_box_scaled_and_unbent() -> None:
    pixels = torch.zeros(2, 3, SIZE, SIZE)
    pixels[1, 0, 20:44, 8:32] = 1  # a red square, 24 x 24
    crop = judges.cut(pixels, torch.tensor([[8.0, 20.0, 32.0, 44.0]]), torch.tensor([1]))
    assert crop.shape == (1, 3, judges.CROP, judges.CROP) and crop[0, 1:].max() == 0
    inside = judges.CROP / 1.15
    assert float(crop[0, 0].mean()) == pytest.approx((inside / judges.CROP) ** 2, abs=0.05)
    middle = judges.CROP // 2
    assert crop[0, 0, middle, middle] == 1 and crop[0, 0, 0, 0] < 0.5


def test_overlapping_boxes_are_one_object_and_the_surest_stays() -> None:
    score = torch.tensor([0.9, 0.6, 0.5] + [0.01] * (judges.MOST - 3))
    box = torch.tensor([[0.0, 0, 20, 20], [2, 0, 22, 20], [30, 30, 50, 50]] + [[0.0, 0, 5, 5]] * (judges.MOST - 3))
    names = torch.nn.functional.one_hot(torch.arange(judges.MOST) % 48, 48).float()
    colors = torch.nn.functional.one_hot(torch.arange(judges.MOST) % 10, 10).float()
    found = judges._detections(judges.Found(score, box, names, colors), Pillow.new("RGB", (64, 64)))
    assert [(d.name, d.color, round(d.score, 2)) for d in found] == [
        (judges.classes()[0], "red", 0.9),
        (judges.classes()[2], "yellow", 0.5),
    ]


def test_boxes_come_back_in_the_pictures_own_pixels() -> None:
    score = torch.tensor([0.9] + [0.0] * (judges.MOST - 1))
    box = torch.tensor([[16.0, 8, 32, 24]]).repeat(judges.MOST, 1)
    names, colors = torch.eye(judges.MOST, 48), torch.eye(judges.MOST, 10)
    (found,) = judges._detections(judges.Found(score, box, names, colors), Pillow.new("RGB", (256, 128)))
    assert found.box == (64 + 32, 16, 64 + 64, 48)  # short side 128: twice as large, cropped by 64 on the left


def test_overlap_is_intersection_over_union() -> None:
    assert judges.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert judges.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0 and judges.overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1


@pytest.mark.parametrize("kind", judges.NETWORKS)
def test_a_judge_is_what_was_saved_and_a_batch_is_its_pictures(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = judges.NETWORKS[kind]()
    with torch.no_grad():
        network.middle.bias.fill_(0.0)  # type: ignore[union-attr]
    network.to(torch.bfloat16).float()
    judge = judges.SceneJudge(kind, network, 0.01)
    judge.save(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({kind: {"threshold": 0.25}}))
    again = judges.SceneJudge.from_pretrained(kind, tmp_path)
    assert again.threshold == again.counting_threshold == 0.25
    rng = np.random.default_rng(0)
    images = [Pillow.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(4)]
    batch = again.detect(images, [{}] * 4)
    assert judge.detect(images) == batch
    alone = [again.detect([image])[0] for image in images]
    for one, other in zip(batch, alone, strict=True):
        assert [d.name for d in one] == [d.name for d in other]
        assert [d.score for d in one] == pytest.approx([d.score for d in other], abs=1e-4)
    assert again.detect([]) == []


def test_bad_judges_are_named(tmp_path: Path, cutouts: Cutouts) -> None:
    with pytest.raises(DetectorError, match="no judge 'three-stage': choose one-stage or two-stage"):
        judges.SceneJudge.from_pretrained("three-stage", tmp_path)
    with pytest.raises(DetectorError, match="train it with `pisces eval judge --train"):
        judges.SceneJudge.from_pretrained("one-stage", tmp_path)
    with pytest.raises(DetectorError, match="no judges at"):
        judges.card(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(EvaluationError, match="is not empty"):
        check.make(tmp_path, cutouts)
    with pytest.raises(EvaluationError, match="labels.json: no such file"):
        check.labeled(tmp_path)


# ----------------------------------------------------------------------------------------------------- the figures


class Scripted:
    """A judge that finds what it is told."""

    kind, name, threshold = "one-stage", "scripted", 0.3

    def __init__(self, *found: list[Detection]) -> None:
        self.found, self.shown = list(found), 0

    def detect(self, images: list[Image], colored: Any = ()) -> list[list[Detection]]:
        """The next pictures' script."""
        start, self.shown = self.shown, self.shown + len(images)
        return self.found[start : self.shown]


def one(name: str, box: tuple[int, int, int, int], color: str = "", score: float = 0.9) -> Detection:
    return Detection(name, box, score, {color: 1.0} if color else {})


LEFT, RIGHT = (4, 20, 28, 44), (36, 20, 60, 44)


def pair(first: str, second: str, relation: str = "left of") -> FrozenScene:
    things = (Thing("heart", first, True, LEFT), Thing("circle", second, True, RIGHT))
    return FrozenScene("k", "noto", (255, 255, 255), things, "pair", relation, "", "", "")


CAT, CAT_TOO = ["cat", "", "left"], ["cat", "", "right"]
BLANK = Pillow.new("RGB", (64, 64))


@pytest.mark.parametrize(
    ("found", "class_", "count", "position", "color"),
    [
        ([one("heart", LEFT, "red"), one("circle", RIGHT, "blue")], 1, 1, 1, 1),
        ([one("circle", RIGHT, "blue"), one("heart", LEFT, "red")], 1, 1, 1, 1),  # the order means nothing
        ([one("heart", LEFT, "blue"), one("circle", RIGHT, "blue")], 1, 1, 1, 0.5),
        ([one("heart", LEFT, "red")], 0.5, 0, 0, 0.5),
        ([one("heart", LEFT, "red"), one("circle", RIGHT, "blue", 0.3)], 0.5, 0, 0, 0.5),  # at the threshold: not found
        ([one("heart", RIGHT, "red"), one("circle", LEFT, "blue")], 0, 1, 0, 0),  # as many, elsewhere
        ([one("heart", LEFT, "red"), one("circle", RIGHT, "blue"), one("cat", (0, 0, 9, 9))], 1, 0, 1, 1),
        ([], 0, 0, 0, 0),
    ],
)
def test_accuracy_on_scenes(found: list[Detection], class_: float, count: float, position: float, color: float) -> None:
    scores = check.on_scenes(Scripted(found), [pair("red", "blue")], [BLANK])  # type: ignore[arg-type]
    assert {name: row["score"] for name, row in scores.items()} == {
        "class": class_,
        "count": count,
        "position": position,
        "colour": color,
    }


def test_a_pair_in_another_relation_is_not_in_place() -> None:
    found = [one("heart", LEFT, "red"), one("circle", RIGHT, "blue")]
    for relation, right in (("left of", 1), ("right of", 0), ("above", 0)):
        scores = check.on_scenes(Scripted(found), [pair("red", "blue", relation)], [BLANK])  # type: ignore[arg-type]
        assert (scores["class"]["score"], scores["position"]["score"]) == (1, right)


@pytest.mark.parametrize(
    ("things", "found", "scores"),
    [
        ([CAT], [one("cat", LEFT)], {"things": 1, "class": 1, "place": 1}),
        ([CAT_TOO], [one("cat", LEFT)], {"things": 1, "class": 1, "place": 0}),
        ([["heart", "red", "left"]], [one("heart", LEFT, "blue")], {"things": 1, "class": 1, "place": 1, "colour": 0}),
        ([CAT], [one("dog", LEFT)], {"things": 0, "class": 0}),
        ([CAT], [one("cat", LEFT), one("dog", RIGHT)], {"things": 0, "class": 1, "place": 1}),
        # What a person could not name may be called anything, or nothing.
        ([CAT, ["?", "", "right"]], [one("cat", LEFT), one("dog", RIGHT)], {"things": 1, "class": 1, "place": 1}),
        ([CAT, ["?", "", "right"]], [one("cat", LEFT)], {"things": 1, "class": 1, "place": 1}),
        ([["?", "", "left"]], [one("cat", LEFT), one("dog", RIGHT)], {"things": 0}),
        ([CAT, CAT_TOO], [one("cat", RIGHT), one("cat", LEFT)], {"things": 1, "class": 1, "place": 1}),
        ([CAT, CAT_TOO], [one("cat", LEFT)], {"things": 0, "class": 0.5, "place": 1}),
    ],
)
def test_agreement_with_a_person(things: Any, found: list[Detection], scores: dict[str, float]) -> None:
    measured = check.on_labeled(Scripted(found), [BLANK], [{"things": things}])  # type: ignore[arg-type]
    assert {name: row["score"] for name, row in measured.items()} == scores


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 20, 20), "top left"),
        ((20, 20, 44, 44), "centre"),
        ((40, 20, 64, 44), "right"),
        ((22, 50, 42, 64), "bottom"),
    ],
)
def test_places_are_ninths(box: tuple[int, int, int, int], place: str) -> None:
    assert check.place_of(one("cat", box)) == place


def test_two_judges_agree_where_they_find_the_same_things() -> None:
    a = Scripted([one("cat", LEFT)], [one("cat", LEFT)], [])
    b = Scripted([one("cat", RIGHT)], [one("cat", LEFT), one("cat", RIGHT)], [])
    assert check.agreement([a, b], [BLANK] * 3) == pytest.approx(2 / 3)  # type: ignore[list-item]


def test_the_threshold_is_the_one_with_most_pictures_right(cutouts: Cutouts) -> None:
    made = training.compose(cutouts, 20, 5)
    script = []
    for i in range(20):  # true things at 0.7, one false alarm a picture at 0.42
        true = [one(judges.classes()[c], LEFT, score=0.7) for c in made.class_NK[i] if c >= 0]
        script.append([*true, one("cat", RIGHT, score=0.42)])
    found = check.calibrate(Scripted(*script), cutouts, 5, 20)  # type: ignore[arg-type]
    assert 0.42 <= found < 0.7


def test_judges_are_made_measured_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    styles = sorted({scene.style for scene in frozen_scenes.load("questions/train")})
    plate = Pillow.new("RGBA", (30, 30), (200, 10, 10, 255))
    things = (*vocabulary().objects, *vocabulary().shapes)
    keys = [(style, t.concept, t.colour if t.is_shape else "") for style in styles for t in things]
    plates = Cutouts(dict.fromkeys(keys, plate), {style: style for style in styles})
    monkeypatch.setattr(check, "MEASURED", {"train": 12})
    monkeypatch.setattr(check, "CALIBRATED", 8)
    plan = {"one-stage": (1, 2), "two-stage": (2, 2)}
    check.make(tmp_path / "made", plates, plan, pictures=8)
    card = judges.card(tmp_path / "made")
    for kind in plan:
        judge = judges.SceneJudge.from_pretrained(kind, tmp_path / "made")
        assert judge.threshold == card[kind]["threshold"] in check.THRESHOLDS
        assert card[kind]["trained"]["steps"] == 2 and card[kind]["real scenes, train"]["count"]["n"] == 12
        assert check.measure(judge, plates)["labelled drawings"] == card[kind]["labelled drawings"]


# ---------------------------------------------------------------------------------------------- those in the package


def test_the_card_says_what_holds() -> None:
    card = judges.card()
    images, rows = check.labeled()
    assert len(images) == len(rows) == 100
    both = [judges.SceneJudge.from_pretrained(kind) for kind in judges.NETWORKS]
    for judge in both:
        assert check.on_labeled(judge, images, rows) == card[judge.kind]["labelled drawings"]
        real = card[judge.kind]["real scenes, train"]
        assert real["count"]["n"] == 1000
        assert all(real[name]["score"] >= 0.97 for name in ("class", "count", "position", "colour"))
    assert check.agreement(both, images) == pytest.approx(card["agreement on labelled pictures"], abs=1e-4)


def test_labels_speak_the_judges_language() -> None:
    _, rows = check.labeled()
    things = [thing for row in rows for thing in row["things"]]
    assert {name for name, *_ in things} <= {*judges.classes(), "?"}
    assert {color for _, color, _ in things} <= {*judges.COLORS, ""}
    places = {check.place_of(one("cat", (x, y, x + 2, y + 2))) for x in (5, 30, 55) for y in (5, 30, 55)}
    assert {place for *_, place in things} <= places
