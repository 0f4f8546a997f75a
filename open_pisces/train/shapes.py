"""How large a micro-batch is, and a micro-batch of that size without data: what plans and throughput are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from open_pisces.batch import PairBatch, SequenceBatch
from open_pisces.config import RunConfig


@dataclass(frozen=True)
class Shape:
    """How large a micro-batch is: rows of the LLM with what is in them, or pictures with captions."""

    rows: int = 0
    length: int = 0
    packed: bool = False
    supervised: int = 0
    """Tokens with a label."""
    seen: int = 0
    """Pictures to understand."""
    drawn: int = 0
    """Pictures to draw."""
    pictures: int = 0
    """Pairs of a picture and a caption."""
    caption: int = 0
    """Tokens of the captions, padding included."""
    own: int = 0
    """Pairs of all this rank's micro-batches, which a contrastive loss compares ..."""
    everywhere: int = 0
    """... with those of all ranks."""


def empty_sequences(module: Any, config: RunConfig, shape: Shape) -> SequenceBatch:
    """A micro-batch of the LLM stages, with nothing in it."""
    encoders = (module.understanding_encoder, module.generation_encoder)
    kinds = ("understanding", "generation")
    counts = (shape.seen, shape.drawn)
    vectors = (module.understanding_encoder.vectors, config.model.generation.vectors)
    cached = [bool(config.data.features) and kind in config.data.feature_kinds for kind in kinds]
    sides = [encoder.image_size for encoder in encoders]
    pixels = [torch.empty(n, 3, side, side, dtype=torch.uint8) for n, side in zip(counts, sides, strict=True)]
    features = [torch.empty(n, v, e.width) for n, v, e in zip(counts, vectors, encoders, strict=True)]
    places = [torch.zeros(n * v, dtype=torch.long) for n, v in zip(counts, vectors, strict=True)]
    labels = torch.zeros(shape.supervised, dtype=torch.long)
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    return SequenceBatch(
        ids_BS=ids,
        understanding_at_K=places[0],
        generation_at_K=places[1],
        text_at_K=labels,
        labels_K=labels.clone(),
        understanding_pixels_BCHW=torch.empty(0, 3, 0, 0) if cached[0] else pixels[0],
        generation_pixels_BCHW=torch.empty(0, 3, 0, 0) if cached[1] else pixels[1],
        understanding_features_BNE=features[0] if cached[0] else None,
        generation_features_BME=features[1] if cached[1] else None,
        samples_BS=ids.clone() if shape.packed else None,
        positions_BS=ids.clone() if shape.packed else None,
    )


def empty_pairs(sizes: tuple[int, int], config: RunConfig, shape: Shape) -> PairBatch:
    """A micro-batch of gen-CLIP's or the decoder's training, with nothing in it."""
    cached = bool(config.data.features) and config.objective == "decoder"
    ids = torch.zeros(shape.pictures, shape.caption, dtype=torch.long)
    settings = config.model.generation
    pixels, targets = (torch.empty(shape.pictures, 3, side, side, dtype=torch.uint8) for side in sizes)
    return PairBatch(
        pixels_BCHW=pixels,
        targets_BCHW=pixels if sizes[0] == sizes[1] else targets,
        ids_BS=ids,
        mask_BS=ids.bool(),
        draws=((0, ""),) * shape.pictures,
        captions_B=torch.zeros(shape.pictures, dtype=torch.long),
        total=shape.everywhere,
        features_BME=torch.empty(shape.pictures, settings.vectors, settings.width) if cached else None,
    )
