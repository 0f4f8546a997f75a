"""A batch of both tasks against a batch of words alone with as many tokens, through the same compiled Pisces.

Captions and answers to read, pictures to draw, in one batch; the words alone are its own tokens with no picture in
their places, and the same of them supervised. The encoders' outputs are given as from the cache: what is measured is
what the two kinds of vectors cost inside the step, which is compiled and in bfloat16 autocast.
"""

from __future__ import annotations

from typing import Any

from open_pisces.bench.pairs import compare
from open_pisces.bench.stage_batches import MIX, ROWS, STEPS, read, shipped, step, words_only


def run(pairs: int = 15) -> dict[str, Any]:
    """Tokens a second of the mixed batch over those of words alone: at least 0.95 is wanted."""
    generator = shipped()
    pisces = generator.pisces
    mixed = read(generator, MIX, ROWS)
    words = words_only(mixed)
    tokens = STEPS * mixed.ids_BS.numel()
    pisces.llm.base_model.compile(dynamic=False)
    found = compare(
        "mixed_batch",
        lambda: [step(pisces, mixed) for _ in range(STEPS)],
        lambda: [step(pisces, words) for _ in range(STEPS)],
        pairs,
    )
    found["figures"] |= {
        "tokens_per_second": {
            "mixed": tokens / found["figures"]["seconds_ours"],
            "words": tokens / found["figures"]["seconds_other"],
        },
        "steps": STEPS,
        "tokens": list(mixed.ids_BS.shape),
        "understanding_vectors": len(mixed.understanding_at_K),
        "generation_vectors": len(mixed.generation_at_K),
        "supervised_words": len(mixed.labels_K),
    }
    return found
