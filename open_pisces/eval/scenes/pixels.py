"""What pixel arithmetic sees in a picture of one object on a plain ground: its place and its colors.

The background is the median of the border, the object is what differs from it, its place is the centroid, its color
the class most of its pixels fall in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")
NOWHERE = -1

FOREGROUND_DISTANCE = 0.2
"""Distance in RGB (each in [0, 1]) from the background at which a pixel belongs to the object."""
LEAD = 2.0
"""How many times the second color's share the first one's must be for a color to be dominant."""
_HUES = ((17, "red"), (37, "orange"), (63, "yellow"), (175, "green"), (250, "blue"), (300, "purple"), (345, "pink"))
"""Upper end of each hue in degrees; above is red. Set so that the colored emoji shapes get their own names."""


@dataclass(frozen=True)
class Look:
    """What pixel arithmetic sees in a picture."""

    column: int
    """The centroid's horizontal third, 0 to 2, or `NOWHERE` if the picture is empty."""
    row: int
    """Its vertical third."""
    colors: tuple[str, ...]
    """Names of the colors present, the largest share first."""
    dominant: bool
    """Whether the first color has `LEAD` times the share of the second."""

    @property
    def first_color(self) -> str:
        """The color of the largest share, "" if the picture is empty."""
        return self.colors[0] if self.colors else ""


def look(pixels: np.ndarray) -> Look:
    """Place and colors of the one object in ``pixels`` (3, H, W) in [0, 1]."""
    mask = foreground(pixels)
    if not mask.any():
        return Look(NOWHERE, NOWHERE, (), False)
    y, x = (float(places.mean() + 0.5) for places in np.nonzero(mask))
    height, width = mask.shape
    shares = color_shares(pixels[:, mask])
    largest = [*shares.values(), 0.0]
    return Look(third(x / width), third(y / height), tuple(shares), largest[0] >= LEAD * largest[1])


def foreground(pixels: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the pixels that differ from the background, the median color of the border."""
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    background = np.median(border, axis=1)[:, None, None]
    return np.sqrt(((pixels - background) ** 2).sum(axis=0)) > FOREGROUND_DISTANCE


def third(place: float) -> int:
    """0, 1 or 2: the third in which ``place`` (share of the picture's side, in [0, 1]) lies."""
    return min(2, int(place * 3))


def color_shares(pixels: np.ndarray) -> dict[str, float]:
    """Weighted count of each color present in ``pixels`` (3, K), the largest first.

    Colorless pixels weigh half: outlines, shadows and highlights are black, gray and white whatever the object is.
    """
    classes = color_classes(pixels)
    shares = np.bincount(classes, minlength=len(COLORS)).astype(float)
    shares[[COLORS.index(name) for name in ("black", "gray", "white")]] /= 2
    order = np.argsort(-shares, kind="stable")
    return {COLORS[i]: float(shares[i]) for i in order if shares[i] > 0}


def color_classes(pixels: np.ndarray) -> np.ndarray:
    """Indices (K,) into `COLORS` of ``pixels`` (3, K) in [0, 1], by hue where there is color, else by lightness."""
    high = pixels.max(axis=0)
    low = pixels.min(axis=0)
    chroma = high - low
    lightness = (high + low) / 2
    hue = _hue(pixels, high, chroma)
    names = np.array([name for _, name in _HUES] + ["red"])[np.searchsorted([end for end, _ in _HUES], hue, "right")]
    pale = np.where(names == "orange", lightness > 0.8, lightness > 0.7)
    dull = (high < 0.8) & np.where((hue < 17) | (hue >= 345), chroma < 0.6 * high, hue < 48)
    names = np.where(((names == "red") | (names == "orange")) & pale, "pink", names)
    names = np.where(dull, "brown", names)  # brown is dark orange, or a red that is both dark and weak
    plain = np.where(lightness > 0.8, "white", np.where(high < 0.33, "black", "gray"))
    names = np.where((chroma < 0.15) | (high < 0.15), plain, names)
    return np.array([COLORS.index(name) for name in names], dtype=np.int64)


def _hue(pixels: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Hue in degrees [0, 360) of ``pixels`` (3, K); 0 where there is no color."""
    red, green, blue = pixels
    safe = np.maximum(chroma, 1e-6)
    sector = np.where(
        high == red,
        ((green - blue) / safe) % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return sector * 60 % 360
