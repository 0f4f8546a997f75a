"""GenEval: is in the picture what the prompt says? The official rules over any detector, and their scores.

Rules (arXiv 2310.11513; ``evaluation/evaluate_images.py`` of djghosh13/geneval), one picture at a time:

- detections of a class count above a confidence of 0.3, of counting prompts above 0.9, the 16 most confident at most;
- every object of ``include`` has to be found ``count`` times or more, none of ``exclude`` as often as it says: "two
  cats" includes 2 and excludes 3;
- only the ``count`` most confident detections of a class enter the tests of color and position, and all must pass;
- position: center to center, less a dead zone of 0.1 x (sum of the widths, of the heights), divided by the distance
  of the centers; a component beyond +-0.5 is a relation, so a diagonal may have two and a small offset none. Every
  one of A has to stand in the relation to every one of B. Where B was not found, or not in its color, A fails too;
- objects are looked for one by one: the same detection may serve two of them.

Scores: a category's is the share of its pictures that are correct, the overall one the mean of the categories. The
intervals draw *prompts* again, not pictures: pictures of one prompt are alike, so they are no independent samples.

The official code compares and measures in 32-bit floats; so do `verdict_of` and `relations`. Of equal confidences
it takes the later in its detector's list, whose order means nothing; here the order of the given list counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_pisces.eval.drawing.detection import Detection, Detector
from open_pisces.eval.drawing.prompts import CATEGORIES, Prompt, Wanted
from open_pisces.eval.evaluation import Counted, Score
from open_pisces.eval.intervals import EvaluationError, macro_interval, mean_interval

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """The settings of the rules; the defaults are the official ones."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    """For the category "counting"."""
    max_objects: int = 16
    """Detections of a class that count."""
    max_overlap: float = 1.0
    """Detections that overlap a more confident one of their class by this much or more are dropped; 1 drops none."""
    position_threshold: float = 0.1
    """Dead zone of positions, as a share of the summed sizes."""

    @classmethod
    def of(cls, detector: Detector) -> Rules:
        """The official rules with a detector's own thresholds."""
        return cls(detector.threshold, detector.counting_threshold)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt says, and if not, why not."""

    correct: bool
    reasons: tuple[str, ...] = ()
    """What was expected and what was found, one for each object that failed."""


# -------------------------------------------------------------------------------------------------------- the rules


def verdict_of(prompt: Prompt, detections: Sequence[Detection], rules: Rules) -> Verdict:
    """Apply the rules to what was found in one picture of ``prompt``.

    Raises:
        EvaluationError: if a color is to be judged that the detector was not asked for.
    """
    kept = keep(detections, rules, prompt.tag)
    groups: list[list[Detection] | None] = []  # what was matched, for the positions of later objects
    reasons = []
    for wanted in prompt.include:
        # Those behind the first `count` are not looked at, even if they would be right (official).
        found = kept.get(wanted.name, [])[: wanted.count]
        failure = _failure(wanted, found, groups, rules)
        # None: nothing can stand in a relation to what was not found.
        groups.append(None if failure else found)
        if failure:
            reasons.append(failure)
    for unwanted in prompt.exclude:
        count = len(kept.get(unwanted.name, []))
        if count >= unwanted.count:
            reasons.append(f"expected {unwanted.name} < {unwanted.count}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def keep(detections: Sequence[Detection], rules: Rules, tag: str) -> dict[str, list[Detection]]:
    """The detections that count in a category, by class, in falling order of confidence."""
    # In 32 bits, as the official code: 0.3 as a network gives it, 0.30000001, does not pass 0.3.
    threshold = np.float32(rules.counting_threshold if tag == "counting" else rules.threshold)
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):  # stable: equals stay in the order given
        if np.float32(detection.score) > threshold:
            kept.setdefault(detection.name, []).append(detection)
    return {name: _apart(found[: rules.max_objects], rules.max_overlap) for name, found in kept.items()}


def _apart(found: list[Detection], max_overlap: float) -> list[Detection]:
    """Drop those that overlap a more confident one too much."""
    if max_overlap >= 1:
        return found
    # Greedy, the surest first, as in every detector's non-maximum suppression.
    apart: list[Detection] = []
    for detection in found:
        if all(pixel_overlap(other.box, detection.box) < max_overlap for other in apart):
            apart.append(detection)
    return apart


def pixel_overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes whose right and bottom pixels lie inside, as in the official code."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)  # + 1: 0 to 9 are ten pixels

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def _failure(wanted: Wanted, found: list[Detection], groups: list[list[Detection] | None], rules: Rules) -> str:
    """Why an object of ``include`` is not matched by the detections ``found``; "" if it is."""
    if len(found) < wanted.count:
        return f"expected {wanted.name} >= {wanted.count}, found {len(found)}"
    if wanted.color:
        colors = [_color(detection) for detection in found]
        if colors.count(wanted.color) < wanted.count:
            seen = ", ".join(f"{colors.count(color)} {color}" for color in dict.fromkeys(colors))
            return f"expected {wanted.color} {wanted.name} >= {wanted.count}, found {seen}"
    if wanted.position is None:
        return ""
    relation, target = wanted.position
    others = groups[target]
    if others is None:
        return f"no target for {wanted.name} to be {relation}"
    for a in found:
        for b in others:
            true = relations(a.box, b.box, rules.position_threshold)
            if relation not in true:
                return f"expected {wanted.name} {relation} {b.name}, found {' and '.join(true) or 'neither side'}"
    return ""


def _color(detection: Detection) -> str:
    """Its likeliest color."""
    if not detection.colors:
        raise EvaluationError(
            f"the colour of {detection.name} at {detection.box} is to be judged, but the detector was not asked for "
            f"it: detect again with these rules"
        )
    return detection.color


def relations(a: Box, b: Box, dead_zone: float = 0.1) -> tuple[str, ...]:
    """Where box ``a`` stands, seen from box ``b``: none, one or two of "left of", "right of", "above", "below"."""
    corners = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)  # box, corner, axis
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    beyond = np.maximum(np.abs(offset) - np.float32(dead_zone) * sizes.sum(axis=0), 0) * np.sign(offset)
    # The official bound on rounding: inside the dead zone both ways there is no relation.
    if np.all(np.abs(beyond) < 1e-3):
        return ()
    # By the distance of the centers, not of what is left of it: small offsets stay below a half.
    x, y = beyond / np.linalg.norm(offset)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return tuple(name for name, holds in sides.items() if holds)


# ------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class CategoryScore(Counted):
    """Share of a category's ``n`` pictures that are correct."""

    prompts: int
    all_correct: int
    """Prompts with all pictures correct."""
    any_correct: int


@dataclass(frozen=True)
class Spread:
    """How far the score depends on the noise."""

    scores: list[float]
    """The overall score of every prompt's first picture, second ..."""
    deviation: float | None
    """Their standard deviation; None of one picture."""


@dataclass(frozen=True)
class DrawingScore(Score):
    """Mean of the categories that are there; ``n`` counts pictures."""

    baseline: float | None
    """What an empty picture scores: 0 by the rules, for every prompt includes something."""
    prompts: int
    all_correct: int
    any_correct: int
    categories: dict[str, CategoryScore]
    missing: list[str]
    """Categories without a prompt."""
    spread: Spread


def summarize(tags: Sequence[str], correct: Sequence[Sequence[bool]], seed: int = 0) -> DrawingScore:
    """The scores of pictures, n for each prompt.

    Args:
        tags: each prompt's category.
        correct: for each prompt whether its pictures are correct, in order.
        seed: of the intervals.

    Raises:
        EvaluationError: without prompts, or if they have different numbers of pictures.
    """
    numbers = sorted({len(pictures) for pictures in correct})
    if not correct or numbers[0] == 0 or len(numbers) > 1:
        raise EvaluationError(f"{len(correct)} prompts with {numbers} pictures each: all need the same number, not 0")
    groups: dict[str, list[Sequence[bool]]] = {tag: [] for tag in CATEGORIES}  # in the official order
    for tag, pictures in zip(tags, correct, strict=True):
        groups[tag].append(pictures)
    hits = {tag: np.array(rows) for tag, rows in groups.items() if rows}
    # Prompts are drawn again, not pictures: pictures of one prompt are alike.
    overall = macro_interval({tag: rows.mean(axis=1) for tag, rows in hits.items()}, seed=seed).rounded()
    categories = {tag: _category_score(rows, seed) for tag, rows in hits.items()}
    by_picture = np.mean([rows.mean(axis=0) for rows in hits.values()], axis=0)
    deviation = round(float(by_picture.std(ddof=1)), 4) if len(by_picture) > 1 else None
    return DrawingScore(
        name="geneval",
        score=overall["score"],
        low=overall["low"],
        high=overall["high"],
        n=sum(row.n for row in categories.values()),
        baseline=0.0,
        prompts=sum(row.prompts for row in categories.values()),
        all_correct=sum(row.all_correct for row in categories.values()),
        any_correct=sum(row.any_correct for row in categories.values()),
        categories=categories,
        missing=[tag for tag in CATEGORIES if tag not in hits],
        spread=Spread([round(float(score), 4) for score in by_picture], deviation),
    )


def _category_score(hits: np.ndarray, seed: int) -> CategoryScore:
    """The scores of one category, from its prompts' hits (prompts, n)."""
    return CategoryScore(
        **mean_interval(hits.mean(axis=1), seed=seed).rounded(),
        n=hits.size,
        prompts=len(hits),
        all_correct=int(hits.all(axis=1).sum()),
        any_correct=int(hits.any(axis=1).sum()),
    )
