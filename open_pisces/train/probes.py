"""Pictures and answers written during training, so that a run can be judged by looking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from open_pisces.config import RunConfig
from open_pisces.data.shards import ShardReader, data_path
from open_pisces.device import autocast
from open_pisces.train.objectives.base import Objective
from open_pisces.train.sharding import gathered
from open_pisces.train.world import World

COUNT = 8


Probe = Callable[[RunConfig, Objective, Path, int, World], None]
"""Recipe, training, folder, step, world. All ranks call it: together they hold the model."""


@torch.no_grad()
def probe(config: RunConfig, training: Objective, folder: Path, step: int, world: World) -> None:
    """Write ``step-N.png`` (and ``step-N.txt`` for answers) about held-out pictures of the packaged fixture."""
    # An adapter's bfloat16 base and what learns in float32 meet under autocast only.
    mixed = config.train.lora is not None and config.train.precision == "bf16"
    with gathered(training.module), autocast(world.device, mixed), TemporaryDirectory() as elsewhere:
        place = folder if world.is_first else Path(elsewhere)
        place.mkdir(parents=True, exist_ok=True)
        reader = ShardReader(data_path("fixture/pairs"))
        samples = [reader[i] for i in range(min(COUNT, len(reader)))]
        training.module.eval()
        training.probe(samples, place / f"step-{step}")
