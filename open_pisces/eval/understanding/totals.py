"""Benchmark scores with bootstrap intervals, from per-question grades.

Pure functions of questions and grades. ``unit`` of a question is what the rule counts and the bootstrap draws anew: an
image of MME, a pair of MMVP, a question of MMBench with all its rotations. Scores are in the unit of the paper's table:
percent, for MME points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from open_pisces.eval.intervals import EvaluationError, bootstrap
from open_pisces.eval.understanding.scoring import Grade, Question

MME_TASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
"""The ten and four subtasks of MME whose scores are summed."""
CV_SOURCES = ("ADE20K", "COCO", "Omni3D")


@dataclass(frozen=True)
class Parts:
    """What a score is made of, before its interval."""

    groups: Mapping[str, np.ndarray]
    """For each name the units' values, ``(n_i, k)``; empty where the rule cannot be applied."""
    combine: Callable[[dict[str, np.ndarray]], np.ndarray]
    """From the groups' means, ``(..., k)``, to scores ``(...)``, of which 1 is 100 points."""
    n: int
    details: dict[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Total:
    """What a benchmark's answers amount to."""

    score: float | None
    """In the unit of the paper's table; None where the rule cannot be applied, ``why`` says why."""
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Units that were counted."""
    details: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def _score(parts: Parts) -> float:
    return float(parts.combine({name: values.mean(0) for name, values in parts.groups.items()}))


def total(kind: str, questions: Sequence[Question], grades: Sequence[Grade]) -> Total:
    """What grades amount to, by one of `TOTALS`, with its interval.

    Raises:
        EvaluationError: without grades.
    """
    return finish(_parts(kind, questions, grades))


def score_only(kind: str, questions: Sequence[Question], grades: Sequence[Grade]) -> float | None:
    """The score of `total` without its interval, which takes most of the time."""
    parts = _parts(kind, questions, grades)
    return 100 * _score(parts) if parts.groups else None


def finish(parts: Parts) -> Total:
    """A total of its parts."""
    if not parts.groups:
        return Total(None, n=parts.n, details=parts.details, why=parts.why)
    found = bootstrap(parts.groups, parts.combine)
    return Total(100 * found.score, 100 * found.low, 100 * found.high, parts.n, parts.details, parts.why)


def _parts(kind: str, questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    if not grades:
        raise EvaluationError("no answers to score")
    return TOTALS[kind](questions, grades)


def _first(means: dict[str, np.ndarray]) -> np.ndarray:
    return means[""][..., 0]


def _share(grades: Sequence[Grade]) -> float:
    """Percent of the answers that are right."""
    return 100 * float(np.mean([one.value for one in grades]))


def _mean(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    return Parts({"": np.array([[one.value] for one in grades])}, _first, len(grades))


def _by_unit(questions: Sequence[Question], grades: Sequence[Grade]) -> dict[Any, list[tuple[Question, Grade]]]:
    units: dict[Any, list[tuple[Question, Grade]]] = {}
    for question, one in zip(questions, grades, strict=True):
        units.setdefault(question["unit"], []).append((question, one))
    return units


def _all_right(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """A unit counts if each of its answers is right: all rotations of a question (MMBench)."""
    units = _by_unit(questions, grades)
    sizes = Counter(len(unit) for unit in units.values())
    details = {"each": _share(grades), "rotations": {str(size): sizes[size] for size in sorted(sizes)}}
    return Parts({"": _lowest(units.values())}, _first, len(units), details)


def _pairs(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """Both pictures of a pair have to be right (MMVP); half a pair is left out."""
    units = _by_unit(questions, grades)
    whole = [unit for unit in units.values() if len(unit) == 2]
    why = f"{len(units) - len(whole)} of {len(units)} pairs left out: not both pictures are there"
    return Parts({"": _lowest(whole)} if whole else {}, _first, len(whole), {"each": _share(grades)},
                 why if len(whole) < len(units) else "")  # fmt: skip


def _lowest(units: Iterable[Sequence[tuple[Question, Grade]]]) -> np.ndarray:
    """The worst answer of each unit, (n, 1)."""
    worst = [min(unit, key=lambda pair: pair[1].value) for unit in units]
    return np.array([[one.value] for _, one in worst])


def _f1(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """POPE: F1 of "yes" over all samplings together; an unread answer misses its object and claims none."""
    counts = []
    for question, one in zip(questions, grades, strict=True):
        said = one.read == "yes"
        wanted = question["gold"] == "yes"
        counts.append((said and wanted, said and not wanted, wanted and not said, wanted and one.read is None))
    values = np.array(counts, dtype=float)
    hit, false, missed, unread = values.sum(0)
    details = {
        "accuracy": _share(grades),
        "precision": 100 * _ratio(hit, hit + false),
        "recall": 100 * _ratio(hit, hit + missed),
        "yes_ratio": 100 * float(np.mean([one.read == "yes" for one in grades])),
        "gold_yes_ratio": 100 * float(np.mean([q["gold"] == "yes" for q in questions])),
        # lmms-eval leaves unread answers out of recall, so that silence scores better than a wrong answer.
        "f1_unread_left_out": 100 * _ratio(2 * hit, 2 * hit + false + missed - unread),
    }
    return Parts({"": values[:, :3]}, _f1_of, len(grades), details)


def _f1_of(means: dict[str, np.ndarray]) -> np.ndarray:
    hit, false, missed = np.moveaxis(means[""], -1, 0)
    below = 2 * hit + false + missed
    return np.where(below > 0, 2 * hit / np.where(below > 0, below, 1), 0.0)


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def _mme(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """MME: over the images of a subtask the mean of share right + both right, summed over subtasks."""
    units = _by_unit(questions, grades)
    groups: dict[str, list[list[float]]] = {}
    for unit in units.values():
        if len(unit) == 2:
            values = [one.value for _, one in unit]
            # MME's accuracy of the two questions, plus "accuracy+", which is 1 only if both are right.
            groups.setdefault(unit[0][0]["facts"]["category"], []).append([sum(values) / 2 + min(values)])
    images = sum(len(values) for values in groups.values())
    why = [f"{len(units) - images} images left out: without their two questions"] if images < len(units) else []
    for tasks in MME_TASKS.values():
        missing = [name for name in tasks if name not in groups]
        if 0 < len(missing) < len(tasks):
            why.append(f"{len(missing)} of {len(tasks)} subtasks have no question here and add nothing")
    arrays = {name: np.array(values) for name, values in groups.items()}
    details = {name: 100 * float(values.mean()) for name, values in arrays.items()}
    return Parts(arrays, _sum_of_means, images, {"each": _share(grades), **details}, "; ".join(why))


def _sum_of_means(means: dict[str, np.ndarray]) -> np.ndarray:
    return np.sum([mean[..., 0] for mean in means.values()], axis=0)


def _grouped(column: str, questions: Sequence[Question], grades: Sequence[Grade]) -> dict[str, np.ndarray]:
    """Worths ``(n_i, 1)`` by the value of a column."""
    groups: dict[str, list[list[float]]] = {}
    for question, one in zip(questions, grades, strict=True):
        groups.setdefault(str(question["facts"][column]), []).append([one.value])
    return {name: np.array(values) for name, values in groups.items()}


def _categories(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """MMStar: the mean of its 18 categories' accuracies."""
    groups = _grouped("l2_category", questions, grades)
    details = {name: 100 * float(values.mean()) for name, values in groups.items()}
    why = f"{len(groups)} of 18 categories have questions here" if len(groups) < 18 else ""
    return Parts(groups, lambda means: _sum_of_means(means) / len(means), len(grades), details, why)


def _cv_bench(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """CV-Bench as published: 1/2 ((ADE20K + COCO) / 2 + Omni3D)."""

    def formula(means: dict[str, np.ndarray]) -> np.ndarray:
        ade, coco, omni = (means[name][..., 0] for name in CV_SOURCES)
        return ((ade + coco) / 2 + omni) / 2

    groups = _grouped("source", questions, grades)
    details = {"each": _share(grades), **{name: 100 * float(values.mean()) for name, values in groups.items()}}
    missing = [name for name in CV_SOURCES if name not in groups]
    why = f"the formula needs questions from {', '.join(missing)}" if missing else ""
    kept = {} if missing else {name: groups[name] for name in CV_SOURCES}
    return Parts(kept, formula, len(grades), details, why)


def _hallusion(questions: Sequence[Question], grades: Sequence[Grade]) -> Parts:
    """HallusionBench: aAcc, all questions (the score); fAcc, figures with no error; qAcc, questions with no error."""
    details = {"aAcc": _share(grades)}
    for name, column in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        sets: dict[tuple[str, ...], float] = {}
        for question, one in zip(questions, grades, strict=True):
            facts = question["facts"]
            if column == "figure_id" and without_figure(question):
                continue
            key = tuple(str(facts[part]) for part in ("category", "subcategory", "set_id", column))
            sets[key] = min(sets.get(key, 1.0), one.value)
        details[name] = 100 * float(np.mean(list(sets.values()))) if sets else 0.0
    return Parts(_mean(questions, grades).groups, _first, len(grades), details)


def without_figure(question: Question) -> bool:
    """HallusionBench: whether a question that a figure would supplement is asked without one."""
    return question["facts"]["category"] == "VS" and str(question["facts"]["figure_id"]) == "0"


def ratio(marks: Sequence[tuple[float, float]]) -> Total:
    """LLaVA-W: 100 x mean of the model's marks / mean of the reference's; pairs are (reference, model)."""
    values = np.array(marks, dtype=float)
    return finish(Parts({"": values}, lambda means: means[""][..., 1] / means[""][..., 0], len(values)))


def guesses(questions: Sequence[Question], grades: Sequence[Grade]) -> dict[str, float]:
    """What drawing a letter for each unread answer would add on average (MMMU's published code does)."""
    guessed = 0
    worth = []
    for question, one in zip(questions, grades, strict=True):
        options = question["options"]
        if options and one.read is None:
            guessed += 1
            worth.append(1 / len(options))
        else:
            worth.append(one.value)
    return {"guesses": guessed, "score_with_guesses": 100 * float(np.mean(worth))}


TOTALS: dict[str, Callable[[Sequence[Question], Sequence[Grade]], Parts]] = {
    "mean": _mean,
    "all_right": _all_right,
    "pairs": _pairs,
    "f1": _f1,
    "mme": _mme,
    "categories": _categories,
    "cv_bench": _cv_bench,
    "hallusion": _hallusion,
}
"""Ways from grades to a score."""
