"""What scorers of drawings need of a detector, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL.Image import Image

from open_pisces.errors import PiscesError


class DetectorError(PiscesError):
    """A detector that cannot do what is asked; the message names it, the thing and the remedy."""


@dataclass(frozen=True)
class Detection:
    """One object found in a picture."""

    name: str
    """Its class."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; right and bottom lie outside."""
    score: float
    """The detector's confidence, 0 to 1."""
    colors: Mapping[str, float] = field(default_factory=dict)
    """Probability of each color's name; empty where colors were not asked for."""
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Pixels of the object (H, W), bool, if the detector gives them."""

    @property
    def color(self) -> str:
        """The likeliest color, "" if none was asked for."""
        return max(self.colors, key=lambda name: self.colors[name]) if self.colors else ""


class Detector(Protocol):
    """Finds objects, and names their colors."""

    name: str
    """What scores call it: the model and its version."""
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    threshold: float
    """Confidence above which a detection counts (GenEval: 0.3)."""
    counting_threshold: float
    """The stricter one for counting (GenEval: 0.9)."""

    def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
        """Everything found in each picture, in falling order of confidence, above a floor below both thresholds.

        Args:
            images: the pictures.
            colored: for each picture the classes whose colors are wanted, and of how many of their most
                confident detections.
        """
        ...
