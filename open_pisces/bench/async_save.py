"""How long a training stands still for a checkpoint: in the background against in the foreground.

All of a save counts: the model folder, the shards, their checksums, the moment they are surely on disk. In the
background the training waits only until its tensors are copied; the rest is awaited outside the clock here.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch

from open_pisces.bench.pairs import interval
from open_pisces.config import load_config
from open_pisces.model.folder import WEIGHTS
from open_pisces.train.loop import Run, save, start
from open_pisces.train.world import World


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds that the training stands still in the foreground over those in the background: at least 10 is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        place = [f"model.start={WEIGHTS}", f"out={folder}", "data.sources.0.path=fixture/train"]
        config = load_config("tiny/stage3", place)
        training = start(config, World(torch.device("cpu")))
        _still(training, True)
        seconds = np.array([[_still(training, way) for way in (True, False)] for _ in range(pairs)])
        training.checkpoints.close()
        written = sum(value.nbytes for value in training.tensors.values())
    ratios = seconds[:, 1] / seconds[:, 0]
    low, high = interval(ratios)
    figures = {
        "seconds_background": float(np.median(seconds[:, 0])),
        "seconds_foreground": float(np.median(seconds[:, 1])),
    }
    figures |= {"share": 1 / float(np.median(ratios)), "megabytes": written / 1e6}
    found = {"name": "async_save", "ratio": float(np.median(ratios)), "low": low, "high": high, "n": pairs}
    return {**found, "figures": figures}


def _still(training: Run, background: bool) -> float:
    training.progress.step += 1
    training.checkpoints.background = background
    begun = time.perf_counter()
    save(training)
    seconds = time.perf_counter() - begun
    training.checkpoints.wait()
    return seconds
