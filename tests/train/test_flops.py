"""FLOPs: by hand, against PyTorch's counter on real steps, and on twins without weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_pisces.config import RunConfig
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import load_config
from open_pisces.train.flops import Cost, Costs, Counts, counts_of, flops_of, matmul_rate, meta_copy
from open_pisces.train.objectives import build_training, costs_of, skeleton

OWN = ["model.start=null", "train.accumulate=1"]


def cost(costs: Costs, part: str, unit: str) -> float:
    return sum(c.forward for c in costs.costs if (c.part, c.unit) == (part, unit))


def passes(costs: Costs) -> dict[tuple[str, str], float]:
    """What a training step is worth, in forward passes."""
    return {(c.part, c.unit): c.training / c.forward for c in costs.costs}


# ------------------------------------------------------------------------------------------------------- by hand


def test_a_linear_layer_and_attention_by_hand() -> None:
    x, q = torch.empty(3, 5, 16, device="meta"), torch.empty(1, 2, 7, 8, device="meta")
    layer = nn.Linear(16, 32, device="meta")
    forward = 2 * 3 * 5 * 16 * 32
    assert flops_of(lambda: layer(x)) == (forward, 2 * forward)  # nobody asks for the gradient of the input
    assert flops_of(lambda: layer(x.clone().requires_grad_())) == (forward, 3 * forward)
    assert flops_of(lambda: layer.requires_grad_(False)(x.clone().requires_grad_())) == (forward, 2 * forward)
    attention = 2 * 2 * (2 * 7 * 7 * 8)
    assert flops_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == (attention, attention)


def test_the_parts_of_nano_by_hand() -> None:
    config = load_config("nano/stage1", OWN)
    costs = costs_of(skeleton(config), config)
    width, inner, layers, words = 64, 128, 2, 265
    linear = (
        2 * layers * (2 * width * width + 2 * width * width // 2 + 3 * width * inner)
    )  # keys, values: half the heads
    assert cost(costs, "llm", "tokens") == linear
    assert cost(costs, "llm", "token_pairs") == 4 * width * layers
    assert cost(costs, "llm_head", "supervised") == 2 * width * words
    assert cost(costs, "bridge", "seen_vectors") == 2 * (32 * width + width * width)
    assert cost(costs, "bridge", "drawn_vectors") == 2 * (32 * width + width * width) * 2  # into the LLM, and the head
    assert costs.training(Counts(tokens=10)) == 3 * 10 * linear
    assert costs.by_part(Counts(supervised=2)) == {"llm_head": 3 * 2 * 2 * width * words}


def test_counts_of_several_batches_add_up() -> None:
    costs = Costs((Cost("llm", "tokens", 5.0, 15.0), Cost("vae", "pictures", 7.0, 7.0)))
    assert costs.training(Counts(tokens=2) + Counts(tokens=1, pictures=4)) == 3 * 5 * 3 + 7 * 4


# ------------------------------------------------------------------------------------------------- against reality


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("nano/stage1", []),
        ("nano/stage1", ["data.row_length=512", "data.rows=2"]),
        ("nano/stage3", ["loss.own_passes=2"]),
        ("nano/stage1", ["train.freeze=[llm, understanding_encoder, generation_encoder]"]),
        ("nano/decoder", []),
        ("nano/gen_clip", []),
        ("nano/understanding_clip", []),
    ],
)
def test_a_real_step_costs_what_is_counted(recipe: str, more: list[str]) -> None:
    config = load_config(recipe, [*OWN, "train.batch_size=6", *more])
    training = build_training(config)
    batches, costs = training.load(0).with_totals(), costs_of(training.module, config)
    # The plain kernel: fused ones compute attention anew in the backward pass, which utilisation does not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in training.prepare(batches):
            training.losses(batch).loss.backward()
    counted = sum(costs.training(counts_of(batch)) for batch in batches)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_is_frozen_costs_less() -> None:
    config = load_config("nano/stage1", OWN)
    usual = passes(costs_of(skeleton(config), config))
    assert usual["llm", "tokens"] == usual["llm", "token_pairs"] == usual["llm_head", "supervised"] == 3
    assert usual["understanding_encoder", "seen_pictures"] == usual["generation_encoder", "drawn_pictures"] == 1
    frozen = load_config("nano/stage1", [*OWN, "train.freeze=[llm, understanding_encoder]"])
    costs = passes(costs_of(skeleton(frozen), frozen))
    assert costs["llm", "tokens"] == costs["llm_head", "supervised"] == 2  # gradients pass through to the projector
    assert costs["llm", "token_pairs"] == 3  # where both sides are activations
    everything = load_config("nano/stage1", [*OWN, "train.freeze=[]"])
    assert 2.5 < passes(costs_of(skeleton(everything), everything))["understanding_encoder", "seen_pictures"] < 3


def test_a_batch_without_pictures_or_with_their_features_runs_no_encoder() -> None:
    config = load_config("nano/stage1", OWN)
    training = build_training(config)
    assert counts_of(training.load(0).batches[0]).seen_pictures > 0
    blank = counts_of(training.load.blank())
    assert blank.seen_pictures == blank.drawn_pictures == blank.supervised == 0
    pairs = build_training(load_config("nano/gen_clip", OWN))
    assert counts_of(pairs.load.blank()) == Counts()


def test_the_llm_at_8b_costs_six_flops_a_weight_and_token() -> None:
    config = load_config("8b/stage1")
    module: Any = skeleton(config)
    costs = costs_of(module, config)
    embeddings = module.llm.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in module.llm.parameters()) - embeddings  # looked up, not multiplied with
    assert weights + embeddings == pytest.approx(8.03e9, rel=1e-3)
    assert 3 * (cost(costs, "llm", "tokens") + cost(costs, "llm_head", "supervised")) == pytest.approx(
        6 * weights, rel=0.01
    )


# --------------------------------------------------------------------------------------------------------- twins


def test_a_twin_has_everything_but_weights(nano_pisces: Pisces) -> None:
    nano_pisces.generation_encoder.requires_grad_(False)
    try:
        twin: Any = meta_copy(nano_pisces)
    finally:
        nano_pisces.generation_encoder.requires_grad_(True)
    assert type(twin) is Pisces and twin is not nano_pisces
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    shapes = {name: value.shape for name, value in twin.state_dict().items()}
    assert shapes == {name: value.shape for name, value in nano_pisces.state_dict().items()}
    assert twin.llm.lm_head.weight is twin.llm.model.embed_tokens.weight  # still tied
    assert not any(p.requires_grad for p in twin.generation_encoder.parameters())
    assert all(p.requires_grad for p in twin.llm.parameters())
    assert not any(p.is_meta for p in nano_pisces.parameters())


def test_a_twin_takes_weights_and_then_is_the_model(nano_pisces: Pisces, tmp_path: Path) -> None:
    twin: Any = meta_copy(nano_pisces.llm)
    twin.load_state_dict(nano_pisces.llm.state_dict(), assign=True)
    twin.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.lm_head.weight, nano_pisces.llm.lm_head.weight)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_costs_what_it_did(nano_config: Any) -> None:
    config: RunConfig = load_config("nano/stage1", OWN)
    module: Any = build_training(config).module
    before, names = costs_of(module, config), set(module.state_dict())
    for layer in module.llm.model.layers:
        fully_shard(layer)
    fully_shard(module)
    assert costs_of(module, config) == before
    twin = meta_copy(module)
    assert type(twin) is Pisces and not any(isinstance(part, FSDPModule) for part in twin.modules())
    assert set(twin.state_dict()) == names
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in twin.modules())


# --------------------------------------------------------------------------------------------------------- devices


def test_the_rate_of_a_device_is_that_of_a_large_product() -> None:
    device, size = torch.device("cpu"), 512
    rate = matmul_rate(device, torch.float32, seconds=0.05)
    left = torch.randn(size, size)
    assert 1e7 < rate < 1e14 and torch.isfinite(left @ left).all()
    before = torch.get_rng_state()
    matmul_rate(device, torch.float32, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)  # a training's random numbers are none of its business
