"""Pooling, and the statistics between gen-CLIP's space and the LLM's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from open_pisces.model.bridge import TargetStatistics, TargetSums, VisualTokenPooler
from open_pisces.model.pisces import Pisces


def pooled_by_a_loop(features: Tensor, side: int, kernel: int) -> Tensor:
    """Every window of every picture, added up cell by cell."""
    rows = []
    for y in range(0, side, kernel):
        for x in range(0, side, kernel):
            total = torch.zeros_like(features[:, 0])
            for dy in range(kernel):
                for dx in range(kernel):
                    total += features[:, (y + dy) * side + x + dx]
            rows.append(total / kernel**2)
    return torch.stack(rows, 1)


@given(cells=st.integers(1, 5), kernel=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pooling_equals_a_loop_over_every_window(cells: int, kernel: int, width: int, seed: int) -> None:
    side = cells * kernel
    features = torch.randn(2, side * side, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(VisualTokenPooler(kernel)(features), pooled_by_a_loop(features, side, kernel))


def test_pooling_gives_the_papers_64_vectors_at_8b() -> None:
    assert VisualTokenPooler(4)(torch.zeros(1, 32 * 32, 8)).shape == (1, 64, 8)


@pytest.mark.parametrize(("length", "kernel"), [(17, 1), (16, 3), (25, 2), (8, 2)])
def test_a_sequence_that_is_no_grid_of_the_kernel_is_refused(length: int, kernel: int) -> None:
    with pytest.raises(ValueError, match=f"{length} features are no square grid that {kernel} divides"):
        VisualTokenPooler(kernel)(torch.zeros(1, length, 4))


# ------------------------------------------------------------------------------------------------- statistics


def raw_targets(pictures: int = 50) -> Tensor:
    """Features whose channels and positions lie apart."""
    draw = torch.Generator().manual_seed(0)
    channel = torch.tensor([1e-2, 1.0, 30.0]), torch.tensor([-5.0, 0.0, 1000.0])
    position = torch.randn(4, 3, generator=draw)
    return (torch.randn(pictures, 4, 3, generator=draw) + position) * channel[0] + channel[1]


def taken(standardise: bool = True) -> TargetStatistics:
    statistics = TargetStatistics(4, 3)
    statistics.take(TargetSums.of(raw_targets()), standardise)
    return statistics


def test_entering_and_leaving_are_inverse() -> None:
    statistics = taken()
    inside = torch.randn(5, 4, 3)
    torch.testing.assert_close(statistics.standardize(statistics.destandardize(inside)), inside, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(statistics.destandardize(statistics.standardize(raw_targets())), raw_targets())


def test_taken_statistics_standardise_every_channel() -> None:
    inside = taken().standardize(raw_targets().double())
    torch.testing.assert_close(inside.mean((0, 1)), torch.zeros(3).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(inside.std((0, 1)), torch.ones(3).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("standardise", [True, False])
def test_the_null_condition_is_the_mean_target_of_each_position(standardise: bool) -> None:
    statistics = taken(standardise)
    expected = statistics.standardize(raw_targets()).mean(0)
    torch.testing.assert_close(statistics.null_ME, expected, rtol=1e-3, atol=1e-3)
    apart = expected.std(0) / statistics.standardize(raw_targets()).std((0, 1))
    assert apart.min() > 0.1  # positions differ, so that one mean for all of them would show
    assert statistics.taken == 50


def test_raw_targets_keep_mean_0_and_deviation_1() -> None:
    statistics = taken(standardise=False)
    assert torch.equal(statistics.mean_E, torch.zeros(3)) and torch.equal(statistics.std_E, torch.ones(3))
    assert torch.equal(statistics.standardize(raw_targets()), raw_targets())


def test_a_channel_that_never_changes_divides_by_no_zero() -> None:
    statistics = TargetStatistics(4, 3)
    statistics.take(TargetSums.of(torch.ones(8, 4, 3)), True)
    assert statistics.standardize(torch.ones(1, 4, 3)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_to_the_bit_in_a_narrower_model(nano_pisces: Pisces, dtype: torch.dtype) -> None:
    model = copy.deepcopy(nano_pisces)
    width = model.bridge.statistics.mean_E.shape[0]
    model.bridge.statistics.take(TargetSums.of(torch.randn(9, 4, width) * 3 + 1 / 3), True)
    before = {name: value.clone() for name, value in model.bridge.statistics.named_buffers()}
    model.to(dtype)
    assert model.bridge.head.first.weight.dtype == dtype
    for name, value in model.bridge.statistics.named_buffers():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
