"""GenEval: is in the picture what the prompt says? The official rules over any detector, and their scores.

Rules (arXiv 2310.11513; ``evaluation/evaluate_images.py`` of djghosh13/geneval), one picture at a time:

- detections of a class count above a confidence of 0.3, of counting prompts above 0.9, the 16 most confident at most;
- every object of ``include`` has to be found ``count`` times or more, none of ``exclude`` as often as it says: "two
  cats" includes 2 and excludes 3;
- only the ``count`` most confident detections of a class enter the tests of colour and position, and all must pass;
- position: centre to centre, less a dead zone of 0.1 x (sum of the widths, of the heights), divided by the distance
  of the centres; a component beyond +-0.5 is a relation, so a diagonal may have two and a small offset none. Every
  one of A has to stand in the relation to every one of B. Where B was not found, or not in its colour, A fails too;
- objects are looked for one by one: the same detection may serve two of them.

Scores: a category's is the share of its pictures that are correct, the overall one the mean of the categories. The
intervals draw *prompts* again, not pictures: pictures of one prompt are alike, so they are no independent samples.

The official code compares and measures in 32-bit floats; so do `judge` and `relations`. Where confidences are equal
it takes the later of its detector's list, whose order means nothing; here the order of the list that is given counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_pisces.eval.drawing.detection import Detection, Detector
from open_pisces.eval.drawing.prompts import CATEGORIES, Prompt, Wanted
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


def judge(prompt: Prompt, detections: Sequence[Detection], rules: Rules) -> Verdict:
    """Apply the rules to what was found in one picture of ``prompt``.

    Raises:
        EvaluationError: if a colour is to be judged that the detector was not asked for.
    """
    kept = keep(detections, rules, prompt.tag)
    groups: list[list[Detection] | None] = []  # what was matched, for the positions of later objects
    reasons = []
    for wanted in prompt.include:
        found = kept.get(wanted.name, [])[: wanted.count]
        failure = _failure(wanted, found, groups, rules)
        groups.append(None if failure else found)
        reasons += [failure] if failure else []
    for unwanted in prompt.exclude:
        count = len(kept.get(unwanted.name, []))
        reasons += [f"expected {unwanted.name} < {unwanted.count}, found {count}"] if count >= unwanted.count else []
    return Verdict(not reasons, tuple(reasons))


def keep(detections: Sequence[Detection], rules: Rules, tag: str) -> dict[str, list[Detection]]:
    """The detections that count in a category, by class, in falling order of confidence."""
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
    apart: list[Detection] = []
    for detection in found:
        if all(overlap(other.box, detection.box) < max_overlap for other in apart):
            apart.append(detection)
    return apart


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, whose last pixels count as inside (as in the official code)."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def _failure(wanted: Wanted, found: list[Detection], groups: list[list[Detection] | None], rules: Rules) -> str:
    """Why an object of ``include`` is not matched by the detections ``found``; "" if it is."""
    if len(found) < wanted.count:
        return f"expected {wanted.name} >= {wanted.count}, found {len(found)}"
    if wanted.colour:
        colours = [_colour(detection) for detection in found]
        if colours.count(wanted.colour) < wanted.count:
            seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in dict.fromkeys(colours))
            return f"expected {wanted.colour} {wanted.name} >= {wanted.count}, found {seen}"
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


def _colour(detection: Detection) -> str:
    """Its likeliest colour."""
    if not detection.colours:
        raise EvaluationError(
            f"the colour of {detection.name} at {detection.box} is to be judged, but the detector was not asked for "
            f"it: detect again with these rules"
        )
    return detection.colour


def relations(a: Box, b: Box, dead_zone: float = 0.1) -> tuple[str, ...]:
    """Where box ``a`` stands, seen from box ``b``: none, one or two of "left of", "right of", "above", "below"."""
    corners = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)  # box, corner, axis
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    beyond = np.maximum(np.abs(offset) - np.float32(dead_zone) * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return ()
    x, y = beyond / np.linalg.norm(offset)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return tuple(name for name, holds in sides.items() if holds)


# ------------------------------------------------------------------------------------------------------- the scores


def summarise(tags: Sequence[str], correct: Sequence[Sequence[bool]], seed: int = 0) -> dict[str, Any]:
    """The scores of pictures, n for each prompt.

    Args:
        tags: each prompt's category.
        correct: for each prompt whether its pictures are correct, in order.
        seed: of the intervals.

    Returns:
        ``score`` (mean over the categories that are there; ``missing`` names the others) with ``low`` and ``high``,
        ``baseline`` (an empty picture's score, 0 by the rules: every prompt includes something), ``n`` pictures,
        ``prompts``; prompts with ``all_correct`` and with ``any_correct``; ``categories``; ``spread``: the overall
        score of every prompt's first picture, second ..., and the standard deviation of those.

    Raises:
        EvaluationError: without prompts, or if they have different numbers of pictures.
    """
    numbers = sorted({len(pictures) for pictures in correct})
    if not correct or numbers[0] == 0 or len(numbers) > 1:
        raise EvaluationError(f"{len(correct)} prompts with {numbers} pictures each: all need the same number, not 0")
    hits = {tag: np.array([row for own, row in zip(tags, correct, strict=True) if own == tag]) for tag in CATEGORIES}
    hits = {tag: rows for tag, rows in hits.items() if len(rows)}
    each = np.mean([rows.mean(axis=0) for rows in hits.values()], axis=0)
    return {
        **macro_interval({tag: rows.mean(axis=1) for tag, rows in hits.items()}, seed=seed).rounded(),
        "baseline": 0.0,
        "n": sum(rows.size for rows in hits.values()),
        **_counts(list(hits.values())),
        "categories": {tag: _category(rows, seed) for tag, rows in hits.items()},
        "missing": [tag for tag in CATEGORIES if tag not in hits],
        "spread": {
            "scores": [round(float(score), 4) for score in each],
            "deviation": round(float(each.std(ddof=1)), 4) if len(each) > 1 else None,
        },
    }


def _category(rows: np.ndarray, seed: int) -> dict[str, Any]:
    """The scores of one category, from its prompts' hits (prompts, n)."""
    return {**mean_interval(rows.mean(axis=1), seed=seed).rounded(), "n": rows.size, **_counts([rows])}


def _counts(groups: list[np.ndarray]) -> dict[str, Any]:
    """How many prompts there are, and how many with all or any picture correct."""
    return {
        "prompts": sum(len(rows) for rows in groups),
        "all_correct": sum(int(rows.all(axis=1).sum()) for rows in groups),
        "any_correct": sum(int(rows.any(axis=1).sum()) for rows in groups),
    }
