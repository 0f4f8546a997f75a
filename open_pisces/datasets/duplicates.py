"""Copies of pictures: found by the same file, or by a perceptual hash and coarse colors."""

from __future__ import annotations

from array import array
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow
from PIL.Image import Image

_SIDE = 32  # pixels of the gray square the hash is taken from
_LEAST_AMPLITUDE = 8.0  # a frequency counts as present above this amplitude ...
_LEAST_SHARE = 0.2  # ... and above this share of the root mean square of all 64
_SAME_COLOR = 16  # of 255: JPEG at quality 60 moves a sixteenth of a 64-pixel picture by up to 13


class Appearance(NamedTuple):
    """What a picture looks like: copies of it, re-encoded or resized, differ little."""

    hash: int
    """64 bits, see `perceptual_hash`."""
    colors: np.ndarray
    """uint8 (48,): mean colors of a grid of 4 x 4 cells."""


def appearance_of(image: Image) -> Appearance:
    """The hash and the coarse colors of an RGB picture."""
    cells = image.resize((4, 4), Pillow.Resampling.BOX)
    return Appearance(perceptual_hash(image), np.asarray(cells, np.uint8).reshape(-1))


def same_colors(colors: np.ndarray, others: np.ndarray) -> bool:
    """Whether any row of ``others`` (N, 48) is near ``colors`` (48,): what tells a red heart from a blue one."""
    return bool((np.abs(others.astype(np.int16) - colors).max(-1, initial=0) <= _SAME_COLOR).any())


def perceptual_hash(image: Image) -> int:
    """A 64-bit DCT hash: which of the 64 lowest frequencies of the picture, in gray at 32 x 32, are clearly positive.

    The usual hash compares with the median; drawings have many frequencies near zero, whose bits then are noise. Here
    those bits are 0. Color is not in the hash: `same_colors` compares it.
    """
    gray = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Pillow.Resampling.BILINEAR), np.float64)
    cosines, lowest = _frequencies()
    found = (cosines @ gray @ cosines.T)[lowest]
    bits = found > max(_LEAST_AMPLITUDE, _LEAST_SHARE * float(np.sqrt(np.mean(found**2))))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _frequencies() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The orthonormal DCT-II as a matrix; rows and columns of the 64 lowest frequencies but the mean."""
    place = np.arange(_SIDE)
    matrix = np.cos(np.pi * (2 * place[None] + 1) * place[:, None] / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    matrix[0] /= np.sqrt(2)
    # The 64 lowest all lie in the first 12 rows and columns: the diagonals 1 to 10 hold 65.
    every = np.ndindex(12, 12)
    lowest: np.ndarray = np.array(sorted(every, key=lambda at: (sum(at), at))[1:65])
    return matrix, (lowest[:, 0], lowest[:, 1])


class NearIndex:
    """Pictures seen so far, to ask whether a new one looks like any: hashes within ``distance`` bits, same colors.

    Exact, without comparing all with all: the 64 bits are cut into ``distance + 1`` bands, and two hashes that differ
    in no more than ``distance`` bits agree in at least one whole band, so only pictures that share a band are
    compared. About 56 + 4 * (distance + 1) bytes a picture.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        cuts = [64 * band // (distance + 1) for band in range(distance + 2)]
        # 16 bits of a longer band are enough to look under: the comparison decides.
        self._bands = [(low, (1 << min(16, high - low)) - 1) for low, high in pairwise(cuts)]
        self._places: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._hashes = np.zeros(1024, np.uint64)
        self._colors = np.zeros((1024, 48), np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, one: Appearance) -> None:
        """Remember a picture."""
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._colors = np.concatenate([self._colors, np.zeros_like(self._colors)])
        self._hashes[self._count] = one.hash
        self._colors[self._count] = one.colors
        for (shift, mask), places in zip(self._bands, self._places, strict=True):
            places.setdefault(one.hash >> shift & mask, array("I")).append(self._count)
        self._count += 1

    def near(self, number: int) -> np.ndarray:
        """Which pictures (numbered as they were added) have a hash within the distance of this one, ascending."""
        bands = zip(self._bands, self._places, strict=True)
        found = [places.get(number >> shift & mask, array("I")) for (shift, mask), places in bands]
        at = np.unique(np.concatenate([np.array(places, np.int64) for places in found]))
        return at[np.bitwise_count(self._hashes[at] ^ np.uint64(number)) <= self.distance]

    def __contains__(self, one: Appearance) -> bool:
        """Whether a picture that looks like this one was added."""
        return same_colors(one.colors, self._colors[self.near(one.hash)])


class CopyCounter:
    """Counts pictures that occurred before: ``exact`` as the same file, ``near`` only looking the same."""

    def __init__(self) -> None:
        self.exact = 0
        self.near = 0
        self._files: set[tuple[int, int]] = set()
        # By whole hash, not a `NearIndex` of distance 0, whose single band of 16 bits many drawings share.
        self._colors: dict[int, np.ndarray] = {}

    def add(self, files: list[tuple[int, int]], images: tuple[Image, ...]) -> None:
        """Count the pictures of a sample; ``files`` are their sizes in bytes and CRC-32."""
        for file, image in zip(files, images, strict=True):
            if file in self._files:
                self.exact += 1
                continue
            self._files.add(file)
            one = appearance_of(image)
            others = self._colors.get(one.hash, np.zeros((0, 48), np.uint8))
            if same_colors(one.colors, others):
                self.near += 1
            else:
                self._colors[one.hash] = np.concatenate([others, one.colors[None]])
