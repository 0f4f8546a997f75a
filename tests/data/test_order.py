"""The walk over one dataset: every sample once an epoch, any step at once, lanes that keep to a part of the files."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_pisces.data.order import LARGEST_CHUNK, Walk, subset


def epoch_of(walk: Walk, epoch: int) -> list[int]:
    return [walk.step(n).index for n in range(epoch * walk.count, (epoch + 1) * walk.count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 70), st.integers(1, 300), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(count: int, lanes: int, window: int, seed: int) -> None:
    walk = Walk(count, seed, lanes=lanes, window=window)
    for epoch in (0, 3):
        assert sorted(epoch_of(walk, epoch)) == list(range(count))


@pytest.mark.parametrize("count", [4096 * 3, 4096 * 3 + 2, 4096 * 5 - 1])
def test_chunks_of_several_samples_lose_none_either(count: int) -> None:
    walk = Walk(count, 1, lanes=8, window=64)
    assert walk.chunk > 1
    for epoch in (0, 1):
        assert sorted(epoch_of(walk, epoch)) == list(range(count))


def test_a_step_needs_none_before_it() -> None:
    walked = Walk(9000, 4, source=2)
    steps = {n: walked.step(n) for n in range(0, 27000, 7)}
    for n in (26999 // 7 * 7, 0, 8995, 9002, 14, 21000):
        assert Walk(9000, 4, source=2).step(n) == steps[n] == walked.step(n)


def test_epochs_seeds_and_sources_have_orders_of_their_own() -> None:
    cases = ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0))
    assert len({tuple(epoch_of(Walk(500, seed, source), epoch)) for seed, source, epoch in cases}) == 4


def test_an_order_is_well_mixed() -> None:
    """Neighbours in the order are no neighbours in the files, and place says nothing about number."""
    order = np.array(epoch_of(Walk(40_000, 0), 0))
    assert np.mean(np.abs(np.diff(order)) < 20) < 0.05
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.05


def test_lanes_take_turns_and_keep_to_their_stretch() -> None:
    count, lanes = 1_000_000, 16
    walk = Walk(count, 0, lanes=lanes)
    assert walk.chunk == LARGEST_CHUNK
    steps = [walk.step(n) for n in range(lanes * 2000)]
    assert [s.lane for s in steps[: 2 * lanes]] == [*range(lanes), *range(lanes)]
    for lane in (0, 7, 15):
        chunks = {s.index // walk.chunk for s in steps if s.lane == lane}
        # 2,000 samples of one lane come from the few chunks of the windows it passes, not from all over the files
        assert len(chunks) <= (2000 // walk.window + 2) * (walk.window // walk.chunk + 1)
    both = [{s.index // walk.chunk for s in steps if s.lane == lane} for lane in range(lanes)]
    assert sum(bool(one & two) for one, two in pairwise(both)) <= lanes


def test_draw_100_million_of_a_virtual_dataset_needs_no_walk_to_it() -> None:
    calls = Counter[str]()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    try:
        found = [Walk(150_000_000, seed).step(10**8) for seed in range(3)]
    finally:
        sys.setprofile(None)
    assert all(0 <= step.index < 150_000_000 and step.epoch == 0 for step in found)
    assert calls["call"] + calls["c_call"] < 3 * 2000  # a closed form: no more work than for the first draw


def test_a_subset_is_drawn_once_for_all_without_repeats() -> None:
    chosen = subset(1000, 300, 5, 0)
    assert len(set(chosen.tolist())) == 300 and (np.diff(chosen) > 0).all() and chosen.max() < 1000
    assert np.array_equal(chosen, subset(1000, 300, 5, 0))
    assert not np.array_equal(chosen, subset(1000, 300, 5, 1)) and not np.array_equal(chosen, subset(1000, 300, 6, 0))
    assert 350 < np.mean(chosen) < 650
