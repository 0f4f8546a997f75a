"""The scene score: what models of the scenes' world draw from the frozen captions, by GenEval's rules and two judges.

The captions are those of `open_pisces.eval.scenes.frozen`, 60 for each of GenEval's six categories. The figures are the
first judge's; the second one's stand beside them, with the share of pictures on which both come to the same verdict and
with what each judge was measured at. The baseline is what the same pictures score under other captions of their
category. No figure from here may be compared with published scores of GenEval: other prompts, another detector.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_pisces.eval.drawing.judged_run import detect, draw, found, items_of, prompts_of, score, verdicts
from open_pisces.eval.drawing.prompts import CATEGORIES, Prompt
from open_pisces.eval.drawing.rules import judge, summarise
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, Row, RunFolder, model_hash
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.judge import SceneJudge, card

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

TASK = "scenes/drawing"


def frozen_prompts(split: str = "train", per_category: int = 60, detailed: bool = False) -> list[Prompt]:
    """The first captions of each category, as prompts of GenEval.

    Raises:
        EvaluationError: for an unknown split, or a number that is not there.
    """
    every = frozen_scenes.load(f"drawing/{split}")
    most = max(sum(scene.category == tag for scene in every) for tag in CATEGORIES)
    if not 1 <= per_category <= most:
        raise EvaluationError(f"{per_category} captions of each category: the frozen scenes hold 1 to {most}")
    groups = ([scene for scene in every if scene.category == tag][:per_category] for tag in CATEGORIES)
    return [scene.prompt(detailed) for group in groups for scene in group]


def evaluate_drawing(
    generator: Generator,
    model: str | Path,
    judges: Sequence[SceneJudge],
    folder: str | Path | None = None,
    split: str = "train",
    per_category: int = 60,
    n: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    detailed: bool = False,
) -> Row:
    """Draw the frozen captions and judge the pictures; what is there already of the same run is not made again.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        model: its folder, for the manifest.
        judges: the first one's figures are the scores.
        folder: the run's; None chooses one by the manifest (`RunFolder.open`).
        split: ``train``, or ``pairs`` of things that no training has seen together.
        per_category: captions of each category, at most 60.
        n: pictures of each caption.
        steps: of the decoder; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of the noise.
        batch_size: captions at once.
        detailed: take the detailed captions, not the short ones.

    Returns:
        as `score_run`, with ``seconds`` and ``folder``.

    Raises:
        EvaluationError: for an unknown split or number.
        RunError: if the folder holds another run.
    """
    start = time.time()
    settings = {"scenes": frozen_scenes.VERSION, "split": split, "per_category": per_category, "detailed": detailed}
    settings |= {"n": n, "steps": steps, "guidance_scale": guidance_scale, "seed": seed, "batch_size": batch_size}
    manifest = Manifest(TASK, str(model), model_hash(model), settings, device=str(generator.device))
    run = RunFolder.open(folder, manifest, items_of(frozen_prompts(split, per_category, detailed)))
    draw(generator, run)
    for one in judges:
        detect(one, run)
    scores = run.write_scores(score_run(run, [one.name for one in judges]))
    return {**scores, "seconds": round(time.time() - start, 1), "folder": str(run.folder)}


def score_run(run: RunFolder, names: Sequence[str] = ()) -> Row:
    """The scores of a run from raw detections alone.

    Args:
        run: drawn and looked at.
        names: of the judges, the first one's figures come first; none takes both judges of the package.

    Returns:
        the figures of `drawing.judged_run.score`; ``baseline``: of the same pictures under other captions;
        ``others``: the other judges' scores and how often their verdict is the first one's; ``judges``: what each was
        measured at.
    """
    names = names or [f"scene judge ({kind})" for kind in card() if kind.endswith("stage")]
    first = verdicts(run, names[0])
    others = {}
    for name in names[1:]:
        pairs = ((own, first[key]) for key, own in verdicts(run, name).items())
        same = [a.correct == b.correct for one, two in pairs for a, b in zip(one, two, strict=True)]
        figures = score(run, name)
        others[name] = {
            **{key: figures[key] for key in ("score", "low", "high")},
            "categories": {tag: row["score"] for tag, row in figures["categories"].items()},
            "same_verdict": round(float(np.mean(same)), 4),
        }
    return {
        **score(run, names[0]),
        "name": TASK,
        "baseline": _baseline(run, names[0]),
        "others": others,
        "judges": {name: measured(name) for name in names},
        **{key: run.manifest.settings[key] for key in ("scenes", "split", "detailed")},
    }


def _baseline(run: RunFolder, name: str) -> float | None:
    """The score of the pictures when each is held against the next caption of its category; None if none has two."""
    rules, detections = found(run, name)
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts_of(run):
        groups.setdefault(prompt.tag, []).append(prompt)
    tags, correct = [], []
    for tag, prompts in groups.items():
        for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True) if len(prompts) > 1 else ():
            tags.append(tag)
            correct.append([judge(prompt, picture, rules).correct for picture in detections[other.key]])
    return summarise(tags, correct)["score"] if correct else None


def measured(name: str) -> dict[str, Any]:
    """What a judge's card says of it, in single figures; nothing of detectors that are no judges."""
    if not name.startswith("scene judge ("):
        return {}
    known = card()[name.removeprefix("scene judge (").removesuffix(")")]
    parts = ("real scenes, train", "labelled drawings")
    return {part: {what: row["score"] for what, row in known[part].items()} for part in parts}
