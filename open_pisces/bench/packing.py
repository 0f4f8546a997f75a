"""Packed rows against padded batches: the same samples of `tiny`'s stage-3 mix in the same order, forward and backward.

Padded batches are what most trainers make: samples as they come, each filled up to the longest of its micro-batch.
Sorting a batch by length first saves a part of that, and stands beside it; so does the speed that rows of one full
sample each would have, which no mix reaches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from open_pisces.batch import StepBatches
from open_pisces.bench.pairs import compare
from open_pisces.config import DataConfig
from open_pisces.data.loader import SequenceLoader
from open_pisces.data.order import Mixture
from open_pisces.data.prompts import collate
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import load_config

BATCH = 64
STEPS = 4


def run(pairs: int = 15) -> dict[str, Any]:
    """Samples a second, packed over padded; ``real_tokens`` are the shares of places that are no padding."""
    recipe = load_config("tiny/stage3", ["data.sources.0.path=fixture/train"])
    pisces = Generator.from_pretrained(WEIGHTS, "cpu").pisces.train()
    for frozen in recipe.train.freeze:
        getattr(pisces, frozen).requires_grad_(False)
    packed = [_loader(pisces, recipe.data)(step) for step in range(STEPS)]
    sorted_ = [_loader(pisces, recipe.data.model_copy(update={"row_length": 0}))(step) for step in range(STEPS)]
    padded = [_as_they_come(pisces, recipe.data, step) for step in range(STEPS)]
    # What packing could reach at most: full rows without a mask.
    whole = [_equal(step) for step in packed]
    found = compare("packing", lambda: _train(pisces, packed), lambda: _train(pisces, padded), pairs)
    by_length = compare("sorted", lambda: _train(pisces, packed), lambda: _train(pisces, sorted_), pairs)
    ideal = compare("equal", lambda: _train(pisces, packed), lambda: _train(pisces, whole), pairs)
    found["figures"] |= {
        "samples_per_second": BATCH * STEPS / found["figures"]["seconds_ours"],
        "row_length": recipe.data.row_length,
        "real_tokens": {"packed": _real(packed), "padded": _real(padded), "sorted": _real(sorted_)},
        "over_sorted": {key: by_length[key] for key in ("ratio", "low", "high")},
        "of_rows_of_one_sample": {key: ideal[key] for key in ("ratio", "low", "high")},
    }
    return found


def _loader(pisces: Pisces, data: DataConfig) -> SequenceLoader:
    generator = Generator.from_pretrained(WEIGHTS, "cpu")
    multiple = 8 if data.row_length else 1
    return SequenceLoader(Mixture(data, 0), generator.renderer, data, 0, BATCH, 2, generator.sizes, multiple=multiple)


def _as_they_come(pisces: Pisces, data: DataConfig, step: int) -> StepBatches:
    """The same samples in the order of the batch, each micro-batch as long as its longest."""
    loader = _loader(pisces, data.model_copy(update={"row_length": 0}))
    # By the loader's own reader: the samples and their draws are the same in all ways.
    read = [loader._read(draw) for draw in loader.mixture.batch(step, BATCH)]
    batches = []
    for half in (read[: BATCH // 2], read[BATCH // 2 :]):
        rendered = [one.rendered for one in half]
        images = [one.images for one in half]
        batches.append(collate(rendered, images, loader.renderer, *loader.sizes, multiple=1))
    totals = {
        "total_text": sum(len(batch.labels_K) for batch in batches),
        "total_vectors": sum(len(batch.generation_at_K) for batch in batches),
    }
    real = sum(len(one.rendered.ids) for one in read)
    places = sum(batch.ids_BS.numel() for batch in batches)
    return StepBatches(batches, BATCH, real_tokens=real, all_tokens=places, totals=totals)


def _equal(step: StepBatches) -> StepBatches:
    """The packed rows as if each were one sample: no mask, no padding."""
    return replace(step, batches=[replace(b, samples_BS=None, positions_BS=None) for b in step.batches])


def _real(steps: list[StepBatches]) -> float:
    return sum(step.real_tokens for step in steps) / sum(step.all_tokens for step in steps)


def _train(pisces: Pisces, steps: list[StepBatches]) -> None:
    for step in steps:
        for batch in step.with_totals():
            with torch.autocast("cpu", torch.bfloat16):
                loss = pisces(batch).loss
            loss.backward()
        pisces.zero_grad(set_to_none=True)
