"""What the decoder keeps of a picture: true pictures against those that it draws from their true vectors.

Five figures, as they disagree: the Frechet distance of the two sets, the distance of each pair's features, and pixels
as mean absolute error, PSNR and SSIM. A blurred picture is near in pixels and far in features; a sharp picture of
something else is near in Frechet distance and far in the rest. Each pair is also held against a wrong one, which earns
the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL.Image import Image

from open_pisces.data.images import generation_pixels, to_pil
from open_pisces.eval.distances.distances import check_enough, frechet_interval, real_baselines
from open_pisces.eval.distances.features import (
    FeatureNetwork,
    FeatureSpec,
    Source,
    extract,
    picture_hash,
)
from open_pisces.eval.distances.pixel_errors import pixel_errors
from open_pisces.eval.distances.run_features import RunFeatures
from open_pisces.eval.evaluation import Evaluation, Score, rounded
from open_pisces.eval.intervals import EvaluationError, Interval, mean_interval
from open_pisces.eval.run import Row, RunFolder


class Reconstructs(Protocol):
    """A `Painter`, a `Generator`, or anything else that draws pictures again."""

    device: Any

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        """Pictures from the true vectors of pictures."""
        ...


@dataclass(frozen=True)
class ReconstructionScore(Score):
    """How far each drawn picture is from its true one; ``score`` is the Frechet distance of the two sets."""

    distance: str
    """What the Frechet distance is called."""
    cosine: Interval
    """1 - cosine of the pair's features."""
    mae: Interval
    """Mean absolute error, pixels in [0, 1]."""
    psnr: Interval
    """In dB, at most `PSNR_CAP`."""
    ssim: Interval
    biased: bool
    """Too few pictures for the width of the features."""
    baseline: float
    """The Frechet distance of other true pictures."""
    baselines: dict[str, float]
    """``real`` and ``halves`` of `real_baselines`, and the other figures of wrong pairs."""
    ruler: FeatureSpec
    seed: int


@dataclass
class ReconstructionEvaluation(Evaluation):
    """Draw pictures again from their true vectors, and measure what changed.

    The run keeps each true picture, cut to the drawn one's size, beside the drawn one; and their features.

    Args:
        painter: draws them.
        images: the true pictures.
        network: whose features are compared.
        steps: denoising steps; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of the noise; each batch starts from its own.
        batch_size: pictures at once.
        biased: allow fewer pictures than the features are wide.

    Raises:
        EvaluationError: too few pictures, or the painter draws another number of them, or none of their shape.
    """

    task: ClassVar[str] = "decoder/reconstruction"
    stages: ClassVar[Sequence[str]] = ("images", "errors")

    painter: Reconstructs
    images: Sequence[Image]
    network: FeatureNetwork
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    biased: bool = False

    def __post_init__(self) -> None:
        self.device = str(self.painter.device)

    @property
    def settings(self) -> Row:
        """What shapes the pictures. What measures them is kept with the features."""
        return {name: getattr(self, name) for name in ("seed", "steps", "guidance_scale", "batch_size")}

    def items(self) -> list[Row]:
        """The true pictures, known by their pixels: they may move to another folder."""
        check_enough(len(self.images), self.network.ruler.width, "true", self.biased)
        return [{"key": f"{i:05d}", "sha256": f"{picture_hash(one):064x}"} for i, one in enumerate(self.images)]

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Draw a batch, or measure the errors of its pixels."""
        first = int(batch[0]["key"])
        if stage == "errors":
            run.append("errors", [_errors(run, first + place) for place in range(len(batch))])
            return
        true = list(self.images[first : first + len(batch)])
        seed = self.seed + first
        drawn = self.painter.reconstruct(true, steps=self.steps, guidance_scale=self.guidance_scale, seed=seed)
        if len(drawn) != len(true):
            raise EvaluationError(f"{len(drawn)} drawn pictures for {len(true)} true ones: give one to each")
        pairs = {}
        for item, image, picture in zip(batch, true, drawn, strict=True):
            if picture.width != picture.height:
                raise EvaluationError(f"a drawn picture of {picture.width} x {picture.height}: decoders draw squares")
            # Cut to the drawn size and saved in 8 bits, as it is compared: errors and features come from these files.
            pairs[item["key"]] = [to_pil(generation_pixels(image, picture.width)), picture]
        run.save_images(pairs)

    def complete(self, run: RunFolder) -> None:
        """Draw and measure what is missing, then keep the features of both sets."""
        super().complete(run)
        if not RunFeatures.made_with(self.network.ruler, run):
            features = {}
            for place, name in enumerate(("true", "drawn")):  # as the run keeps each pair
                sources = [Source(item["key"], partial(_picture, run, item["key"], place)) for item in run.items]
                features[name] = extract(self.network, sources)
            RunFeatures(features).save(run)

    def score(self, run: RunFolder) -> ReconstructionScore:
        """From the errors and features that the run keeps."""
        return score_run(run)


def _picture(run: RunFolder, key: str, place: int) -> list[Image]:
    return [run.images(key)[place]]


def _errors(run: RunFolder, place: int) -> Row:
    """A row of `pixel_errors`: of a pair, and of its true picture with the next drawn one."""
    key = run.items[place]["key"]
    # A wrong pair takes the next picture: each is wrong once, and never paired with itself.
    following = run.items[(place + 1) % len(run.items)]["key"]
    true, drawn = [generation_pixels(picture, picture.width) for picture in run.images(key)]
    (wrong,) = _picture(run, following, 1)
    wrong_errors = pixel_errors(true, generation_pixels(wrong, wrong.width))
    return {"key": key, **pixel_errors(true, drawn), "wrong": wrong_errors}


def score_run(run: RunFolder) -> ReconstructionScore:
    """The score of a run from the errors and features that it keeps.

    Raises:
        RunError: if it does not keep them yet.
    """
    rows = run.rows("errors")
    kept = RunFeatures.load(run).rows
    true = kept["true"]
    drawn = kept["drawn"]
    seed = run.manifest.settings["seed"]
    baselines = real_baselines(true, len(drawn), seed)
    baselines["cosine"] = round(float(np.mean(_cosines(true.rows, np.roll(drawn.rows, -1, axis=0)))), 4)
    pixels = {}
    for name in ("mae", "psnr", "ssim"):
        pixels[name] = rounded(mean_interval([row[name] for row in rows], seed=seed))
        baselines[name] = round(float(np.mean([row["wrong"][name] for row in rows])), 4)
    found = rounded(frechet_interval(true, drawn, paired=True, seed=seed))
    return ReconstructionScore(
        name="decoder/reconstruction",
        score=found.score,
        low=found.low,
        high=found.high,
        n=len(true),
        distance=true.ruler.distance,
        cosine=rounded(mean_interval(_cosines(true.rows, drawn.rows), seed=seed)),
        **pixels,
        biased=len(true) <= true.ruler.width,
        baseline=baselines["real"],
        baselines=baselines,
        ruler=true.ruler,
        seed=seed,
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """1 - the cosine of each pair of rows."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return list(1 - (a * b).sum(axis=1) / np.maximum(lengths, 1e-12))
