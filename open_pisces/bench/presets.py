"""Drawing with the preset ``fast`` against ``quality``, the shipped model, pictures one after another.

A run is `IN_A_ROW` pictures: after a third of a second of matrix products the processor's clock is lower for a while,
so that one picture by ``fast`` right after one by ``quality`` takes a third longer than after another of its own.

What a preset costs in quality is measured by `pisces eval drawing` with its steps; docs/serving.md has the scores.
"""

from __future__ import annotations

from typing import Any

from open_pisces.bench.pairs import compare
from open_pisces.config import PresetName
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS

IN_A_ROW = 12
PROMPT = "a red heart on a blue background"


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of pictures by ``quality`` over seconds by ``fast``; at least 3 is wanted."""
    generator = Generator.from_pretrained(WEIGHTS, "cpu")

    def draw(name: PresetName) -> None:
        chosen = generator.pisces.settings.decoder.preset(name)
        for _ in range(IN_A_ROW):
            generator.image(
                [PROMPT],
                steps=chosen.steps,
                guidance_scale=chosen.guidance_scale,
                vector_guidance=chosen.vector_guidance,
            )

    found = compare("presets", lambda: draw("fast"), lambda: draw("quality"), pairs)
    balanced = compare("presets", lambda: draw("balanced"), lambda: draw("quality"), pairs)
    return {**found, "balanced": {key: balanced[key] for key in ("ratio", "low", "high", "n", "figures")}}
