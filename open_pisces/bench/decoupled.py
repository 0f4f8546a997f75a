"""What separate encoders save: drawing with 64 vectors where one encoder for both tasks would write 729 or 1,024.

The paper understands through 729 vectors of SigLIP and draws through 64 of gen-CLIP, and says that this lowers the cost
of inference (its section on decoupled encoders; Table 4's one encoder reads 1,024). Measured with the LLM's part of it:
an LLM of random weights in the shape of SmolLM2-135M cut to a third of its layers, float32, one picture, its prompt of
50 tokens; and one question about a picture of so many vectors, with an answer of 16 tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.bench.pairs import compare
from open_pisces.bench.vector_loop import PROMPT, SHAPE, random_generator
from open_pisces.data.prompts import generation_turns
from open_pisces.data.tokenizer import BEGIN_IMAGE
from open_pisces.generate.generator import Generator

POOLED = 64
"""Vectors that the paper draws with: a grid of 32 x 32, averaged 4 x 4."""
SIGLIP = 27 * 27
"""Vectors of SigLIP so400m at 384 pixels: what it understands through."""
WHOLE = 32 * 32
"""Vectors of gen-CLIP without averaging."""
ANSWER = 16
PATCH = 2


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of drawing with 1,024 vectors over seconds with 64.

    ``siglip_for_both``: 729 against 64. ``question``: a question through 1,024 vectors, as with one gen-CLIP for both
    tasks, over one through SigLIP's 729. ``question_through_64``: one through 729 over one through 64: what answering
    would save if it took the pooled vectors too, at a price that `pisces lab encoders` measures.
    """
    draw = {count: _drawing(count) for count in (POOLED, SIGLIP, WHOLE)}
    ask = {count: _asking(count) for count in (POOLED, SIGLIP, WHOLE)}
    found = compare("decoupled", draw[POOLED], draw[WHOLE], pairs)
    others = {
        "siglip_for_both": (draw[POOLED], draw[SIGLIP]),
        "question": (ask[SIGLIP], ask[WHOLE]),
        "question_through_64": (ask[POOLED], ask[SIGLIP]),
    }
    for name, (ours, other) in others.items():
        one = compare(name, ours, other, pairs)
        found[name] = {key: one[key] for key in ("ratio", "low", "high", "n", "figures")}
    return found


def _generator(seen: int, drawn: int) -> Generator:
    """A model that understands a picture through ``seen`` vectors and draws it with ``drawn``."""
    settings = {"llm.config": {**SHAPE, "max_position_embeddings": 2048}, "generation.pool": 1}
    settings |= {"understanding.config.patch_size": PATCH, "generation.patch_size": PATCH}
    settings |= {"understanding.config.image_size": PATCH * round(seen**0.5)}
    return random_generator(settings | {"generation.image_size": PATCH * round(drawn**0.5)})


def _drawing(count: int) -> Any:
    generator = _generator(POOLED, count)
    batch = generator.prompt([generation_turns("cats " * PROMPT)], [()], BEGIN_IMAGE)
    batch = replace(batch, ids_BS=batch.ids_BS[:, -PROMPT:])
    return lambda: generator.vectors_after(batch)


def _asking(count: int) -> Any:
    generator = _generator(count, POOLED)
    ids = generator.renderer.text_ids("what is in the picture? " * PROMPT)[:PROMPT]
    batch: SequenceBatch = generator.prompt([(Turn("user", ("a",)),)], [()])
    # The LLM's part alone: the encoders' cost is that of SigLIP and of gen-CLIP, whatever the LLM reads of them.
    seen = torch.randint(0, 200, (1, count), generator=torch.Generator().manual_seed(0))
    batch = replace(batch, ids_BS=torch.cat([seen, torch.tensor([ids])], 1))
    return lambda: list(generator.tokens(batch, ANSWER, 0.0, 0))
