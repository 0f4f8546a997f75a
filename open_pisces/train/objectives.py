"""The three objectives behind all trainings: contrastive (two towers), diffusion (the decoder), and Pisces itself.

Each is described to the loop by one `Training`. Everything random about a sample is drawn from (seed, epoch,
sample, purpose), so neither the order of work nor the number of processes can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from open_pisces.batch import Losses, PairBatch, SequenceBatch, StepBatches, wide
from open_pisces.config import ConfigError, RunConfig
from open_pisces.data.draws import stream
from open_pisces.data.images import generation_bytes
from open_pisces.data.lengths import check_lengths
from open_pisces.data.loader import MULTIPLE, LengthError, PairLoader, SequenceLoader
from open_pisces.data.mixture import Mixture
from open_pisces.data.prompts import Renderer
from open_pisces.data.shards import DamagedSample, open_dataset
from open_pisces.data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from open_pisces.frozen import get_part, in_start, open_features
from open_pisces.model.adapters import AdapterError, adapter_layers
from open_pisces.model.bridge import TargetStatistics, TargetSums, VisualTokenPooler
from open_pisces.model.gen_clip import Embedded, GenCLIP
from open_pisces.model.pisces import Pisces, with_blank_pictures
from open_pisces.train.contrast import Pull, pulled, pulls
from open_pisces.train.distributed import World


class Loads(Protocol):
    """What gives a training its batches."""

    mixture: Mixture

    def __call__(self, step: int) -> StepBatches:
        """This process's part of a step."""

    def blank(self) -> Any:
        """A micro-batch that weighs nothing."""


@dataclass
class Training:
    """What the loop needs to know of an objective."""

    module: nn.Module
    """Everything that is moved, saved and resumed; parameters that need a gradient learn."""
    load: Loads
    """What a step trains on."""
    losses: Callable[[Any], Losses]
    """One micro-batch's share of the global loss."""
    parts: dict[str, Any]
    """The parts of the model folder that this training writes."""
    tokenizer: Any
    compiled: nn.Module | None = None
    """What ``train.compile`` compiles, if anything pays."""
    prepare: Callable[[list[Any]], list[Any]] = list
    """What has to be known of all micro-batches before the first one's loss."""
    idle: Callable[[Any], list[nn.Module]] = lambda batch: []
    """Modules that no sample of the global batch has used: a gradient of zero must not decay them."""


def build_training(config: RunConfig, world: World | None = None) -> Training:
    """Read data, build or load the parts, freeze what is frozen; the same in every process but for its batches."""
    torch.manual_seed(config.seed)
    if not config.data.sources:
        raise ConfigError(f"{config.name}: data.sources is empty: name at least one dataset")
    build = {"contrastive": _contrastive, "decoder": _decoder, "pisces": _pisces}[config.objective]
    return build(config, world or World(torch.device("cpu")))


# -------------------------------------------------------------------------------------------------- contrastive


def _contrastive(config: RunConfig, world: World) -> Training:
    """gen-CLIP, or with a MAE weight of 0 the understanding encoder of ``tiny``."""
    name = f"{config.contrastive.tower}_encoder"
    tokenizer, vision = get_tokenizer(config), get_part(name, config.model)
    vision.requires_grad_(True)
    module = GenCLIP(vision, config.contrastive, len(tokenizer))
    patches = config.model.generation.grid**2
    visible = max(1, round(patches * config.contrastive.visible))
    waiting: dict[int, Pull] = {}

    def embed(batch: PairBatch) -> Embedded:
        keep = [_draw(config, d, "mask").permutation(patches)[:visible] for d in batch.draws]
        return module(batch, torch.from_numpy(np.stack(keep)).to(batch.pixels_BCHW.device))

    def prepare(batches: list[PairBatch]) -> list[PairBatch]:
        """Several micro-batches: embed all without gradient, so that each can be compared with all."""
        if len(batches) > 1:
            with torch.no_grad():
                embedded = [embed(batch) for batch in batches]
            pulling = pulls(embedded, batches, world)
            waiting.update({id(batch): pull for batch, pull in zip(batches, pulling, strict=True)})
        return batches

    def losses(batch: PairBatch) -> Losses:
        embedded = embed(batch)
        pull = waiting.pop(id(batch), None) or pulls([embedded], [batch], world)[0]
        return pulled(embedded, pull, batch, config.contrastive.mae_weight)

    side = vision.image_size
    loader = PairLoader(
        _mixture(config), tokenizer, config.seed, config.train.batch_size, config.train.accumulate, (side, side)
    )
    loader.rank, loader.ranks = world.rank, world.ranks
    return Training(module, loader, losses, {name: vision}, tokenizer, module, prepare)


# ------------------------------------------------------------------------------------------------------ decoder


class DecoderOnVectors(nn.Module):
    """The decoder with what makes its conditions: all that its training runs, in one module that can be sharded."""

    def __init__(self, generation_encoder: Any, decoder: Any, statistics: TargetStatistics, pool: int) -> None:
        super().__init__()
        self.generation_encoder, self.decoder, self.statistics = generation_encoder, decoder, statistics
        self.pooler = VisualTokenPooler(pool)

    @torch.no_grad()
    def vectors(self, batch: PairBatch) -> Tensor:
        """True conditions in gen-CLIP's space, ``(B, M, E)``."""
        if batch.features_BME is not None:
            return batch.features_BME
        return wide(self.pooler(self.generation_encoder.features(batch.pixels_BCHW)))

    def forward(self, batch: PairBatch, noise_BCHW: Tensor, times_B: Tensor, dropped_B: Tensor) -> Losses:
        """The error of one denoising step, as a share of the global batch's; where ``dropped_B``, without condition."""
        raw_BME, latents = self.vectors(batch), self.decoder.encode(batch.targets_BCHW)
        null_BME = self.statistics.leave(self.statistics.null_ME).expand_as(raw_BME)
        vectors = torch.where(dropped_B.view(-1, 1, 1), null_BME, raw_BME)
        weight = 0.0 if batch.blank else 1 / max(batch.total, 1)
        # `to(latents)` follows a float64 proof; latents are never less than float32, so nothing is rounded.
        loss = self.decoder(latents, vectors, noise_BCHW.to(latents), times_B.to(latents)).sum() * weight
        return Losses(loss, {"diffusion": loss.detach()})


def _decoder(config: RunConfig, world: World) -> Training:
    """The diffusion decoder on true vectors: the whole U-Net learns (as in Emu2), the encoders do not."""
    tokenizer = get_tokenizer(config)
    encoder = get_part("generation_encoder", config.model).requires_grad_(False)
    bridge, decoder = get_part("bridge", config.model), get_part("decoder", config.model)
    sizes = encoder.image_size, decoder.image_size
    mixture = _mixture(config)
    features = open_features(config, mixture)
    loader = PairLoader(
        mixture, tokenizer, config.seed, config.train.batch_size, config.train.accumulate, sizes, features
    )
    module = DecoderOnVectors(encoder, decoder, bridge.statistics, config.model.generation.pool)
    if not bridge.statistics.taken:
        bridge.statistics.take(_target_sums(config, module, mixture, world), config.model.bridge.standardise)
    loader.rank, loader.ranks = world.rank, world.ranks
    settings = config.diffusion

    def losses(batch: PairBatch) -> Losses:
        draws = [_draw(config, d, "diffusion") for d in batch.draws]
        noise = torch.from_numpy(np.stack([d.standard_normal(decoder.latent_shape, np.float32) for d in draws]))
        times = torch.tensor([_time(d, decoder.is_flow, settings.time_shift) for d in draws])
        dropped = torch.tensor([d.random() < settings.drop_condition for d in draws])
        return module(batch, *(value.to(batch.pixels_BCHW.device) for value in (noise, times, dropped)))

    return Training(module, loader, losses, {"decoder": decoder, "bridge": bridge}, tokenizer)


def _time(draw: np.random.Generator, flow: bool, shift: float) -> float:
    """A time in [0, 1]: logit-normal for flows (Stable Diffusion 3), uniform for diffusion."""
    return float(1 / (1 + np.exp(-(draw.standard_normal() + shift)))) if flow else float(draw.random())


STATISTICS_CHUNK = 32
"""Pictures encoded together for the target statistics."""


@torch.no_grad()
def _target_sums(config: RunConfig, module: DecoderOnVectors, mixture: Mixture, world: World) -> TargetSums:
    """Sums over the raw targets of the first pictures of the run; each rank encodes its share, on its own device.

    Only the sums are kept, so 2,048 pictures at 1024 px need no more memory than 32.
    """
    encoder = module.generation_encoder.to(world.device)
    pictures = torch.arange(config.diffusion.statistics_samples)
    settings = config.model.generation
    sums = TargetSums.of(torch.zeros(0, settings.vectors, settings.width))
    for chunk in pictures.split(STATISTICS_CHUNK)[world.rank :: world.ranks]:
        pixels = [pixels for g in chunk.tolist() for pixels in _generation_picture(mixture, g, encoder.image_size)]
        if pixels:
            features = encoder.features(torch.from_numpy(np.stack(pixels)).to(world.device))
            sums += TargetSums.of(wide(module.pooler(features)).cpu())
    if world.mesh is not None:  # sharding takes it to the device block by block
        encoder.cpu()
    return TargetSums(*(world.sum(part) for part in sums))


def _generation_picture(mixture: Mixture, g: int, size: int) -> list[np.ndarray]:
    """The picture of draw ``g`` as gen-CLIP sees it; none if it is damaged, which is counted when it is trained on."""
    try:
        images = mixture.sample(mixture.draw(g)).images
    except DamagedSample:
        return []
    return [generation_bytes(image, size) for image in images[:1]]


# ------------------------------------------------------------------------------------------------------- pisces


def _pisces(config: RunConfig, world: World) -> Training:
    """Cross-entropy on text, squared error on vectors; LLM and MLPs learn, encoders do not (the paper, all stages)."""
    tokenizer = get_tokenizer(config)
    names = ("llm", "understanding_encoder", "generation_encoder", "bridge")
    parts = {name: get_part(name, config.model, len(tokenizer)) for name in names}
    if adapter_layers(parts["llm"]) and "llm" not in config.train.freeze:
        raise AdapterError(
            f"{config.name}: model.start = {config.model.start} holds an adapter, its base would not learn: merge it "
            "first with `pisces export MODEL OUT`"
        )
    decoder = get_part("decoder", config.model) if in_start(config.model, "decoder") else None
    pisces = Pisces(config.model, **parts, decoder=decoder, weights=config.loss)
    for name in config.train.freeze:
        if getattr(pisces, name, None) is not None:
            getattr(pisces, name).requires_grad_(False)
    N, M = pisces.understanding_encoder.vectors, config.model.generation.vectors
    sizes = pisces.understanding_encoder.image_size, pisces.generation_encoder.image_size
    mixture, renderer = _mixture(config), Renderer(tokenizer, config.model.template, N, M)
    _check_lengths(mixture, renderer, config, world)
    loader = SequenceLoader(
        mixture,
        renderer,
        config.data,
        config.seed,
        config.train.batch_size,
        config.train.accumulate,
        sizes,
        open_features(config, mixture),
        # A compiled LLM gets few lengths to compile; otherwise rows are as short as they can be.
        MULTIPLE if config.train.compile or not config.data.row_length else 8,
        world.rank,
        world.ranks,
    )

    def losses(batch: SequenceBatch) -> Losses:
        draws_KR = _head_draws(config, batch, pisces.bridge.head.loss_draws, M)
        return pisces(batch if world.ranks == 1 else with_blank_pictures(batch), draws_KR)

    def idle(batch: SequenceBatch) -> list[nn.Module]:
        found = []
        if not batch.total_vectors:
            found += [pisces.bridge.generation_projector, pisces.bridge.head]
        if not batch.total_seen:
            found += [pisces.bridge.understanding_projector, pisces.understanding_encoder]
        return found

    # What learns is written; what is frozen only where the folder this training starts from does not hold it.
    trained = {n: p for n, p in parts.items() if n not in config.train.freeze or not in_start(config.model, n)}
    return Training(pisces, loader, losses, trained, tokenizer, pisces.llm.base_model, idle=idle)


def _head_draws(config: RunConfig, batch: SequenceBatch, numbers: int, vectors: int) -> Tensor | None:
    """What a head's loss takes of chance, ``(K, numbers)`` standard normal; each picture's from its own stream."""
    if not numbers:
        return None
    drawn = [_draw(config, draw, "head").standard_normal((vectors, numbers), np.float32) for draw in batch.draws]
    shape = len(drawn) * vectors, numbers
    return torch.from_numpy(np.array(drawn, np.float32).reshape(shape)).to(batch.ids_BS.device)


def _check_lengths(mixture: Mixture, renderer: Renderer, config: RunConfig, world: World) -> None:
    """Each rank checks its share of the data; what one finds, all refuse.

    Raises:
        LengthError: naming a sample over ``data.max_length``.
    """
    found = ""
    try:
        check_lengths(mixture, renderer, config.data, world.rank, world.ranks)
    except LengthError as error:
        found = str(error)
    for message in world.gather_objects(found):
        if message:
            raise LengthError(message)


# -------------------------------------------------------------------------------------------------- shared parts


def _draw(config: RunConfig, drawn: tuple[int, str], purpose: str) -> np.random.Generator:
    """The stream of one sample for one purpose in one epoch."""
    return stream(config.seed, purpose, *drawn)


def _mixture(config: RunConfig) -> Mixture:
    return Mixture(config.data, config.seed)


def get_tokenizer(config: RunConfig) -> Any:
    """The start folder's tokenizer, or the one the settings describe."""
    model = config.model
    if in_start(model, "tokenizer"):
        return load_tokenizer(Path(model.start or "") / "tokenizer", model.template)
    if model.tokenizer == "bytes":
        return byte_tokenizer(model.template)
    if model.tokenizer == "bpe":
        return train_tokenizer(_texts(config), model.vocab_size, model.template)
    return load_tokenizer(model.tokenizer, model.template)


def _texts(config: RunConfig, most: int = 20_000) -> Iterator[str]:
    """Captions, questions and answers of the run's datasets, at most so many samples of each."""
    for source in config.data.sources:
        reader = open_dataset(source.path)
        for index in range(min(most, len(reader))):
            try:
                words = reader.words(index)
            except DamagedSample:
                continue  # met again, and counted, when it is drawn
            yield from (*words.short_captions, words.detailed)
            for asked in words.questions:
                yield from (asked.question, asked.answer)
