"""Questions about scenes: exact match per question type, against two baselines that cannot see.

Scenes are frozen (`open_pisces.eval.scenes.frozen`) or composed at evaluation time, with exact answers; nothing here
was in a training set: see `fresh_scenes` for why. Each scene gives one question, each of the six types the same number
of questions, and the score is the mean of the types' accuracies. What it has to beat is the better of two:
``constant``, the best fixed answer per type, chosen on the very answers it is scored on (no other constant is better),
and ``blank``, the same model asked the same questions over a picture of plain mid-gray.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow

from open_pisces.batch import Question, Sample
from open_pisces.data.order import stream
from open_pisces.datasets.scenes.composer import Composer, Cutouts, load_cutouts
from open_pisces.datasets.scenes.layout import Split
from open_pisces.eval.evaluation import Evaluation, Score, rounded
from open_pisces.eval.intervals import EvaluationError, Interval, macro_interval
from open_pisces.eval.run import Row, RunFolder
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.frozen import KINDS, checksum

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator

NEVER_ASKED = {"pairs": ("how_many",)}
"""Types without an open answer in a split: held-out pairs are always one thing and another."""
SEEDS_FROM = 2**62
"""Evaluation composes its scenes with seeds from here on; datasets are built with smaller ones."""
GRAY = (128, 128, 128)
"""The blank picture: mid-gray is as far from a light ground as from a dark one, so it suggests no object."""
_SEARCHED = 100  # scenes looked through for each question before giving up
_SHOWN = 20


def fresh_scenes(split: Split, seed: int, cutouts: Cutouts | None = None, plain: bool = False) -> Iterator[Sample]:
    """Scenes that no training has seen, without end; the same ones for the same ``split`` and ``seed``.

    A scene is a function of (composer's seed, split, index). The composer's seed here is derived from ``seed`` under
    the purpose ``"eval"`` and lies at or above `SEEDS_FROM`, where no dataset's seed lies, so the draws behind a
    scene (objects, sizes, places, colors) are independent of those behind any training scene. ``plain`` scenes are
    those of the first lesson, of one style on white.

    Raises:
        EvaluationError: if there are no cut-outs, or no such split.
    """
    # Not the seed itself: a dataset of the same seed would hold the same scenes.
    own = int(stream(seed, "eval", "scenes").integers(SEEDS_FROM, 2**63 - 1))
    composer = Composer(load_cutouts() if cutouts is None else cutouts, split, seed=own, plain=plain)
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
        # In turn, not wherever one is found: the answers of a type stay spread as the composer spreads them.
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


def normalize(answer: str) -> str:
    """The form in which answers are compared: lower case, single spaces, no full stop at the end, no article."""
    text = " ".join(answer.lower().split()).rstrip(".").rstrip()
    return re.sub(r"^(a|an|the) (?=\S)", "", text)


@dataclass
class SceneQuestions(Evaluation):
    """Questions about scenes, asked over the picture and over a blank one.

    Args:
        generator: anything with ``text(images, prompts) -> answers``.
        limit: number of questions.
        seed: None takes the frozen scenes (`open_pisces.eval.scenes.frozen`), whose first version is what seed 0
            composed when it was made; a number composes fresh ones. Training never sees either (`fresh_scenes`).
        split: ``train`` (trained concepts and styles), ``pairs`` (held-out pairs; all types but
            "how many") or ``style`` (held-out style).
        batch_size: questions per call of the model.
        cutouts: what `open_pisces.datasets.scenes.composer.load_cutouts` gives; None loads the default ones.

    Raises:
        EvaluationError: when it is opened, if ``limit`` is below the number of types, or there are no cut-outs, or no
            such split.
    """

    generator: Generator
    limit: int
    seed: int | None = None
    split: Split = "train"
    batch_size: int = 64
    cutouts: Cutouts | None = None
    task = "scenes/vqa"
    stages = ("answers",)

    @property
    def settings(self) -> Row:
        """Those of the scenes."""
        _, scenes, pictures_differ = self._asked
        found = {"scenes": scenes, "split": self.split, "pictures_differ": pictures_differ}
        return {"limit": self.limit, "batch_size": self.batch_size, **found}

    def items(self) -> list[Row]:
        """The questions, with the checksums of their pictures."""
        rows = []
        for number, (image, asked) in enumerate(self._asked[0]):
            row = {"question": asked.question, "answer": asked.answer, "kind": asked.kind}
            rows.append({"key": f"{number:05d}", **row, "pixels": checksum(image)})
        return rows

    @cached_property
    def _asked(self) -> tuple[list[tuple[Image, Question]], str, int]:
        """Pictures with their questions, what the scenes are, and how many pictures are not what they were."""
        cutouts = load_cutouts() if self.cutouts is None else self.cutouts
        if self.seed is None:
            chosen = frozen_scenes.questions(self.limit, self.split)
            images, differ = frozen_scenes.pictures(chosen, cutouts)
            asked = [(image, scene.asked()) for image, scene in zip(images, chosen, strict=True)]
            return asked, frozen_scenes.VERSION, differ
        kinds = [kind for kind in KINDS if kind not in NEVER_ASKED.get(self.split, ())]
        scenes = fresh_scenes(self.split, self.seed, cutouts)
        fresh = balanced_scenes(scenes, self.limit, self.seed, kinds)
        return [(sample.images[0], question) for sample, question in fresh], f"fresh, seed {self.seed}", 0

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """What the model says to a batch of questions, over their pictures and over blank ones."""
        images = [self._asked[0][int(item["key"])][0] for item in batch]
        questions = [item["question"] for item in batch]
        # Both times the same questions in the same batches: only the pictures differ.
        answers = self.generator.text([[image] for image in images], questions)
        blanks = self.generator.text([[Pillow.new("RGB", image.size, GRAY)] for image in images], questions)
        rows = []
        for item, answer, blank in zip(batch, answers, blanks, strict=True):
            rows.append({"key": item["key"], "answer": answer, "blank": blank})
        run.append(stage, rows)

    def score(self, run: RunFolder) -> SceneQuestionsScore:
        """Exact match."""
        return score_run(run)


@dataclass(frozen=True)
class TypeScore:
    """Accuracies of one type's questions."""

    score: float
    constant: float
    blank: float
    n: int


@dataclass(frozen=True)
class SceneQuestionsScore(Score):
    """Mean of the types' accuracies (exact match); ``n`` counts questions."""

    baseline: float
    """The better of the baselines."""
    baselines: dict[str, float]
    """``constant`` and ``blank``; see the head of this file."""
    margin: Interval
    """Score minus the better baseline, question by question."""
    types: dict[str, TypeScore]
    examples: list[tuple[str, str, str]]
    """Question, true answer and the model's, of the first wrong ones."""
    scenes: str
    split: str
    pictures_differ: int
    """True pictures that are not what they were when the scenes were frozen."""


def score_run(run: RunFolder) -> SceneQuestionsScore:
    """The score of a run from its rows alone."""
    questions = [Question(item["question"], item["answer"], item["kind"]) for item in run.items]
    rows = run.rows("answers")
    which = {name: run.manifest.settings[name] for name in ("scenes", "split", "pictures_differ")}
    return score_answers(questions, [row["answer"] for row in rows], [row["blank"] for row in rows], **which)


def score_answers(
    questions: Sequence[Question],
    answers: Sequence[str],
    blanks: Sequence[str],
    scenes: str = "",
    split: str = "train",
    pictures_differ: int = 0,
) -> SceneQuestionsScore:
    """The score of what was asked and answered; ``blanks`` were given without the picture, the rest is passed on."""
    own = _hits(questions, answers)
    constant = _hits(questions, best_constants(questions))
    blank = _hits(questions, blanks)
    baselines = {"constant": _macro_mean(constant), "blank": _macro_mean(blank)}
    # Question by question, not as a difference of two scores: both saw the same questions.
    better = constant if baselines["constant"] >= baselines["blank"] else blank
    overall = rounded(macro_interval(own))
    types = {}
    for kind, hits in own.items():
        means = [round(float(one.mean()), 4) for one in (hits, constant[kind], blank[kind])]
        types[kind] = TypeScore(means[0], means[1], means[2], len(hits))
    pairs = zip(questions, answers, strict=True)
    wrong = [(asked.question, asked.answer, answer) for asked, answer in pairs if not matches(asked, answer)]
    return SceneQuestionsScore(
        name=SceneQuestions.task,
        score=overall.score,
        low=overall.low,
        high=overall.high,
        n=len(questions),
        baseline=round(max(baselines.values()), 4),
        baselines={name: round(value, 4) for name, value in baselines.items()},
        margin=rounded(macro_interval({kind: hits - better[kind] for kind, hits in own.items()})),
        types=types,
        examples=wrong[:_SHOWN],
        scenes=scenes,
        split=split,
        pictures_differ=pictures_differ,
    )


def best_constants(questions: Sequence[Question]) -> list[str]:
    """For each question the most common answer of its type among ``questions``: the strongest constant there is."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[normalize(question.answer)] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def matches(question: Question, answer: str) -> bool:
    """Whether ``answer`` is the question's answer, both normalized."""
    return normalize(question.answer) == normalize(answer)


def _hits(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """For each type its questions' hits (0 or 1), in order."""
    hits: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        hits.setdefault(question.kind, []).append(float(matches(question, answer)))
    return {kind: np.array(values) for kind, values in hits.items()}


def _macro_mean(hits: dict[str, np.ndarray]) -> float:
    """Mean of the types' means."""
    return float(np.mean([values.mean() for values in hits.values()]))
