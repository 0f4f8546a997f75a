"""Percentile bootstrap intervals (Efron 1979): how far a score may move when other samples had been drawn.

Draw as many values with replacement as there are, take the statistic, repeat; the interval holds the middle of the
repeats. Seeded, so the same values give the same interval. Where all values are equal the interval has no width: it
knows nothing of the cases that were not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from open_pisces.errors import PiscesError

RESAMPLES = 2000
MIDDLE_95 = (0.025, 0.975)
"""The quantiles of the repeats between which 95 % of them lie."""
_DRAWS_AT_ONCE = 4_000_000  # bounds memory to about 64 MB however many values there are


class EvaluationError(PiscesError):
    """A measurement that cannot be made as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class Interval:
    """A score with the two ends of its bootstrap interval."""

    score: float
    low: float
    high: float

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """``{"score", "low", "high"}`` for printing."""
        return {name: round(value, digits) for name, value in asdict(self).items()}


def bootstrap(
    groups: Mapping[str, np.ndarray],
    combine: Callable[[dict[str, np.ndarray]], np.ndarray],
    statistic: Callable[..., np.ndarray] = np.mean,
    ends: tuple[float, float] = MIDDLE_95,
    resamples: int = RESAMPLES,
    rng: np.random.Generator | None = None,
) -> Interval:
    """A score made of groups of values, with its bootstrap interval.

    Args:
        groups: for each name the values ``(n_i, ...)``; each group is resampled on its own, so its size is kept.
        combine: from the groups' statistics, ``(resamples, ...)``, to scores ``(resamples,)``; without that first axis
            it gives the score itself.
        statistic: of the values of a group along an ``axis``: `numpy.mean`, `numpy.median`.
        ends: the quantiles of the repeats that become ``low`` and ``high``.
        resamples: number of repeats.
        rng: makes the draws, group by group in their order; None is a generator of seed 0.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    score = combine({name: statistic(values, axis=0) for name, values in groups.items()})
    repeats = combine({name: _resampled(values, statistic, resamples, rng) for name, values in groups.items()})
    low, high = np.quantile(repeats, ends)
    return Interval(float(score), float(low), float(high))


def _resampled(
    values: np.ndarray, statistic: Callable[..., np.ndarray], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """``statistic`` (resamples, ...) of ``values`` (n, ...) drawn with replacement, in blocks that fit in memory."""
    n = len(values)
    block = max(1, _DRAWS_AT_ONCE // values.size)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([statistic(values[rng.integers(0, n, (size, n))], axis=1) for size in sizes])


def mean_interval(values: ArrayLike, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of ``values`` (n,) with its bootstrap interval.

    Raises:
        EvaluationError: if there are no values, or one of them is not a finite number.
    """
    return macro_interval({"values": values}, level, resamples, seed)


def macro_interval(
    groups: Mapping[str, ArrayLike], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of the groups' means with its interval.

    Args:
        groups: for each name the values (n_i,) of one group; sizes may differ, every group weighs the same.
        level: the share of the repeats that the interval holds.
        resamples: number of repeats.
        seed: of the repeats' draws.

    Raises:
        EvaluationError: if there is no group, a group is empty, or a value is not a finite number.
    """
    if not groups:
        raise EvaluationError("no group of values: an interval needs at least one group with one value")
    if not 0 < level < 1:
        raise EvaluationError(f"level = {level}: give the share the interval holds, between 0 and 1, for example 0.95")
    arrays = {name: _checked(name, values) for name, values in groups.items()}
    ends = ((1 - level) / 2, (1 + level) / 2)
    return bootstrap(arrays, _mean_of_groups, ends=ends, resamples=resamples, rng=np.random.default_rng(seed))


def _mean_of_groups(means: dict[str, np.ndarray]) -> np.ndarray:
    return np.mean(list(means.values()), axis=0)


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    """``values`` as floats (n,), refused when empty or not finite."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise EvaluationError(f"{name}: no values to take a mean of; give at least one")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise EvaluationError(f"{name}: {bad} of {array.size} values are not finite numbers; remove or cap them")
    return array
