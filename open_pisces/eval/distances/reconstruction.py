"""What the decoder keeps of a picture: true pictures against those that it draws from their true vectors.

Five figures, as they disagree: the Frechet distance of the two sets, the distance of each pair's features, and pixels
as mean absolute error, PSNR and SSIM. A blurred picture is near in pixels and far in features; a sharp picture of
something else is near in Frechet distance and far in the rest. Each pair is also held against a wrong one, which earns
the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch.nn import functional

from open_pisces.data.images import generation_pixels, to_pil
from open_pisces.eval.distances.distances import check_enough, frechet_interval, real_baselines
from open_pisces.eval.distances.features import FeatureNetwork, extract, pictures_of
from open_pisces.eval.intervals import EvaluationError, mean_interval
from open_pisces.eval.scenes.placement import PSNR_CAP

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


class Reconstructs(Protocol):
    """A `Painter`, a `Generator`, or anything else that draws pictures again."""

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        """Pictures from the true vectors of pictures."""
        ...


def reconstruction(
    painter: Reconstructs,
    images: Sequence[Image],
    network: FeatureNetwork,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    biased: bool = False,
) -> dict[str, Any]:
    """Draw pictures again from their true vectors, and measure what changed (`compare_pairs`).

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
        EvaluationError: too few pictures, or the painter draws another number of them.
    """
    start = time.time()
    check_enough(len(images), network.ruler.width, "true", biased)
    drawn: list[Image] = []
    for first in range(0, len(images), batch_size):
        batch = list(images[first : first + batch_size])
        drawn += painter.reconstruct(batch, steps=steps, guidance_scale=guidance_scale, seed=seed + first)
    result = compare_pairs(images, drawn, network, seed, biased)
    return {**result, "seed": seed, "seconds": round(time.time() - start, 1)}


def compare_pairs(
    true: Sequence[Image], drawn: Sequence[Image], network: FeatureNetwork, seed: int = 0, biased: bool = False
) -> dict[str, Any]:
    """How far each drawn picture is from its true one, cut to the drawn one's size.

    Returns:
        ``score`` with ``low`` and ``high``: the Frechet distance, named in ``distance``; ``cosine`` (1 - cosine of the
        features), ``mae`` (pixels in [0, 1]), ``psnr`` (dB, at most `PSNR_CAP`), ``ssim``, each as ``{"score", "low",
        "high"}``; ``baseline`` (the Frechet distance of other true pictures) and ``baselines`` (`real_baselines`, and
        the other figures of wrong pairs); ``n``, ``biased``, ``ruler``.

    Raises:
        EvaluationError: other numbers of pictures, too few, or sizes that do not fit.
    """
    if len(true) != len(drawn):
        raise EvaluationError(f"{len(drawn)} drawn pictures for {len(true)} true ones: give one to each")
    check_enough(len(true), network.ruler.width, "true", biased)
    cut = [generation_pixels(image, _side(picture)) for image, picture in zip(true, drawn, strict=True)]
    pixels = [generation_pixels(picture, picture.width) for picture in drawn]
    a, b = (extract(network, pictures_of(images)) for images in ([to_pil(picture) for picture in cut], drawn))
    right = {"cosine": _cosines(a.rows, b.rows), **_errors(cut, pixels)}
    wrong = {"cosine": _cosines(a.rows, np.roll(b.rows, -1, axis=0)), **_errors(cut, [*pixels[1:], pixels[0]])}
    baselines = real_baselines(a, len(drawn), seed)
    baselines |= {name: round(float(np.mean(values)), 4) for name, values in wrong.items()}
    return {
        "name": "decoder/reconstruction",
        "distance": network.ruler.distance,
        **frechet_interval(a, b, paired=True, seed=seed).rounded(),
        **{name: mean_interval(values, seed=seed).rounded() for name, values in right.items()},
        "n": len(true),
        "biased": len(true) <= network.ruler.width,
        "baseline": baselines["real"],
        "baselines": baselines,
        "ruler": asdict(a.ruler),
    }


def _side(picture: Image) -> int:
    """The side of a drawn picture, which has to be a square."""
    if picture.width != picture.height:
        raise EvaluationError(f"a drawn picture of {picture.width} x {picture.height}: decoders draw squares")
    return picture.width


def _cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """1 - the cosine of each pair of rows."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return list(1 - (a * b).sum(axis=1) / np.maximum(lengths, 1e-12))


def _errors(true: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Figures of pixels of each pair."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(true, drawn, strict=True)]
    return {
        "mae": [float(np.abs(a - b).mean()) for a, b in pairs],
        "psnr": [float(-10 * np.log10(max(((a - b) ** 2).mean(), 10 ** (-PSNR_CAP / 10)))) for a, b in pairs],
        "ssim": [ssim(a, b) for a, b in pairs],
    }


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures ``(C, H, W)`` in [0, 1] (Wang et al. 2004): 1 if they are equal.

    A Gaussian window of 11 x 11 (sigma 1.5), per colour channel, averaged over all windows that lie inside.

    Raises:
        EvaluationError: if the pictures differ in size, or are smaller than the window.
    """
    if a.shape != b.shape or min(a.shape[1:]) < WINDOW:
        raise EvaluationError(
            f"pictures of {a.shape} and {b.shape}: SSIM needs equal sizes of at least {WINDOW} pixels"
        )
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    window = torch.outer(line, line) / line.sum() ** 2
    x, y = (torch.from_numpy(picture.astype(np.float64)) for picture in (a, b))
    parts = torch.stack([x, y, x * x, y * y, x * y])
    channels = len(x)
    means = functional.conv2d(parts, window.expand(channels, 1, WINDOW, WINDOW), groups=channels)
    mean_x, mean_y, xx, yy, xy = means
    light = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    shape = (2 * (xy - mean_x * mean_y) + K2**2) / (xx - mean_x**2 + yy - mean_y**2 + K2**2)
    return float((light * shape).mean())
