"""Questions about scenes: exact match per question type, against two baselines that cannot see.

Scenes are frozen (`open_pisces.eval.scenes.frozen`) or composed at evaluation time, with exact answers; nothing here
was in a training set: see `fresh_scenes` for why. Each scene gives one question, each of the six types the same number
of questions, and the score is the mean of the types' accuracies. What it has to beat is the better of two:
``constant``, the best fixed answer per type, chosen on the very answers it is scored on (no other constant is better),
and ``blank``, the same model asked the same questions over a picture of plain mid-grey.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Pillow

from open_pisces.batch import Question, Sample
from open_pisces.data.draws import stream
from open_pisces.datasets.scenes.composer import Composer, Cutouts, load_cutouts
from open_pisces.datasets.scenes.layout import Split
from open_pisces.eval.intervals import EvaluationError, macro_interval
from open_pisces.eval.run import Manifest, RunFolder, model_hash
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.frozen import KINDS, checksum

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator

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


def balanced_scenes(
    scenes: Iterator[Sample], limit: int, seed: int, kinds: Sequence[str] = KINDS
) -> list[tuple[Sample, Question]]:
    """``limit`` scenes with one question each, equally many of each of ``kinds`` (the first kinds get the rest).

    Scene k is asked about kind ``k mod len(kinds)`` and passed over if it has no such question, so that the answers
    of a kind are spread as the composer spreads them; which of several questions is drawn.

    Raises:
        EvaluationError: if ``limit`` is below the number of kinds, or the scenes hold too few questions of a kind.
    """
    if limit < len(kinds):
        raise EvaluationError(f"limit = {limit}: give at least {len(kinds)}, one question for each type")
    wanted = {kind: limit // len(kinds) + (place < limit % len(kinds)) for place, kind in enumerate(kinds)}
    found: list[tuple[Sample, Question]] = []
    for index, sample in enumerate(islice(scenes, _SEARCHED * limit)):
        kind = kinds[index % len(kinds)]
        questions = [question for question in sample.questions if question.kind == kind]
        if not questions or not wanted[kind]:
            continue
        wanted[kind] -= 1
        choice = int(stream(seed, "eval", "question", index).integers(len(questions)))
        found.append((sample, questions[choice]))
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
    seed: int | None = None,
    split: Split = "train",
    batch_size: int = 64,
    cutouts: Cutouts | None = None,
    model: str | Path | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Score ``generator.text`` on ``limit`` questions about scenes, asked over the picture and over a blank one.

    Args:
        generator: anything with ``text(images, prompts) -> answers``.
        limit: number of questions.
        seed: None takes the frozen scenes (`open_pisces.eval.scenes.frozen`), whose first version is what seed 0
            composed when it was made; a number composes fresh ones. Training never sees either (`fresh_scenes`).
        split: ``train`` (trained concepts and styles), ``pairs`` (held-out pairs; all types but
            "how many") or ``style`` (held-out style).
        batch_size: questions per call of the model.
        cutouts: what `open_pisces.datasets.scenes.composer.load_cutouts` gives; None loads the default ones.
        model: the model's folder, for the run's manifest; None keeps no run.
        folder: the run's folder; None chooses one by the manifest (`RunFolder.open`).

    Returns:
        ``score`` (macro mean of exact match over the types) with ``low`` and ``high``, ``n``, ``baselines``,
        ``baseline`` (the better one), ``margin`` (score minus that baseline, question by question, with its
        interval), ``types``, ``examples`` (the first wrong answers), ``scenes``, ``split``, ``seconds``, ``folder``.

    Raises:
        EvaluationError: if ``limit`` is below the number of types, or there are no cut-outs, or no such split.
        RunError: if ``folder`` holds another run.
    """
    start = time.time()
    asked, which = _asked(limit, seed, split, load_cutouts() if cutouts is None else cutouts)
    items = [
        {"key": f"{number:05d}", "question": q.question, "answer": q.answer, "kind": q.kind, "pixels": checksum(image)}
        for number, (image, q) in enumerate(asked)
    ]
    batches = (items[first : first + batch_size] for first in range(0, len(items), batch_size))
    if model is None:
        rows = [row for batch in batches for row in _rows(generator, batch, asked)]
        return {"name": "scenes/vqa", **score_answers(*_columns(items, rows)), **which}
    settings = {"limit": limit, "batch_size": batch_size, **which}
    run = RunFolder.open(folder, Manifest("scenes/vqa", str(model), model_hash(model), settings), items)
    for batch in run.batches("answers", batch_size):
        run.append("answers", _rows(generator, batch, asked))
    scores = run.write_scores(score_run(run))
    return {**scores, "seconds": round(time.time() - start, 1), "folder": str(run.folder)}


def score_run(run: RunFolder) -> dict[str, Any]:
    """The figures of `evaluate_vqa` from a run's rows alone."""
    which = {name: run.manifest.settings[name] for name in ("scenes", "split", "pictures_differ")}
    return {"name": "scenes/vqa", **score_answers(*_columns(run.items, run.rows("answers"))), **which}


def _asked(
    limit: int, seed: int | None, split: Split, cutouts: Cutouts
) -> tuple[list[tuple[Image, Question]], dict[str, Any]]:
    """Pictures with their questions, and what they are."""
    if seed is None:
        chosen = frozen_scenes.questions(limit, split)
        images, differ = frozen_scenes.pictures(chosen, cutouts)
        which = {"scenes": frozen_scenes.VERSION, "split": split, "pictures_differ": differ}
        return [(image, scene.asked()) for image, scene in zip(images, chosen, strict=True)], which
    kinds = [kind for kind in KINDS if kind not in NEVER_ASKED.get(split, ())]
    fresh = balanced_scenes(fresh_scenes(split, seed, cutouts), limit, seed, kinds)
    which = {"scenes": f"fresh, seed {seed}", "split": split, "pictures_differ": 0}
    return [(sample.images[0], question) for sample, question in fresh], which


def _rows(
    generator: Generator, items: Sequence[dict[str, Any]], asked: Sequence[tuple[Image, Question]]
) -> list[dict[str, Any]]:
    """What the model says to a batch of questions, over their pictures and over blank ones."""
    images, questions = [asked[int(item["key"])][0] for item in items], [item["question"] for item in items]
    answers = generator.text([[image] for image in images], questions)
    blanks = generator.text([[Pillow.new("RGB", image.size, GREY)] for image in images], questions)
    return [
        {"key": item["key"], "answer": answer, "blank": blank}
        for item, answer, blank in zip(items, answers, blanks, strict=True)
    ]


def _columns(
    items: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> tuple[list[Question], list[str], list[str]]:
    """Questions, answers, and answers over blank pictures."""
    questions = [Question(item["question"], item["answer"], item["kind"]) for item in items]
    return questions, [row["answer"] for row in rows], [row["blank"] for row in rows]


def score_answers(
    questions: Sequence[Question], answers: Sequence[str], blanks: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """The figures of `evaluate_vqa` from what was asked and answered; ``blanks`` were given without the picture."""
    runs = {"score": _hits(questions, answers), "constant": _hits(questions, best_constants(questions))}
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
