"""The decoder's gate: from true vectors, is the object in the right third of the picture, in the right colour?

No learned judge. Held-out scenes with a single object go through the generation encoder and the decoder, and pixel
arithmetic looks at what comes back: the background is the median of the border, the object is what differs from it,
its place is the centroid, its colour the class most of its pixels fall in. The right third comes from the scene's
exact box, the right colour from the same rule on the true picture. Neighbouring names (orange and brown, red and
pink, white and gray) are different colours here; ``colour_near`` says how often the right one came second.

Asked are objects that have a dominant colour: one with at least `LEAD` times the share of the next in the true
picture. Of a penguin, half black and half white, blurring by one pixel decides the name; ``all`` scores those too.
How good the ruler itself is stands in the result: ``ceiling`` is the score of the true pictures, ``degraded`` that
of the same pictures blurred and noisy, ``baseline`` the mean score over all wrong pairings of pictures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ImageFilter

from open_pisces.batch import Sample
from open_pisces.data.draws import stream
from open_pisces.data.images import generation_pixels, to_pil
from open_pisces.datasets.scenes.composer import Cutouts, load_cutouts
from open_pisces.datasets.scenes.layout import Split
from open_pisces.eval.intervals import EvaluationError, mean_interval
from open_pisces.eval.run import Manifest, RunFolder, model_hash
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.vqa import fresh_scenes
from open_pisces.sheets import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator
    from open_pisces.generate.painter import Painter

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")
COLUMNS = ("left", "centre", "right")
ROWS = ("top", "middle", "bottom")
NOWHERE = -1

FOREGROUND_DISTANCE = 0.2
"""Distance in RGB (each in [0, 1]) from the background at which a pixel belongs to the object."""
LEAD = 2.0
"""How many times the second colour's share the first one's must be for a colour to be dominant."""
MARGIN = 0.03
"""Scenes whose box centre is this close to a border between thirds are not asked: their centroid may lie beyond it."""
PSNR_CAP = 60.0
"""Decibels given to equal pictures: about what rounding to 8 bits costs."""
_SEARCHED = 100  # scenes looked through for each one wanted before giving up
_SHOWN = 64  # scenes on a sheet
_HUES = ((17, "red"), (37, "orange"), (63, "yellow"), (175, "green"), (250, "blue"), (300, "purple"), (345, "pink"))
"""Upper end of each hue in degrees; above is red. Set so that the coloured emoji shapes get their own names."""


@dataclass(frozen=True)
class Look:
    """What pixel arithmetic sees in a picture."""

    column: int
    """The centroid's horizontal third, 0 to 2, or `NOWHERE` if the picture is empty."""
    row: int
    """Its vertical third."""
    colours: tuple[str, ...]
    """Names of the colours present, the largest share first."""
    dominant: bool
    """Whether the first colour has `LEAD` times the share of the second."""


# ------------------------------------------------------------------------------------------------- the measurement


def look(pixels: np.ndarray) -> Look:
    """Place and colours of the one object in ``pixels`` (3, H, W) in [0, 1]."""
    mask = foreground(pixels)
    if not mask.any():
        return Look(NOWHERE, NOWHERE, (), False)
    y, x = (float(places.mean() + 0.5) for places in np.nonzero(mask))
    height, width = mask.shape
    shares = colour_shares(pixels[:, mask])
    largest = [*shares.values(), 0.0]
    return Look(third(x / width), third(y / height), tuple(shares), largest[0] >= LEAD * largest[1])


def foreground(pixels: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the pixels that differ from the background, the median colour of the border."""
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    background = np.median(border, axis=1)[:, None, None]
    return np.sqrt(((pixels - background) ** 2).sum(axis=0)) > FOREGROUND_DISTANCE


def third(place: float) -> int:
    """0, 1 or 2: the third in which ``place`` (share of the picture's side, in [0, 1]) lies."""
    return min(2, int(place * 3))


def colour_shares(pixels: np.ndarray) -> dict[str, float]:
    """Weighted count of each colour present in ``pixels`` (3, K), the largest first.

    Colourless pixels weigh half: outlines, shadows and highlights are black, gray and white whatever the object is.
    """
    classes = colour_classes(pixels)
    shares = np.bincount(classes, minlength=len(COLOURS)).astype(float)
    shares[[COLOURS.index(name) for name in ("black", "gray", "white")]] /= 2
    order = np.argsort(-shares, kind="stable")
    return {COLOURS[i]: float(shares[i]) for i in order if shares[i] > 0}


def colour_classes(pixels: np.ndarray) -> np.ndarray:
    """Indices (K,) into `COLOURS` of ``pixels`` (3, K) in [0, 1], by hue where there is colour, else by lightness."""
    high, low = pixels.max(axis=0), pixels.min(axis=0)
    chroma, lightness = high - low, (high + low) / 2
    hue = _hue(pixels, high, chroma)
    names = np.array([name for _, name in _HUES] + ["red"])[np.searchsorted([end for end, _ in _HUES], hue, "right")]
    pale = np.where(names == "orange", lightness > 0.8, lightness > 0.7)
    dull = (high < 0.8) & np.where((hue < 17) | (hue >= 345), chroma < 0.6 * high, hue < 48)
    names = np.where(((names == "red") | (names == "orange")) & pale, "pink", names)
    names = np.where(dull, "brown", names)  # brown is dark orange, or a red that is both dark and weak
    plain = np.where(lightness > 0.8, "white", np.where(high < 0.33, "black", "gray"))
    names = np.where((chroma < 0.15) | (high < 0.15), plain, names)
    return np.array([COLOURS.index(name) for name in names], dtype=np.int64)


def _hue(pixels: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Hue in degrees [0, 360) of ``pixels`` (3, K); 0 where there is no colour."""
    red, green, blue = pixels
    safe = np.maximum(chroma, 1e-6)
    sector = np.where(
        high == red,
        ((green - blue) / safe) % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return sector * 60 % 360


# ------------------------------------------------------------------------------------------------------ the score


def evaluate_placement(
    generator: Generator | Painter,
    limit: int,
    seed: int | None = None,
    split: Split = "train",
    batch_size: int = 64,
    steps: int | None = None,
    guidance_scale: float | None = None,
    cutouts: Cutouts | None = None,
    sheet: str | Path | None = None,
    model: str | Path | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Score ``generator.reconstruct`` on ``limit`` single-object scenes, as many for each horizontal third.

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
        model: the model's folder, for the run's manifest; None keeps no run.
        folder: the run's folder; None chooses one by the manifest (`RunFolder.open`).

    Returns:
        ``score`` with ``low`` and ``high``: share of the ``n`` objects of dominant colour with both the horizontal
        third and the colour right. ``third``, ``third_vertical``, ``third_both``, ``colour``, ``colour_near`` of the
        same objects, and of all scenes ``mae`` (pixels in [0, 1]) and ``psnr`` (dB), each as
        ``{"score", "low", "high"}``; the ruler's own ``ceiling``, ``degraded`` and ``baseline``; ``all``, the score
        over all ``limit`` scenes; ``scenes``, ``split``.

    Raises:
        EvaluationError: if ``limit`` is below 3, there are no cut-outs, or ``split`` is ``pairs``.
        RunError: if ``folder`` holds another run.
    """
    start, noise = time.time(), seed or 0
    samples, which = _chosen(limit, seed, split, cutouts)

    def draw(first: int) -> list[Image]:
        images = [sample.images[0] for sample in samples[first : first + batch_size]]
        return generator.reconstruct(images, steps=steps, guidance_scale=guidance_scale, seed=noise + first)

    if model is None:
        drawn = [image for first in range(0, limit, batch_size) for image in draw(first)]
        found = {"name": "decoder/placement", **compare(samples, drawn, noise), **which}
    else:
        settings = {"limit": limit, "seed": noise, "steps": steps, "guidance_scale": guidance_scale}
        settings |= {"batch_size": batch_size, **which}
        items = [{"key": f"{i:05d}", "objects": (s.facts or {})["objects"]} for i, s in enumerate(samples)]
        run = RunFolder.open(folder, Manifest("decoder/placement", str(model), model_hash(model), settings), items)
        for batch in run.batches("images", batch_size):
            first = int(batch[0]["key"])
            pairs = zip(batch, samples[first : first + batch_size], draw(first), strict=True)
            run.save_images({item["key"]: [sample.images[0], image] for item, sample, image in pairs})
        found = {**run.write_scores(score_run(run)), "folder": str(run.folder)}
        drawn = [run.images(item["key"])[1] for item in items]
    if sheet is not None:
        write_sheet(sheet, samples, drawn)
    return {**found, "seconds": round(time.time() - start, 1)}


def score_run(run: RunFolder) -> dict[str, Any]:
    """The figures of `evaluate_placement` from a run's pictures, each true one beside what was drawn of it."""
    pairs = [run.images(item["key"]) for item in run.items]
    samples = [
        Sample(item["key"], (true,), facts={"objects": item["objects"]})
        for item, (true, _) in zip(run.items, pairs, strict=True)
    ]
    which = {name: run.manifest.settings[name] for name in ("scenes", "split", "pictures_differ", "seed")}
    figures = compare(samples, [drawn for _, drawn in pairs], run.manifest.settings["seed"])
    return {"name": "decoder/placement", **figures, **which}


def _chosen(limit: int, seed: int | None, split: Split, cutouts: Cutouts | None) -> tuple[list[Sample], dict[str, Any]]:
    """The scenes, and what they are."""
    if seed is not None or split == "pairs":
        which = {"scenes": f"fresh, seed {seed}", "split": split, "pictures_differ": 0}
        return single_objects(limit, seed or 0, split, cutouts), which
    every = frozen_scenes.load(f"placement/{split}")
    if not len(COLUMNS) <= limit <= len(every):
        raise EvaluationError(
            f"limit = {limit}: the frozen scenes hold {len(every)} single objects of split {split!r}; ask for "
            f"{len(COLUMNS)} to {len(every)}, or give a seed for fresh scenes"
        )
    left = {column: limit // 3 + (column < limit % 3) for column in range(3)}
    samples = []
    images, differ = frozen_scenes.pictures(every, load_cutouts() if cutouts is None else cutouts)
    for scene, image in zip(every, images, strict=True):
        objects = [{"concept": thing.concept, "box": list(thing.box)} for thing in scene.things]
        sample = Sample(scene.key, (image,), facts={"objects": objects})
        if left[column := true_place(sample)[0]]:
            left[column] -= 1
            samples.append(sample)
    return samples, {"scenes": frozen_scenes.VERSION, "split": split, "pictures_differ": differ}


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
    """Column and row of the third in which the centre of the only object's exact box lies."""
    x, y = _centre(sample)
    return third(x), third(y)


def _centre(sample: Sample) -> tuple[float, float]:
    """Centre of the only object's box as shares of the picture's width and height."""
    left, top, right, bottom = (sample.facts or {})["objects"][0]["box"]
    width, height = sample.images[0].size
    return (left + right) / 2 / width, (top + bottom) / 2 / height


def _clear(sample: Sample) -> bool:
    """Whether the box's centre keeps `MARGIN` from the borders between thirds, both ways."""
    return all(abs(place - border) >= MARGIN for place in _centre(sample) for border in (1 / 3, 2 / 3))


def compare(samples: Sequence[Sample], drawn: Sequence[Image], seed: int = 0) -> dict[str, Any]:
    """The figures of `evaluate_placement` for single-object ``samples`` and what was ``drawn`` of each."""
    true = [generation_pixels(sample.images[0], image.width) for sample, image in zip(samples, drawn, strict=True)]
    wanted = [_wanted(sample, pixels) for sample, pixels in zip(samples, true, strict=True)]
    seen = [look(_pixels(image)) for image in drawn]
    asked = [index for index, reference in enumerate(wanted) if reference.dominant]
    if not asked:
        raise EvaluationError(f"none of {len(samples)} scenes has an object with a dominant colour: ask more scenes")
    hits = {name: values[asked] for name, values in _hits(wanted, seen).items()}
    every = _hits(wanted, seen)["score"]
    return {
        **mean_interval(hits["score"], seed=seed).rounded(),
        "n": len(asked),
        **{name: mean_interval(hits[name], seed=seed).rounded() for name in hits if name != "score"},
        **_errors(true, drawn, seed),
        **_ruler([wanted[i] for i in asked], [seen[i] for i in asked], [true[i] for i in asked], seed),
        "all": {**mean_interval(every, seed=seed).rounded(), "n": len(every)},
    }


def _errors(true: Sequence[np.ndarray], drawn: Sequence[Image], seed: int) -> dict[str, Any]:
    """Mean absolute error (pixels in [0, 1]) and peak signal-to-noise ratio (dB) of all pictures."""
    errors = [(a - _pixels(b)).astype(np.float64) for a, b in zip(true, drawn, strict=True)]
    return {
        "mae": mean_interval([np.abs(error).mean() for error in errors], seed=seed).rounded(),
        "psnr": mean_interval([_decibels(error) for error in errors], seed=seed).rounded(2),
    }


def _ruler(wanted: Sequence[Look], seen: Sequence[Look], true: Sequence[np.ndarray], seed: int) -> dict[str, float]:
    """What the measurement gives perfect pictures, worn ones, and pictures of something else."""
    worn = [look(_degraded(pixels, seed, index)) for index, pixels in enumerate(true)]
    return {
        "ceiling": round(float(_hits(wanted, [look(pixels) for pixels in true])["score"].mean()), 4),
        "degraded": round(float(_hits(wanted, worn)["score"].mean()), 4),
        "baseline": round(_wrong_pairings(wanted, seen), 4),
    }


def _wanted(sample: Sample, true: np.ndarray) -> Look:
    """The reference: the place of the exact box, the colours of the true picture."""
    column, row = true_place(sample)
    return replace(look(true), column=column, row=row)


def _hits(wanted: Sequence[Look], seen: Sequence[Look]) -> dict[str, np.ndarray]:
    """Which pictures agree with their references, by criterion; an empty picture agrees in nothing."""
    pairs = list(zip(wanted, seen, strict=True))
    across = np.array([a.column == b.column for a, b in pairs])
    down = np.array([a.row == b.row for a, b in pairs])
    colour = np.array([bool(a.colours) and a.colours[:1] == b.colours[:1] for a, b in pairs])
    near = np.array([bool(a.colours) and a.colours[0] in b.colours[:2] for a, b in pairs])
    return {
        "score": across & colour,
        "third": across,
        "third_vertical": down,
        "third_both": across & down,
        "colour": colour,
        "colour_near": near,
    }


def _wrong_pairings(wanted: Sequence[Look], seen: Sequence[Look]) -> float:
    """Mean score when every picture is held against every other picture's reference: what seeing nothing earns."""
    names = {name: code for code, name in enumerate(COLOURS)}
    right = np.array([(a.column, names[a.colours[0]] if a.colours else -1) for a in wanted])
    found = np.array([(b.column, names[b.colours[0]] if b.colours else -2) for b in seen])
    agree = (right[:, None] == found[None]).all(axis=-1)
    n = len(wanted)
    return float((agree.sum() - np.trace(agree)) / max(1, n * (n - 1)))


def _decibels(error: np.ndarray) -> float:
    """Peak signal-to-noise ratio of an ``error`` in [0, 1] units, at most `PSNR_CAP`."""
    return float(-10 * np.log10(max((error**2).mean(), 10 ** (-PSNR_CAP / 10))))


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
    return f"{seen.colours[0]}, {ROWS[seen.row]} {COLUMNS[seen.column]}" if seen.colours else "nothing"
