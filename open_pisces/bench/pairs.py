"""How a claim of speed is measured: interleaved pairs, the median of the paired ratios, its bootstrap interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from open_pisces.data.order import stream
from open_pisces.eval.intervals import bootstrap

TELL_EVERY = 10.0
"""Seconds between two lines of progress on standard error."""


def compare(
    name: str, ours: Callable[[], Any], other: Callable[[], Any], pairs: int = 15, warm: int = 1
) -> dict[str, Any]:
    """Time two ways of doing the same work.

    Which goes first changes from pair to pair, so that a machine that slows down or warms up favours neither.

    Args:
        name: of the claim.
        ours: one run of our way.
        other: one run of what it is compared with.
        pairs: how many pairs.
        warm: runs of each before the clock starts.

    Returns:
        What `summarize` gives, with the median seconds of both ways and the number of threads in ``figures``.
    """
    begun = time.perf_counter()
    for _ in range(warm):
        ours()
        other()
    _tell(f"{name}: {pairs} pairs, {_left(time.perf_counter() - begun, warm, pairs)}; --pairs N takes fewer")
    begun = told = time.perf_counter()
    seconds = np.zeros((pairs, 2))
    ways = (ours, other)
    for pair in range(pairs):
        if time.perf_counter() - told > TELL_EVERY:
            told = time.perf_counter()
            _tell(f"{name}: {pair} of {pairs} pairs, {_left(told - begun, pair, pairs - pair)}")
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for way in order:
            start = time.perf_counter()
            ways[way]()
            seconds[pair, way] = time.perf_counter() - start
    ours_median, other_median = np.median(seconds, axis=0).tolist()
    figures = {"seconds_ours": ours_median, "seconds_other": other_median, "threads": torch.get_num_threads()}
    return summarize(name, seconds, figures)


def summarize(name: str, seconds: np.ndarray, figures: dict[str, Any]) -> dict[str, Any]:
    """The result of a bench.

    Args:
        name: of the claim.
        seconds: of each pair, ``(n, 2)``: ours, and what it is compared with.
        figures: what else there is to say.

    Returns:
        ``name``; ``ratio``, the median of the other's time over ours, so more is faster; ``low`` and ``high``, its 95 %
        bootstrap interval; ``n``; ``figures``.
    """
    # The median: one pair that another process disturbed would pull a mean along.
    ratios = {"ratios": seconds[:, 1] / seconds[:, 0]}
    found = bootstrap(ratios, lambda medians: medians["ratios"], np.median, rng=stream(0, "bench"))
    return {
        "name": name,
        "ratio": found.score,
        "low": found.low,
        "high": found.high,
        "n": len(seconds),
        "figures": figures,
    }


def _left(seconds: float, done: int, remaining: int) -> str:
    """The time that the remaining pairs will take, in words."""
    if not done:
        return "time unknown"
    minutes, rest = divmod(round(seconds / done * remaining), 60)
    return f"about {minutes} min {rest:02d} s left"


def _tell(text: str) -> None:
    print(f"pisces bench: {text}", file=sys.stderr, flush=True)
