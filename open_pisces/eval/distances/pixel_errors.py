"""Errors between two pictures of one size: mean absolute error, PSNR and SSIM, the last two by torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from open_pisces.eval.intervals import EvaluationError

WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5), in pixels (Wang et al. 2004)."""
PSNR_CAP = 60.0
"""Decibels given to equal pictures: about what rounding to 8 bits costs."""


def psnr(true: np.ndarray, drawn: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1], at most `PSNR_CAP`."""
    # Equal pictures have an infinite ratio, of which no mean can be taken.
    return min(PSNR_CAP, float(peak_signal_noise_ratio(_as_batch(drawn), _as_batch(true), data_range=1.0)))


def ssim(true: np.ndarray, drawn: np.ndarray) -> float:
    """Structural similarity of two pictures ``(C, H, W)`` in [0, 1] (Wang et al. 2004): 1 if they are equal.

    Averaged over color channels and over all windows that lie inside the picture.

    Raises:
        EvaluationError: if the pictures differ in size, or are smaller than the window.
    """
    if true.shape != drawn.shape or min(true.shape[1:]) < WINDOW:
        raise EvaluationError(
            f"pictures of {true.shape} and {drawn.shape}: SSIM needs equal sizes of at least {WINDOW} pixels"
        )
    _, every_BCHW = structural_similarity_index_measure(
        _as_batch(drawn), _as_batch(true), data_range=1.0, return_full_image=True
    )
    # torchmetrics pads by reflection and counts the border; the original averages whole windows only.
    margin = WINDOW // 2
    return float(every_BCHW[..., margin:-margin, margin:-margin].mean())


def pixel_errors(true: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """``mae``, ``psnr`` and ``ssim`` of two pictures ``(C, H, W)`` in [0, 1]."""
    return {
        "mae": float(np.abs(true.astype(np.float64) - drawn).mean()),
        "psnr": psnr(true, drawn),
        "ssim": ssim(true, drawn),
    }


def _as_batch(pixels: np.ndarray) -> torch.Tensor:
    """One picture as ``(1, C, H, W)``, float64."""
    return torch.from_numpy(pixels.astype(np.float64))[None]
