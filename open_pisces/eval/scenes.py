"""Questions about fresh scenes: exact match per question type, against two baselines that cannot see.

Scenes are composed at evaluation time with exact answers, so nothing here was in a training set: see `fresh_scenes`
for why. Each scene gives one question, each of the six types the same number of questions, and the score is the
mean of the types' accuracies. What it has to beat is the better of two: ``constant``, the best fixed answer per type,
chosen on the very answers it is scored on (no other constant does better), and ``blank``, the same model asked the
same questions over a picture of plain mid-grey.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Pillow

from open_pisces.batch import Question, Sample
from open_pisces.data.draws import stream
from open_pisces.data.sources.scenes import Composer, Cutouts, Split, load_cutouts
from open_pisces.eval.intervals import EvaluationError, macro_interval

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate import Generator

KINDS = ("what", "how_many", "which_colour", "where", "is_there", "left_or_right")
"""The six types of questions, as `open_pisces.data.sources.scenes` names them."""
NEVER_ASKED = {"pairs": ("how_many",)}
"""Types without an open answer in a split: held-out pairs are always one thing and another."""
SEEDS_FROM = 2**62
"""Evaluation composes its scenes with seeds from here on; datasets are built with smaller ones."""
GREY = (128, 128, 128)
"""The blank picture: mid-grey is as far from a light ground as from a dark one, so it suggests no object."""
_SEARCHED = 100  # scenes looked through for each question before giving up
_SHOWN = 20


def fresh_scenes(split: Split, seed: int, cutouts: Cutouts | None = None) -> Iterator[Sample]:
    """Scenes that no training has seen, without end; the same ones for the same ``split`` and ``seed``.

    A scene is a function of (composer's seed, split, index). The composer's seed here is derived from ``seed`` under
    the purpose ``"eval"`` and lies at or above `SEEDS_FROM`, where no dataset's seed lies, so the draws behind a
    scene (objects, sizes, places, colours) are independent of those behind any training scene.

    Raises:
        EvaluationError: if there are no cut-outs, or no such split.
    """
    own = int(stream(seed, "eval", "scenes").integers(SEEDS_FROM, 2**63 - 1))
    composer = Composer(load_cutouts() if cutouts is None else cutouts, split, seed=own)
    return (composer.scene(index) for index in count())


def balanced_questions(
    scenes: Iterator[Sample], limit: int, seed: int, kinds: Sequence[str] = KINDS
) -> list[tuple[Image, Question]]:
    """``limit`` pictures with one question each, equally many of each of ``kinds`` (the first kinds get the rest).

    Scene k is asked about kind ``k mod len(kinds)`` and passed over if it has no such question, so that the answers
    of a kind are spread as the composer spreads them; which of several questions is drawn.

    Raises:
        EvaluationError: if ``limit`` is below the number of kinds, or the scenes hold too few questions of a kind.
    """
    if limit < len(kinds):
        raise EvaluationError(f"limit = {limit}: give at least {len(kinds)}, one question for each type")
    wanted = {kind: limit // len(kinds) + (place < limit % len(kinds)) for place, kind in enumerate(kinds)}
    found: list[tuple[Image, Question]] = []
    for index, sample in enumerate(islice(scenes, _SEARCHED * limit)):
        kind = kinds[index % len(kinds)]
        questions = [question for question in sample.questions if question.kind == kind]
        if not questions or not wanted[kind]:
            continue
        wanted[kind] -= 1
        choice = int(stream(seed, "eval", "question", index).integers(len(questions)))
        found.append((sample.images[0], questions[choice]))
        if len(found) == limit:
            return found
    missing = ", ".join(kind for kind in kinds if wanted[kind])
    raise EvaluationError(f"too few questions of type {missing} in {_SEARCHED * limit} scenes: build the artwork again")


def normalise(answer: str) -> str:
    """The form in which answers are compared: lower case, single spaces, no full stop at the end, no article."""
    text = " ".join(answer.lower().split()).rstrip(".").rstrip()
    return re.sub(r"^(a|an|the) (?=\S)", "", text)


def evaluate_vqa(
    generator: Generator,
    limit: int,
    seed: int,
    split: Split = "train",
    batch_size: int = 64,
    blank: bool = True,
    cutouts: Cutouts | None = None,
) -> dict[str, Any]:
    """Score ``generator.text`` on ``limit`` questions about fresh scenes.

    Args:
        generator: anything with ``text(images, prompts) -> answers``.
        limit: number of questions.
        seed: of scenes and questions; training never sees the same scenes (`fresh_scenes`).
        split: ``train`` (trained concepts and styles), ``pairs`` (held-out pairs; all types but
            "how many") or ``style`` (held-out style).
        batch_size: questions per call of the model.
        blank: also ask the same questions over a blank picture (twice the time).
        cutouts: what `open_pisces.data.sources.scenes.load_cutouts` gives; None loads the default ones.

    Returns:
        ``score`` (macro mean of exact match over the types) with ``low`` and ``high``, ``n``, ``baselines``,
        ``baseline`` (the better one), ``margin`` (score minus that baseline, question by question, with its
        interval), ``types``, ``examples`` (the first wrong answers), ``split``, ``seed``, ``seconds``.

    Raises:
        EvaluationError: if ``limit`` is below the number of types, or there are no cut-outs, or no such split.
    """
    start = time.time()
    kinds = [kind for kind in KINDS if kind not in NEVER_ASKED.get(split, ())]
    asked = balanced_questions(fresh_scenes(split, seed, cutouts), limit, seed, kinds)
    answers = _answers(generator, asked, batch_size)
    grey = [(Pillow.new("RGB", image.size, GREY), question) for image, question in asked]
    blanks = _answers(generator, grey, batch_size) if blank else None
    result = score_answers([question for _, question in asked], answers, blanks, seed)
    return {"name": "scenes/vqa", **result, "split": split, "seed": seed, "seconds": round(time.time() - start, 1)}


def score_answers(
    questions: Sequence[Question], answers: Sequence[str], blanks: Sequence[str] | None, seed: int = 0
) -> dict[str, Any]:
    """The figures of `evaluate_vqa` from what was asked and answered; ``blanks`` were given without the picture."""
    runs = {"score": _hits(questions, answers), "constant": _hits(questions, best_constants(questions))}
    if blanks is not None:
        runs["blank"] = _hits(questions, blanks)
    means = {name: float(np.mean([hits.mean() for hits in kinds.values()])) for name, kinds in runs.items()}
    best = max((name for name in means if name != "score"), key=lambda name: means[name])
    margins = {kind: hits - runs[best][kind] for kind, hits in runs["score"].items()}
    types = {
        kind: {**{name: round(float(run[kind].mean()), 4) for name, run in runs.items()}, "n": len(hits)}
        for kind, hits in runs["score"].items()
    }
    wrong = [(q.question, q.answer, a) for q, a in zip(questions, answers, strict=True) if not matches(q, a)]
    return {
        **macro_interval(runs["score"], seed=seed).rounded(),
        "n": len(questions),
        "baseline": round(means[best], 4),
        "baselines": {name: round(value, 4) for name, value in means.items() if name != "score"},
        "margin": macro_interval(margins, seed=seed).rounded(),
        "types": types,
        "examples": wrong[:_SHOWN],
    }


def best_constants(questions: Sequence[Question]) -> list[str]:
    """For each question the most common answer of its type among ``questions``: the strongest constant there is."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[normalise(question.answer)] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def matches(question: Question, answer: str) -> bool:
    """Whether ``answer`` is the question's answer, both normalised."""
    return normalise(question.answer) == normalise(answer)


def _hits(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """For each type its questions' hits (0 or 1), in order."""
    hits: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        hits.setdefault(question.kind, []).append(float(matches(question, answer)))
    return {kind: np.array(values) for kind, values in hits.items()}


def _answers(generator: Generator, asked: Sequence[tuple[Image, Question]], batch_size: int) -> list[str]:
    """The model's greedy answers to questions about their pictures."""
    answers: list[str] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        answers += generator.text([[image] for image, _ in batch], [question.question for _, question in batch])
    return answers
