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

from open_pisces.bench.pairs import summarize
from open_pisces.model.folder import WEIGHTS
from open_pisces.recipe import load_config
from open_pisces.train.loop import Run, save, start
from open_pisces.train.world import World


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds that the training stands still in the foreground over those in the background: at least 10 is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        place = [f"model.start={WEIGHTS}", f"out={folder}", "data.sources.0.path=fixture/train"]
        config = load_config("tiny/stage3", place)
        training = start(config, World(torch.device("cpu")))
        _still(training, True)  # the first save makes folders and starts the writer: it is not timed
        seconds = np.zeros((pairs, 2))
        for pair in range(pairs):
            seconds[pair, 0] = _still(training, True)
            seconds[pair, 1] = _still(training, False)
        training.checkpoints.close()
        written = sum(value.nbytes for value in training.tensors.values())
    background, foreground = np.median(seconds, axis=0).tolist()
    found = summarize("async_save", seconds, {"seconds_background": background, "seconds_foreground": foreground})
    found["figures"] |= {"share": 1 / found["ratio"], "megabytes": written / 1e6}
    return found


def _still(training: Run, background: bool) -> float:
    """Seconds that the training stands still for one save."""
    training.progress.step += 1
    training.checkpoints.background = background
    begun = time.perf_counter()
    save(training)
    seconds = time.perf_counter() - begun
    training.checkpoints.wait()  # outside the clock: the next save would wait for this one
    return seconds
