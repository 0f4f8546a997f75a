"""Pictures of the scene score drawn and judged in batches, against one caption at a time."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from open_pisces.bench.pairs import compare
from open_pisces.eval.drawing.rules import Rules, verdict_of
from open_pisces.eval.scenes.drawing import frozen_prompts
from open_pisces.eval.scenes.judge import NETWORKS, SceneJudge
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS

BATCH = 16
CAPTIONS = 24


def run(pairs: int = 15) -> dict[str, Any]:
    """Pictures a second in batches of `BATCH` over one at a time; the verdicts have to be the same."""
    generator = Generator.from_pretrained(WEIGHTS, device="cpu")
    judges = [SceneJudge.from_pretrained(kind) for kind in NETWORKS]
    every = frozen_prompts()
    prompts = every[:: len(every) // CAPTIONS][:CAPTIONS]
    generator.null_vectors  # computed once a model, so it belongs to neither way  # noqa: B018

    def evaluate(size: int) -> list[list[bool]]:
        found = []
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            images: list[Image] = [row[0] for row in generator.image([prompt.prompt for prompt in batch])]
            seen = [(one.detect(images), Rules.of(one)) for one in judges]
            found += [[verdict_of(p, d[i], rules).correct for d, rules in seen] for i, p in enumerate(batch)]
        return found

    same = evaluate(BATCH) == evaluate(1)
    found = compare("eval_drawing", lambda: evaluate(BATCH), lambda: evaluate(1), pairs, warm=0)
    seconds = {name: found["figures"][f"seconds_{name}"] for name in ("ours", "other")}
    found["figures"] |= {
        "images_per_second": {"batched": CAPTIONS / seconds["ours"], "one_by_one": CAPTIONS / seconds["other"]},
        "same_verdicts": same,
        "batch": BATCH,
    }
    return found
