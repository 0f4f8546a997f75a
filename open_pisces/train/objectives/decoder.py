"""The diffusion decoder's training on true vectors: the whole U-Net learns (as in Emu2), the encoders do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_pisces.batch import Losses, PairBatch, Sample
from open_pisces.config import RunConfig
from open_pisces.data.images import generation_bytes, to_pil
from open_pisces.data.loader import PairLoader
from open_pisces.data.order import Mixture
from open_pisces.data.shards import DamagedSample
from open_pisces.device import upcast
from open_pisces.model.bridge import TargetStatistics, TargetSums, VisualTokenPooler
from open_pisces.model.folder import in_start, without_sources
from open_pisces.model.parts import build_part
from open_pisces.sheets import contact_sheet
from open_pisces.train.flops import Cost, Counts, frozen_generation_encoder, meta, meta_part, unit_cost
from open_pisces.train.objectives.base import Objective, draw, get_features, get_parts, get_tokenizer, stack_pixels
from open_pisces.train.shapes import Shape, empty_pairs
from open_pisces.train.world import World

STATISTICS_CHUNK = 32
"""Pictures encoded together for the target statistics."""


class DecoderOnVectors(nn.Module):
    """The decoder with what makes its conditions: all that its training runs, in one module that can be sharded."""

    def __init__(self, generation_encoder: Any, decoder: Any, statistics: TargetStatistics, pool: int) -> None:
        super().__init__()
        self.generation_encoder = generation_encoder
        self.decoder = decoder
        self.statistics = statistics
        self.pooler = VisualTokenPooler(pool)

    @torch.no_grad()
    def vectors(self, batch: PairBatch) -> Tensor:
        """True conditions in gen-CLIP's space, ``(B, M, E)``."""
        if batch.features_BME is not None:
            return batch.features_BME
        return upcast(self.pooler(self.generation_encoder.features(batch.pixels_BCHW)))

    def forward(
        self,
        batch: PairBatch,
        noise_BCHW: Tensor,
        times_B: Tensor,
        dropped_B: Tensor,
        vector_noise_BME: Tensor | None = None,
        levels_B: Tensor | None = None,
        predicted_B: Tensor | None = None,
    ) -> Losses:
        """The error of one denoising step, as a share of the global batch's; where ``dropped_B``, without condition.

        ``vector_noise_BME`` are standard normal numbers, ``levels_B`` what they are multiplied with. Where
        ``predicted_B``, the vectors are an LLM's; their noise must be zero, their level is what the decoder is told.
        """
        raw_BME = self.vectors(batch)
        if predicted_B is not None and batch.predicted_BME is not None:
            raw_BME = torch.where(predicted_B.view(-1, 1, 1), batch.predicted_BME, raw_BME)
        if levels_B is not None and vector_noise_BME is not None:
            # Levels are in deviations of the targets, whatever their scale.
            raw_BME = raw_BME + levels_B.view(-1, 1, 1) * self.statistics.std_E * vector_noise_BME
            # A dropped condition has no error.
            levels_B = levels_B.masked_fill(dropped_B, 0.0)
        latents = self.decoder.encode(batch.targets_BCHW)
        null_BME = self.statistics.destandardize(self.statistics.null_ME).expand_as(raw_BME)
        vectors = torch.where(dropped_B.view(-1, 1, 1), null_BME, raw_BME)
        weight = 0.0 if batch.blank else 1 / max(batch.total, 1)
        # `to(latents)` follows a float64 proof; latents are never less than float32, so nothing is rounded.
        errors_B = self.decoder(latents, vectors, noise_BCHW.to(latents), times_B.to(latents), levels_B)
        loss = errors_B.sum() * weight
        return Losses(loss, {"diffusion": loss.detach()})


class DecoderObjective(Objective):
    """One denoising step on the true vectors of each picture, a tenth of them without a condition."""

    module: DecoderOnVectors

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        self.tokenizer = get_tokenizer(config)
        parts = get_parts(("generation_encoder", "bridge", "decoder"), config, world)
        encoder, bridge, decoder = parts.values()
        # Before sharding and the optimizer look at what learns.
        encoder.requires_grad_(False)
        mixture = Mixture(config.data, config.seed)
        settings = config.train
        self.load = PairLoader(
            mixture,
            self.tokenizer,
            config.seed,
            settings.batch_size,
            settings.accumulate,
            (encoder.image_size, decoder.image_size),
            get_features(config, mixture, world),
            world.rank,
            world.ranks,
        )
        self.module = DecoderOnVectors(encoder, decoder, bridge.statistics, config.model.generation.pool)
        if not bridge.statistics.taken:
            bridge.statistics.take(target_sums(config, self.module, mixture, world), config.model.bridge.standardise)
        self.parts = {"decoder": decoder, "bridge": bridge}
        if not in_start(config.model, "generation_encoder"):
            self.parts["generation_encoder"] = encoder  # from its source: without it nobody could make its vectors

    def losses(self, batch: PairBatch) -> Losses:
        """The squared error of each picture's own noise, time and drop."""
        decoder = self.module.decoder
        settings = self.config.diffusion
        draws = [draw(self.config, drawn, "diffusion") for drawn in batch.draws]
        noise = torch.from_numpy(np.stack([d.standard_normal(decoder.latent_shape, np.float32) for d in draws]))
        times = torch.tensor([draw_time(d, decoder.is_flow, settings.time_shift) for d in draws])
        # Drawn last from each sample's stream: noise and time do not depend on how often conditions are dropped.
        dropped = torch.tensor([d.random() < settings.drop_condition for d in draws])
        given = [noise, times, dropped]
        if settings.noisy or settings.predicted:
            given += self._wrong_vectors(batch)
        device = batch.pixels_BCHW.device
        return self.module(batch, *(value.to(device) for value in given))

    def _wrong_vectors(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise for each picture's vectors, its level (0: true vectors), and where the LLM's replace them.

        Each picture draws from its own stream, and first what it always drew.
        """
        settings = self.config.diffusion
        shape = self.config.model.generation.vectors, self.config.model.generation.width
        noises = []
        levels = []
        predicted = []
        for drawn in batch.draws:
            stream = draw(self.config, drawn, "vectors")
            level = stream.uniform(0, settings.noise)
            level = level if stream.random() < settings.noisy else 0.0
            noise = stream.standard_normal(shape, np.float32)
            is_predicted = stream.random() < settings.predicted
            predicted.append(is_predicted)
            levels.append(self.config.model.decoder.noise_level if is_predicted else level)
            noises.append(np.zeros_like(noise) if is_predicted else noise)
        return torch.from_numpy(np.stack(noises)), torch.tensor(levels, dtype=torch.float32), torch.tensor(predicted)

    def probe(self, samples: list[Sample], path: Path) -> None:
        """True pictures above their reconstructions from true vectors."""
        module = self.module
        encoder = module.generation_encoder
        decoder = module.decoder
        statistics = module.statistics
        raw = upcast(module.pooler(encoder.features(stack_pixels(samples, encoder.image_size, encoder))))
        noise = torch.randn(len(samples), *decoder.latent_shape, generator=torch.Generator().manual_seed(0)).to(raw)
        drawn = decoder.sample(raw, statistics.destandardize(statistics.null_ME), noise, 20, 1.0)
        images = [s.images[0] for s in samples] + [to_pil(picture) for picture in drawn.float().cpu().numpy()]
        contact_sheet(images, [s.short for s in samples] + ["from its vectors"] * len(samples), len(samples)).save(
            path.with_suffix(".png")
        )

    @classmethod
    def skeleton(cls, config: RunConfig) -> nn.Module:
        """Encoder, decoder and statistics on the meta device."""
        model = without_sources(config.model)
        with torch.device("meta"):
            encoder, bridge, decoder = (build_part(n, model) for n in ("generation_encoder", "bridge", "decoder"))
        encoder.requires_grad_(False)
        return DecoderOnVectors(encoder, decoder, bridge.statistics, model.generation.pool)

    @staticmethod
    def costs(module: Any, config: RunConfig) -> Iterator[Cost]:
        """The U-Net learns; gen-CLIP and the autoencoder's encoder are frozen."""
        decoder = meta_part(module, "decoder")
        settings = config.model
        latents = meta(1, *decoder.latent_shape)
        times = meta(1)
        vectors = meta(1, settings.generation.vectors, settings.generation.width)
        side = decoder.image_size
        yield unit_cost("network", "pictures", lambda: decoder.denoise(latents, times, vectors))
        yield unit_cost("vae", "pictures", lambda: decoder.encode(meta(1, 3, side, side)))
        yield frozen_generation_encoder(module)

    @staticmethod
    def rehearsal(module: Any, config: RunConfig, shape: Shape) -> Callable[[], Tensor]:
        """One denoising step. The scheduler's tables are left out, for they are too small to count."""
        decoder = module.decoder
        batch = empty_pairs((module.generation_encoder.image_size, decoder.image_size), config, shape)
        noise = torch.empty(shape.pictures, *decoder.latent_shape)
        times = torch.zeros(shape.pictures)

        def run() -> Tensor:
            vectors = module.vectors(batch)
            latents = decoder.encode(batch.targets_BCHW)
            predicted = decoder.denoise(latents + noise, times, vectors)
            return (upcast(predicted) - upcast(noise)).pow(2).mean((1, 2, 3)).sum()

        return run

    @staticmethod
    def picture_bytes(module: Any, counts: Counts, samples: int) -> float:
        """One picture at the encoder's size and one at the decoder's."""
        return 3.0 * (module.generation_encoder.image_size**2 + module.decoder.image_size**2)


def draw_time(draw: np.random.Generator, flow: bool, shift: float) -> float:
    """A time in [0, 1]: logit-normal for flows (Stable Diffusion 3), uniform for diffusion."""
    return float(1 / (1 + np.exp(-(draw.standard_normal() + shift)))) if flow else float(draw.random())


@torch.no_grad()
def target_sums(config: RunConfig, module: DecoderOnVectors, mixture: Mixture, world: World) -> TargetSums:
    """Sums over the raw targets of the first pictures of the run, the same on all ranks.

    Rank 0, which has the encoder's weights, encodes them on its device. Only the sums are kept, so 2,048 pictures at
    1024 px need no more memory than 32.
    """
    pictures = torch.arange(config.diffusion.statistics_samples)
    settings = config.model.generation
    sums = TargetSums.of(torch.zeros(0, settings.vectors, settings.width))
    if not world.is_first:
        return TargetSums(*(world.broadcast(part) for part in sums))
    # Targets are what the decoder trains on: float32, also where the folder holds half precision.
    encoder = module.generation_encoder.to(world.device, torch.float32)
    for chunk in pictures.split(STATISTICS_CHUNK):
        pixels = [pixels for g in chunk.tolist() for pixels in _generation_picture(mixture, g, encoder.image_size)]
        if pixels:
            features = encoder.features(torch.from_numpy(np.stack(pixels)).to(world.device))
            sums += TargetSums.of(upcast(module.pooler(features)).cpu())
    if world.mesh is not None:  # sharding takes it to the device block by block
        encoder.cpu()
    return TargetSums(*(world.broadcast(part) for part in sums))


def _generation_picture(mixture: Mixture, g: int, size: int) -> list[np.ndarray]:
    """The picture of draw ``g`` as gen-CLIP sees it; none if it is damaged, which is counted when it is trained on."""
    try:
        images = mixture.sample(mixture.draw(g)).images
    except DamagedSample:
        return []
    return [generation_bytes(image, size) for image in images[:1]]
