"""How claims are measured."""

from __future__ import annotations

import time

import numpy as np
import pytest

from open_pisces.bench.pairs import compare, interval


def test_a_ratio_says_how_many_times_faster_ours_is() -> None:
    order: list[str] = []

    def ours() -> None:
        order.append("a")
        time.sleep(0.004)

    def other() -> None:
        order.append("b")
        time.sleep(0.012)

    found = compare("sleep", ours, other, pairs=6)
    assert found["name"] == "sleep" and found["n"] == 6 and 2.0 < found["low"] <= found["ratio"] <= found["high"] < 4.0
    assert "".join(order) == "ab" + "abba" * 3  # one warm-up, then whoever went second goes first
    assert found["figures"]["seconds_ours"] == pytest.approx(0.004, rel=0.5)


def test_the_interval_is_that_of_the_median() -> None:
    ratios = np.random.default_rng(0).normal(2.0, 0.1, 41)
    low, high = interval(ratios)
    assert low < np.median(ratios) < high and 0.02 < high - low < 0.15
    assert interval(np.ones(5)) == (1.0, 1.0)
