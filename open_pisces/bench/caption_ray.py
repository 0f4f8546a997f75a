"""Captioning on Ray Data against our own worker processes: the same stage and pictures, two workers of one thread each.

Both load the model in each worker, so a run of few pictures measures the start too; ``ms_of_an_item`` is what either
adds to a shard whose work takes no time.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from open_pisces.bench.pairs import compare
from open_pisces.data.shards import open_dataset
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.factory.caption import Captioning, caption
from open_pisces.factory.caption_checks import Filters, find_template
from open_pisces.factory.captioners import CaptionerSettings
from open_pisces.factory.cluster import Workers, run_stage
from open_pisces.files import WEIGHTS

PICTURES = 640
SHARD = 40
ITEMS = 2000


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of our own workers over seconds of Ray, for 640 captions by the shipped model.

    Raises:
        AssertionError: if the captions differ.
    """
    import ray

    # One thread in each worker, on Ray and beside it.
    alone = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, alone):
        folder = Path(name)
        _write(folder / "in")
        settings = CaptionerSettings("pisces", str(WEIGHTS), max_tokens=48, device="cpu")
        how = Captioning(settings, find_template("trained", "short"), "short", Filters((1, 200), 1.0))
        numbers = count()

        def captions(workers: Workers) -> str:
            out = folder / str(next(numbers))
            caption(str(folder / "in"), out, how, workers)
            return open_dataset(out).digest

        started = time.perf_counter()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        start = time.perf_counter() - started
        try:
            if captions(Workers(2, "local")) != captions(Workers(2)):
                raise AssertionError("other captions on Ray than on our own workers")
            found = compare(
                "caption_ray", lambda: captions(Workers(2, "local")), lambda: captions(Workers(2)), pairs, warm=0
            )
            found["figures"]["pictures_per_second"] = PICTURES / found["figures"]["seconds_ours"]
            found["figures"]["seconds_to_start_ray"] = start
            found["figures"]["ms_of_an_item_on_ray"] = _item(Workers(2, "local"))
            found["figures"]["ms_of_an_item_on_processes"] = _item(Workers(2))
        finally:
            ray.shutdown()
    return found


def _write(folder: Path) -> None:
    """The fixture's scenes again and again, in shards."""
    scenes = open_dataset("fixture/train")
    with ShardWriter(folder, SHARD) as writer:
        for number in range(PICTURES):
            writer.write(replace(scenes[number % len(scenes)], key=f"k{number}"))


class Nothing:
    """A stage without work."""

    def __call__(self, item: int) -> dict[str, Any]:
        """The item itself."""
        return {"item": item}


def _item(workers: Workers) -> float:
    """Milliseconds of one more item: many against a few, so that the start does not count."""
    seconds = []
    for items in (ITEMS // 10, ITEMS):
        began = time.perf_counter()
        assert len(list(run_stage(partial(Nothing), range(items), workers))) == items
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (ITEMS - ITEMS // 10) * 1000
