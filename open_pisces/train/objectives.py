"""The three objectives behind all trainings: contrastive (two towers), diffusion (the decoder), and Pisces itself.

Each is described to the loop by one `Training`. Everything random about a sample is drawn from (seed, epoch,
sample, purpose), so neither the order of work nor the number of processes can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_pisces.batch import Losses, PairBatch, SequenceBatch, StepBatches
from open_pisces.config import ConfigError, RunConfig
from open_pisces.data.draws import stream
from open_pisces.data.lengths import check_lengths
from open_pisces.data.loader import MULTIPLE, PairLoader, SequenceLoader
from open_pisces.data.mixture import Mixture
from open_pisces.data.prompts import Renderer
from open_pisces.data.shards import DamagedSample, open_dataset
from open_pisces.data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from open_pisces.frozen import get_part, in_start, open_features
from open_pisces.model.bridge import VisualTokenPooler
from open_pisces.model.build import assemble
from open_pisces.model.gen_clip import GenCLIP


@dataclass
class Training:
    """What the loop needs to know of an objective."""

    module: nn.Module
    """Everything that is moved, saved and resumed; parameters that need a gradient learn."""
    load: Callable[[int], StepBatches]
    """What a step trains on."""
    losses: Callable[[Any], Losses]
    """One micro-batch's share of the global loss."""
    parts: dict[str, Any]
    """The parts of the model folder that this training writes."""
    tokenizer: Any
    compiled: nn.Module | None = None
    """What ``train.compile`` compiles, if anything pays."""


def build_training(config: RunConfig) -> Training:
    """Read data, build or load the parts, freeze what is frozen."""
    torch.manual_seed(config.seed)
    if not config.data.sources:
        raise ConfigError(f"{config.name}: data.sources is empty: name at least one dataset")
    return {"contrastive": _contrastive, "decoder": _decoder, "pisces": _pisces}[config.objective](config)


# -------------------------------------------------------------------------------------------------- contrastive


def _contrastive(config: RunConfig) -> Training:
    """gen-CLIP, or with a MAE weight of 0 the understanding encoder of ``tiny``."""
    if config.train.accumulate > 1:
        raise ConfigError("train.accumulate must be 1 here: a contrastive loss compares the whole batch at once")
    name = f"{config.contrastive.tower}_encoder"
    tokenizer, vision = get_tokenizer(config), get_part(name, config.model)
    vision.requires_grad_(True)
    module = GenCLIP(vision, config.contrastive, len(tokenizer))
    visible = max(1, round(config.model.generation.grid**2 * config.contrastive.visible))

    def losses(batch: PairBatch) -> Losses:
        patches = config.model.generation.grid**2
        keep = [_draw(config, d, "mask").permutation(patches)[:visible] for d in batch.draws]
        return module(batch, torch.from_numpy(np.stack(keep)).to(batch.pixels_BCHW.device))

    loader = PairLoader(_mixture(config), tokenizer, config.seed, config.train.batch_size, 1, (vision.image_size,) * 2)
    return Training(module, loader, losses, {name: vision}, tokenizer, module)


# ------------------------------------------------------------------------------------------------------ decoder


def _decoder(config: RunConfig) -> Training:
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
    pooler, statistics = VisualTokenPooler(config.model.generation.pool), bridge.statistics
    if not statistics.taken:
        statistics.take(_raw_targets(config, encoder, pooler, loader), config.model.bridge.standardise)
    module = nn.ModuleDict({"generation_encoder": encoder, "decoder": decoder, "statistics": statistics})
    settings = config.diffusion

    def losses(batch: PairBatch) -> Losses:
        with torch.no_grad():
            raw_BME = batch.features_BME
            if raw_BME is None:
                raw_BME = pooler(encoder.features(batch.pixels_BCHW)).float()
            latents = decoder.encode(batch.targets_BCHW)
        draws = [_draw(config, d, "diffusion") for d in batch.draws]
        noise = torch.from_numpy(np.stack([d.standard_normal(latents.shape[1:], np.float32) for d in draws]))
        noise = noise.to(latents)
        times = torch.tensor([_time(d, decoder.is_flow, settings.time_shift) for d in draws]).to(latents)
        dropped = torch.tensor([d.random() < settings.drop_condition for d in draws], device=latents.device)
        null_BME = statistics.leave(statistics.null_ME).expand_as(raw_BME)
        vectors = torch.where(dropped.view(-1, 1, 1), null_BME, raw_BME)
        loss = decoder(latents, vectors, noise, times).sum() / batch.total
        return Losses(loss, {"diffusion": loss.detach()})

    return Training(module, loader, losses, {"decoder": decoder, "bridge": bridge}, tokenizer)


def _time(draw: np.random.Generator, flow: bool, shift: float) -> float:
    """A time in [0, 1]: logit-normal for flows (Stable Diffusion 3), uniform for diffusion."""
    return float(1 / (1 + np.exp(-(draw.standard_normal() + shift)))) if flow else float(draw.random())


@torch.no_grad()
def _raw_targets(config: RunConfig, encoder: Any, pooler: VisualTokenPooler, loader: PairLoader) -> Tensor:
    """Pooled raw features of the first pictures the run will see, on the CPU: ``(pictures, M, E)``."""
    steps = -(-config.diffusion.statistics_samples // config.train.batch_size)
    batches = (batch for step in range(steps) for batch in loader(step).batches)
    return torch.cat([pooler(encoder.features(batch.pixels_BCHW)) for batch in batches])


# ------------------------------------------------------------------------------------------------------- pisces


def _pisces(config: RunConfig) -> Training:
    """Cross-entropy on text, squared error on vectors; LLM and MLPs learn, encoders do not (the paper, all stages)."""
    tokenizer = get_tokenizer(config)
    names = ("llm", "understanding_encoder", "generation_encoder", "bridge")
    parts = {name: get_part(name, config.model, len(tokenizer)) for name in names}
    decoder = get_part("decoder", config.model) if in_start(config.model, "decoder") else None
    pisces = assemble(config.model, {**parts, "decoder": decoder}, config.loss)
    for name in config.train.freeze:
        if getattr(pisces, name, None) is not None:
            getattr(pisces, name).requires_grad_(False)
    N, M = pisces.understanding_encoder.vectors, config.model.generation.vectors
    sizes = pisces.understanding_encoder.image_size, pisces.generation_encoder.image_size
    mixture, renderer = _mixture(config), Renderer(tokenizer, config.model.template, N, M)
    check_lengths(mixture, renderer, config.data)
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
    )

    def losses(batch: SequenceBatch) -> Losses:
        return pisces(batch)

    # What learns is written; what is frozen only where the folder this training starts from does not hold it.
    trained = {n: p for n, p in parts.items() if n not in config.train.freeze or not in_start(config.model, n)}
    return Training(pisces, loader, losses, trained, tokenizer, pisces.llm.base_model)


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
            yield from (words.short, words.detailed)
            for asked in words.questions:
                yield from (asked.question, asked.answer)
