"""Between pictures and vectors, without an LLM: true vectors of pictures, and pictures from vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.config import ModelConfig
from open_pisces.data.images import generation_bytes, to_pil
from open_pisces.device import pick_device
from open_pisces.generate.offload import ENCODES, PAINTS, Parts
from open_pisces.model.bridge import Bridge
from open_pisces.model.decoder import ImageDecoder
from open_pisces.model.encoders import GenerationEncoder
from open_pisces.model.folder import load_part, read_config

Progress = Callable[[str, int, int], object]
"""Gets the stage (``vectors`` of the LLM or ``steps`` of the decoder), how many are done, and of how many. What it
raises ends the work and reaches the caller: so a drawing is cancelled."""


class Painter:
    """gen-CLIP, the statistics of its vectors, and the decoder: all that a picture needs besides its vectors."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: GenerationEncoder,
        bridge: Bridge,
        decoder: ImageDecoder,
        device: torch.device,
        parts: Parts | None = None,
    ) -> None:
        self.settings = config.decoder
        self.device = device
        self.parts = parts or Parts({}, device, offload=False)
        self.encoder = encoder.eval()
        self.bridge = bridge.eval().to(device)
        self.decoder = decoder.eval()
        if not self.parts.offload:
            self.encoder.to(device)
            self.decoder.to(device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "auto") -> Painter:
        """Load the three parts of a model folder; its LLM need not exist yet (a decoder is judged before it)."""
        config = read_config(folder)
        parts: dict[str, Any] = {n: load_part(folder, n, config) for n in ("generation_encoder", "bridge", "decoder")}
        encoder, bridge, decoder = parts.values()
        return cls(config, encoder, bridge, decoder, pick_device(device))

    @torch.inference_mode()
    def encode(self, images: list[Image]) -> Tensor:
        """The true generation vectors of pictures, ``(B, M, E)``, in the LLM's space."""
        self.parts.use(ENCODES)
        size = self.encoder.image_size
        pixels = torch.stack([torch.from_numpy(generation_bytes(image, size)) for image in images])
        return self.bridge.targets(self.encoder.features(pixels.to(self.device)))

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        """Pictures from their true vectors: what the decoder could do if the LLM were perfect.

        Guidance starts from the condition that the decoder was trained without, the mean target at each position.
        """
        null_ME = self.bridge.statistics.null_ME
        numbers = [0] * len(images)
        # True vectors have no error.
        return pictures(self.pixels(self.encode(images), null_ME, numbers, steps, guidance_scale, seed, level=0.0))

    @torch.inference_mode()
    def pixels(
        self,
        vectors_BME: Tensor,
        null_ME: Tensor | None,
        numbers: list[int],
        steps: int | None,
        guidance_scale: float | None,
        seed: int,
        level: float | None = None,
        noise_BCHW: Tensor | None = None,
        scheduler: Any = None,
        on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Pictures from vectors, ``(B, 3, H, W)`` in [0, 1].

        Args:
            vectors_BME: conditions, in the LLM's space.
            null_ME: the unconditional context, likewise; guidance needs it.
            numbers: picture i starts from the noise of (seed, ``numbers[i]``), whatever else is in the batch.
            steps: denoising steps; None takes the model's own.
            guidance_scale: 1 turns guidance off; None takes the model's own.
            seed: of the noise.
            level: how wrong the vectors are, as the decoder is told; None takes the model's own for the LLM's vectors.
            noise_BCHW: to start from, in place of the noise of ``seed`` and ``numbers``.
            scheduler: in place of the decoder's own.
            on_step: see `ImageDecoder.sample`.
            progress: called after every step.
        """
        self.parts.use(PAINTS)
        leave = self.bridge.statistics.destandardize
        scale = guidance_scale
        scale = self.settings.guidance_scale if scale is None else scale
        if noise_BCHW is None:
            noise_BCHW = torch.stack([self.noise(seed, number) for number in numbers])
        steps = steps or self.settings.steps
        # Some schedulers take more steps than they were asked for, such as Heun's.
        total = 0 if progress is None else len(self.decoder.start_scheduler(steps, scheduler).timesteps)

        def after(number: int, time: Tensor, latents: Tensor) -> Tensor:
            if on_step is not None:
                latents = on_step(number, time, latents)
            if progress is not None:
                progress("steps", number + 1, total)
            return latents

        return self.decoder.sample(
            leave(vectors_BME),
            None if null_ME is None or scale == 1.0 else leave(null_ME),
            noise_BCHW.to(self.device),
            steps,
            scale,
            self.settings.noise_level if level is None else level,
            scheduler,
            after,
        )

    def noise(self, seed: int, number: int) -> Tensor:
        """What picture ``number`` of a seed starts from, ``(C, H, W)``: drawn on the CPU, the same on every device."""
        # A prime stride keeps (seed, number) apart for neighboring seeds.
        draw = torch.Generator().manual_seed(seed * 100_003 + number)
        return torch.randn(self.decoder.latent_shape, generator=draw)


def pictures(pixels_BCHW: Tensor) -> list[Image]:
    """Pictures of pixels in [0, 1]."""
    return [to_pil(one) for one in pixels_BCHW.float().cpu().numpy()]
