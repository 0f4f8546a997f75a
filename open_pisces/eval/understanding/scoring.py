"""What one answer is worth by a benchmark's rule, from 0 to 1.

Pure functions of a question and an answer; no model, no file. A question is an item of `questions.Asked`: ``gold``,
``options`` (letter to text) and ``facts`` (columns that its rule asks for).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_pisces.eval.understanding import parsing

Question = Mapping[str, Any]


@dataclass(frozen=True)
class Grade:
    """What one answer is worth."""

    value: float
    """0 to 1; an answer that could not be read is worth 0."""
    read: str | None
    """What was read out of it, None if nothing could be."""


# ------------------------------------------------------------------------------------------------- single answers


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Mean over the people who answered of min(1, others who said the same / 3).

    ``answer`` and ``golds`` are compared as they are: normalize them first.
    """
    matches = sum(gold == answer for gold in golds)
    worth = [min(1.0, (matches - (gold == answer)) / 3) for gold in golds]
    return sum(worth) / len(worth) if worth else 0.0


def vqa_official(answer: str, golds: Sequence[str]) -> float:
    """VQAv2 by the challenge's own code: people's answers are touched only where they differ, and less than ours."""
    golds = [parsing.vqa_gold(gold) for gold in golds] if len(set(golds)) > 1 else golds
    return vqa_accuracy(parsing.vqa_words(answer), golds)


def vqa_m4c(answer: str, golds: Sequence[str]) -> float:
    """TextVQA and VizWiz: answer and people's answers are normalized alike."""
    return vqa_accuracy(parsing.m4c_words(answer), [parsing.m4c_words(gold) for gold in golds])


def anls(answer: str, golds: Sequence[str], cut: float = 0.5) -> float:
    """Average normalized Levenshtein similarity of one answer: the best over golds; below ``cut`` it is 0.

    Blanks are merged and case ignored for the distance, not for the length it is divided by (DocVQA's own code).
    """
    distances = []
    for gold in golds:
        length = max(len(gold), len(answer))
        close = parsing.edit_distance(*(" ".join(text.lower().split()) for text in (gold, answer)))
        distances.append(close / length if length else 0.0)
    similarity = 1 - min(distances, default=1.0)
    return similarity if similarity >= cut else 0.0


def relaxed(answer: str, gold: str, tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the gold one; anything else, and a gold of zero, has to be the same text."""
    found = parsing.number_of(answer)
    target = parsing.number_of(gold)
    if found is not None and target:  # 5 % of zero would be no tolerance
        return float(abs(found - target) / abs(target) <= tolerance)
    return float(answer.lower() == gold.lower())


def contained(answer: str, golds: Sequence[str], formula: bool = False) -> float:
    """OCRBench: a gold text stands in the answer. Formulas are compared without blanks, and with their case."""
    if formula:
        return float(any(_joined(gold) in _joined(answer) for gold in golds))
    text = answer.lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in text for gold in golds))


def _joined(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def mmmu_open_right(answer: str, golds: Sequence[str]) -> float:
    """MMMU, open questions: a gold text stands in what was read, or a gold number is among it."""
    wanted: list[str | float] = []
    for gold in golds:
        wanted += parsing.mmmu_values(gold)
    texts = [value for value in wanted if isinstance(value, str)]
    for found in parsing.mmmu_open(answer):
        if any(text in found for text in texts) if isinstance(found, str) else found in wanted:
            return 1.0
    return 0.0


def _mmmu(question: Question, answer: str, lenient: bool) -> Grade:
    if question["options"]:
        reading = parsing.lenient_mmmu_letter if lenient else parsing.mmmu_letter
        return _same(reading(answer, question["options"]), question["gold"])
    gold = str(question["gold"])
    # Several right answers are stored as the text of a Python list.
    golds = [str(one) for one in ast.literal_eval(gold)] if gold.startswith("[") else [gold]
    return _worth(mmmu_open_right(parsing.plain(answer) if lenient else answer, golds), answer)


def _mathvista(question: Question, answer: str, lenient: bool) -> Grade:
    kind = question["facts"]["answer_type"]
    reading = parsing.mathvista_lenient if lenient else parsing.mathvista_extract
    found = reading(answer, question["options"], kind)
    return mathvista_right(question, found) if found is not None else Grade(0.0, None)


def mathvista_right(question: Question, extraction: str, nearest: bool = False) -> Grade:
    """MathVista: an extraction, brought to the answer's form, against the answer as text."""
    facts = question["facts"]
    args = question["options"], facts["answer_type"], float(facts["precision"] or 0)
    return _same(parsing.mathvista_normal(extraction, *args, nearest=nearest), str(question["gold"]).strip())


def _realworld(question: Question, answer: str, lenient: bool) -> Grade:
    options = question["options"]
    gold = question["gold"]
    if lenient and options:
        return _same(parsing.lenient_letter(answer, options), gold.strip().upper())
    words = parsing.realworld_words(answer, options)
    if lenient:
        return _worth(float(parsing.m4c_words(parsing.plain(answer)) == parsing.m4c_words(gold)), answer)
    return _worth(float(words == parsing.exact_words(gold)), answer)


def _same(read: str | None, gold: str) -> Grade:
    return Grade(float(read == gold), read)


def _worth(value: float, answer: str) -> Grade:
    """An open answer: whatever was said has been read, unless nothing was."""
    return Grade(value, answer.strip() or None)


def _relaxed(question: Question, answer: str, lenient: bool) -> Grade:
    if not lenient:
        return _worth(relaxed(answer, question["gold"]), answer)
    gold = parsing.lenient_number(question["gold"])
    return _worth(relaxed(parsing.lenient_number(parsing.plain(answer)), gold), answer)


def _contained(question: Question, answer: str, lenient: bool) -> Grade:
    # OCRBench's only dataset of handwritten formulas.
    formula = question["facts"]["dataset"] == "HME100k"
    return _worth(contained(parsing.plain(answer) if lenient else answer, question["gold"], formula), answer)


OPEN: dict[str, Callable[[str, Any], float]] = {
    "vqa_official": vqa_official,
    "vqa_m4c": vqa_m4c,
    "words": lambda answer, gold: float(parsing.exact_words(answer) == parsing.exact_words(gold)),
    "anls": anls,
}
"""Rules of open answers: worth of answer and gold."""
OWN: dict[str, Callable[[Question, str, bool], Grade]] = {
    "mmmu": _mmmu,
    "mathvista": _mathvista,
    "realworld": _realworld,
    "relaxed": _relaxed,
    "contained": _contained,
}
"""Rules that look at more than an answer and its gold."""
RULES = ("judged", *OPEN, *OWN, *parsing.YES_NO, *parsing.LETTER)


def grade(rule: str, question: Question, answer: str, lenient: bool = False) -> Grade:
    """The worth of one answer.

    Args:
        rule: one of `RULES` but ``judged``.
        question: what was asked.
        answer: what was said.
        lenient: read the answer our way, not the published one.
    """
    if rule in OWN:
        return OWN[rule](question, answer, lenient)
    if rule in OPEN:
        return _worth(OPEN[rule](parsing.plain(answer) if lenient else answer, question["gold"]), answer)
    if rule in parsing.YES_NO:
        return _same(parsing.lenient_yes_no(answer) if lenient else parsing.YES_NO[rule](answer), question["gold"])
    reading = parsing.lenient_letter if lenient else parsing.LETTER[rule]
    return _same(reading(answer, question["options"]), question["gold"])
