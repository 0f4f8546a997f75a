"""Frechet and kernel distances between the features of two sets of pictures, with intervals.

The Frechet distance takes both sets' features for Gaussian (Heusel et al. 2017, arXiv 1706.08500)::

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

with covariances over n - 1. Of few pictures it is too large: the bias falls as 1 / n, so only figures of equal n
compare, and with no more pictures than the features are wide the covariance is singular; such a figure has to be
allowed, and is marked ``biased``. The kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401) has no such bias.

Intervals are grouped jackknives (Efron 1982): each set is dealt into 20 groups, each group is left out once, and the
spread of the 20 figures gives the standard error; both sets' variances add up. A bootstrap, which draws pictures twice,
would have fewer different pictures and so another bias. The interval is about the figure at this n, not at endless n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_kernel

from open_pisces.data.order import stream
from open_pisces.eval.distances.features import Features, FeatureSpec
from open_pisces.eval.intervals import EvaluationError, Interval
from open_pisces.files import whole_file

GROUPS = 20
STUDENT = 2.093
"""97.5 % quantile of Student's t with `GROUPS` - 1 degrees of freedom."""
LEAST = 2 * GROUPS
"""Pictures below which no distance is given, biased or not: each group needs two."""
_BLOCK = 4096  # rows that are turned into float64 at once


# ------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class FeatureStatistics:
    """What a Frechet distance needs of a set of pictures."""

    n: int
    mean: np.ndarray
    """``(width,)``, float64."""
    scatter: np.ndarray
    """Sum of the outer products of the features less their mean, ``(width, width)``, float64."""
    ruler: FeatureSpec
    pictures: str
    """As in `Features`: the sum of the pictures' sha256."""

    @classmethod
    def of(cls, features: Features) -> FeatureStatistics:
        """Statistics of features, in float64, block by block."""
        width = features.ruler.width
        moments = (0, np.zeros(width), np.zeros((width, width)))
        for start in range(0, len(features), _BLOCK):
            moments = _joined(*moments, *_moments(features.rows[start : start + _BLOCK]))
        return cls(*moments, features.ruler, features.pictures)

    @property
    def covariance(self) -> np.ndarray:
        """``(width, width)``, over n - 1."""
        return self.scatter / (self.n - 1)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together.

        Raises:
            EvaluationError: if the other one was measured with another ruler.
        """
        check_rulers(self.ruler, other.ruler)
        moments = _joined(self.n, self.mean, self.scatter, other.n, other.mean, other.scatter)
        total = (int(self.pictures, 16) + int(other.pictures, 16)) % 2**256
        return FeatureStatistics(*moments, self.ruler, f"{total:064x}")

    def without(self, rows: np.ndarray) -> FeatureStatistics:
        """Statistics less some of the rows they were made of; what identifies the pictures stays that of all."""
        # The inverse of `_joined`: a jackknife need not read the other rows again.
        n, mean, scatter = _moments(rows)
        left = self.n - n
        rest = (self.n * self.mean - n * mean) / left
        apart = rest - mean
        scatter = self.scatter - scatter - np.outer(apart, apart) * (left * n / self.n)
        return FeatureStatistics(left, rest, scatter, self.ruler, self.pictures)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that says what was measured with what."""
        about = {"n": str(self.n), "ruler": json.dumps(asdict(self.ruler)), "pictures": self.pictures}
        write_tensors(Path(path), {"mean": self.mean, "scatter": self.scatter}, about)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            EvaluationError: if there is no such file, or it does not say what it was measured with.
        """
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                mean, scatter = (file.get_tensor(name) for name in ("mean", "scatter"))
            return cls(int(about["n"]), mean, scatter, FeatureSpec(**json.loads(about["ruler"])), about["pictures"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{path}: no statistics of features that say their n and network ({error}): make them from the "
                f"pictures with this program; those of others do not say how they were made"
            ) from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Write a safetensors file with its metadata, whole or not at all."""
    with whole_file(path) as hidden:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, hidden, metadata=dict(about))


def check_rulers(a: FeatureSpec, b: FeatureSpec) -> None:
    """Refuse to compare what was measured differently.

    Raises:
        EvaluationError: naming the first difference.
    """
    for (name, one), other in zip(asdict(a).items(), asdict(b).values(), strict=True):
        if one != other:
            raise EvaluationError(
                f"features of {a.name} and of {b.name} do not compare ({name}: {one!r} and {other!r}): measure both "
                f"sets with the same network and preparation"
            )


def _moments(rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Number, mean and scatter of rows ``(n, width)``."""
    values = rows.astype(np.float64)  # float32 would lose the small eigenvalues of the covariance
    mean = values.mean(axis=0)
    values -= mean
    return len(rows), mean, values.T @ values


def _joined(n: int, mean: Any, scatter: Any, m: int, other: Any, added: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """Moments of two sets together (Chan et al. 1983); nothing cancels, unlike in sums of squares."""
    apart = other - mean
    return (
        n + m,
        mean + apart * (m / (n + m)),
        scatter + added + np.outer(apart, apart) * (n * m / (n + m)),
    )


# -------------------------------------------------------------------------------------------------------- distances


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The Frechet distance, as torchmetrics computes it.

    Raises:
        EvaluationError: if the two were measured differently, or one has fewer than two pictures.
    """
    check_rulers(a.ruler, b.ruler)
    if min(a.n, b.n) < 2:
        raise EvaluationError(f"sets of {a.n} and {b.n} pictures: a covariance needs two at least")
    # Private, but torchmetrics' class takes pictures only: it cannot be given the moments that a file keeps.
    moments = (a.mean, a.covariance, b.mean, b.covariance)
    found = _compute_fid(*(torch.from_numpy(moment) for moment in moments))
    return max(0.0, float(found))  # rounding can take equal sets below 0


def _factor(of: FeatureStatistics) -> np.ndarray:
    """``F`` ``(width, rank)`` with ``F F'`` the covariance; directions of no variance but rounding are left out."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(of.covariance))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps  # as numpy.linalg.matrix_rank
    return (vectors[:, kept] * values[kept].sqrt()).numpy()


def _symmetric_distance(a: FeatureStatistics, factor: np.ndarray, b: FeatureStatistics) -> float:
    """`frechet_distance` for the jackknife, which needs it 40 times, with the first set's ``F`` at hand.

    The trace of the root is the sum of the roots of the eigenvalues of ``F' S2 F``. Those are the eigenvalues of
    ``S1 S2`` but of a symmetric matrix, which has no more rows than the rank of ``S1``.
    """
    # One core, in place of torchmetrics: 9 s for 16 s (2,000 pictures, 2,048 wide), 0.5 s for 5 s (300, 1,280 wide).
    inner = factor.T @ b.covariance @ factor
    roots = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    apart = a.mean - b.mean
    return float(max(0.0, apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots))


def frechet_interval(a: Features | FeatureStatistics, b: Features, paired: bool = False, seed: int = 0) -> Interval:
    """The Frechet distance with its jackknife interval of 95 %.

    Args:
        a: one set; of mere statistics the rows are unknown, and the interval is about the other set alone.
        b: the other set.
        paired: row k of both belongs together (a picture and its reconstruction): a group is left out of both at once.
        seed: of the groups.

    Raises:
        EvaluationError: if the two were measured differently, or one has fewer than `LEAST` pictures.
    """
    one = _statistics(a)
    other = _statistics(b)
    if min(one.n, other.n) < LEAST:
        raise EvaluationError(f"sets of {one.n} and {other.n} pictures: give at least {LEAST}, so that groups are left")
    score = frechet_distance(one, other)
    if paired and isinstance(a, Features):
        both = []
        for part in _groups(other.n, seed):
            rest = one.without(a.rows[part])  # both sets move, so that no factor can be kept
            both.append(_symmetric_distance(rest, _factor(rest), other.without(b.rows[part])))
        return _jackknife(score, [both])
    moved = [_without_each_group(one, other, b, seed)]
    if isinstance(a, Features):
        moved.append(_without_each_group(other, one, a, seed))
    return _jackknife(score, moved, least=0.0)


def _statistics(of: Features | FeatureStatistics) -> FeatureStatistics:
    return of if isinstance(of, FeatureStatistics) else FeatureStatistics.of(of)


def _without_each_group(kept: FeatureStatistics, less: FeatureStatistics, rows: Features, seed: int) -> list[float]:
    """Frechet distances of ``kept`` from ``less`` without each group of its ``rows``."""
    factor = _factor(kept)  # once for 20 distances
    return [_symmetric_distance(kept, factor, less.without(rows.rows[part])) for part in _groups(less.n, seed)]


def kernel_distance(a: Features, b: Features, seed: int = 0) -> Interval:
    """KID: the unbiased squared maximum mean discrepancy under ``(x y / width + 1)^3``, with its jackknife interval.

    Over all pairs of rows, where others take the mean over subsets of 1,000: the expectation is the same, the spread
    is smaller. It can be below 0.

    Raises:
        EvaluationError: as `frechet_interval`.
    """
    check_rulers(a.ruler, b.ruler)
    if min(len(a), len(b)) < LEAST:
        raise EvaluationError(f"sets of {len(a)} and {len(b)} pictures: give at least {LEAST}, so that groups are left")
    groups_a = _grouped_rows(a, seed)
    groups_b = _grouped_rows(b, seed)
    sums = KernelSums(
        _kernel_sums(groups_a, groups_a),
        _kernel_sums(groups_b, groups_b),
        _kernel_sums(groups_a, groups_b),
        np.array([len(rows) for rows in groups_a]),
        np.array([len(rows) for rows in groups_b]),
    )
    every = np.ones(GROUPS, bool)
    less = ~np.eye(GROUPS, dtype=bool)  # row k keeps all groups but k
    without_a = [sums.discrepancy(kept, every) for kept in less]
    without_b = [sums.discrepancy(every, kept) for kept in less]
    return _jackknife(sums.discrepancy(every, every), [without_a, without_b])


@dataclass(frozen=True)
class KernelSums:
    """Sums of the kernel over the pairs of rows of two groups, ``(GROUPS, GROUPS)``, and the groups' sizes."""

    aa: np.ndarray
    bb: np.ndarray
    ab: np.ndarray
    sizes_a: np.ndarray
    sizes_b: np.ndarray

    def discrepancy(self, a: np.ndarray, b: np.ndarray) -> float:
        """The unbiased discrepancy over the groups that ``a`` and ``b`` keep, each ``(GROUPS,)`` of bool."""
        n = self.sizes_a[a].sum()
        m = self.sizes_b[b].sum()
        within_a = self.aa[a][:, a].sum() / (n * (n - 1))
        within_b = self.bb[b][:, b].sum() / (m * (m - 1))
        return float(within_a + within_b - 2 * self.ab[a][:, b].sum() / (n * m))


def _grouped_rows(of: Features, seed: int) -> list[torch.Tensor]:
    """The rows of each group, float64."""
    return [torch.from_numpy(of.rows[part]).double() for part in _groups(len(of), seed)]


def _kernel_sums(a: list[torch.Tensor], b: list[torch.Tensor]) -> np.ndarray:
    """Sums of KID's kernel over all pairs of a group of ``a`` and one of ``b``; no row is paired with itself."""
    sums = np.empty((len(a), len(b)))
    for i, j in np.ndindex(sums.shape):
        if a is b and j < i:  # the kernel is symmetric
            sums[i, j] = sums[j, i]
            continue
        kernel = poly_kernel(a[i], b[j])
        sums[i, j] = kernel.sum() - (kernel.trace() if a is b and i == j else 0)
    return sums


def _groups(n: int, seed: int) -> list[np.ndarray]:
    """Rows dealt into `GROUPS`."""
    return np.array_split(stream(seed, "eval", "groups").permutation(n), GROUPS)


def _jackknife(score: float, moved: Sequence[Sequence[float]], least: float = -math.inf) -> Interval:
    """``score`` and its interval from what it becomes when groups of each set are left out."""
    variance = sum((GROUPS - 1) * float(np.var(figures)) for figures in moved)
    # (g - 1) / g of the sum of squares. Student's quantile: 20 figures know the spread only roughly.
    half = STUDENT * math.sqrt(variance)
    return Interval(score, max(least, score - half), score + half)


# --------------------------------------------------------------------------------------- what figures are held against


def check_enough(n: int, width: int, what: str, biased: bool) -> None:
    """Refuse too few pictures for features of a width, or say how many it takes.

    Raises:
        EvaluationError: for fewer than `LEAST`, or no more than ``width`` unless a biased figure is allowed.
    """
    if n < LEAST:
        raise EvaluationError(f"{n} {what} pictures: no distance is given for fewer than {LEAST}")
    if n <= width and not biased:
        raise EvaluationError(
            f"{n:,} {what} pictures for {width:,} features: their covariance is singular and the distance far too "
            f"large; give at least {width + 1:,} (the COCO-30K protocol takes 30,000), or allow a figure that is "
            f"marked as biased (`--biased`)"
        )


def real_baselines(real: Features, n: int, seed: int) -> dict[str, float]:
    """``halves``, the Frechet distance of two halves of a set, and ``real``, what follows for ``n`` other pictures.

    Pictures of the same kind are apart by bias alone, which falls as 1 / n of each set: halves of N pictures are apart
    by about ``b (2 / N + 2 / N)``, so N and n of them by ``b (1 / N + 1 / n)``. Measured on composed scenes with
    EfficientNet-Lite0 (1,280 wide): 11.4 follows for 1,500 and 1,500 pictures, 12.4 is what they score.
    """
    order = stream(seed, "eval", "halves").permutation(len(real))
    parts = [real.rows[part] for part in np.array_split(order, 2)]
    halves = [FeatureStatistics.of(Features(rows, real.ruler, "0", real.sides)) for rows in parts]
    apart = frechet_distance(*halves)
    others = apart * len(real) / 4 * (1 / len(real) + 1 / n)
    return {"real": round(others, 4), "halves": round(apart, 4)}
