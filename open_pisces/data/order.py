"""The order of training, and every other random choice: closed forms of the seed and of what they are for.

`stream` names a choice (``stream(seed, "mask", epoch, key)``), so it never depends on what was drawn before. `Mixture`
says which sample of which source comes at draw ``g``, with which task: a block of draws holds exact counts of each
source, the `Walk` of a source says which sample. Ranks, workers and restarts agree without any state.

A walk cuts an epoch into chunks of neighboring samples, shuffles the chunks, and shuffles what comes out again within
windows. Equal stretches of that sequence are the lanes; draw ``n`` takes the next sample of lane ``n`` modulo lanes. A
rank that owns some lanes therefore reads a few runs of its files and not all of them, and every sample comes once an
epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from numbers import Integral
from typing import Literal

import numpy as np

from open_pisces.batch import Sample
from open_pisces.config import DataConfig, SourceConfig, Task
from open_pisces.data.shards import ShardError, ShardReader, open_dataset

BLOCK = 100
"""Most draws of a block; inside a block every source has its exact count."""


@dataclass(frozen=True)
class Draw:
    """One place in the order of training."""

    source: int
    index: int
    epoch: int
    lane: int
    task: Task | Literal["pair"]


class Mixture:
    """An endless, seeded order over weighted sources.

    Args:
        data: the sources to mix, the lanes and the window of their walks.
        seed: the run's seed.
        open_source: how a source's path becomes a dataset.

    Raises:
        ShardError: without sources, for a missing or empty one, one that holds less than is to be taken of it, or a
            weight too small for a block.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        open_source: Callable[[str], ShardReader] = open_dataset,
    ) -> None:
        if not data.sources:
            raise ShardError("a training needs data: name at least one dataset in data.sources")
        self.sources = tuple(data.sources)
        self.seed = seed
        self.counts = block_counts([source.weight for source in self.sources])
        self.block = sum(self.counts)
        self.readers = [open_source(source.path) for source in self.sources]
        for source, count, reader in zip(self.sources, self.counts, self.readers, strict=True):
            self._check(source, count, len(reader))
        self._subsets: list[np.ndarray | None] = []
        self._walks: list[Walk] = []
        for at, (source, reader) in enumerate(zip(self.sources, self.readers, strict=True)):
            self._subsets.append(subset(len(reader), source.take, seed, at) if source.take else None)
            self._walks.append(Walk(source.take or len(reader), seed, at, data.lanes, data.window))
        self._blocks: dict[int, np.ndarray] = {}

    def _check(self, source: SourceConfig, count: int, size: int) -> None:
        if not size:
            raise ShardError(f"the dataset {source.path} is empty: build it again or take it out of data.sources")
        if not count:
            raise ShardError(
                f"source {source.path}: weight {source.weight} gives less than one draw in {self.block}: "
                "raise it or take the source out of data.sources"
            )
        if source.take and source.take > size:
            raise ShardError(f"source {source.path}: take {source.take:,} is more than its {size:,} samples: lower it")

    def draw(self, g: int) -> Draw:
        """The ``g``-th draw, counted from 0."""
        block, place = divmod(g, self.block)
        order = self._block(block)
        source = int(order[place])
        before = int(np.count_nonzero(order[:place] == source))
        step = self._walks[source].step(block * self.counts[source] + before)
        chosen = self._subsets[source]
        index = step.index if chosen is None else int(chosen[step.index])
        return Draw(source, index, step.epoch, step.lane, self._task(source, step.epoch, index))

    def batch(self, step: int, size: int, rank: int = 0, ranks: int = 1) -> list[Draw]:
        """A rank's part of the global batch of a step.

        The batch is ordered by lane and cut into equal parts, so that whatever the number of ranks, together they
        hold the same draws in the same order, and each stays with its lanes.
        """
        # By lane: a rank's cut then holds whole lanes, and lanes are stretches of its files.
        draws = sorted((self.draw(g) for g in range(step * size, (step + 1) * size)), key=lambda draw: draw.lane)
        return draws[rank * size // ranks : (rank + 1) * size // ranks]

    def names(self, step: int, size: int) -> list[str]:
        """The samples of a global batch, as ``source:key``."""
        draws = (self.draw(g) for g in range(step * size, (step + 1) * size))
        return [f"{self.sources[d.source].path}:{self.readers[d.source].key(d.index)}" for d in draws]

    def holds(self, source: int, index: int) -> bool:
        """Whether a sample of a source can be drawn at all."""
        chosen = self._subsets[source]
        if chosen is None:
            return True
        at = int(np.searchsorted(chosen, index))
        return at < len(chosen) and int(chosen[at]) == index

    def sample(self, draw: Draw) -> Sample:
        """The sample of a draw."""
        return self.readers[draw.source][draw.index]

    def _block(self, block: int) -> np.ndarray:
        """The sources of a block in their order; the last one is kept."""
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self.counts)), self.counts)
            self._blocks = {block: stream(self.seed, "block", block).permutation(sources)}
        return self._blocks[block]

    def _task(self, source: int, epoch: int, index: int) -> Task | Literal["pair"]:
        tasks = {name: weight for name, weight in sorted(self.sources[source].tasks.items()) if weight > 0}
        if not tasks:
            return "pair"
        bounds = np.cumsum(list(tasks.values()))
        # Drawn from the sample and epoch, so that a sample keeps its task whatever is mixed beside it.
        at = stream(self.seed, "task", source, epoch, index).random() * bounds[-1]
        return list(tasks)[min(int(np.searchsorted(bounds, at, side="right")), len(tasks) - 1)]


def block_counts(weights: Sequence[float]) -> list[int]:
    """Draws of each source in one block: the least block that is exact, or `BLOCK` by largest remainder."""
    shares = [Fraction(str(weight)) for weight in weights]  # 0.1 means a tenth, not its nearest binary fraction
    total = sum(shares)
    least = lcm(*((share / total).denominator for share in shares))
    size = least if least <= BLOCK else BLOCK
    exact = [share / total * size for share in shares]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: size - sum(counts)]:
        counts[i] += 1
    return counts


def stream(seed: int, *purpose: object) -> np.random.Generator:
    """A generator that belongs to one purpose.

    Args:
        seed: the run's seed.
        purpose: words and whole numbers that name the choice, such as ``"order", source, epoch``.

    Raises:
        TypeError: for a part that is neither a word nor a whole number (its spelling could change between versions).
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *purpose):
        digest.update(_spell(part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _spell(part: object) -> bytes:
    """Bytes that differ for different parts, wherever one ends and the next begins."""
    if isinstance(part, Integral):  # numpy's integers count as Python's
        text = f"i{int(part)}"
    elif isinstance(part, str):
        text = f"s{part}"
    else:
        raise TypeError(f"a purpose is made of words and whole numbers, found {part!r} ({type(part).__name__})")
    raw = text.encode()
    return f"{len(raw)}:".encode() + raw


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
