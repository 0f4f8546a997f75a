"""The order of training: which sample, of which source, with which task, as a closed form of (seed, g, sources).

Draw ``g`` depends on nothing that happened before it, so ranks, workers and restarts agree without any state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Literal, Protocol

import numpy as np

from open_pisces.batch import Sample
from open_pisces.config import SourceConfig, Task
from open_pisces.data.draws import stream
from open_pisces.data.shards import ShardError, ShardReader, data_path

BLOCK = 100
"""Most draws of a block; inside a block every source has its exact count."""


class _Dataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Draw:
    """One place in the order of training."""

    source: int
    index: int
    epoch: int
    task: Task | Literal["pair"]


class Mixture:
    """An endless, seeded order over weighted sources.

    Args:
        sources: what is mixed; each source's folder is opened once.
        seed: the run's seed.
        open_source: how a source's path becomes a dataset.

    Raises:
        ShardError: without sources, for a missing or empty one, or a weight too small for a block.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        seed: int,
        open_source: Callable[[str], _Dataset] = lambda path: ShardReader(data_path(path)),
    ) -> None:
        if not sources:
            raise ShardError("a training needs data: name at least one dataset in data.sources")
        self.sources, self.seed = tuple(sources), seed
        self.counts = block_counts([source.weight for source in sources])
        self.block = sum(self.counts)
        self.readers = [open_source(source.path) for source in sources]
        for source, count, reader in zip(sources, self.counts, self.readers, strict=True):
            if not len(reader):
                raise ShardError(f"the dataset {source.path} is empty: build it again or take it out of data.sources")
            if not count:
                raise ShardError(
                    f"source {source.path}: weight {source.weight} gives less than one draw in {self.block}: "
                    "raise it or take the source out of data.sources"
                )
        self._blocks: dict[int, np.ndarray] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self, g: int) -> Draw:
        """The ``g``-th draw, counted from 0."""
        block, place = divmod(g, self.block)
        order = self._block(block)
        source = int(order[place])
        before = int(np.count_nonzero(order[:place] == source))
        epoch, step = divmod(block * self.counts[source] + before, len(self.readers[source]))
        index = int(self._order(source, epoch)[step])
        return Draw(source, index, epoch, self._task(source, epoch, index))

    def sample(self, draw: Draw) -> Sample:
        """The sample of a draw."""
        return self.readers[draw.source][draw.index]

    def _block(self, block: int) -> np.ndarray:
        """The sources of a block in their order; the last one is kept."""
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self.counts)), self.counts)
            self._blocks = {block: stream(self.seed, "block", block).permutation(sources)}
        return self._blocks[block]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """A source's permutation for an epoch; the last one is kept."""
        if self._orders.get(source, (-1,))[0] != epoch:
            order = stream(self.seed, "order", source, epoch).permutation(len(self.readers[source]))
            self._orders[source] = (epoch, order)
        return self._orders[source][1]

    def _task(self, source: int, epoch: int, index: int) -> Task | Literal["pair"]:
        tasks = {name: weight for name, weight in sorted(self.sources[source].tasks.items()) if weight > 0}
        if not tasks:
            return "pair"
        bounds = np.cumsum(list(tasks.values()))
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
