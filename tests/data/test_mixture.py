"""The order of training is a closed form of (seed, g, sources)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_pisces.batch import Sample
from open_pisces.config import DataConfig, SourceConfig
from open_pisces.data.order import BLOCK, Mixture, block_counts
from open_pisces.data.shards import ShardError

SIZES = {"a": 7, "b": 130, "c": 1, "empty": 0}


class Fake(list[Sample]):
    """A dataset whose samples are called after their source and place."""


def open_fake(path: str) -> Fake:
    return Fake(Sample(f"{path}{i}", ()) for i in range(SIZES[path]))


def mixture(seed: int = 0, tasks: dict[str, float] | None = None, **weights: float) -> Mixture:
    sources = [SourceConfig(path=p, weight=w, tasks=tasks or {}) for p, w in weights.items()]  # type: ignore[arg-type]
    return Mixture(DataConfig(sources=sources), seed, open_fake)


def test_a_draw_depends_on_no_draw_before_it() -> None:
    walked = mixture(a=3.0, b=1.0)
    in_order = [walked.draw(g) for g in range(300)]
    other = mixture(a=3.0, b=1.0)
    for g in (299, 0, 150, 151, 7, 298, 0):
        assert other.draw(g) == in_order[g] == mixture(a=3.0, b=1.0).draw(g)


def test_another_seed_is_another_order() -> None:
    first, second = ([mixture(seed, a=3.0, b=1.0).draw(g) for g in range(40)] for seed in (0, 1))
    assert first != second and Counter(d.source for d in first) == Counter(d.source for d in second)


def test_every_block_holds_exact_counts_and_blocks_differ() -> None:
    mixed = mixture(a=0.5, b=0.3, c=0.2)
    assert mixed.block == 10
    blocks = [[mixed.draw(10 * b + i).source for i in range(10)] for b in range(20)]
    assert all(Counter(block) == {0: 5, 1: 3, 2: 2} for block in blocks)
    assert len({tuple(block) for block in blocks}) > 15


def test_each_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    mixed = mixture(a=1.0, c=1.0)
    drawn = [d for d in map(mixed.draw, range(2 * 7 * 6)) if d.source == 0]
    epochs = [drawn[i : i + 7] for i in range(0, 42, 7)]
    for number, epoch in enumerate(epochs):
        assert sorted(d.index for d in epoch) == list(range(7)) and {d.epoch for d in epoch} == {number}
    assert all([d.index for d in one] != [d.index for d in two] for one, two in pairwise(epochs))


def test_samples_come_from_their_source() -> None:
    mixed = mixture(a=1.0, b=2.0)
    for draw in map(mixed.draw, range(30)):
        assert mixed.sample(draw).key == f"{'ab'[draw.source]}{draw.index}"


def test_tasks_follow_their_weights_and_change_with_the_epoch() -> None:
    mixed = mixture(tasks={"question": 3.0, "caption_short": 1.0, "generate_short": 0.0}, b=1.0)
    draws = [mixed.draw(g) for g in range(130 * 20)]
    tasks = Counter(d.task for d in draws)
    assert set(tasks) == {"question", "caption_short"} and 0.71 < tasks["question"] / len(draws) < 0.79
    by_sample = {i: {d.task for d in draws if d.index == i} for i in range(130)}
    assert sum(len(seen) == 2 for seen in by_sample.values()) > 120
    assert {mixture(b=1.0).draw(g).task for g in range(9)} == {"pair"}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 2000).map(lambda n: n / 100), min_size=1, max_size=6))
def test_block_counts_are_the_nearest_whole_numbers(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) <= BLOCK
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * sum(counts)) < 1
    if sum(counts) < BLOCK:  # a shorter block is exact
        shares = [count / sum(counts) for count in counts]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-12)


def test_block_counts_are_decimal() -> None:
    assert block_counts([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert block_counts([1.0, 1.0, 1.0]) == [1, 1, 1]
    assert block_counts([1.0, 300.0]) == [0, 100]


def test_what_cannot_be_mixed_is_named() -> None:
    with pytest.raises(ShardError, match="name at least one dataset"):
        Mixture(DataConfig(), 0)
    with pytest.raises(ShardError, match="dataset empty is empty"):
        mixture(a=1.0, empty=1.0)
    with pytest.raises(ShardError, match="source a: weight 0.001 gives less than one draw in 100"):
        mixture(a=0.001, b=1.0)
    with pytest.raises(ShardError, match="source b: take 131 is more than its 130 samples"):
        Mixture(DataConfig(sources=[SourceConfig(path="b", take=131)]), 0, open_fake)


def test_take_draws_from_a_fixed_part_of_a_source() -> None:
    sources = [SourceConfig(path="b", take=20), SourceConfig(path="b", take=30)]
    mixed = Mixture(DataConfig(sources=sources), 0, open_fake)
    draws = [mixed.draw(g) for g in range(400)]
    parts = [{d.index for d in draws if d.source == source} for source in (0, 1)]
    assert [len(part) for part in parts] == [20, 30] and not parts[0] <= parts[1]
    for number, part in enumerate(parts):
        assert part == {index for index in range(130) if mixed.holds(number, index)}


# ------------------------------------------------------------------------------------------ global batches


@pytest.mark.parametrize("size", [64, 50])
def test_processes_share_a_batch_whatever_their_number(size: int) -> None:
    mixed = mixture(a=3.0, b=1.0)
    for step in (0, 7):
        whole = mixed.batch(step, size)
        assert Counter(whole) == Counter(mixed.draw(g) for g in range(step * size, (step + 1) * size))
        for ranks in (2, 3, 4, 64):
            parts = [mixed.batch(step, size, rank, ranks) for rank in range(ranks)]
            assert [draw for part in parts for draw in part] == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_stays_with_its_lanes() -> None:
    sources = [SourceConfig(path="b")]
    mixed = Mixture(DataConfig(sources=sources, lanes=8), 0, open_fake)
    lanes = [{draw.lane for step in range(2) for draw in mixed.batch(step, 64, rank, 4)} for rank in range(4)]
    assert lanes == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
