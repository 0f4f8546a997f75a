"""Pixels from gen-CLIP vectors: a latent diffusion U-Net conditioned as Emu2's SDXL (emu/diffusion.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from open_pisces.batch import unit_pixels
from open_pisces.device import upcast
from open_pisces.errors import PiscesError
from open_pisces.model.patch_transformer import PatchTransformer


class PixelUnshuffleVAE:
    """`AutoencoderKL`'s interface over a plain rearrangement: pixels of ``factor`` x ``factor`` become channels.

    For ``tiny``: at 64 px a learned autoencoder would cost more than it saves. Nothing is lost and nothing learnt.
    """

    def __init__(self, unshuffle: int) -> None:
        self.factor = unshuffle
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=None, latent_channels=3 * unshuffle**2)

    def encode(self, pixels_BCHW: Tensor) -> SimpleNamespace:
        """``(B, 3, H, W)`` in [-1, 1] to a "distribution" of ``(B, 3 f f, H / f, W / f)`` with one possible value."""
        # A distribution with one value: callers take `.mode()` as they do of AutoencoderKL's Gaussian.
        latents = F.pixel_unshuffle(pixels_BCHW, self.factor)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents_BCHW: Tensor) -> SimpleNamespace:
        """The inverse of `encode`, as ``.sample``."""
        return SimpleNamespace(sample=F.pixel_shuffle(latents_BCHW, self.factor))


class ConditionTable(nn.Module):
    """What is added to condition vectors, zero at the start: where each one belongs, and how noisy all of them are.

    ``positions_ME`` ``(M, E)`` tells one vector from the next, for a U-Net; a transformer over patches has places of
    its own, and ``vectors`` is 0. ``level_E`` times the noise level is added to each. Stable unCLIP tells its decoder
    the level too, by an embedding joined to the condition, which published weights have no place for.
    """

    def __init__(self, vectors: int, width: int) -> None:
        super().__init__()
        if vectors:
            self.positions_ME = nn.Parameter(torch.zeros(vectors, width))
        self.level_E = nn.Parameter(torch.zeros(width))


class ImageDecoder(nn.Module):
    """A diffusion model that rebuilds a picture from its M pooled gen-CLIP vectors.

    Its network is SDXL's U-Net, or at ``tiny`` a `PatchTransformer`. What follows is said of the U-Net.

    The vectors plus a learned position table (zero at the start, so that published weights load exactly) are the
    cross-attention context; their mean is SDXL's pooled embedding. With ``spatial_condition`` their grid is also
    upsampled and joined to the U-Net's input: our deviation at ``tiny``, where position otherwise comes out wrong.
    With ``clean`` the U-Net predicts the clean latents and a flow's velocity is formed outside it ("Back to Basics",
    arXiv 2511.13720): our second deviation at ``tiny``, where a narrow U-Net cannot carry the noise through.
    """

    def __init__(
        self,
        network: UNet2DConditionModel | PatchTransformer,
        vae: Any,
        scheduler: Any,
        vectors: int,
        image_size: int,
        spatial: bool,
        clean: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.scheduler = scheduler
        self.vae = vae
        self.image_size = image_size
        self.spatial = spatial
        self.clean = clean
        self.grid = int(vectors**0.5)
        self.condition = ConditionTable(0 if self.is_transformer else vectors, self.condition_width)
        self._noiser: Any = None if self.is_flow else _noiser(scheduler)
        if clean and not self.is_flow:
            name = type(scheduler).__name__
            raise PiscesError(f"decoder.predicts = 'clean' needs FlowMatchEulerDiscreteScheduler, not {name}")

    @property
    def is_transformer(self) -> bool:
        """Whether the network is a transformer over patches instead of a U-Net."""
        return isinstance(self.network, PatchTransformer)

    @property
    def condition_width(self) -> int:
        """E of the vectors that it takes."""
        if isinstance(self.network, PatchTransformer):
            return int(self.network.config["vector_width"])
        return int(self.network.config.cross_attention_dim)

    @property
    def is_flow(self) -> bool:
        """Whether the scheduler is a flow (velocity along a straight path) rather than a diffusion of SDXL's kind."""
        return _is_flow(self.scheduler)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a latent."""
        return latent_shape(self.vae, self.image_size)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Pictures to float32 latents; the autoencoder is frozen, its mean is used so that nothing is random.

        The autoencoder may compute in less (autocast, a bfloat16 model). Its latents are upcast, because noise is added
        to them at a level that bfloat16 would round.
        """
        pixels = unit_pixels(pixels_BCHW) * 2 - 1
        latents = self.vae.encode(pixels.to(getattr(self.vae, "dtype", pixels.dtype))).latent_dist.mode()
        return upcast(latents) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents to float32 pictures in [0, 1]."""
        latents = latents_BCHW / self.vae.config.scaling_factor
        pixels = self.vae.decode(latents.to(getattr(self.vae, "dtype", latents.dtype))).sample
        return (upcast(pixels) / 2 + 0.5).clamp(0, 1)

    def denoise(
        self, noisy_BCHW: Tensor, times_B: Tensor, vectors_BME: Tensor, levels_B: Tensor | None = None
    ) -> Tensor:
        """One call of the network: its prediction (noise, velocity or clean) for latents at ``times_B`` in [0, 1000].

        ``levels_B`` says how wrong the vectors are, in deviations of the targets; None is 0: true vectors. All
        arguments are float32. Latents and context are cast to the network's dtype at the last moment, by autocast or
        here. Times and sizes never are, the network casts their embeddings: bfloat16 holds every fourth number above
        512.
        """
        if levels_B is not None:
            vectors_BME = vectors_BME + levels_B.view(-1, 1, 1) * self.condition.level_E
        kind = noisy_BCHW.device.type
        # `is_autocast_enabled` raises for devices that have no autocast.
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = None if autocast else self.condition.level_E.dtype
        if isinstance(self.network, PatchTransformer):
            return self.network(noisy_BCHW.to(dtype=dtype), times_B, vectors_BME.to(dtype=dtype))
        size = float(self.image_size)
        # SDXL's micro-conditioning: original size, crop corner, target size. Ours never crops, so they are constant.
        ids = torch.tensor([size, size, 0.0, 0.0, size, size], device=vectors_BME.device)
        pooled = {"text_embeds": vectors_BME.mean(1), "time_ids": ids.expand(len(vectors_BME), 6)}
        if self.spatial:
            grid = vectors_BME.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            # Bilinear: nearest neighbors would hand the U-Net a grid of hard borders.
            grid = F.interpolate(grid, noisy_BCHW.shape[-2:], mode="bilinear", align_corners=False)
            noisy_BCHW = torch.cat([noisy_BCHW, grid.to(noisy_BCHW.dtype)], 1)
        context = vectors_BME + self.condition.positions_ME
        noisy_BCHW = noisy_BCHW.to(dtype=dtype)
        context = context.to(dtype=dtype)
        return self.network(noisy_BCHW, times_B, context, added_cond_kwargs=pooled).sample

    def forward(
        self,
        latents_BCHW: Tensor,
        vectors_BME: Tensor,
        noise_BCHW: Tensor,
        times_B: Tensor,
        levels_B: Tensor | None = None,
    ) -> Tensor:
        """The squared error of one denoising step, per picture: ``(B,)``.

        Args:
            latents_BCHW: clean latents, float32.
            vectors_BME: conditions in gen-CLIP space.
            noise_BCHW: standard normal noise, float32.
            times_B: in [0, 1], 1 being pure noise; float32.
            levels_B: noise in the vectors, see `denoise`.
        """
        if self.is_flow:
            at = times_B.view(-1, 1, 1, 1)
            noisy = (1 - at) * latents_BCHW + at * noise_BCHW
            # diffusers counts a flow's time from 0 to 1000, and so the U-Net embeds it.
            steps = times_B * 1000
            # Straight path from picture to noise: its velocity is the difference (rectified flow).
            target = latents_BCHW if self.clean else noise_BCHW - latents_BCHW
        else:
            count = self._noiser.config.num_train_timesteps
            # Whole steps, as SDXL was trained: the schedule is a table.
            steps = (times_B * count).long().clamp_max(count - 1)
            noisy = self._noiser.add_noise(latents_BCHW, noise_BCHW, steps)
            target = noise_BCHW
            if self._noiser.config.prediction_type == "v_prediction":
                target = self._noiser.get_velocity(latents_BCHW, noise_BCHW, steps)
            elif self._noiser.config.prediction_type == "sample":
                target = latents_BCHW
        predicted = self.denoise(noisy, steps, vectors_BME, levels_B)
        return (upcast(predicted) - upcast(target)).pow(2).mean((1, 2, 3))

    @torch.no_grad()
    def sample(
        self,
        vectors_BME: Tensor,
        null_ME: Tensor | None,
        noise_BCHW: Tensor,
        steps: int,
        guidance_scale: float,
        level: float = 0.0,
        scheduler: Any = None,
        on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draw pictures: ``(B, 3, H, W)`` in [0, 1].

        Guidance (`predict`) acts here and nowhere else, with the empty caption's vectors as the null condition (paper:
        inference, after Emu2). A scale of 1 skips it and needs no null condition. ``level`` is how wrong the vectors
        are (`denoise`). Latents, times and noise levels stay float32 whatever the U-Net computes in.

        ``scheduler`` takes the place of the decoder's own, and must be of its kind: a flow, or a diffusion. ``on_step``
        gets the number of each step, its time and the latents after it, and returns those to go on with.
        """
        scheduler = self.start_scheduler(steps, scheduler)
        guided = guidance_scale != 1.0
        if guided and null_ME is None:
            raise PiscesError(f"guidance_scale {guidance_scale} needs the null condition: pass null_ME or a scale of 1")
        B = len(vectors_BME)
        scales_B = vectors_BME.new_full((B,), guidance_scale) if guided else None
        levels_B = vectors_BME.new_full((B,), level)
        latents = noise_BCHW.float() * getattr(scheduler, "init_noise_sigma", 1.0)
        for number, time in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
            times = time.expand(B).to(latents.device)
            predicted = self.predict(scaled, times, vectors_BME, levels_B, null_ME, scales_B)
            latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
            if on_step is not None:
                latents = on_step(number, time, latents)
        return self.decode(latents)

    def start_scheduler(self, steps: int, scheduler: Any = None) -> Any:
        """A scheduler for one sampling of ``steps``: it keeps that sampling's state, and others may run beside it.

        Args:
            steps: denoising steps.
            scheduler: in place of the decoder's own.

        Raises:
            PiscesError: for a scheduler of the other kind, flow or diffusion.
        """
        chosen = self.scheduler if scheduler is None else scheduler
        if _is_flow(chosen) != self.is_flow:
            kind = "flow (FlowMatch...)" if self.is_flow else "diffusion"
            raise PiscesError(
                f"{type(chosen).__name__}: this decoder was trained as a {kind}: take a scheduler of that"
            )
        # Our own never samples itself, so a copy is fresh; one that was given may be in the middle of something.
        started = copy.deepcopy(chosen) if scheduler is None else type(chosen).from_config(chosen.config)
        started.set_timesteps(steps, device=self.condition.level_E.device)
        return started

    @torch.no_grad()
    def predict(
        self,
        latents_BCHW: Tensor,
        times_B: Tensor,
        vectors_BME: Tensor,
        levels_B: Tensor,
        null_ME: Tensor | None = None,
        scales_B: Tensor | None = None,
    ) -> Tensor:
        """What a scheduler's step takes: noise or velocity at ``times_B``, guided where ``scales_B`` is given.

        Guidance is ``null + scale * (conditioned - null)``. The null condition has no error: its level is 0.
        """
        if scales_B is None or null_ME is None:
            predicted = self.denoise(latents_BCHW, times_B, vectors_BME, levels_B).float()
        else:
            # Both halves in one batch: one call of the network a step.
            conditions = torch.cat([vectors_BME, null_ME.expand_as(vectors_BME)])
            levels = torch.cat([levels_B, torch.zeros_like(levels_B)])
            both = self.denoise(latents_BCHW.repeat(2, 1, 1, 1), times_B.repeat(2), conditions, levels).float()
            conditioned, null = both.chunk(2)
            predicted = null + scales_B.view(-1, 1, 1, 1) * (conditioned - null)
        if self.clean:
            # latents = (1 - t) clean + t noise, so the velocity noise - clean is (latents - clean) / t.
            predicted = (latents_BCHW - predicted) / (times_B.view(-1, 1, 1, 1) / 1000)
        return predicted


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def latent_shape(vae: Any, image_size: int) -> tuple[int, int, int]:
    """``(C, H, W)`` of the latents that an autoencoder makes of pictures of a size."""
    # AutoencoderKL halves the picture once between each two of its levels.
    blocks = getattr(vae.config, "block_out_channels", None)
    side = image_size // (2 ** (len(blocks) - 1) if blocks else vae.factor)
    return vae.config.latent_channels, side, side


def _noiser(scheduler: Any) -> DDPMScheduler:
    """What adds noise in training, on the schedule that the sampler walks back.

    Raises:
        PiscesError: for a ``prediction_type`` that has no target here, or that the sampler cannot take a step with.
    """
    noiser = DDPMScheduler.from_config(scheduler.config)
    kind = noiser.config.prediction_type
    name = type(scheduler).__name__
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise PiscesError(
            f"decoder.scheduler.prediction_type = {kind!r} is not known: set epsilon, v_prediction or sample"
        )
    if kind == "sample" and not _steps_with_sample(scheduler):
        raise PiscesError(
            f"decoder.scheduler.prediction_type = 'sample': {name} cannot sample with it: take DDIMScheduler or "
            f"EulerDiscreteScheduler, or set epsilon"
        )
    return noiser


def _steps_with_sample(scheduler: Any) -> bool:
    """Whether a sampler takes a step: some accept ``prediction_type: sample`` and refuse it then."""
    with torch.device("cpu"):  # also for a model that is built on the meta device
        trial = type(scheduler).from_config(scheduler.config)
        trial.set_timesteps(2)
        latents = torch.zeros(1, 1, 1, 1)
        try:
            trial.scale_model_input(latents, trial.timesteps[0])
            trial.step(latents, trial.timesteps[0], latents)
        except NotImplementedError:
            return False
    return True
