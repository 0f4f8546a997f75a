"""How claims are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from open_pisces.bench import (
    caption_ray,
    compile,
    decode_step,
    decoupled,
    mixed_batch,
    pairs,
    presets,
    serving,
    stage_batches,
    stage_step,
    supervised_logits,
    vector_loop,
)
from open_pisces.bench.pairs import compare, summarize
from open_pisces.generate.generator import Generator


def test_a_ratio_says_how_many_times_faster_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: now[0])

    def ours() -> None:
        order.append("a")
        now[0] += 4.0

    def other() -> None:
        order.append("b")
        now[0] += 12.0 if len(order) > 4 else 16.0  # slower in the first pair

    found = compare("sleep", ours, other, pairs=6)
    assert found["name"] == "sleep" and found["n"] == 6
    assert found["ratio"] == 3.0 and found["low"] == 3.0 <= found["high"] <= 4.0
    assert "".join(order) == "ab" + "abba" * 3  # one warm-up, then whoever went second goes first
    assert found["figures"]["seconds_ours"] == 4.0 and found["figures"]["seconds_other"] == 12.0


def test_the_interval_is_that_of_the_median() -> None:
    ratios = np.random.default_rng(0).normal(2.0, 0.1, 41)
    found = summarize("a", np.stack([np.full(41, 2.0), 2 * ratios], axis=1), {"threads": 1})
    assert found["ratio"] == pytest.approx(np.median(ratios)) and found["n"] == 41
    assert found["low"] < found["ratio"] < found["high"] and 0.02 < found["high"] - found["low"] < 0.15
    same = summarize("b", np.ones((5, 2)), {})
    assert (same["low"], same["ratio"], same["high"]) == (1.0, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------- training steps


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few samples and one layer that are not compiled: what is computed, not how fast."""
    shipped = stage_batches.shipped

    def shallow() -> Generator:
        generator = shipped()
        llm: Any = generator.pisces.llm
        llm.model.layers = llm.model.layers[:1]
        return generator

    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: None)
    monkeypatch.setattr(stage_batches, "shipped", shallow)
    for bench in (stage_step, mixed_batch, compile):
        monkeypatch.setattr(bench, "shipped", shallow)
        monkeypatch.setattr(bench, "ROWS", 2)
        monkeypatch.setattr(bench, "STEPS", 1)


def test_logits_at_supervised_places_take_a_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORDS": 1000, "WIDTH": 8, "PLACES": 64, "SUPERVISED": 16}.items():
        monkeypatch.setattr(supervised_logits, name, value)
    found = supervised_logits.run(2)["figures"]
    bytes_ours, bytes_full = (found["peak_bytes"][name]["loss"] for name in ("ours", "other"))
    assert 2 * 4 * 16 * 1000 < bytes_ours < 2.1 * 4 * 16 * 1000  # logits and their softmax
    assert 3 * 4 * 64 * 1000 < bytes_full < 3.1 * 4 * 64 * 1000  # and the gradient of either, each on its own
    assert found["bytes_over_full"] == bytes_ours / bytes_full


@pytest.mark.usefixtures("small")
def test_a_stage_step_learns_the_words_that_the_bare_llama_learns() -> None:
    found = stage_step.run(2)["figures"]["loss_without_pictures"]
    assert found["pisces"] == pytest.approx(found["llama"], rel=1e-3)


@pytest.mark.usefixtures("small")
def test_a_mixed_batch_has_both_tasks_and_its_words_neither() -> None:
    found = mixed_batch.run(2)["figures"]
    generator = stage_batches.shipped()
    mixed = stage_batches.read(generator, stage_batches.MIX, 4)
    words = stage_batches.words_only(mixed)
    assert len(mixed.understanding_at_K) and len(mixed.generation_at_K) and found["tokens"][0] == 2
    assert not len(words.understanding_at_K) and not len(words.generation_at_K)
    assert torch.equal(words.ids_BS, mixed.ids_BS) and torch.equal(words.labels_K, mixed.labels_K)
    with torch.no_grad():
        assert generator.pisces(words).parts["vectors"] == 0 < generator.pisces(mixed).parts["vectors"]


@pytest.mark.usefixtures("small")
def test_ragged_batches_have_the_few_shapes_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "RAGGED", 20)
    found = compile.run(2)["figures"]
    assert found["ragged"]["shapes"] == [(2, 64), (2, 128), (2, 192), (2, 256)]
    assert found["ragged"]["recompiles"] == 0 == found["ragged"]["graphs_of_warm_up"]  # nothing is compiled here
    assert found["ways"][0].startswith("compiled") and found["ways"][1].startswith("eager")


def test_a_decode_step_writes_transformers_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    monkeypatch.setattr(vector_loop, "SHAPE", {**vector_loop.SHAPE, **small, "num_key_value_heads": 1})
    found = decode_step.run(2)
    assert found["ratio"] > 0 and found["figures"]["tokens_per_second"] > 0 and found["larger"]["n"] == 2
    theirs = decode_step.theirs
    monkeypatch.setattr(decode_step, "theirs", lambda *given: [1, *theirs(*given)[1:]])
    with pytest.raises(AssertionError, match="other tokens"):
        decode_step.run(2)


def test_presets_are_compared_one_picture_at_a_time() -> None:
    found = presets.run(2)
    assert found["ratio"] > 1 and found["balanced"]["n"] == 2


@pytest.mark.slow
def test_a_server_is_measured_over_http() -> None:
    found = serving.run(2)
    assert found["ratio"] > 1 and found["questions"]["ratio"] > 1 and found["second_question"]["ratio"] > 1
    assert found["http_ms"]["n"] == 2


def test_a_vector_loop_without_a_cache_writes_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    monkeypatch.setattr(vector_loop, "SHAPE", {**vector_loop.SHAPE, **small, "num_key_value_heads": 1})
    found = vector_loop.run(2)
    assert (found["figures"]["prompt_tokens"], found["figures"]["vectors"]) == (50, 4 * 64) and found["ratio"] > 0
    assert found["alone"]["figures"]["vectors"] == 64
    generator, batch = vector_loop.random_model(2)
    one, two = generator.vectors_after(batch), vector_loop.recomputed(generator, batch)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[:, 1:], one[:, :-1], atol=1e-3)  # the vectors differ from place to place
    honest = vector_loop.recomputed
    monkeypatch.setattr(vector_loop, "recomputed", lambda *given: honest(*given) + 1)
    with pytest.raises(AssertionError, match="vectors with a cache and without one are"):
        vector_loop.run(2)


def test_more_vectors_take_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(decoupled, "SHAPE", {**decoupled.SHAPE, **small, "num_key_value_heads": 1})
    for name, count in (("POOLED", 4), ("SIGLIP", 9), ("WHOLE", 64)):
        monkeypatch.setattr(decoupled, name, count)
    generator = decoupled._generator(9, 64)
    assert (generator.renderer.N, generator.renderer.M) == (9, 64)
    found = decoupled.run(3)
    assert found["name"] == "decoupled" and found["ratio"] > 3
    assert set(found) >= {"siglip_for_both", "question", "question_through_64"}


@pytest.mark.slow
def test_ray_and_own_workers_write_the_same_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    for name, count in (("PICTURES", 8), ("SHARD", 4), ("ITEMS", 20)):
        monkeypatch.setattr(caption_ray, name, count)
    found = caption_ray.run(2)
    assert found["name"] == "caption_ray" and found["n"] == 2
    figures = found["figures"]
    assert figures["seconds_to_start_ray"] > 0 and figures["pictures_per_second"] > 0
