"""Bootstrap intervals: of means, of groups, and of any statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from open_pisces.eval.intervals import bootstrap, macro_interval, mean_interval


def test_interval_of_a_mean() -> None:
    values = np.arange(100.0)
    found = mean_interval(values)
    assert found.score == 49.5 and found == mean_interval(values) and found != mean_interval(values, seed=1)
    spread = values.std() / 10  # standard error; the normal interval is +-1.96 of it
    assert found.low == pytest.approx(49.5 - 1.96 * spread, abs=0.5)
    assert found.high == pytest.approx(49.5 + 1.96 * spread, abs=0.5)
    assert mean_interval([1, 1, 1]).rounded() == {"score": 1.0, "low": 1.0, "high": 1.0}


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.random(60) < 0.7, resamples=400, seed=i) for i in range(300)]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in found])
    assert 0.90 <= covered <= 0.98


def test_macro_interval_weighs_groups_equally_and_resamples_within_them() -> None:
    groups = {"a": [1.0] * 90, "b": [0.0] * 10}
    assert macro_interval(groups).rounded() == {"score": 0.5, "low": 0.5, "high": 0.5}  # groups never mix
    found = macro_interval({"a": [0.0, 1.0] * 50, "b": [0.0, 1.0] * 50})
    pooled = mean_interval([0.0, 1.0] * 100)
    assert found.score == 0.5 and found.high - found.low == pytest.approx(pooled.high - pooled.low, abs=0.02)


def test_blocks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mean_interval(np.arange(50.0))
    monkeypatch.setattr("open_pisces.eval.intervals._DRAWS_AT_ONCE", 1000)
    assert mean_interval(np.arange(50.0)) == whole


@pytest.mark.parametrize(("values", "says"), [([], "no values"), ([1.0, float("nan")], "1 of 2 values"), ({}, "group")])
def test_intervals_refuse_what_has_no_mean(values: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        macro_interval(values) if isinstance(values, dict) else mean_interval(values)


def test_any_statistic_of_groups_is_combined_in_any_way() -> None:
    """Medians of known values, their differences; and a ratio of two columns that are drawn together."""
    rng = np.random.default_rng(0)
    groups = {"a": rng.normal(5, 1, 400), "b": rng.normal(2, 1, 100)}
    found = bootstrap(groups, lambda of: of["a"] - of["b"], np.median)
    assert found.score == np.median(groups["a"]) - np.median(groups["b"])
    spread = np.sqrt(np.pi / 2 * (1 / 400 + 1 / 100))  # of medians of normal values, pi / 2 times that of means
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    rows = rng.random((50, 1)) * [1.0, 3.0]
    ratio = bootstrap({"": rows}, lambda of: of[""][..., 1] / of[""][..., 0])
    assert ratio.rounded() == {"score": 3.0, "low": 3.0, "high": 3.0}  # rows stay whole


def test_the_draws_are_those_of_the_generator_that_is_given() -> None:
    """One value in ten is 1: a draw by hand, of the same generator, gives the same repeats."""
    values = np.array([1.0] + [0.0] * 9)
    found = bootstrap({"": values}, lambda of: of[""], rng=np.random.default_rng(7), resamples=200)
    drawn = np.random.default_rng(7).integers(0, 10, (200, 10))
    expected = np.quantile((drawn == 0).mean(axis=1), [0.025, 0.975])
    assert (found.low, found.high) == tuple(expected) and found.score == 0.1
    assert bootstrap({"": values}, lambda of: of[""]) == bootstrap(
        {"": values}, lambda of: of[""], rng=np.random.default_rng(0)
    )
