"""What the benches of a training step share: the shipped model, and padded batches whose pictures are encoded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from open_pisces.batch import SequenceBatch
from open_pisces.config import DataConfig, SourceConfig, Task
from open_pisces.data.loader import SequenceLoader
from open_pisces.data.order import Mixture
from open_pisces.factory.encoders import FrozenEncoder
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS
from open_pisces.model.pisces import Pisces

ROWS = 32
"""Samples of a batch that is timed: a micro-batch of `tiny`'s stages."""
STEPS = 2
"""Batches of one timed run; one alone would be too short a time to compare."""
MIX: dict[Task, float] = {"generate_short": 1, "generate_detailed": 1, "question": 1, "caption_detailed": 1}


def shipped() -> Generator:
    """The model in the package, ready to train: what the stages freeze is frozen."""
    generator = Generator.from_pretrained(WEIGHTS, "cpu")
    generator.pisces.train().requires_grad_(False)
    generator.pisces.llm.requires_grad_(True)
    generator.pisces.bridge.requires_grad_(True)
    return generator


def read(generator: Generator, tasks: dict[Task, float], rows: int) -> SequenceBatch:
    """A batch of the small dataset in the package as the loader pads it, with features as from the cache."""
    data = DataConfig(sources=[SourceConfig(path="fixture/train", tasks=tasks)], max_length=256)
    loader = SequenceLoader(Mixture(data, 0), generator.renderer, data, 0, rows, 1, generator.sizes)
    (batch,) = loader(0).with_totals()
    return encoded(generator.pisces, batch)


@torch.no_grad()
def encoded(pisces: Pisces, batch: SequenceBatch) -> SequenceBatch:
    """The batch with the encoders' outputs in place of pixels, as the feature cache gives it."""
    pool = pisces.settings.generation.pool
    see = FrozenEncoder("understanding", pisces.understanding_encoder, pool)
    draw = FrozenEncoder("generation", pisces.generation_encoder, pool)
    seen = batch.understanding_pixels_BCHW
    drawn = batch.generation_pixels_BCHW
    return replace(
        batch,
        understanding_features_BNE=see(_some(seen))[: len(seen)],
        generation_features_BME=draw(_some(drawn))[: len(drawn)],
    )


def _some(pixels_BCHW: Tensor) -> Tensor:
    """A blank where there is no picture: SigLIP refuses an empty batch."""
    return pixels_BCHW if len(pixels_BCHW) else pixels_BCHW.new_zeros(1, *pixels_BCHW.shape[1:])


def words_only(batch: SequenceBatch) -> SequenceBatch:
    """The same tokens and the same supervised words without pictures: their places hold the placeholder's embedding."""
    nowhere = batch.text_at_K[:0]
    seen = batch.understanding_features_BNE
    drawn = batch.generation_features_BME
    return replace(
        batch,
        understanding_at_K=nowhere,
        generation_at_K=nowhere,
        understanding_features_BNE=None if seen is None else seen[:0],
        generation_features_BME=None if drawn is None else drawn[:0],
    )


def step(pisces: Pisces, batch: SequenceBatch, half: bool = True) -> float:
    """Forward and backward of a batch, in bfloat16 autocast or float32; the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = pisces(batch).loss
    loss.backward()
    pisces.zero_grad(set_to_none=True)
    return loss.item()
