"""A training step that reads the feature cache, against the same step with the encoders taken out of the model.

The first pays for all that a run pays for: drawing, reading, collating ahead in a thread, the step. The second has
its batches in memory and no encoders. Ratio 1 means that the cache costs nothing. The losses of a run with the cache
and of one that encodes on the fly stand beside it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from open_pisces.bench.pairs import compare
from open_pisces.config import RunConfig
from open_pisces.data.prefetch import prefetch
from open_pisces.factory.encode import encode
from open_pisces.model.folder import WEIGHTS
from open_pisces.recipe import load_config
from open_pisces.train.loop import start, train_step
from open_pisces.train.objectives.base import Objective
from open_pisces.train.world import World

STEPS = 6
WAYS = {"cache": "float32", "on_the_fly": ""}
"""Settings of ``data.features`` whose losses are compared."""


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of a step without encoders over seconds of a step with the cache: at least 0.95 is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("PISCES_DATA")
        os.environ["PISCES_DATA"] = folder
        try:
            return _measure(Path(folder), pairs)
        finally:
            os.environ.pop("PISCES_DATA") if before is None else os.environ.update(PISCES_DATA=before)


def _recipe(folder: Path, features: str, *over: str) -> RunConfig:
    source = "data.sources.0.path=fixture/train"
    place = [f"model.start={WEIGHTS}", f"out={folder / 'run'}"]
    return load_config("tiny/stage3", [source, *place, f"data.features='{features}'", *over])


def _measure(folder: Path, pairs: int) -> dict[str, Any]:
    cached = _recipe(folder, "float32")
    encode(cached)
    world = World(torch.device("cpu"))
    with_cache = start(cached, world)
    without = start(cached, world)
    for name in ("understanding_encoder", "generation_encoder"):
        setattr(without.training.module, name, torch.nn.Identity())
    # Batches in a thread ahead of the step, as a run has them; the other way has its batches in memory.
    ahead = _endless(with_cache.training)
    kept = [without.training.load(step).with_totals() for step in range(STEPS)]
    found = compare(
        "feature_cache",
        lambda: [train_step(with_cache, next(ahead), 0) for _ in range(STEPS)],
        lambda: [train_step(without, batches, 0) for batches in kept],
        pairs,
    )
    # float32: under bf16 rounding alone would set the two apart.
    curves = {name: _curve(_recipe(folder, features, "train.precision=fp32")) for name, features in WAYS.items()}
    apart = max(abs(a - b) / abs(b) for a, b in zip(curves["cache"], curves["on_the_fly"], strict=True))
    found["figures"] |= {"losses": curves, "largest_relative_difference_of_losses": apart}
    return found


def _endless(training: Objective) -> Iterator[list[Any]]:
    steps = itertools.count()
    while True:
        first = next(steps) * 1000
        yield from (given.with_totals() for given in prefetch(training.load, range(first, first + 1000)))


def _curve(config: RunConfig) -> list[float]:
    """The losses of the first steps of a run."""
    run = start(config, World(torch.device("cpu")))
    rows = [train_step(run, run.training.load(step).with_totals(), step) for step in range(STEPS)]
    return [row["text"] + row["vectors"] for row in rows]
