"""What may be concluded from paired runs: differences seed by seed, a paired test, an effect size, an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from open_pisces.lab.experiment import HIGHER, Comparison, LabError

Verdict = Literal["agrees", "disagrees", "cannot tell"]
LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """A comparison of two variants over the same seeds.

    Attributes:
        difference: mean of better minus worse, in the direction that the claim says: above 0 agrees.
        low: lower end of its 95 % interval (Student's t).
        high: upper end.
        effect: the mean difference in its own standard deviations (Cohen's d of pairs); None where all are equal.
        p: two-sided, of the paired t-test.
        seeds: pairs.
        verdict: ``agrees`` or ``disagrees`` if p is below 0.05, else ``cannot tell``.
    """

    difference: float
    low: float
    high: float
    effect: float | None
    p: float
    seeds: int
    verdict: Verdict


def compare_paired(better: Sequence[float], worse: Sequence[float], metric: str) -> Paired:
    """Compare what two variants reached, seed by seed.

    Raises:
        LabError: for fewer than two seeds, or other seeds of one than of the other.
    """
    if len(better) != len(worse) or len(better) < 2:
        raise LabError(f"{len(better)} and {len(worse)} runs to compare: a paired test needs two seeds or more of both")
    sign = 1.0 if HIGHER[metric] else -1.0
    apart = sign * (np.asarray(better, float) - np.asarray(worse, float))
    mean, deviation = float(apart.mean()), float(apart.std(ddof=1))
    if deviation == 0:  # no spread to judge by: equal, or apart by the very same amount in every pair
        return Paired(mean, mean, mean, None, 1.0 if mean == 0 else 0.0, len(apart), _verdict(mean, float(mean == 0)))
    try:
        from scipy.stats import ttest_1samp
    except ModuleNotFoundError:
        raise LabError("scipy is missing, which tests the differences: pip install 'open-pisces[lab]'") from None
    found = ttest_1samp(apart, 0.0)
    interval = found.confidence_interval(0.95)
    p = float(found.pvalue)
    ends = float(interval.low), float(interval.high)
    return Paired(mean, *ends, mean / deviation, p, len(apart), _verdict(mean, p))


def _verdict(mean: float, p: float) -> Verdict:
    if p >= LEVEL:
        return "cannot tell"
    return "agrees" if mean > 0 else "disagrees"


def verdict_of(comparisons: Sequence[tuple[Comparison, Paired]]) -> str:
    """The claim's, in words: one verdict, or one for each thing that is matched where these differ.

    Of what is matched alike: agrees if all comparisons do, disagrees if one does and none agrees, else cannot tell.
    """
    by_matched: dict[str, set[Verdict]] = {}
    for comparison, paired in comparisons:
        by_matched.setdefault(comparison.matched, set()).add(paired.verdict)
    found = {matched: _together(verdicts) for matched, verdicts in by_matched.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{verdict} with {matched} matched" for matched, verdict in found.items())


def _together(found: set[Verdict]) -> Verdict:
    if found == {"agrees"}:
        return "agrees"
    return "disagrees" if "disagrees" in found and "agrees" not in found else "cannot tell"
