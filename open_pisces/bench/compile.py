"""A compiled step of `tiny` in its better dtype against an eager one in its better dtype, and how often it compiles.

Forward and backward of a mixed batch. Lengths are padded as the loader does it, so a compiled model meets few shapes:
after one step of each, 200 steps of ragged batches should compile nothing. Packed rows are not measured here.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from open_pisces.batch import SequenceBatch
from open_pisces.bench.pairs import compare
from open_pisces.bench.stage_batches import MIX, ROWS, STEPS, encoded, read, shipped, step
from open_pisces.data.order import stream
from open_pisces.data.prompts import IGNORED, Rendered, collate
from open_pisces.generate.generator import Generator
from open_pisces.model.pisces import Pisces

RAGGED = 200
"""Steps of ragged batches after the warm-up."""
FEW = 2
"""Rows of each."""
LONGEST = 256
"""Tokens of its longest row, as in `tiny`'s recipes."""
DTYPES = {"bf16": True, "fp32": False}


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of the faster eager step over the faster compiled one: at least 1.1 is wanted."""
    generator = shipped()
    batch = read(generator, MIX, ROWS)
    ways: dict[str, Callable[[], list[float]]] = {}
    for dtype, half in DTYPES.items():
        ways[f"eager_{dtype}"] = _way(copy.deepcopy(generator.pisces), batch, half)
        compiled = copy.deepcopy(generator.pisces)
        compiled.llm.base_model.compile(dynamic=False)
        ways[f"compiled_{dtype}"] = _way(compiled, batch, half)
    first = {name: _seconds(way) for name, way in ways.items()}
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(3):  # in turns, so that a machine that slows down favors no way
        for name, way in ways.items():
            seconds[name] = min(seconds[name], _seconds(way))
    ours = _fastest("compiled", seconds)
    other = _fastest("eager", seconds)
    found = compare("compile", ways[ours], ways[other], pairs)
    found["figures"] |= {
        "ways": [ours, other],
        "steps": STEPS,
        "seconds": seconds,
        "seconds_of_first_run": {name: first[name] for name in first if name.startswith("compiled")},
        "ragged": _ragged(generator, ours == "compiled_bf16"),
    }
    return found


def _fastest(kind: str, seconds: dict[str, float]) -> str:
    return min((name for name in seconds if name.startswith(kind)), key=lambda name: seconds[name])


def _way(pisces: Pisces, batch: SequenceBatch, half: bool) -> Callable[[], list[float]]:
    return lambda: [step(pisces, batch, half) for _ in range(STEPS)]


def _seconds(way: Callable[[], list[float]]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _ragged(generator: Generator, half: bool) -> dict[str, Any]:
    """How many graphs 200 small batches compile after one of each shape."""
    torch._dynamo.reset()
    pisces = generator.pisces
    pisces.llm.base_model.compile(dynamic=False)
    batches = [encoded(pisces, _words(generator, number)) for number in range(RAGGED)]
    shapes = {tuple(batch.ids_BS.shape): batch for batch in batches}
    counters.clear()
    for batch in shapes.values():
        step(pisces, batch, half)
    # Whatever is compiled from here on is a shape that the warm-up did not meet.
    warm = counters["stats"]["unique_graphs"]
    for batch in batches:
        step(pisces, batch, half)
    again = counters["stats"]["unique_graphs"] - warm
    return {"steps": RAGGED, "shapes": sorted(shapes), "graphs_of_warm_up": warm, "recompiles": again}


def _words(generator: Generator, number: int) -> SequenceBatch:
    """Rows of random tokens and random lengths, up to the longest of `tiny`, padded by the loader's own code."""
    draw = stream(0, "bench lengths", number)
    rendered = []
    for _ in range(FEW):
        length = int(draw.integers(2, LONGEST + 1))
        ids = draw.integers(generator.renderer.tokenizer.vocab_size, size=length).tolist()
        rendered.append(Rendered(ids, [IGNORED, *ids[1:]], [False] * length, [False] * length))
    batch = collate(rendered, [()] * FEW, generator.renderer, *generator.sizes)
    return replace(batch, total_text=len(batch.labels_K))
