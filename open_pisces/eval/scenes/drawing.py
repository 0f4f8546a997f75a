"""The scene score: what models of the scenes' world draw from the frozen captions, by GenEval's rules and two judges.

The captions are those of `open_pisces.eval.scenes.frozen`, 60 for each of GenEval's six categories. The figures are the
first judge's; the second one's stand beside them, with the share of pictures on which both come to the same verdict and
with what each judge was measured at. The baseline is what the same pictures score under other captions of their
category. No figure from here may be compared with published scores of GenEval: other prompts, another detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from open_pisces.eval.drawing.detection import Detector
from open_pisces.eval.drawing.judged_run import (
    Findings,
    GenEvalScore,
    JudgedDrawing,
    detectors_of,
    read_findings,
    score_findings,
)
from open_pisces.eval.drawing.prompts import CATEGORIES, Prompt
from open_pisces.eval.drawing.rules import summarize, verdict_of
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Row, RunFolder
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.judge import card

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator


def frozen_prompts(split: str = "train", per_category: int = 60, detailed: bool = False) -> list[Prompt]:
    """The first captions of each category, as prompts of GenEval.

    Raises:
        EvaluationError: for an unknown split, or a number that is not there.
    """
    groups: dict[str, list[Prompt]] = {tag: [] for tag in CATEGORIES}
    for scene in frozen_scenes.load(f"drawing/{split}"):
        groups[scene.category].append(scene.prompt(detailed))
    most = max(len(group) for group in groups.values())
    if not 1 <= per_category <= most:
        raise EvaluationError(f"{per_category} captions of each category: the frozen scenes hold 1 to {most}")
    prompts = []
    for group in groups.values():
        prompts += group[:per_category]
    return prompts


@dataclass
class SceneDrawing(JudgedDrawing):
    """Drawings of the frozen captions.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        detectors: judges; the first one's figures are the scores.
        split: ``train``, or ``pairs`` of things that no training has seen together.
        per_category: captions of each category, at most 60.
        n: pictures of each caption.
        steps: of the decoder; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of the noise.
        batch_size: captions at once.
        detailed: take the detailed captions, not the short ones.
        best_of: draw so many for each picture, of which the model's own answers choose (`choose.best_of`).
        vector_guidance: None is the model's own.
    """

    generator: Generator
    detectors: Sequence[Detector]
    split: str = "train"
    per_category: int = 60
    n: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    detailed: bool = False
    best_of: int = 1
    vector_guidance: float | None = None
    task = "scenes/drawing"

    @property
    def settings(self) -> Row:
        """Those of the captions and of the sampler."""
        names = ("split", "per_category", "detailed", *self.sampler)
        found = {"scenes": frozen_scenes.VERSION, **{name: getattr(self, name) for name in names}}
        # Only where they are set, so that runs from before there were such settings stay the same runs.
        found |= {} if self.best_of == 1 else {"best_of": self.best_of}
        return found | ({} if self.vector_guidance is None else {"vector_guidance": self.vector_guidance})

    def prompts(self) -> Sequence[Prompt]:
        """The frozen captions.

        Raises:
            EvaluationError: see `frozen_prompts`.
        """
        return frozen_prompts(self.split, self.per_category, self.detailed)

    def score(self, run: RunFolder) -> SceneDrawingScore:
        """The first judge's score, the others' beside it."""
        return score_run(run, [detector.name for detector in self.detectors])


@dataclass(frozen=True)
class OtherJudge:
    """What another judge says of the same pictures."""

    score: float | None
    low: float | None
    high: float | None
    categories: dict[str, float]
    same_verdict: float
    """Share of the pictures on which its verdict is the first one's."""


@dataclass(frozen=True)
class SceneDrawingScore(GenEvalScore):
    """The first judge's score; ``baseline`` is that of the same pictures under other captions."""

    others: dict[str, OtherJudge]
    judges: dict[str, Row]
    """What each judge was measured at."""
    scenes: str
    split: str
    detailed: bool


def score_run(run: RunFolder, names: Sequence[str] = ()) -> SceneDrawingScore:
    """The scores of a run from raw detections alone.

    Args:
        run: drawn and looked at.
        names: of the judges, the first one's figures come first; none takes all that have looked, sorted.
    """
    names = names or detectors_of(run)
    first, *rest = [read_findings(run, name) for name in names]
    settings = run.manifest.settings
    scores = replace(score_findings(first), name=SceneDrawing.task, baseline=_baseline(first))
    return SceneDrawingScore(
        **vars(scores),
        others={other.detector: _beside(other, first) for other in rest},
        judges={name: measured(name) for name in names},
        scenes=settings["scenes"],
        split=settings["split"],
        detailed=settings["detailed"],
    )


def _beside(other: Findings, first: Findings) -> OtherJudge:
    """Another judge's scores, and how often it agrees with the first."""
    scores = score_findings(other)
    # Picture by picture: equal scores may hide that two judges disagree on half of them.
    same = np.array(other.correct) == np.array(first.correct)
    categories = {tag: row.score for tag, row in scores.categories.items()}
    return OtherJudge(scores.score, scores.low, scores.high, categories, round(float(np.mean(same)), 4))


def _baseline(findings: Findings) -> float | None:
    """The score of the pictures when each is held against the next caption of its category; None if none has two."""
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(findings.prompts):
        groups.setdefault(prompt.tag, []).append(place)
    tags = []
    correct = []
    for tag, places in groups.items():
        # A caption alone in its category would be held against itself.
        if len(places) == 1:
            continue
        for place, other in zip(places, [*places[1:], places[0]], strict=True):
            pictures = findings.detections[other]
            tags.append(tag)
            correct.append([verdict_of(findings.prompts[place], one, findings.rules).correct for one in pictures])
    return summarize(tags, correct).score if correct else None


def measured(name: str) -> dict[str, Row]:
    """What a judge's card says of it, in single figures; nothing of detectors that are no judges."""
    if not name.startswith("scene judge ("):
        return {}
    known = card()[name.removeprefix("scene judge (").removesuffix(")")]
    found = {}
    for part in ("real scenes, train", "labelled drawings"):
        found[part] = {what: row["score"] for what, row in known[part].items()}
    return found
