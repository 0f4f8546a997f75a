"""GenEval: pictures of prompts, what detectors find in them, and the scores of that.

A run folder (`open_pisces.eval.run`) holds the prompts in the official form, the pictures in the official layout and,
for each detector that looked, ``detections-NAME.jsonl``: everything it found, with the thresholds it brought. Scores
come from those rows alone, so they can be made again under other rules without model or pictures.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL.Image import Image

from open_pisces.eval.drawing.detection import Detection, Detector
from open_pisces.eval.drawing.prompts import Prompt, PromptSetError, check_known, from_row, to_row
from open_pisces.eval.drawing.rules import DrawingScore, Rules, Verdict, summarize, verdict_of
from open_pisces.eval.evaluation import Evaluation, draw
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Row, RunError, RunFolder

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

_SHOWN = 3  # wrong pictures of each category in the scores


def items_of(prompts: Sequence[Prompt]) -> list[Row]:
    """What a run asks: the official rows, each with its key."""
    return [{"key": prompt.key, **to_row(prompt)} for prompt in prompts]


def prompts_of(run: RunFolder) -> list[Prompt]:
    """The prompts of a run, checked.

    Raises:
        RunError: if the run asks something that is no GenEval prompt.
    """
    try:
        return [from_row(item) for item in run.items]
    except PromptSetError as error:
        raise RunError(f"{run.folder} is no run of GenEval: {error}") from None


# ----------------------------------------------------------------------------------------------------- the evaluations


class JudgedPictures(Evaluation):
    """Pictures of prompts that one or more detectors look at; subclasses say how the pictures come about."""

    detectors: Sequence[Detector]
    """The first one's figures are the scores."""

    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """What the pictures have to show."""

    def items(self) -> list[Row]:
        """The official rows.

        Raises:
            PromptSetError: if a detector does not know a class or color; nothing is drawn then.
        """
        prompts = self.prompts()
        for detector in self.detectors:
            check_known(prompts, detector.classes, detector.colors, detector.name)
        return items_of(prompts)

    @property
    def stages(self) -> Sequence[str]:
        """What each detector finds."""
        return [rows_name(detector.name) for detector in self.detectors]

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Detect what is in the pictures of a batch."""
        detector = next(one for one in self.detectors if rows_name(one.name) == stage)
        detect(detector, run, batch, [self.pictures(run, item["key"]) for item in batch])

    def pictures(self, run: RunFolder, key: str) -> list[Image]:
        """The pictures of an item."""
        return run.images(key)


class JudgedDrawing(JudgedPictures):
    """Pictures that a model draws of the prompts; subclasses have `sampler` as attributes."""

    generator: Generator
    sampler = ("n", "steps", "guidance_scale", "seed", "batch_size")
    """Settings of `open_pisces.eval.evaluation.draw`."""

    def __post_init__(self) -> None:
        self.device = str(self.generator.device)

    @property
    def stages(self) -> Sequence[str]:
        """The pictures, then what each detector finds in them."""
        return ["images", *super().stages]

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Draw a batch, or detect what is in it."""
        if stage == "images":
            draw(self.generator, run, batch)
        else:
            super().answer(run, stage, batch)


@dataclass
class GenEval(JudgedDrawing):
    """GenEval of a model: its drawings of given prompts.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        asked: prompts of `open_pisces.eval.drawing.prompts`.
        detectors: the first one's figures are the scores; the others' rows are kept beside them.
        n: pictures of each prompt; official 4.
        steps: of the decoder's sampler; None is the model's own (official sampler: 50).
        guidance_scale: None is the model's own (official sampler: 9.0).
        seed: of the noise; official 42.
        batch_size: prompts at once.
    """

    generator: Generator
    asked: Sequence[Prompt]
    detectors: Sequence[Detector]
    n: int = 4
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 42
    batch_size: int = 16
    task = "geneval"

    @property
    def settings(self) -> Row:
        """Those of the sampler."""
        return {name: getattr(self, name) for name in self.sampler}

    def prompts(self) -> Sequence[Prompt]:
        """Those that were given."""
        return self.asked

    def score(self, run: RunFolder) -> GenEvalScore:
        """By the first detector's rows."""
        return score_run(run, self.detectors[0].name)


# ------------------------------------------------------------------------------------------------------ detections


def rows_name(detector: str) -> str:
    """The name of a detector's rows in a run folder."""
    return f"detections-{re.sub(r'[^a-z0-9]+', '-', detector.lower()).strip('-')}"


def detect(
    detector: Detector,
    run: RunFolder,
    batch: Sequence[Row],
    pictures: Sequence[Sequence[Image]],
    rules: Rules | None = None,
) -> None:
    """Keep what a detector finds in the pictures of a batch.

    Args:
        detector: it is asked for colors of those detections that the rules may look at.
        run: where the rows are kept, as `rows_name`.
        batch: the items.
        pictures: of each item.
        rules: whose overlap suppression the rows have to serve; None is the official ones.
    """
    rules = rules or Rules.of(detector)
    images: list[Image] = []
    colored: list[dict[str, int]] = []
    for item, shown in zip(batch, pictures, strict=True):
        images += shown
        colored += [_colored(from_row(item), rules)] * len(shown)
    # One call for all pictures of a batch: a detector is fastest on many.
    found = iter(detector.detect(images, colored))
    thresholds = {"threshold": detector.threshold, "counting_threshold": detector.counting_threshold}
    rows = []
    for item, shown in zip(batch, pictures, strict=True):
        packed = [_packed(next(found)) for _ in shown]
        # Name and thresholds stand in every row: a file that two detectors wrote into is noticed.
        rows.append({"key": item["key"], "pictures": packed, "detector": detector.name, **thresholds})
    run.append(rows_name(detector.name), rows)


def _colored(prompt: Prompt, rules: Rules) -> dict[str, int]:
    """Of how many detections of each class the rules may ask the color."""
    asked: dict[str, int] = {}
    for wanted in prompt.include:
        if wanted.color:
            # Where overlapping detections are dropped, any of those that count may move up.
            count = wanted.count if rules.max_overlap >= 1 else rules.max_objects
            asked[wanted.name] = max(count, asked.get(wanted.name, 0))
    return asked


def _packed(detections: Sequence[Detection]) -> list[Row]:
    """Detections as they stand in a row, without their masks."""
    rows = []
    for one in detections:
        # Plain numbers: JSON knows none of numpy's. Masks are left out, for no rule looks at them.
        box = [float(edge) for edge in one.box]
        rows.append({"class": one.name, "box": box, "score": float(one.score), "colours": dict(one.colors)})
    return rows


# ----------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class Findings:
    """What one detector found in a run's pictures, and what the rules say of it."""

    detector: str
    rules: Rules
    prompts: list[Prompt]
    detections: list[list[list[Detection]]]
    """Of each prompt's pictures."""
    verdicts: list[list[Verdict]]
    """On each prompt's pictures."""

    @property
    def correct(self) -> list[list[bool]]:
        """Whether each prompt's pictures are correct."""
        return [[verdict.correct for verdict in verdicts] for verdicts in self.verdicts]


def detectors_of(run: RunFolder) -> list[str]:
    """The names of the detectors that looked at a run, sorted.

    Raises:
        RunError: if none has.
    """
    names = [run.rows(path.stem)[0]["detector"] for path in sorted(run.folder.glob("detections-*.jsonl"))]
    if not names:
        raise RunError(f"{run.folder} has no detections yet; the command that began the run goes on with it")
    return sorted(names)


def read_findings(run: RunFolder, detector: str = "", rules: Rules | None = None) -> Findings:
    """Read a detector's rows and judge them; neither pictures nor a model are needed.

    Args:
        run: drawn and looked at.
        detector: whose rows; "" if only one has looked.
        rules: None takes the official ones with the detector's own thresholds.

    Raises:
        RunError: if rows are missing, of several detectors, or of several thresholds.
        EvaluationError: if the rules ask for less confident detections than the detector promises to give.
    """
    names = [rows_name(detector)] if detector else sorted(path.stem for path in run.folder.glob("detections-*.jsonl"))
    if len(names) != 1:
        which = f"{' and '.join(names)}: say which" if names else "none yet: detect first"
        raise RunError(f"{run.folder} has detections of {which}")
    rows = run.rows(names[0])
    kinds = sorted({(row["detector"], row["threshold"], row["counting_threshold"]) for row in rows})
    if len(kinds) > 1:
        both = " and ".join(f"{name} (thresholds {low}, {high})" for name, low, high in kinds)
        raise RunError(f"{run.folder}/{names[0]}.jsonl holds rows of {both}: delete it and detect again")
    name, *thresholds = kinds[0]
    rules = rules or Rules(*thresholds)
    # A detector keeps nothing it is not sure enough of, so looser rules would count too little and not say so.
    lowest = min(rules.threshold, rules.counting_threshold)
    if lowest < min(thresholds):
        raise EvaluationError(
            f"a threshold of {lowest} is below those of {name}, so what it found between may not have been noted: "
            f"detect again with a detector of that threshold"
        )
    prompts = prompts_of(run)
    found = []
    verdicts = []
    for prompt, row in zip(prompts, rows, strict=True):
        pictures = []
        for picture in row["pictures"]:
            pictures.append(
                [Detection(one["class"], tuple(one["box"]), one["score"], one["colours"]) for one in picture]
            )
        found.append(pictures)
        verdicts.append([verdict_of(prompt, picture, rules) for picture in pictures])
    return Findings(name, rules, prompts, found, verdicts)


@dataclass(frozen=True)
class WrongPicture:
    """A picture that does not show what its prompt says."""

    key: str
    prompt: str
    picture: int
    reasons: list[str]


@dataclass(frozen=True)
class GenEvalScore(DrawingScore):
    """Scores by one detector's rows."""

    detector: str
    rules: Rules
    examples: list[WrongPicture]
    """The first wrong pictures of each category."""


def score_run(run: RunFolder, detector: str = "", rules: Rules | None = None) -> GenEvalScore:
    """The scores of a run by one detector's rows; see `read_findings` for arguments and errors."""
    return score_findings(read_findings(run, detector, rules))


def score_findings(findings: Findings) -> GenEvalScore:
    """The scores of what one detector found."""
    wrong: dict[str, list[WrongPicture]] = {}
    for prompt, verdicts in zip(findings.prompts, findings.verdicts, strict=True):
        group = wrong.setdefault(prompt.tag, [])
        for number, verdict in enumerate(verdicts):
            # The first ones, not the worst or the best: nothing is picked.
            if not verdict.correct and len(group) < _SHOWN:
                group.append(WrongPicture(prompt.key, prompt.prompt, number, list(verdict.reasons)))
    scores = summarize([prompt.tag for prompt in findings.prompts], findings.correct)
    examples: list[WrongPicture] = []
    for group in wrong.values():
        examples += group
    return GenEvalScore(**vars(scores), detector=findings.detector, rules=findings.rules, examples=examples)
