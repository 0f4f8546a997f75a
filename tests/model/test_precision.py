"""What says where or when stays float32: diffusion times, noise levels, rotary tables, pixel and target statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import EulerDiscreteScheduler
from models import build_pisces
from PIL.Image import fromarray
from test_decoder import SDXL_SCHEDULER, VAE, built
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from open_pisces.batch import PairBatch, unit_pixels
from open_pisces.config import ModelConfig, TrainConfig
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.model.decoder import ImageDecoder
from open_pisces.model.gen_clip import contrast
from open_pisces.model.pisces import Pisces
from open_pisces.train.objectives.decoder import DecoderOnVectors
from open_pisces.train.sharding import shard
from open_pisces.train.world import World

DRAWN = 4000
"""Times enough to meet nearly all 1,000 steps."""


@pytest.fixture
def one_rank() -> Iterator[World]:
    """A process group of this process alone: FSDP2 then shards, gathers and casts as it does for many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        yield World(torch.device("cpu"), mesh=mesh)
    finally:
        dist.destroy_process_group()


class Recorder:
    """Stands in for `UNet2DConditionModel.forward`, keeps what it is given, and answers with zeros."""

    def __init__(self, decoder: ImageDecoder) -> None:
        self.decoder = decoder
        self.steps: list[Tensor] = []
        self.noisy: list[Tensor] = []

    def __call__(self, noisy: Tensor, steps: Tensor, context: Tensor, added_cond_kwargs: dict[str, Tensor]) -> Any:
        self.steps.append(steps)
        self.noisy.append(noisy)
        assert added_cond_kwargs["time_ids"].dtype == torch.float32
        return type("Output", (), {"sample": self.zeros_like_latents(noisy)})()

    def zeros_like_latents(self, noisy: Tensor) -> Tensor:
        channels = self.decoder.network.config.out_channels
        return self.decoder.condition.positions_ME.sum() + 0 * noisy[:, :channels].float()


def pairs(count: int) -> PairBatch:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = torch.ones(count, 1)
    features = torch.zeros(count, 4, 32)
    return PairBatch(pixels, pixels, words.long(), words.bool(), (), words[:, 0].long(), count, features_BME=features)


def given_to_the_u_net(
    pisces: Pisces, decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, bf16: bool, world: World | None = None
) -> tuple[Tensor, Tensor]:
    """The steps and the noise levels that reach the U-Net for 4,000 drawn times."""
    module = DecoderOnVectors(pisces.generation_encoder, decoder, pisces.bridge.statistics, 4).requires_grad_(False)
    module.decoder.network.requires_grad_(True)
    module.decoder.condition.requires_grad_(True)
    if world is not None:
        shard(module, world, TrainConfig(precision="bf16"))
    recorder = Recorder(decoder)
    monkeypatch.setattr(decoder.network, "forward", recorder)
    # The level is what noise is multiplied with: noise of ones, less none at all. Latents are the same in both.
    levels = []
    exact = torch.zeros(DRAWN, *decoder.latent_shape)
    monkeypatch.setattr(decoder, "encode", lambda pixels: exact)
    times = torch.rand(DRAWN, generator=torch.Generator().manual_seed(3))
    for noise in (torch.ones_like(exact), torch.zeros_like(exact)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            module(pairs(DRAWN), noise, times, torch.zeros(DRAWN, dtype=torch.bool))
        levels.append(recorder.noisy[-1])
    return recorder.steps[-1], (levels[0] - levels[1])[:, 0, 0, 0]


@pytest.fixture
def sdxl(nano_config: ModelConfig) -> ImageDecoder:
    return built(nano_config, spatial_condition=False, vae=VAE, scheduler=SDXL_SCHEDULER)


@pytest.fixture
def flow(nano_config: ModelConfig) -> ImageDecoder:
    return built(nano_config)


@pytest.mark.parametrize("kind", ["sdxl", "flow"])
@pytest.mark.parametrize("sharded", [False, True], ids=["alone", "sharded"])
def test_drawn_times_and_noise_levels_reach_the_u_net_in_float32(
    nano_pisces: Pisces, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str, sharded: bool
) -> None:
    decoder = request.getfixturevalue(kind)
    world = request.getfixturevalue("one_rank") if sharded else None
    expected = given_to_the_u_net(copy.deepcopy(nano_pisces), copy.deepcopy(decoder), monkeypatch, False)
    steps, levels = given_to_the_u_net(copy.deepcopy(nano_pisces), decoder, monkeypatch, True, world)
    assert torch.equal(steps, expected[0])
    assert steps.dtype == (torch.int64 if kind == "sdxl" else torch.float32)
    assert len(steps.unique()) > 950  # rounded to bfloat16 it is half of them
    assert levels.dtype == torch.float32 and torch.equal(levels, expected[1])


def test_the_sdxl_schedule_is_trained_at_every_step_it_samples(sdxl: ImageDecoder) -> None:
    sampler = EulerDiscreteScheduler.from_config(sdxl.scheduler.config)
    sampler.set_timesteps(50)
    drawn = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    trained = set((drawn * 1000).long().tolist())
    assert {int(t) for t in sampler.timesteps} <= trained
    rounded = set((drawn.bfloat16() * 1000).long().tolist())
    assert len({int(t) for t in sampler.timesteps} - rounded) > 30  # what this is about


def test_latents_of_an_autoencoder_are_float32_under_autocast_and_in_bfloat16(sdxl: ImageDecoder) -> None:
    pixels = pairs(2).targets_BCHW
    exact = sdxl.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sdxl.encode(pixels)
    narrow = copy.deepcopy(sdxl).to(torch.bfloat16)
    for found in (mixed, narrow.encode(pixels)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
    assert narrow.decode(exact).dtype == torch.float32


def test_a_bfloat16_decoder_is_asked_at_the_samplers_own_times(
    flow: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = flow.to(torch.bfloat16)
    recorder = Recorder(narrow)
    monkeypatch.setattr(narrow.network, "forward", recorder)
    narrow.sample(torch.zeros(1, 4, 32), None, torch.zeros(1, *flow.latent_shape), 50, 1.0)
    narrow.scheduler.set_timesteps(50)
    assert torch.equal(torch.cat(recorder.steps), narrow.scheduler.timesteps)


# ---------------------------------------------------------------------------------------------- prediction types


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_predicting_the_sample_is_trained_and_sampled(nano_config: ModelConfig, name: str) -> None:
    settings = {**SDXL_SCHEDULER, "class": name, "prediction_type": "sample"}
    settings |= {"clip_sample": False} if name == "DDIMScheduler" else {}
    decoder = built(nano_config, spatial_condition=False, scheduler=settings)
    latents = torch.randn(2, *decoder.latent_shape, generator=torch.Generator().manual_seed(0))
    decoder.denoise = lambda noisy, times, vectors, levels: latents[: len(noisy)]  # type: ignore[method-assign]
    vectors, noise = torch.zeros(2, 4, 32), torch.ones_like(latents)
    assert decoder(latents, vectors, noise, torch.tensor([0.2, 0.9])).abs().max() == 0
    drawn = decoder.sample(vectors, None, noise, 10, 1.0)
    torch.testing.assert_close(drawn, decoder.decode(latents), rtol=1e-3, atol=1e-3)


def test_predicting_the_sample_can_be_planned(nano_config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = built(nano_config, spatial_condition=False, scheduler={**SDXL_SCHEDULER, "prediction_type": "sample"})
    assert all(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("kind", "says"),
    [("sample", "EulerAncestralDiscreteScheduler cannot sample with it: take DDIM"), ("v", "'v' is not known")],
)
def test_a_prediction_type_that_cannot_be_is_refused(nano_config: ModelConfig, kind: str, says: str) -> None:
    scheduler = {**SDXL_SCHEDULER, "class": "EulerAncestralDiscreteScheduler", "prediction_type": kind}
    with pytest.raises(PiscesError, match=says):
        built(nano_config, spatial_condition=False, scheduler=scheduler)


# --------------------------------------------------------------------------------------------- a model in bfloat16


@pytest.fixture(scope="module")
def llama31(nano_config: ModelConfig, nano_tokenizer: Any) -> Pisces:
    """Nano with Llama-3.1's rotary settings."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = nano_config.llm.config | {"rope_parameters": rope, "max_position_embeddings": 131072}
    llm = nano_config.llm.model_copy(update={"config": config})
    torch.manual_seed(0)
    return build_pisces(nano_config.model_copy(update={"llm": llm}), len(nano_tokenizer)).eval()


def ways_to_bfloat16(pisces: Pisces, tokenizer: Any, folder: Path) -> dict[str, Pisces]:
    pisces.save_pretrained(folder, tokenizer)
    return {
        "to": copy.deepcopy(pisces).to(torch.bfloat16),
        "bfloat16": copy.deepcopy(pisces).bfloat16(),
        "from_pretrained": Pisces.from_pretrained(folder, torch.bfloat16),
    }


def test_rotary_tables_and_statistics_of_a_bfloat16_model_equal_float32s_to_the_bit(
    llama31: Pisces, nano_tokenizer: Any, tmp_path: Path
) -> None:
    at = torch.tensor([[4000]])
    rotary = llama31.llm.get_decoder().rotary_emb
    expected = rotary(torch.zeros(1), at)
    rounded = copy.deepcopy(rotary).to(torch.bfloat16)(torch.zeros(1), at)
    assert (rounded[0] - expected[0]).abs().max() > 0.5  # what this is about
    for way, narrow in ways_to_bfloat16(llama31, nano_tokenizer, tmp_path / "model").items():
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}, way
        found = narrow.llm.get_decoder().rotary_emb(torch.zeros(1), at)
        assert all(map(torch.equal, found, expected)), way
        buffers = dict(narrow.named_buffers())
        for name, value in llama31.named_buffers():
            assert torch.equal(buffers[name], value), f"{way}: {name}"


@torch.no_grad()
def test_logits_at_position_4000_survive_bfloat16(llama31: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    ids = torch.arange(64)[None] % 50
    positions = torch.linspace(0, 4000, 64).long()[None]  # far apart, as the pictures of a long conversation
    sharp = copy.deepcopy(llama31)
    for layer in sharp.llm.get_decoder().layers:  # attention that looks at where things are
        layer.self_attn.q_proj.weight.mul_(40)
        layer.self_attn.k_proj.weight.mul_(40)

    def logits(llm: nn.Module) -> Tensor:
        return llm(input_ids=ids, position_ids=positions).logits.float()

    expected = logits(sharp.llm)
    apart = {
        "ours": (logits(copy.deepcopy(sharp).bfloat16().llm) - expected).abs().mean(),
        "rounded": (logits(copy.deepcopy(sharp.llm).bfloat16()) - expected).abs().mean(),
    }
    assert apart["ours"] < 0.5 * apart["rounded"], apart


def test_pixels_are_normalized_in_float32_by_a_bfloat16_model(nano_pisces: Pisces, nano_tokenizer: Any) -> None:
    narrow = Generator(copy.deepcopy(nano_pisces).bfloat16(), nano_tokenizer, "cpu")
    seen: list[Tensor] = []
    for encoder in (narrow.pisces.understanding_encoder, narrow.pisces.generation_encoder):
        encoder.normalize.register_forward_hook(lambda module, given, found: seen.extend([given[0], found]))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    narrow.text([[fromarray(pixels)]], ["What is it?"], max_new_tokens=1)
    narrow.encode([fromarray(pixels)])
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert len(seen) == 4
    for given, found in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(unit_pixels(given), exact)
        assert found.dtype == torch.float32


def test_bytes_are_the_pixels_that_float_arrays_hold() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(unit_pixels(every).numpy(), np.arange(256, dtype=np.float32) / np.float32(255))


# ------------------------------------------------------------------------------------------------- contrastive loss


def test_similarities_are_compared_in_float32_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    images, texts = (nn.functional.normalize(torch.randn(16, 32, generator=draw), dim=-1) for _ in range(2))
    given = images, texts, torch.tensor([100.0]), torch.arange(16)
    expected = contrast(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(*given)
    assert torch.equal(found[0], expected[0])
