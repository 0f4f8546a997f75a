"""What an experiment measures of a trained model: on scenes of its world that no training has seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from open_pisces.batch import Question, Sample, Turn
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.eval.drawing.detection import Detector
from open_pisces.eval.drawing.prompts import Prompt
from open_pisces.eval.run import Row
from open_pisces.eval.scenes.drawing import SceneDrawing
from open_pisces.eval.scenes.freeze import by_category
from open_pisces.eval.scenes.vqa import balanced_scenes, fresh_scenes, normalize
from open_pisces.generate.choose import log_likelihoods
from open_pisces.generate.messages import Conversation

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

AT_ONCE = 32
STEPS = 10
"""Of the decoder: what half as many lose is the same for all variants."""
SEED = 17
"""Of the scenes."""


@dataclass(frozen=True)
class HeldOut:
    """The questions and captions that every run of an experiment is measured on.

    Args:
        asked: scenes with a question each.
        prompts: captions, each with what its drawing has to show.
        drawn: pictures of other scenes with their captions, whose vectors are compared.
    """

    asked: list[tuple[Sample, Question]]
    prompts: list[Prompt]
    drawn: list[tuple[Image, str]]


def held_out(cutouts: Cutouts, plain: bool, questions: int, captions: int) -> HeldOut:
    """Fresh scenes: ``questions`` of them asked about, ``captions`` of each of GenEval's categories to draw."""
    asked = balanced_scenes(fresh_scenes("train", SEED, cutouts, plain), questions, SEED)
    # Other seeds: no scene serves twice.
    scenes = by_category(fresh_scenes("train", SEED + 1, cutouts, plain), captions)
    others = islice(fresh_scenes("train", SEED + 2, cutouts, plain), 6 * captions)
    drawn = [(sample.images[0], sample.short) for sample in others]
    return HeldOut(asked, [scene.prompt() for scene in scenes], drawn)


@dataclass
class FreshDrawing(SceneDrawing):
    """Drawings of captions of fresh scenes; otherwise as `SceneDrawing`."""

    given: Sequence[Prompt] = ()

    @property
    def settings(self) -> Row:
        """Those of `SceneDrawing`, and what its scenes really are."""
        return {**super().settings, "scenes": f"fresh, seed {SEED + 1}"}

    def prompts(self) -> Sequence[Prompt]:
        """Those that were given."""
        return self.given


def measure(generator: Generator, judge: Detector, shown: HeldOut, model: Path, out: Path) -> dict[str, float]:
    """All metrics of a model.

    Args:
        generator: the model, loaded.
        judge: looks at its drawings.
        shown: what it is measured on.
        model: its folder.
        out: the run folder of its drawings.

    Returns:
        ``questions``: share answered exactly, mean of the six types. ``answer_loss``: mean negative log-likelihood of
        a token of the true answers, nats. ``drawing``: share of captions drawn by GenEval's rules, mean of the six
        categories. ``things``: how sure the judge is of what was asked for (`confidence`).
        ``vector_error``: mean squared error of the vectors that the model writes by itself for a caption,
        in variances of the targets.
    """
    how = FreshDrawing(generator, [judge], steps=STEPS, batch_size=AT_ONCE, given=shown.prompts)
    drawing = float(how.run(model, out)["score"])
    drawn = {"drawing": drawing, "things": confidence(out), "vector_error": _error(generator, shown)}
    return {**_understanding(generator, shown.asked), **drawn}


def confidence(folder: Path) -> float:
    """How much surer the judge is of what captions ask for than of what others do, from their drawings' run folder.

    For each thing its confidence (of two cats that in the second surest, 0 if one was found), less its mean confidence
    in the things of all captions that do not name it: 1 is perfect, 0 what drawings get that heed no caption. Early in
    a training few drawings pass all of GenEval's rules, and the share that does tells no two models apart; this does.
    """
    asked = {row["key"]: row["include"] for row in _rows(folder / "items.jsonl")}
    everything = Counter((thing["class"], thing["count"]) for things in asked.values() for thing in things)
    (detections,) = folder.glob("detections-*.jsonl")
    found = []
    for row in _rows(detections):
        own = {thing["class"] for thing in asked[row["key"]]}
        others = {thing: times for thing, times in everything.items() if thing[0] not in own}
        for picture in row["pictures"]:
            rest = sum(times * _surety(picture, *thing) for thing, times in others.items()) / max(
                1, sum(others.values())
            )
            found += [_surety(picture, thing["class"], thing["count"]) - rest for thing in asked[row["key"]]]
    return sum(found) / len(found)


def _surety(picture: list[dict[str, Any]], name: str, count: int) -> float:
    scores = sorted((one["score"] for one in picture if one["class"] == name), reverse=True)
    return scores[count - 1] if len(scores) >= count else 0.0


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _understanding(generator: Generator, asked: Sequence[tuple[Sample, Question]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    loss = tokens = 0.0
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        pictures = [[sample.images[0]] for sample, _ in some]
        answers = generator.text(pictures, [question.question for _, question in some])
        for (_, question), answer in zip(some, answers, strict=True):
            right.setdefault(question.kind, []).append(normalize(answer) == normalize(question.answer))
        conversations = [
            Conversation((Turn("user", (0, question.question)),), (sample.images[0],)) for sample, question in some
        ]
        true = [question.answer for _, question in some]
        loss -= sum(total for total, _ in log_likelihoods(generator, conversations, true))
        tokens += sum(len(generator.renderer.text_ids(answer)) for answer in true)
    shares = [sum(found) / len(found) for found in right.values()]
    return {"questions": sum(shares) / len(shares), "answer_loss": loss / tokens}


@torch.inference_mode()
def _error(generator: Generator, shown: HeldOut) -> float:
    error = 0.0
    for start in range(0, len(shown.drawn), AT_ONCE):
        some = shown.drawn[start : start + AT_ONCE]
        true_BME = generator.encode([picture for picture, _ in some]).float()
        own_BME = generator.vectors([caption for _, caption in some])
        error += float((own_BME - true_BME).pow(2).mean((1, 2)).sum())
    return error / len(shown.drawn)
