"""How a claim is measured: A and B in turns, the ratio of each pair, the median of the ratios and its interval."""

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
"""Seconds between two lines on standard error: a slow machine shall show a sign of life."""


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
        ``name``; ``ratio``, the median of ``other``'s time over ``ours``, so more is faster; ``low`` and ``high``, its
        95 % bootstrap interval; ``n``; ``figures`` with the median seconds of both.
    """
    begun = time.perf_counter()
    for _ in range(warm):
        ours()
        other()
    _tell(f"{name}: {pairs} pairs, {_left(time.perf_counter() - begun, warm, pairs)}; --pairs N takes fewer")
    begun = told = time.perf_counter()
    seconds = np.zeros((pairs, 2))
    for pair in range(pairs):
        if time.perf_counter() - told > TELL_EVERY:
            told = time.perf_counter()
            _tell(f"{name}: {pair} of {pairs} pairs, {_left(told - begun, pair, pairs - pair)}")
        for way in ((0, 1), (1, 0))[pair % 2]:
            start = time.perf_counter()
            (ours, other)[way]()
            seconds[pair, way] = time.perf_counter() - start
    ratios = seconds[:, 1] / seconds[:, 0]
    low, high = interval(ratios)
    medians = {"seconds_ours": float(np.median(seconds[:, 0])), "seconds_other": float(np.median(seconds[:, 1]))}
    found = {"name": name, "ratio": float(np.median(ratios)), "low": low, "high": high, "n": pairs}
    return {**found, "figures": {**medians, "threads": torch.get_num_threads()}}


def _left(seconds: float, done: int, remaining: int) -> str:
    """The time that the remaining pairs will take, in words."""
    if not done:
        return "time unknown"
    minutes, rest = divmod(round(seconds / done * remaining), 60)
    return f"about {minutes} min {rest:02d} s left"


def _tell(text: str) -> None:
    print(f"pisces bench: {text}", file=sys.stderr, flush=True)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of ``ratios`` (n,)."""
    found = bootstrap({"ratios": ratios}, lambda medians: medians["ratios"], np.median, rng=stream(0, "bench"))
    return found.low, found.high
