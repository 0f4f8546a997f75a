"""The scene score and the diagnosis: perfect and blind stand-ins, figures worked by hand, runs that go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.eval.drawing.detection import Detection
from open_pisces.eval.intervals import EvaluationError, Interval
from open_pisces.eval.run import RunError, RunFolder
from open_pisces.eval.scenes import diagnose as d
from open_pisces.eval.scenes import diagnose_vectors as v
from open_pisces.eval.scenes import drawing
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.frozen import FrozenScene
from open_pisces.eval.scenes.judge import COLORS, classes
from open_pisces.generate.choose import best_of
from open_pisces.generate.generator import Generator


@pytest.fixture(scope="module")
def cutouts() -> Cutouts:
    """A plate of its own colour for each thing in each style."""
    styles = {scene.style for part in ("train", "pairs") for scene in frozen_scenes.load(f"drawing/{part}")}
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        for place, style in enumerate(sorted(styles)):
            key = (style, thing.concept, thing.colour if thing.is_shape else "")
            pictures[key] = Pillow.new("RGBA", (40, 40), (3 * number, 40 * place, 255 - 3 * number, 255))
    return Cutouts(pictures, {style: style for style in sorted(styles)})


class Knows:
    """A judge that has seen some pictures before and says what is in them; of others it says nothing."""

    classes, colors, threshold, counting_threshold = classes(), COLORS, 0.3, 0.3

    def __init__(self, name: str, scenes: Sequence[FrozenScene], images: Sequence[Image]) -> None:
        self.name, self.looked = name, 0
        self.truth = {image.tobytes(): scene for scene, image in zip(scenes, images, strict=True)}

    def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
        """The truth of known pictures."""
        self.looked += len(images)
        known = [self.truth.get(image.convert("RGB").tobytes()) for image in images]
        return [
            [Detection(t.concept, t.box, 0.9, {t.colour or "red": 1.0}) for t in scene.things] if scene else []
            for scene in known
        ]


@pytest.fixture(scope="module")
def scenes() -> list[FrozenScene]:
    """Two of each category."""
    every = frozen_scenes.load("drawing/train")
    chosen = {prompt.key for prompt in drawing.frozen_prompts(per_category=2)}
    return [scene for scene in every if scene.key in chosen]


class Draws:
    """A generator that draws the true pictures of captions."""

    device = "cpu"

    def __init__(self, scenes: Sequence[FrozenScene], images: Sequence[Image]) -> None:
        self.pictures = dict(zip([scene.short for scene in scenes], images, strict=True))
        self.drawn = 0

    def image(self, prompts: list[str], n: int, **how: Any) -> list[list[Image]]:
        """The same picture n times."""
        self.drawn += len(prompts)
        return [[self.pictures[prompt]] * n for prompt in prompts]


# ------------------------------------------------------------------------------------------------------ the scene score


def test_who_draws_what_captions_say_scores_one(
    scenes: list[FrozenScene], cutouts: Cutouts, nano_folder: Path, tmp_path: Path
) -> None:
    images, _ = frozen_scenes.pictures(scenes, cutouts)
    model, knows, blind = Draws(scenes, images), Knows("knows", scenes, images), Knows("blind", [], [])
    how: dict[str, Any] = {"per_category": 2, "n": 2, "batch_size": 5}
    found = drawing.SceneDrawing(model, [knows, blind], **how).run(nano_folder, tmp_path / "run")  # type: ignore[arg-type, list-item]
    assert found["score"] == found["low"] == found["high"] == 1 and (found["n"], found["prompts"]) == (24, 12)
    assert set(found["categories"]) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert found["others"]["blind"]["score"] == 0 == found["others"]["blind"]["same_verdict"]
    assert found["baseline"] < 0.3  # another caption of the same category is seldom true by chance
    again = drawing.SceneDrawing(model, [knows, blind], **how).run(nano_folder, tmp_path / "run")  # type: ignore[arg-type, list-item]
    assert (model.drawn, knows.looked) == (12, 24) and {**again, "seconds": 0} == {**found, "seconds": 0}
    run = RunFolder.load(tmp_path / "run")
    assert drawing.score_run(run, ["blind", "knows"]).score == 0
    with pytest.raises(RunError, match="something else"):
        drawing.SceneDrawing(model, [knows], **{**how, "n": 1}).run(nano_folder, tmp_path / "run")  # type: ignore[arg-type, list-item]


def test_drawings_may_be_chosen_by_the_models_own_answers(
    generator: Generator, nano_folder: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"per_category": 1, "steps": 2, "seed": 3}
    plain = drawing.SceneDrawing(generator, [Knows("blind", [], [])], **how)  # type: ignore[list-item]
    asked = drawing.SceneDrawing(generator, plain.detectors, **how, best_of=3, vector_guidance=1.5)
    assert {
        **plain.settings,
        "best_of": 3,
        "vector_guidance": 1.5,
    } == asked.settings  # the plain run stays the same run
    run = asked.open(nano_folder, tmp_path / "run")
    asked.complete(run)
    prompts = [prompt.prompt for prompt in asked.prompts()]
    expected = best_of(generator, prompts, 3, 1, 2, None, 3, vector_guidance=1.5)
    unchosen = generator.image(prompts, 1, 2, None, 3, vector_guidance=1.5)
    drawn = [run.images(item["key"])[0].tobytes() for item in run.items]
    assert drawn == [row[0].tobytes() for row in expected] != [row[0].tobytes() for row in unchosen]


def test_captions_that_are_not_there_are_named() -> None:
    with pytest.raises(EvaluationError, match="61 captions of each category: the frozen scenes hold 1 to 60"):
        drawing.frozen_prompts(per_category=61)
    with pytest.raises(EvaluationError, match="no part 'drawing/style'"):
        drawing.frozen_prompts("style")
    assert drawing.frozen_prompts(detailed=True)[0].prompt != drawing.frozen_prompts()[0].prompt


# ------------------------------------------------------------------------------------------------------- the vectors


def test_the_probe_reads_what_is_there_and_nothing_else() -> None:
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 3, 8, generator=draws)
    names = [i % 4 for i in range(200)]
    vectors = centres[names] + 0.3 * torch.randn(200, 3, 8, generator=draws)
    probe = v.Probe(vectors[:120], [f"thing {i}" for i in names[:120]])
    assert np.mean([a == f"thing {b}" for a, b in zip(probe(vectors[120:]), names[120:], strict=True)]) == 1
    noise = v.Probe(torch.randn(120, 3, 8, generator=draws), [f"thing {i}" for i in names[:120]])
    told = noise(torch.randn(80, 3, 8, generator=draws))
    assert np.mean([a == f"thing {b}" for a, b in zip(told, names[120:], strict=True)]) < 0.5


def test_rows_of_vectors_by_hand() -> None:
    true = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 0.0]]])
    free = true.clone()
    free[0] = true[1]  # the first is predicted as the second
    free[2, 1] = torch.tensor([0.0, 1.0])
    items = [
        {"key": str(i), "tag": tag, "include": [{"class": "cat"}]}
        for i, tag in enumerate(("colors", "position", "position"))
    ]
    rows = v.vector_rows(items, {"true": true, "forced": true, "free": free}, lambda v: ["cat"] * len(v))  # type: ignore[arg-type]
    assert [row["forced"]["error"] for row in rows] == [[0, 0]] * 3 and [row["forced"]["rank"] for row in rows] == [
        0,
        0,
        0,
    ]
    assert rows[0]["free"]["error"] == [2.0, 0.0]  # (1 - -1)^2 over two channels
    assert [row["free"]["rank"] for row in rows] == [1, 0, 0]  # the second picture's vectors lie nearer
    assert rows[2]["free"]["error"] == [0.0, 0.5] and rows[2]["free"]["norm"] == [3.0, 1.0]
    assert rows[0]["free"]["probe"] is True and "probe" not in rows[1]["free"]
    figures = v.vector_figures(rows)
    assert figures["forced"].norm == figures["forced"].variance == [1, 1] and figures["forced"].mean_error == 0
    assert figures["free"].norm == [
        pytest.approx(5 / 5),
        pytest.approx(5 / 4),
    ]  # sums of norms: 1+1+3; 2+2+1 to 2+2+0


# ------------------------------------------------------------------------------------------------------- the diagnosis


@pytest.fixture(scope="module")
def generator(nano_pisces: Any, nano_tokenizer: Any) -> Generator:
    """The nano model."""
    return Generator(copy.deepcopy(nano_pisces), nano_tokenizer, "cpu")


def test_a_diagnosis_says_where_the_loss_is(
    generator: Generator, cutouts: Cutouts, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d, "PROBED", 60)
    chosen = [
        s
        for s in frozen_scenes.load("drawing/train")
        if s.key in {p.key for p in drawing.frozen_prompts(per_category=1)}
    ]
    images, _ = frozen_scenes.pictures(chosen, cutouts)
    knows, blind = Knows("knows", chosen, images), Knows("blind", [], [])
    how: dict[str, Any] = {"per_category": 1, "batch_size": 4, "cutouts": cutouts}
    found = d.Diagnosis(generator, [knows, blind], **how).run(nano_folder, tmp_path / "run")
    assert {name: row["score"] for name, row in found["sources"].items()} == {
        "true": 1,
        "decoder": 0,
        "forced": 0,
        "free": 0,
    }
    assert {name: row["score"] for name, row in found["losses"].items()} == {
        "true": 0,
        "decoder": 1,
        "forced": 0,
        "free": 0,
    }
    assert found["sentence"].startswith("The largest loss, 100 points [100, 100], lies in gen-CLIP and the decoder")
    assert found["score"] == 0 and found["n"] == 6 and found["agreement"] == {"blind": 1.0}
    assert len(found["vectors"]["free"]["error"]) == generator.renderer.M and found["probe"]["true"]["n"] == 2
    assert found["null_distance"] > 0 and set(found["guidance"]) >= {"1", "3"} and 0 <= found["diversity"]["within"]
    with Pillow.open(found["png"]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6) or ()) > 50
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["sentence"] == found["sentence"]

    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(generator.painter, "pixels", no)
    monkeypatch.setattr(generator, "vectors", no)
    generator.__dict__["null_vectors"] = generator.null_vectors
    again = d.Diagnosis(generator, [knows, blind], **how).run(nano_folder, tmp_path / "run")
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert d.score_run(RunFolder.load(tmp_path / "run"), ["knows", "blind"]).row()["losses"] == found["losses"]


def test_forced_vectors_are_predicted_from_the_true_ones(generator: Generator) -> None:
    captions = ["a cat", "two dogs on green"]
    own = generator.vectors(captions)
    assert torch.allclose(generator.vectors(captions, own), own, atol=1e-5)  # fed what it would feed itself
    other = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    forced = generator.vectors(captions, other)
    assert torch.allclose(forced[:, 0], own[:, 0], atol=1e-5)  # the first sees the caption only
    assert not torch.allclose(forced[:, 1], own[:, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("place", "says"), [("forced", "has learned of the vectors"), ("free", "own errors add up to")]
)
def test_the_sentence_names_the_largest_loss(place: str, says: str) -> None:
    losses = {name: Interval(0.1, 0.05, 0.2) for name in ("true", "decoder", "forced", "free")}
    losses["true"] = Interval(0.9, 0.05, 0.2)  # the judge's own fault is no place for a gain
    losses[place] = Interval(0.4, 0.3, 0.5)
    told = d.sentence(losses, 0.123)
    assert says in told and "40 points [30, 50]" in told and "costs 12 on true vectors" in told


def test_only_true_vectors_are_told_to_be_true(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def pixels(vectors: Any, null: Any, numbers: Any, steps: Any, scale: Any, seed: Any, level: Any = None) -> Any:
        told[name] = level
        return torch.zeros(len(vectors), 3, 8, 8)

    monkeypatch.setattr(generator.painter, "pixels", pixels)
    vectors = dict.fromkeys(("true", "noise", "forced", "detailed", "free"), torch.zeros(1, 4, 8))
    for name in d.picture_names(generator):
        d._drawn(generator, name, [0], [Pillow.new("RGB", (8, 8))], vectors)
    # None: the level of the LLM's vectors, `decoder.noise_level`.
    assert told.pop("decoder") == 0.0 and set(told.values()) == {None}


def test_noise_is_as_large_as_the_error_of_the_forced_vectors(generator: Generator, cutouts: Cutouts) -> None:
    scenes = list(frozen_scenes.load("drawing/train")[:60:2])
    images, _ = frozen_scenes.pictures(scenes, cutouts)
    found = v.predict_vectors(generator, scenes, images, 16)
    errors = [(found[name] - found["true"]).pow(2).mean((0, 2)) for name in ("noise", "forced")]
    assert torch.allclose(errors[0], errors[1], rtol=0.25)  # by position
    apart = (found["noise"] - found["true"]) / errors[1].sqrt()[:, None]
    assert abs(float(apart.mean())) < 0.1 and not torch.allclose(found["noise"], found["forced"])


def test_differences_are_taken_caption_by_caption() -> None:
    tags = ["colors", "colors", "position"]
    lost = d._difference(tags, np.array([1.0, 1, 1]), np.array([1.0, 0, 0]))
    assert lost.score == 0.75  # a half of the colours, all of the positions
