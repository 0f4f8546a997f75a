"""The image decoder: latents, conditions, targets, guidance, and samplers that arrive where the targets point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from open_pisces.config import ModelConfig, PatchTransformerConfig
from open_pisces.model.decoder import ImageDecoder, PixelUnshuffleVAE
from open_pisces.model.parts import PARTS, build_decoder
from open_pisces.model.patch_transformer import PatchTransformer
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError

SDXL_SCHEDULER = {
    "class": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


def built(config: ModelConfig, **over: object) -> ImageDecoder:
    torch.manual_seed(0)
    return build_decoder(config.model_copy(update={"decoder": config.decoder.model_copy(update=over)})).eval()


@pytest.fixture(scope="module")
def flow(nano_config: ModelConfig) -> ImageDecoder:
    """As at tiny: flow, pixels for latents, spatial condition. Shared: deepcopy it before changing it."""
    return built(nano_config)


@pytest.fixture(scope="module")
def sdxl(nano_config: ModelConfig) -> ImageDecoder:
    """As at 8b: Euler on predicted noise, an autoencoder, no spatial condition."""
    return built(nano_config, spatial_condition=False, vae=VAE, scheduler=SDXL_SCHEDULER)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- latents


def test_unshuffled_pixels_come_back_to_the_bit() -> None:
    vae, pixels = PixelUnshuffleVAE(4), draw(2, 3, 16, 16)
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (2, vae.config.latent_channels, 4, 4) == (2, 48, 4, 4)
    assert torch.equal(vae.decode(latents).sample, pixels)


def test_latent_shapes_follow_the_autoencoder(flow: ImageDecoder, sdxl: ImageDecoder) -> None:
    for decoder in (flow, sdxl):
        assert decoder.encode(torch.rand(1, 3, 32, 32)).shape[1:] == decoder.latent_shape
    assert flow.latent_shape == (48, 8, 8) and sdxl.latent_shape == (4, 16, 16)


@torch.no_grad()
def test_an_autoencoders_latents_are_its_mean_times_its_scale(sdxl: ImageDecoder) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    expected = sdxl.vae.encode(pixels * 2 - 1).latent_dist.mean * 0.5
    assert torch.equal(sdxl.encode(pixels), expected)
    decoded = (sdxl.vae.decode(expected / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(sdxl.decode(expected), decoded)


# ---------------------------------------------------------------------------------------------------- conditions


@torch.no_grad()
def test_the_position_table_starts_at_zero_and_changes_nothing(sdxl: ImageDecoder) -> None:
    noisy, times, vectors = draw(2, 4, 16, 16), torch.tensor([10.0, 700.0]), draw(2, 4, 32)
    ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(2, 6)
    pooled = {"text_embeds": vectors.mean(1), "time_ids": ids}
    assert torch.equal(
        sdxl.denoise(noisy, times, vectors), sdxl.network(noisy, times, vectors, added_cond_kwargs=pooled)[0]
    )


@torch.no_grad()
def test_the_position_table_tells_the_order_of_vectors_which_attention_alone_does_not(sdxl: ImageDecoder) -> None:
    noisy, times, vectors = draw(1, 4, 16, 16), torch.tensor([500.0]), draw(1, 4, 32)
    turned = vectors[:, [2, 0, 3, 1]]
    torch.testing.assert_close(sdxl.denoise(noisy, times, turned), sdxl.denoise(noisy, times, vectors))
    learnt = copy.deepcopy(sdxl)
    learnt.condition.positions_ME.normal_()
    assert not torch.allclose(learnt.denoise(noisy, times, turned), learnt.denoise(noisy, times, vectors), atol=1e-3)


def entering(decoder: ImageDecoder, vectors: Tensor) -> Tensor:
    """What the U-Net's first convolution is given."""
    seen: list[Tensor] = []
    hook = decoder.network.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        decoder.denoise(torch.zeros(1, *decoder.latent_shape), torch.tensor([500.0]), vectors)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("place", range(4))
def test_a_vector_stands_at_its_place_of_the_grid_in_the_spatial_condition(flow: ImageDecoder, place: int) -> None:
    vectors = torch.zeros(1, 4, 32)
    vectors[0, place] = 1.0
    joined = entering(flow, vectors)[0, 48:]
    assert joined.shape == (32, 8, 8)
    y, x = divmod(place, 2)  # the 2 x 2 grid of vectors lies over the 8 x 8 latents
    corner = joined[:, 7 * y, 7 * x], joined[:, 7 - 7 * y, 7 - 7 * x]
    assert torch.equal(corner[0], torch.ones(32)) and torch.equal(corner[1], torch.zeros(32))


@torch.no_grad()
def test_moving_a_vector_moves_what_the_u_net_answers(nano_config: ModelConfig) -> None:
    # With attention and pooled condition silenced, only the joined grid can carry a place.
    decoder = built(nano_config)
    for name, parameter in decoder.network.named_parameters():
        if "attn2.to_out" in name or "add_embedding" in name:
            parameter.zero_()
    noise = torch.zeros(1, *decoder.latent_shape)
    answers = []
    for place in (0, 3):
        vectors = torch.zeros(1, 4, 32)
        vectors[0, place] = 5.0
        still = decoder.denoise(noise, torch.tensor([500.0]), torch.zeros(1, 4, 32))
        answers.append((decoder.denoise(noise, torch.tensor([500.0]), vectors) - still)[0].abs().mean(0))
    assert answers[0][:4, :4].mean() > answers[0][4:, 4:].mean()
    assert answers[1][:4, :4].mean() < answers[1][4:, 4:].mean()


def test_without_spatial_condition_the_u_net_takes_latents_alone(nano_config: ModelConfig) -> None:
    assert built(nano_config).network.conv_in.in_channels == 48 + 32
    plain = built(nano_config, spatial_condition=False)
    assert plain.network.conv_in.in_channels == 48
    assert entering(plain, draw(1, 4, 32)).shape == (1, 48, 8, 8)


# ------------------------------------------------------------------------------------------------------- targets

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_denoiser(decoder: ImageDecoder, denoise: Denoise) -> ImageDecoder:
    """The same decoder around another denoiser."""
    changed = copy.deepcopy(decoder)
    changed.denoise = lambda noisy, times, vectors, levels: denoise(noisy, times, vectors)  # type: ignore
    return changed


def test_a_flow_learns_diffusers_straight_path(flow: ImageDecoder) -> None:
    latents, noise, times = draw(3, 48, 8, 8), draw(3, 48, 8, 8, seed=1), torch.tensor([0.1, 0.5, 0.9])
    asked: list[tuple[Tensor, Tensor]] = []
    answer = draw(3, 48, 8, 8, seed=2)
    stub = with_denoiser(flow, lambda noisy, steps, _: asked.append((noisy, steps)) or answer)  # type: ignore[func-returns-value]
    loss = stub(latents, draw(3, 4, 32), noise, times)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times.flip(0).tolist())  # the scheduler counts down
    expected = scheduler.scale_noise(latents.flip(0), scheduler.timesteps, noise.flip(0)).flip(0)
    torch.testing.assert_close(asked[0][0], expected)
    torch.testing.assert_close(asked[0][1], scheduler.timesteps.flip(0))
    torch.testing.assert_close(loss, (answer - (noise - latents)).pow(2).mean((1, 2, 3)))


def test_a_clean_flow_learns_the_picture_and_samples_by_its_velocity(nano_config: ModelConfig) -> None:
    clean = built(nano_config, predicts="clean")
    latents, noise, times = draw(3, 48, 8, 8), draw(3, 48, 8, 8, seed=1), torch.tensor([0.1, 0.5, 1.0])
    asked: list[tuple[Tensor, Tensor]] = []
    answer = draw(3, 48, 8, 8, seed=2)
    stub = with_denoiser(clean, lambda noisy, steps, _: asked.append((noisy, steps)) or answer)  # type: ignore[func-returns-value]
    loss = stub(latents, draw(3, 4, 32), noise, times)
    at = times.view(3, 1, 1, 1)
    torch.testing.assert_close(asked[0][0], (1 - at) * latents + at * noise)
    torch.testing.assert_close(loss, (answer - latents).pow(2).mean((1, 2, 3)))
    goal = clean.encode(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    for steps in (1, 4, 50):
        drawn = with_denoiser(clean, lambda x, t, _: goal).sample(draw(2, 4, 32), None, draw(2, 48, 8, 8), steps, 1.0)
        torch.testing.assert_close(drawn, clean.decode(goal), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_of_clean_predictions_equals_that_of_velocities(nano_config: ModelConfig, scale: float) -> None:
    clean, plain = built(nano_config, predicts="clean"), built(nano_config)

    def goal(x: Tensor, vectors: Tensor) -> Tensor:
        return vectors.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x)

    given = torch.full((1, 4, 32), 0.2), torch.full((4, 32), 0.05), draw(1, 48, 8, 8), 5, scale
    drawn = with_denoiser(clean, lambda x, t, v: goal(x, v)).sample(*given)
    by_velocity = with_denoiser(plain, lambda x, t, v: (x - goal(x, v)) / (t.view(-1, 1, 1, 1) / 1000))
    torch.testing.assert_close(drawn, by_velocity.sample(*given), rtol=0, atol=1e-4)


def test_clean_prediction_needs_a_flow(nano_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="predicts = 'clean' needs FlowMatchEuler.*, not EulerDiscreteScheduler"):
        built(nano_config, predicts="clean", scheduler=SDXL_SCHEDULER)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_diffusion_learns_diffusers_noise_or_velocity(nano_config: ModelConfig, kind: str) -> None:
    scheduler = SDXL_SCHEDULER | {"prediction_type": kind}
    decoder = built(nano_config, spatial_condition=False, scheduler=scheduler)
    latents, noise, times = draw(3, 48, 8, 8), draw(3, 48, 8, 8, seed=1), torch.tensor([0.0, 0.25, 1.0])
    asked: list[tuple[Tensor, Tensor]] = []
    answer = draw(3, 48, 8, 8, seed=2)
    stub = with_denoiser(decoder, lambda noisy, steps, _: asked.append((noisy, steps)) or answer)  # type: ignore[func-returns-value]
    loss = stub(latents, draw(3, 4, 32), noise, times)
    assert asked[0][1].tolist() == [0, 250, 999]
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kept = reference.alphas_cumprod[[0, 250, 999]].view(3, 1, 1, 1)
    torch.testing.assert_close(asked[0][0], kept.sqrt() * latents + (1 - kept).sqrt() * noise)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    target = noise if kind == "epsilon" else velocity
    torch.testing.assert_close(loss, (answer - target).pow(2).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_shorter_schedule_is_never_asked_beyond_its_end(nano_config: ModelConfig) -> None:
    decoder = built(nano_config, spatial_condition=False, scheduler=SDXL_SCHEDULER | {"num_train_timesteps": 100})
    loss = decoder(draw(1, 48, 8, 8), draw(1, 4, 32), draw(1, 48, 8, 8), torch.tensor([1.0]))
    assert loss.isfinite().all()


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_perfect_flow_arrives_at_its_picture(flow: ImageDecoder, steps: int) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    goal = flow.encode(pixels)
    perfect = with_denoiser(flow, lambda x, t, _: (x - goal) / (t.view(-1, 1, 1, 1) / 1000))
    drawn = perfect.sample(draw(2, 4, 32), None, draw(2, 48, 8, 8), steps, 1.0)
    torch.testing.assert_close(drawn, pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_diffusion_arrives_at_its_picture(nano_config: ModelConfig, kind: str) -> None:
    scheduler = SDXL_SCHEDULER | {"prediction_type": kind}
    decoder = built(nano_config, spatial_condition=False, scheduler=scheduler)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    goal = decoder.encode(pixels)
    kept_at = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod

    def perfect(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        kept = kept_at[t.long()].view(-1, 1, 1, 1)
        noise = (x - kept.sqrt() * goal) / (1 - kept).sqrt()
        return noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * goal

    drawn = with_denoiser(decoder, perfect).sample(draw(1, 4, 32), None, draw(1, 48, 8, 8), 25, 1.0)
    torch.testing.assert_close(drawn, pixels, rtol=0, atol=2e-2)


def test_guidance_1_equals_no_guidance_whatever_the_null(flow: ImageDecoder, sdxl: ImageDecoder) -> None:
    for decoder in (flow, sdxl):
        given = draw(2, 4, 32), draw(2, *decoder.latent_shape)
        plain = decoder.sample(given[0], None, given[1], 3, 1.0)
        assert torch.equal(decoder.sample(given[0], draw(4, 32, seed=7), given[1], 3, 1.0), plain)
        assert not torch.equal(decoder.sample(given[0], draw(4, 32, seed=7), given[1], 3, 1.5), plain)


def test_guidance_0_equals_the_null_condition_alone(flow: ImageDecoder) -> None:
    null, noise = draw(4, 32, seed=7), draw(2, 48, 8, 8)
    drawn = flow.sample(draw(2, 4, 32), null, noise, 3, 0.0)
    torch.testing.assert_close(drawn, flow.sample(null.expand(2, -1, -1), None, noise, 3, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_walks_from_the_null_through_the_condition(flow: ImageDecoder, scale: float) -> None:
    mean = with_denoiser(flow, lambda x, _, vectors: vectors.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x))
    vectors, null = torch.full((1, 4, 32), 0.2), torch.full((4, 32), 0.05)
    drawn = mean.sample(vectors, null, torch.zeros(1, 48, 8, 8), 1, scale)
    velocity = 0.05 + scale * (0.2 - 0.05)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.5 - velocity / 2))


def test_guidance_without_a_null_condition_is_refused(flow: ImageDecoder) -> None:
    with pytest.raises(ValueError, match="guidance_scale 2.0 needs the null condition"):
        flow.sample(draw(1, 4, 32), None, draw(1, 48, 8, 8), 1, 2.0)


def test_the_noise_level_is_added_to_each_vector_and_a_new_decoder_ignores_it(flow: ImageDecoder) -> None:
    decoder = copy.deepcopy(flow)
    noisy, times, vectors = draw(2, *decoder.latent_shape), torch.tensor([200.0, 800.0]), draw(2, 4, 32)
    levels = torch.tensor([0.5, 0.25])
    plain = decoder.denoise(noisy, times, vectors)
    assert torch.equal(decoder.denoise(noisy, times, vectors, levels), plain)
    decoder.condition.level_E.data.normal_()
    moved = vectors + levels.view(2, 1, 1) * decoder.condition.level_E
    torch.testing.assert_close(decoder.denoise(noisy, times, vectors, levels), decoder.denoise(noisy, times, moved))
    assert torch.equal(decoder.denoise(noisy, times, vectors, torch.zeros(2)), plain)


def test_sampling_tells_the_level_to_the_condition_and_not_to_the_null_one(flow: ImageDecoder) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, _: Tensor, vectors: Tensor, levels: Tensor) -> Tensor:
        seen.append(levels)
        return x

    decoder = copy.deepcopy(flow)
    decoder.denoise = watched  # type: ignore[method-assign]
    decoder.sample(draw(2, 4, 32), draw(4, 32), draw(2, *decoder.latent_shape), 1, 1.5, level=0.3)
    decoder.sample(draw(2, 4, 32), None, draw(2, *decoder.latent_shape), 1, 1.0)
    torch.testing.assert_close(seen[0], torch.tensor([0.3, 0.3, 0.0, 0.0]))
    assert torch.equal(seen[1], torch.zeros(2))


def test_an_sdxl_like_decoder_trains_a_step_and_samples(sdxl: ImageDecoder) -> None:
    decoder = copy.deepcopy(sdxl).train()
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    latents = decoder.encode(torch.rand(2, 3, 32, 32))
    given = latents, draw(2, 4, 32), draw(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    before = decoder(*given).mean()
    before.backward()
    assert decoder.condition.positions_ME.grad is not None and decoder.condition.positions_ME.grad.abs().sum() > 0
    assert all(p.grad is None for p in decoder.vae.parameters())
    optimizer.step()
    assert decoder(*given).mean() < before
    drawn = decoder.eval().sample(draw(2, 4, 32), draw(4, 32), draw(2, 4, 16, 16), 3, 2.0)
    assert drawn.shape == (2, 3, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1 and drawn.std() > 0


def test_a_bf16_decoder_samples_what_the_float32_one_does(flow: ImageDecoder, sdxl: ImageDecoder) -> None:
    for decoder in (flow, sdxl):  # what a model on an accelerator runs in
        vectors, null, noise = draw(1, 4, 32), draw(4, 32, seed=1), draw(1, *decoder.latent_shape)
        narrow = copy.deepcopy(decoder).to(torch.bfloat16)
        drawn = narrow.sample(vectors.bfloat16(), null.bfloat16(), noise.bfloat16(), 4, 2.0)
        expected = decoder.sample(vectors, null, noise, 4, 2.0)
        assert (drawn.float() - expected).abs().mean() < 0.03


def test_an_unknown_scheduler_or_u_net_setting_is_refused(nano_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="NoSuchScheduler"):
        built(nano_config, scheduler={"class": "NoSuchScheduler"})
    with pytest.raises(ConfigError, match="layers_per_blok.*did you mean layers_per_block"):
        built(nano_config, unet=nano_config.decoder.unet | {"layers_per_blok": 1})


# ------------------------------------------------------------------------------------------ a transformer instead


@pytest.fixture
def patches(flow: ImageDecoder) -> ImageDecoder:
    """A decoder of patches: latents 48 x 8 x 8, a token for each of its four vectors."""
    torch.manual_seed(3)
    network = PatchTransformer(48, 8, 4, 32, patch=4, width=64, layers=2, heads=2)
    return ImageDecoder(network, flow.vae, flow.scheduler, 4, 32, spatial=False, clean=True).eval()


@torch.no_grad()
def test_each_patch_is_told_its_own_vector_and_attends_to_the_others(patches: ImageDecoder) -> None:
    noisy, times, vectors = draw(1, *patches.latent_shape), torch.tensor([500.0]), draw(1, 4, 32)
    before = patches.denoise(noisy, times, vectors)
    assert before.shape == noisy.shape
    other = vectors.clone()
    other[0, 3] += 1.0
    moved = (patches.denoise(noisy, times, other) - before).abs()[0].mean(0)
    corners = moved[:4, :4].mean(), moved[4:, 4:].mean()
    assert 0 < corners[0] < corners[1]


@torch.no_grad()
def test_patches_know_their_place_and_the_time(patches: ImageDecoder) -> None:
    noisy = draw(1, 48, 4, 4).repeat(1, 1, 2, 2)
    out = patches.denoise(noisy, torch.tensor([500.0]), draw(1, 1, 32).expand(1, 4, 32))
    assert not torch.allclose(out[:, :, :4, :4], out[:, :, 4:, 4:], atol=1e-3)
    network: Any = patches.network
    network.time_second.weight.normal_(std=0.1)
    vectors = draw(1, 4, 32)
    early, late = (patches.denoise(noisy, torch.tensor([t]), vectors) for t in (20.0, 900.0))
    assert not torch.allclose(early, late, atol=1e-3)


@torch.no_grad()
def test_a_finer_grid_of_patches_gets_the_vectors_enlarged() -> None:
    network = PatchTransformer(48, 8, 4, 32, patch=2, width=64, layers=1, heads=2)
    given: list[Tensor] = []
    network.condition.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    vectors = torch.zeros(1, 4, 32)
    vectors[0, 1] = 1.0
    assert network(draw(1, 48, 8, 8), torch.tensor([1.0]), vectors).shape == (1, 48, 8, 8)
    square = given[0].view(4, 4, 32)[..., 0]
    assert square[0, 3] == 1.0 and square[3, 0] == 0.0 and 0 < square[0, 2] < 1.0


def test_a_transformer_learns_a_picture_and_samples_it(patches: ImageDecoder) -> None:
    decoder = copy.deepcopy(patches).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    latents = decoder.encode(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    vectors = draw(1, 4, 32)
    numbers = torch.Generator().manual_seed(2)
    for _ in range(150):
        noise = torch.randn(4, *decoder.latent_shape, generator=numbers)
        loss = decoder(latents.expand_as(noise), vectors.expand(4, 4, 32), noise, torch.rand(4, generator=numbers))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    drawn = decoder.eval().sample(vectors, None, draw(1, *decoder.latent_shape), 4, 1.0)
    assert (drawn - decoder.decode(latents)).abs().mean() < 0.1
    assert decoder.condition.level_E.grad is None  # nothing was told a level


def test_a_folder_keeps_a_transformer_in_either_dtype(nano_config: ModelConfig, tmp_path: Path) -> None:
    settings = {"unet": {}, "transformer": PatchTransformerConfig(width=64, layers=1, heads=2), "predicts": "clean"}
    config = nano_config.model_copy(update={"decoder": nano_config.decoder.model_copy(update=settings)})
    decoder = build_decoder(config)
    with torch.no_grad():
        decoder.condition.level_E.normal_()
    PARTS["decoder"].save(decoder, tmp_path / "decoder")
    given = draw(1, *decoder.latent_shape), torch.tensor([500.0]), draw(1, 4, 32), torch.tensor([0.2])
    for dtype in (torch.float32, torch.bfloat16):
        found = PARTS["decoder"].load(tmp_path / "decoder", config, dtype)
        expected = copy.deepcopy(decoder).to(dtype)
        with torch.no_grad():
            assert torch.equal(found.denoise(*given), expected.denoise(*given))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "transformer takes the place of unet and source: set one of them"),
        ({"unet": {}, "transformer": PatchTransformerConfig(patch=3)}, "patch = 3 does not divide latents of side 8"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(nano_config: ModelConfig, settings: dict[str, Any], said: str) -> None:
    settings = {"transformer": PatchTransformerConfig(), **settings}
    config = nano_config.model_copy(update={"decoder": nano_config.decoder.model_copy(update=settings)})
    with pytest.raises(ConfigError, match=said):
        build_decoder(config)


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="width 320 must be a multiple of heads 6"):
        load_config("tiny/decoder", ["model.decoder.transformer.heads=6"])
