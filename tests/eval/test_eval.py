"""Scores, worked by hand: places and colours of drawn rectangles, answers, baselines, intervals."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Question, Sample
from open_pisces.datasets.scenes.composer import Composer, Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.datasets.scenes.texts import words
from open_pisces.eval.distances.pixel_errors import PSNR_CAP
from open_pisces.eval.scenes import pixels as ruler
from open_pisces.eval.scenes import placement
from open_pisces.eval.scenes import vqa as scenes

RGB = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "pink": (234, 89, 110 + 80),
    "brown": (193, 105, 79),
    "black": (49, 55, 61),
    "gray": (150, 150, 150),
    "white": (245, 245, 245),
}
SIDE = 60


def rectangle(colour: str, box: tuple[int, int, int, int], ground: tuple[int, int, int] = (200, 225, 190)) -> Image:
    """A picture of one filled rectangle."""
    image = Pillow.new("RGB", (SIDE, SIDE), ground)
    image.paste(RGB[colour], box)
    return image


def box_in(column: int, row: int, side: int = 14) -> tuple[int, int, int, int]:
    """A box in the middle of a third."""
    left, top = 10 + 20 * column - side // 2, 10 + 20 * row - side // 2
    return (left, top, left + side, top + side)


def sample_of(colour: str, box: tuple[int, int, int, int], key: str = "k") -> Sample:
    """A single-object sample as the composer gives it."""
    return Sample(key, (rectangle(colour, box),), facts={"objects": [{"concept": "square", "box": list(box)}]})


def pixels(image: Image) -> np.ndarray:
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


# ------------------------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("colour", RGB)
def test_the_ruler_names_colours(colour: str) -> None:
    seen = ruler.look(pixels(rectangle(colour, box_in(1, 1))))
    assert seen.colors == (colour,) and (seen.column, seen.row) == (1, 1)


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("row", range(3))
def test_the_ruler_finds_thirds(column: int, row: int) -> None:
    seen = ruler.look(pixels(rectangle("blue", box_in(column, row))))
    assert (seen.column, seen.row) == (column, row)


def test_thirds_end_where_they_should() -> None:
    assert [ruler.third(x) for x in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_an_empty_picture_agrees_in_nothing() -> None:
    empty = Pillow.new("RGB", (SIDE, SIDE), (200, 225, 190))
    assert ruler.look(pixels(empty)) == ruler.Look(ruler.NOWHERE, ruler.NOWHERE, (), False)
    found = placement.compare([sample_of("red", box_in(0, 0))] * 3, [empty] * 3)
    assert found.score == found.colour.score == found.colour_near.score == found.third.score == 0


def test_a_coloured_thing_keeps_its_colour_inside_a_black_outline() -> None:
    image = rectangle("black", box_in(1, 1, 16))  # 256 pixels, 144 of which turn yellow
    image.paste(RGB["yellow"], box_in(1, 1, 12))
    assert ruler.look(pixels(image)).colors == ("yellow", "black")
    image.paste(RGB["black"], box_in(1, 1, 10))  # 44 yellow against 212 black: a black thing with a yellow rim
    assert ruler.look(pixels(image)).colors == ("black", "yellow")


@pytest.mark.parametrize(("right", "wrong"), [("orange", "brown"), ("red", "pink"), ("white", "gray")])
def test_neighbouring_colours_are_not_merged(right: str, wrong: str) -> None:
    box = box_in(2, 0)
    drawn = rectangle(wrong, box)
    found = placement.compare([sample_of(right, box)], [drawn])
    assert (found.score, found.colour.score, found.colour_near.score) == (0, 0, 0)
    drawn.paste(RGB[right], (box[0], box[1], box[2], box[1] + 6))  # 84 of 196 pixels are right now: second, not first
    found = placement.compare([sample_of(right, box)], [drawn])
    assert (found.colour.score, found.colour_near.score, found.third.score) == (0, 1, 1)


def nine() -> list[Sample]:
    """One sample for each place, all of different colours."""
    return [sample_of(list(RGB)[i], box_in(i % 3, i // 3), str(i)) for i in range(9)]


def test_true_pictures_score_one_and_worn_ones_too() -> None:
    samples = nine()
    found = placement.compare(samples, [sample.images[0] for sample in samples])
    assert found.score == found.low == found.high == found.ceiling == 1
    assert found.degraded == 1 and found.third_both.score == 1
    assert found.mae.score == 0 and found.psnr.score == PSNR_CAP
    assert found.baseline == 0  # nine colours: no wrong pairing has the right one


def test_each_criterion_counts_its_own_errors() -> None:
    samples = [sample_of("red", box_in(0, 0)) for _ in range(4)]
    drawn = [
        rectangle("red", box_in(0, 0)),  # right
        rectangle("red", box_in(1, 0)),  # wrong column
        rectangle("red", box_in(0, 2)),  # wrong row: the score asks for the horizontal third only
        rectangle("blue", box_in(0, 0)),  # wrong colour
    ]
    found = placement.compare(samples, drawn)
    names = ("third", "third_vertical", "third_both", "colour")
    assert found.score == 0.5 and [getattr(found, name).score for name in names] == [0.75, 0.75, 0.5, 0.75]
    assert found.low <= 0.5 <= found.high


def test_baseline_is_the_mean_over_wrong_pairings() -> None:
    samples = [sample_of("red", box_in(0, 0)), sample_of("red", box_in(0, 1)), sample_of("blue", box_in(2, 0))]
    found = placement.compare(samples, [sample.images[0] for sample in samples])
    assert found.score == 1 and found.baseline == pytest.approx(2 / 6, abs=1e-4)  # the two red ones, both ways


def test_errors_are_measured_in_shares_of_full_range() -> None:
    sample = sample_of("red", box_in(0, 0))
    true = np.asarray(sample.images[0]).astype(int)
    lighter = Pillow.fromarray(np.where(true < 204, true + 51, true - 51).astype(np.uint8))  # each by 51 of 255
    found = placement.compare([sample], [lighter])
    assert found.mae.score == 0.2 and found.psnr.score == 13.98  # -20 log10(0.2)


def test_objects_without_a_dominant_colour_are_scored_apart() -> None:
    half = sample_of("red", box_in(0, 0))
    half.images[0].paste(RGB["blue"], (3, 3, 17, 9))  # 84 of 196 pixels: red has 4/3 of blue's share
    samples = [sample_of("green", box_in(1, 0)), half]
    found = placement.compare(samples, [samples[0].images[0], rectangle("blue", box_in(0, 0))])
    assert (found.score, found.n) == (1, 1) and (found.all.score, found.all.n) == (0.5, 2)
    with pytest.raises(ValueError, match="none of 1 scenes"):
        placement.compare([half], [half.images[0]])


class Echo:
    """A decoder that gives back what it was shown, in another order if told so."""

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.seeds = shift, []  # type: ignore[var-annotated]

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        self.seeds.append(seed)
        return [images[(i + self.shift) % len(images)] for i in range(len(images))]


def synthetic(*_: Any) -> Any:
    """Scenes without end: single squares everywhere (also near borders), and every third scene two objects."""
    rng = np.random.default_rng(0)
    for index in count():
        left, top = rng.integers(0, SIDE - 14, 2).tolist()
        sample = sample_of(list(RGB)[rng.integers(11)], (left, top, left + 14, top + 14), str(index))
        if index % 3 == 0:
            sample.facts["objects"].append({"box": [0, 0, 5, 5]})  # type: ignore[index]
        yield sample


def test_placement_end_to_end(monkeypatch: pytest.MonkeyPatch, nano_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "fresh_scenes", synthetic)
    chosen = placement.single_objects(31, 0, "train")
    columns = [placement.true_place(sample)[0] for sample in chosen]
    assert [columns.count(c) for c in range(3)] == [11, 10, 10]
    assert all(len(sample.facts["objects"]) == 1 for sample in chosen)  # type: ignore[index]
    echo = Echo()
    how: dict[str, Any] = {"limit": 31, "seed": 5}
    asked = placement.Placement(echo, **how, batch_size=8, sheet=tmp_path / "sheet.png")  # type: ignore[arg-type]
    found = asked.run(nano_folder, tmp_path / "run")
    assert found["name"] == "decoder/placement" and found["score"] == 1 and found["n"] == 31
    assert echo.seeds == [5, 13, 21, 29]  # batches do not share their noise
    with Pillow.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 6 * 128
    mixed = placement.Placement(Echo(1), **how).run(nano_folder, tmp_path / "mixed")  # type: ignore[arg-type]
    assert mixed["score"] < 0.3 and mixed["baseline"] < 0.15 and mixed["ceiling"] == 1


def test_placement_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="limit = 2"):
        placement.single_objects(2, 0, "train")
    monkeypatch.setattr(placement, "fresh_scenes", lambda *_: (sample_of("red", box_in(0, 0)) for _ in count()))
    with pytest.raises(ValueError, match="1 of 3 single-object scenes"):
        placement.single_objects(3, 0, "train")
    with pytest.raises(ValueError, match="no single objects: choose"):
        placement.single_objects(3, 0, "pairs")


# ------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("A red heart.", "red heart"),
        ("  The   cat ", "cat"),
        ("an apple", "apple"),
        ("Left.", "left"),
        ("another", "another"),
        ("a", "a"),
        ("3", "3"),
    ],
)
def test_normalize(answer: str, same: str) -> None:
    assert scenes.normalize(answer) == same


def asked(kind: str, *answers: str) -> list[Question]:
    return [Question(f"{kind}?", answer, kind) for answer in answers]


def test_accuracy_is_the_mean_of_the_types() -> None:
    questions = asked("colour", "red", "red", "blue", "green") + asked("count", "two", "three")
    found = scenes.score_answers(questions, ["Red.", "blue", "blue", "red", "two", "three"], ["red"] * 4 + ["two"] * 2)
    assert found.types["colour"] == scenes.TypeScore(score=0.5, constant=0.5, blank=0.5, n=4)
    assert found.types["count"] == scenes.TypeScore(score=1.0, constant=0.5, blank=0.5, n=2)
    assert found.score == 0.75 and found.baselines == {"constant": 0.5, "blank": 0.5} and found.n == 6
    assert found.margin.score == 0.25
    assert found.examples == [("colour?", "red", "blue"), ("colour?", "green", "red")]


def test_the_baseline_is_the_better_one() -> None:
    questions = asked("there", "yes", "no", "yes", "no")
    assert scenes.score_answers(questions, ["yes"] * 4, ["yes", "no", "yes", "yes"]).baseline == 0.75
    assert scenes.score_answers(questions, ["yes"] * 4, ["no"] * 4).baseline == 0.5


def test_no_constant_beats_the_constant() -> None:
    questions = asked("a", "x", "y", "x", "The x.") + asked("b", "p", "q", "q")
    assert scenes.best_constants(questions) == ["x"] * 4 + ["q"] * 3


@pytest.fixture(scope="module")
def cutouts() -> Cutouts:
    """Plain squares in place of artwork: everything the composer knows, in three styles."""
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        colour = RGB[thing.colour or list(RGB)[number % 8]]
        for style in ("noto", "fluent-flat", "twemoji"):
            key = (style, thing.concept, thing.colour if thing.is_shape else "")
            pictures[key] = Pillow.new("RGBA", (32, 32), (*colour, 255))
    return Cutouts(pictures, {"noto": "", "fluent-flat": "flat", "twemoji": "twemoji"})


class Scripted:
    """A model that answers from a script, in the order of asking, or always the same."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked, self.seen = answers, 0, []  # type: ignore[var-annotated]

    def text(self, images: list[list[Image]], prompts: list[str]) -> list[str]:
        start, self.asked = self.asked, self.asked + len(prompts)
        self.seen += [image for (image,) in images]
        return [self.answers[(start + i) % len(self.answers)] for i in range(len(prompts))]


def script(cutouts: Cutouts, limit: int, seed: int, split: scenes.Split = "train") -> list[Question]:
    """The questions `SceneQuestions` will ask."""
    kinds = [kind for kind in scenes.KINDS if kind not in scenes.NEVER_ASKED.get(split, ())]
    return [q for _, q in scenes.balanced_scenes(scenes.fresh_scenes(split, seed, cutouts), limit, seed, kinds)]


@pytest.mark.parametrize(("split", "types"), [("train", 6), ("style", 6), ("pairs", 5)])
def test_a_perfect_model_scores_one(
    cutouts: Cutouts, split: scenes.Split, types: int, nano_folder: Path, tmp_path: Path
) -> None:
    model = Scripted(*(q.answer.upper() + "." for q in script(cutouts, 63, 3, split)))
    asked = scenes.SceneQuestions(model, 63, 3, split, batch_size=63, cutouts=cutouts)  # type: ignore[arg-type]
    found = asked.run(nano_folder, tmp_path / "run")
    assert found["score"] == found["low"] == found["high"] == 1 and found["examples"] == []
    assert (found["name"], found["n"], found["split"], found["scenes"]) == ("scenes/vqa", 63, split, "fresh, seed 3")
    sizes = [row["n"] for row in found["types"].values()]
    assert len(sizes) == types and sum(sizes) == 63 and max(sizes) - min(sizes) <= 1


def test_a_constant_model_scores_its_baseline(cutouts: Cutouts, nano_folder: Path, tmp_path: Path) -> None:
    model = Scripted(*scenes.best_constants(script(cutouts, 60, 3)))
    asked = scenes.SceneQuestions(model, 60, 3, cutouts=cutouts)  # type: ignore[arg-type]
    found = asked.run(nano_folder, tmp_path / "run")
    assert 0 < found["score"] == found["baseline"] == found["baselines"]["constant"] == found["baselines"]["blank"]
    assert found["margin"] == {"score": 0, "low": 0, "high": 0}
    assert len(model.seen) == 120 and all(image.getcolors() == [(64 * 64, scenes.GRAY)] for image in model.seen[60:])
    assert all(len(image.getcolors() or ()) > 1 for image in model.seen[:60])


def test_evaluation_scenes_are_not_training_scenes(cutouts: Cutouts, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    class Spy(Composer):
        def __init__(self, cutouts: Cutouts, split: scenes.Split, seed: int, plain: bool) -> None:
            seeds.append(seed)
            super().__init__(cutouts, split, seed, plain=plain)

    monkeypatch.setattr(scenes, "Composer", Spy)
    first = [next(scenes.fresh_scenes("train", 0, cutouts)).images[0].tobytes() for _ in range(2)]
    other = next(scenes.fresh_scenes("train", 1, cutouts)).images[0].tobytes()
    assert first[0] == first[1] != other and seeds[0] == seeds[1] != seeds[2]
    assert all(seed >= scenes.SEEDS_FROM for seed in seeds)
    assert Composer(cutouts, "train", 0).scene(0).images[0].tobytes() != first[0]


def test_types_are_those_of_the_composer() -> None:
    assert set(scenes.KINDS) == set(words()["questions"])


def test_questions_say_what_they_lack(
    cutouts: Cutouts, nano_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="limit = 5: give at least 6"):
        scenes.SceneQuestions(Scripted("yes"), 5, 0, cutouts=cutouts).run(nano_folder, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too few questions of type how_many"):
        scenes.balanced_scenes(scenes.fresh_scenes("pairs", 0, cutouts), 6, 0)
    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    for evaluation in (scenes.SceneQuestions, placement.Placement):
        with pytest.raises(ValueError, match="pisces data build artwork"):
            evaluation(Scripted("yes"), 6, 0).run(nano_folder, tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_placement_on_composed_scenes(cutouts: Cutouts, nano_folder: Path, tmp_path: Path) -> None:
    asked = placement.Placement(Echo(), 45, seed=0, split="style", cutouts=cutouts)  # type: ignore[arg-type]
    found = asked.run(nano_folder, tmp_path / "run")
    assert found["score"] == found["ceiling"] == 1 and found["degraded"] > 0.9 and found["baseline"] < 0.2
