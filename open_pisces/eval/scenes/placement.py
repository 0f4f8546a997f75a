"""The decoder's gate: from true vectors, is the object in the right third of the picture, in the right color?

No learned judge. Held-out scenes with a single object go through the generation encoder and the decoder, and pixel
arithmetic (`open_pisces.eval.scenes.pixels`) looks at what comes back. The right third comes from the scene's exact
box, the right color from the same rule on the true picture. Neighboring names (orange and brown, red and pink, white
and gray) are different colors here; ``colour_near`` says how often the right one came second.

Asked are objects that have a dominant color: one with at least `LEAD` times the share of the next in the true
picture. Of a penguin, half black and half white, blurring by one pixel decides the name; ``all`` scores those too.
How good the ruler itself is stands in the result: ``ceiling`` is the score of the true pictures, ``degraded`` that
of the same pictures blurred and noisy, ``baseline`` the mean score over all wrong pairings of pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageFilter

from open_pisces.batch import Sample
from open_pisces.data.images import generation_pixels, to_pil
from open_pisces.data.order import stream
from open_pisces.datasets.scenes.composer import Cutouts, load_cutouts
from open_pisces.datasets.scenes.layout import Split
from open_pisces.eval.distances.pixel_errors import psnr
from open_pisces.eval.evaluation import Counted, Evaluation, Score, rounded
from open_pisces.eval.intervals import EvaluationError, Interval, mean_interval
from open_pisces.eval.run import Row, RunFolder
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.pixels import Look, look, third
from open_pisces.eval.scenes.vqa import fresh_scenes
from open_pisces.sheets import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator
    from open_pisces.generate.painter import Painter

COLUMNS = ("left", "centre", "right")
ROWS = ("top", "middle", "bottom")
MARGIN = 0.03
"""Scenes whose box center is this close to a border between thirds are not asked: their centroid may lie beyond it."""
_SEARCHED = 100  # scenes looked through for each one wanted before giving up
_SHOWN = 64  # scenes on a sheet


# ------------------------------------------------------------------------------------------------------ the score


@dataclass
class Placement(Evaluation):
    """Reconstructions of single-object scenes, as many for each horizontal third.

    Args:
        generator: anything with ``reconstruct(images, steps, guidance_scale, seed) -> images``.
        limit: number of scenes.
        seed: None takes the frozen scenes (`open_pisces.eval.scenes.frozen`), whose first version is what seed 0
            composed when it was made; a number composes fresh ones. Also of the decoder's noise (None: 0).
        split: ``train``, or ``style`` for the style that is never trained on; ``pairs`` holds no single objects.
        batch_size: pictures per call of the decoder.
        steps: denoising steps; None is the model's own.
        guidance_scale: None is the model's own.
        cutouts: what `open_pisces.datasets.scenes.composer.load_cutouts` gives; None loads the default ones.
        sheet: where to save true pictures above their reconstructions; None saves none.

    Raises:
        EvaluationError: when it is opened, if ``limit`` is below 3, there are no cut-outs, or ``split`` is ``pairs``.
    """

    generator: Generator | Painter
    limit: int
    seed: int | None = None
    split: Split = "train"
    batch_size: int = 64
    steps: int | None = None
    guidance_scale: float | None = None
    cutouts: Cutouts | None = None
    sheet: str | Path | None = None
    task = "decoder/placement"
    stages = ("images",)

    @property
    def settings(self) -> Row:
        """Those of the scenes and of the decoder."""
        _, scenes, pictures_differ = self._chosen
        names = ("limit", "steps", "guidance_scale", "batch_size", "split")
        found = {"seed": self.seed or 0, "scenes": scenes, "pictures_differ": pictures_differ}
        return {**{name: getattr(self, name) for name in names}, **found}

    def items(self) -> list[Row]:
        """The objects of each scene."""
        samples, _, _ = self._chosen
        return [{"key": f"{i:05d}", "objects": (one.facts or {})["objects"]} for i, one in enumerate(samples)]

    @cached_property
    def _chosen(self) -> tuple[list[Sample], str, int]:
        """The scenes, what they are, and how many pictures are not what they were."""
        if self.seed is None and self.split != "pairs":
            samples, differ = frozen_objects(self.limit, self.split, self.cutouts)
            return samples, frozen_scenes.VERSION, differ
        return single_objects(self.limit, self.seed or 0, self.split, self.cutouts), f"fresh, seed {self.seed}", 0

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Keep true pictures, each with its reconstruction; every batch starts from noise of its own."""
        first = int(batch[0]["key"])
        true = [sample.images[0] for sample in self._chosen[0][first : first + len(batch)]]
        # By the place of the batch: two batches must not start from the same noise.
        seed = (self.seed or 0) + first
        drawn = self.generator.reconstruct(true, steps=self.steps, guidance_scale=self.guidance_scale, seed=seed)
        # The true picture is kept too: scores can be made again without the artwork.
        run.save_images({item["key"]: pair for item, *pair in zip(batch, true, drawn, strict=True)})

    def complete(self, run: RunFolder) -> None:
        """As every evaluation, and write the sheet."""
        super().complete(run)
        if self.sheet is not None:
            write_sheet(self.sheet, *_pictures(run))

    def score(self, run: RunFolder) -> PlacementScore:
        """By pixel arithmetic."""
        return score_run(run)


@dataclass(frozen=True)
class PlacementScore(Score):
    """Share of the ``n`` objects of dominant color with both the horizontal third and the color right."""

    third: Interval
    third_vertical: Interval
    third_both: Interval
    colour: Interval
    colour_near: Interval
    """The right color is the drawn picture's first or second."""
    mae: Interval
    """Mean absolute error of all pictures, pixels in [0, 1]."""
    psnr: Interval
    """In dB, of all pictures."""
    ceiling: float
    """The score of the true pictures."""
    degraded: float
    """That of the true pictures, blurred and noisy."""
    baseline: float
    """Mean score over all wrong pairings of pictures."""
    all: Counted
    """The score over all scenes, also those without a dominant color."""
    scenes: str
    split: str
    pictures_differ: int
    """True pictures that are not what they were when the scenes were frozen."""
    seed: int


def score_run(run: RunFolder) -> PlacementScore:
    """The score of a run from its pictures, each true one beside what was drawn of it."""
    settings = run.manifest.settings
    which = {name: settings[name] for name in ("scenes", "split", "pictures_differ")}
    return compare(*_pictures(run), settings["seed"], **which)


def _pictures(run: RunFolder) -> tuple[list[Sample], list[Image]]:
    """The scenes of a run, and what was drawn of each."""
    samples = []
    drawn = []
    for item in run.items:
        true, image = run.images(item["key"])
        samples.append(Sample(item["key"], (true,), facts={"objects": item["objects"]}))
        drawn.append(image)
    return samples, drawn


def frozen_objects(limit: int, split: Split, cutouts: Cutouts | None = None) -> tuple[list[Sample], int]:
    """``limit`` frozen scenes with one object, as `single_objects`, and how many pictures are not what they were.

    Raises:
        EvaluationError: if so many were not frozen, or there are no cut-outs.
    """
    every = frozen_scenes.load(f"placement/{split}")
    if not len(COLUMNS) <= limit <= len(every):
        raise EvaluationError(
            f"limit = {limit}: the frozen scenes hold {len(every)} single objects of split {split!r}; ask for "
            f"{len(COLUMNS)} to {len(every)}, or give a seed for fresh scenes"
        )
    # Frozen scenes come in any order of thirds; the first of each third are taken.
    left = [limit // 3 + (column < limit % 3) for column in range(3)]
    samples = []
    images, differ = frozen_scenes.pictures(every, load_cutouts() if cutouts is None else cutouts)
    for scene, image in zip(every, images, strict=True):
        objects = [{"concept": thing.concept, "box": list(thing.box)} for thing in scene.things]
        sample = Sample(scene.key, (image,), facts={"objects": objects})
        column, _ = true_place(sample)
        if left[column]:
            left[column] -= 1
            samples.append(sample)
    return samples, differ


def single_objects(limit: int, seed: int, split: Split, cutouts: Cutouts | None = None) -> list[Sample]:
    """``limit`` fresh scenes with one object, equally many in each horizontal third (the first thirds get the rest).

    Raises:
        EvaluationError: if ``limit`` is below 3, ``split`` is ``pairs``, or too few scenes have a single object.
    """
    if limit < len(COLUMNS):
        raise EvaluationError(f"limit = {limit}: give at least {len(COLUMNS)}, one scene for each third of the picture")
    if split == "pairs":
        raise EvaluationError("split 'pairs' holds no single objects: choose `train` or `style`")
    wanted = [limit // 3 + (column < limit % 3) for column in range(3)]
    found: list[Sample] = []
    for sample in islice(fresh_scenes(split, seed, cutouts), _SEARCHED * limit):
        column = true_place(sample)[0]
        if len((sample.facts or {})["objects"]) == 1 and _clear(sample) and wanted[column]:
            wanted[column] -= 1
            found.append(sample)
            if len(found) == limit:
                return found
    raise EvaluationError(
        f"{len(found)} of {limit} single-object scenes in {_SEARCHED * limit} of split {split!r}: ask fewer"
    )


def true_place(sample: Sample) -> tuple[int, int]:
    """Column and row of the third in which the center of the only object's exact box lies."""
    x, y = _center(sample)
    return third(x), third(y)


def _center(sample: Sample) -> tuple[float, float]:
    """Center of the only object's box as shares of the picture's width and height."""
    left, top, right, bottom = (sample.facts or {})["objects"][0]["box"]
    width, height = sample.images[0].size
    return (left + right) / 2 / width, (top + bottom) / 2 / height


def _clear(sample: Sample) -> bool:
    """Whether the box's center keeps `MARGIN` from the borders between thirds, both ways."""
    return all(min(abs(place - 1 / 3), abs(place - 2 / 3)) >= MARGIN for place in _center(sample))


def compare(
    samples: Sequence[Sample],
    drawn: Sequence[Image],
    seed: int = 0,
    scenes: str = "",
    split: str = "train",
    pictures_differ: int = 0,
) -> PlacementScore:
    """The score of single-object ``samples`` and what was ``drawn`` of each; the last three are passed on.

    Raises:
        EvaluationError: if no object has a dominant color.
    """
    true = [generation_pixels(sample.images[0], image.width) for sample, image in zip(samples, drawn, strict=True)]
    wanted = []
    for sample, pixels in zip(samples, true, strict=True):
        column, row = true_place(sample)
        wanted.append(replace(look(pixels), column=column, row=row))
    seen = [look(_pixels(image)) for image in drawn]
    asked = [index for index, reference in enumerate(wanted) if reference.dominant]
    if not asked:
        raise EvaluationError(f"none of {len(samples)} scenes has an object with a dominant colour: ask more scenes")
    hits = _hits(wanted, seen)
    figures = {name: rounded(mean_interval(values[asked], seed=seed)) for name, values in hits.items()}
    # All pictures count for pixels: a dominant color matters to the naming of colors alone.
    pairs = [(pixels, _pixels(image)) for pixels, image in zip(true, drawn, strict=True)]
    references = [wanted[i] for i in asked]
    worn = [_degraded(true[i], seed, place) for place, i in enumerate(asked)]
    return PlacementScore(
        name=Placement.task,
        score=figures["score"].score,
        low=figures["score"].low,
        high=figures["score"].high,
        n=len(asked),
        third=figures["third"],
        third_vertical=figures["third_vertical"],
        third_both=figures["third_both"],
        colour=figures["colour"],
        colour_near=figures["colour_near"],
        mae=rounded(mean_interval([np.abs((a - b).astype(np.float64)).mean() for a, b in pairs], seed=seed)),
        psnr=rounded(mean_interval([psnr(a, b) for a, b in pairs], seed=seed), 2),
        ceiling=_mean_score(references, [true[i] for i in asked]),
        degraded=_mean_score(references, worn),
        baseline=round(_wrong_pairings(references, [seen[i] for i in asked]), 4),
        all=Counted(**mean_interval(hits["score"], seed=seed).rounded(), n=len(samples)),
        scenes=scenes,
        split=split,
        pictures_differ=pictures_differ,
        seed=seed,
    )


def _mean_score(wanted: Sequence[Look], pictures: Sequence[np.ndarray]) -> float:
    """What the measurement gives ``pictures`` (3, H, W) that should be right."""
    return round(float(_hits(wanted, [look(pixels) for pixels in pictures])["score"].mean()), 4)


def _hits(wanted: Sequence[Look], seen: Sequence[Look]) -> dict[str, np.ndarray]:
    """Which pictures agree with their references, by criterion; an empty picture agrees in nothing."""
    pairs = list(zip(wanted, seen, strict=True))
    across = np.array([a.column == b.column for a, b in pairs])
    down = np.array([a.row == b.row for a, b in pairs])
    color = np.array([bool(a.colors) and a.colors[:1] == b.colors[:1] for a, b in pairs])
    near = np.array([bool(a.colors) and a.colors[0] in b.colors[:2] for a, b in pairs])
    return {
        "score": across & color,
        "third": across,
        "third_vertical": down,
        "third_both": across & down,
        "colour": color,
        "colour_near": near,
    }


def _wrong_pairings(wanted: Sequence[Look], seen: Sequence[Look]) -> float:
    """Mean score when every picture is held against every other picture's reference: what seeing nothing earns."""
    right = [(one.column, one.first_color) for one in wanted]
    found = [(one.column, one.first_color) for one in seen]
    counts = Counter(one for one in found if one[1])  # an empty picture agrees in nothing
    # Counted, not compared pair by pair: right pairings are taken off again.
    own = sum(bool(b[1]) and a == b for a, b in zip(right, found, strict=True))
    agree = sum(counts[one] for one in right) - own
    return agree / max(1, len(right) * (len(right) - 1))


def _degraded(pixels: np.ndarray, seed: int, index: int) -> np.ndarray:
    """``pixels`` (3, H, W) blurred by 1/64 of the width and with noise of 0.04: a faithful but imperfect decoder."""
    blurred = _pixels(to_pil(pixels).filter(ImageFilter.GaussianBlur(pixels.shape[-1] / 64)))
    return blurred + stream(seed, "eval", "degraded", index).normal(0, 0.04, pixels.shape)


def _pixels(image: Image) -> np.ndarray:
    """A picture as it is, (3, H, W) in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


# ------------------------------------------------------------------------------------------------------ to look at


def write_sheet(path: str | Path, samples: Sequence[Sample], drawn: Sequence[Image], columns: int = 8) -> None:
    """Save rows of true pictures, each above what was drawn of it, with what pixel arithmetic saw in both; 64 at most.

    A last row that is not full is left out unless it is the only one.
    """
    columns = min(columns, len(drawn))
    images: list[Image] = []
    captions: list[str] = []
    for start in range(0, min(len(drawn), _SHOWN) - columns + 1, columns):
        row = range(start, start + columns)
        true = [to_pil(generation_pixels(samples[i].images[0], drawn[i].width)) for i in row]
        images += [*true, *(drawn[i] for i in row)]
        captions += [f"true: {_described(image)}" for image in true]
        captions += [f"drawn: {_described(drawn[i])}" for i in row]
    contact_sheet(images, captions, columns).save(path)


def _described(image: Image) -> str:
    """What pixel arithmetic sees, in words."""
    seen = look(_pixels(image))
    return f"{seen.first_color}, {ROWS[seen.row]} {COLUMNS[seen.column]}" if seen.colors else "nothing"
