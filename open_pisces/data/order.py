"""The order in which one dataset is walked: a closed form of (seed, source, n).

An epoch is cut into chunks of neighbouring samples, the chunks are shuffled, and what comes out is shuffled again
within windows. Equal stretches of that sequence are the lanes; draw ``n`` takes the next sample of lane ``n`` modulo
lanes. A rank that owns some lanes therefore reads a few runs of its files and not all of them, every sample comes
once an epoch, and neither ranks, workers nor restarts can change anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_pisces.data.draws import stream

LARGEST_CHUNK = 128
"""Most samples of a chunk; datasets of less than half a million samples have smaller ones, down to 1."""


@dataclass(frozen=True)
class Step:
    """One step of a walk."""

    index: int
    epoch: int
    lane: int


class Walk:
    """A walk over ``count`` samples.

    Args:
        count: samples of the dataset.
        seed: the run's seed.
        source: which of the run's sources it is: two walks over one dataset differ.
        lanes: canonical lanes, which ranks share among them.
        window: samples shuffled together after their chunks were.
    """

    def __init__(self, count: int, seed: int, source: int = 0, lanes: int = 64, window: int = 1024) -> None:
        self.count = count
        self.seed = seed
        self.source = source
        self.lanes = lanes
        self.window = window
        # 4,096 chunks shuffle a small set as well as single samples would; large sets keep neighbors for the disk.
        self.chunk = min(max(count // 4096, 1), LARGEST_CHUNK)
        self._chunks: dict[int, tuple[np.ndarray, int]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def step(self, n: int) -> Step:
        """Step ``n``, counted from 0; it needs none of those before it."""
        epoch, place = divmod(n, self.count)
        along, lane = divmod(place, self.lanes)
        share, rest = divmod(self.count, self.lanes)
        at = lane * share + min(lane, rest) + along
        number, offset = divmod(at, self.window)
        shuffled = number * self.window + int(self._window(epoch, number)[offset])
        return Step(self._sample(epoch, shuffled), epoch, lane)

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """The order inside a window; those that the lanes stand in are kept."""
        key = epoch, number
        if key not in self._windows:
            size = min(self.window, self.count - number * self.window)
            self._windows[key] = stream(self.seed, "window", self.source, epoch, number).permutation(size)
            if len(self._windows) > 2 * self.lanes:
                self._windows.pop(next(iter(self._windows)))
        return self._windows[key]

    def _sample(self, epoch: int, at: int) -> int:
        """The sample at a place of the epoch's row of chunks, one of which may be shorter than the others."""
        order, short_at = self._row(epoch)
        short = self.count % self.chunk
        start = short_at * self.chunk
        if at >= start + short:
            at -= short
        elif at >= start:
            return len(order) * self.chunk + at - start
        return int(order[at // self.chunk]) * self.chunk + at % self.chunk

    def _row(self, epoch: int) -> tuple[np.ndarray, int]:
        """The order of the whole chunks, and before which of them the short one stands; the last two are kept."""
        if epoch not in self._chunks:
            random = stream(self.seed, "chunks", self.source, epoch)
            whole = self.count // self.chunk
            self._chunks[epoch] = random.permutation(whole), int(random.integers(whole + 1))
            if len(self._chunks) > 2:
                self._chunks.pop(next(iter(self._chunks)))
        return self._chunks[epoch]


def subset(count: int, take: int, seed: int, source: int) -> np.ndarray:
    """``take`` of ``count`` samples, drawn by the seed, in the order of the files."""
    chosen = stream(seed, "take", source).choice(count, take, replace=False, shuffle=False)
    chosen.sort()
    return chosen
