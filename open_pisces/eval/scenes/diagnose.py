"""Where drawing loses its quality: on the way from a picture to vectors, back to pixels, or in what the LLM writes.

The frozen captions are drawn from four sources, each a step further from the truth, and judged by the same rules:

1. ``true``: the true pictures. What is missing here is the judge's fault.
2. ``decoder``: pictures from true vectors. The loss is gen-CLIP's and the decoder's: the upper bound of any LLM.
3. ``forced``: vectors that the LLM predicts when true ones are fed, as in training: what it has not learned.
4. ``free``: vectors that it predicts from its own, as in drawing: what its errors add up to.

Between 2 and 3 stands ``noise``: true vectors with white noise as large as the error in 3. What it costs, a decoder
that is trained on such vectors could win back; what is lost beyond it are things that the vectors no longer say.

Beside them: the error of the vectors by position, the drift of their norm and variance, whether they find their own
picture among all, a linear probe that reads the concept from them (so that gen-CLIP can be told from the decoder),
longer captions, other guidance, other seeds, and the empty caption. All of it in a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Image
from torch import Tensor

from open_pisces.datasets.scenes.composer import Cutouts, load_cutouts
from open_pisces.eval.drawing.detection import Detector
from open_pisces.eval.drawing.judged_run import JudgedPictures, detectors_of, read_findings
from open_pisces.eval.drawing.prompts import Prompt
from open_pisces.eval.drawing.rules import summarize
from open_pisces.eval.evaluation import Score, rounded
from open_pisces.eval.intervals import EvaluationError, Interval, macro_interval
from open_pisces.eval.run import Row, RunFolder
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.diagnose_plot import SOURCES, plot
from open_pisces.eval.scenes.diagnose_vectors import (
    Retrieval,
    VectorFigures,
    predict_vectors,
    probe_score,
    retrieval_score,
    train_probe,
    vector_figures,
    vector_rows,
)
from open_pisces.eval.scenes.drawing import frozen_prompts, measured
from open_pisces.eval.scenes.frozen import FrozenScene
from open_pisces.generate.painter import pictures

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

GUIDANCE = (1.0, 1.5, 2.0, 3.0)
SEEDS = 3
PROBED = 1500
"""Fresh single objects from which the probe learns."""
PLACES = {
    "decoder": ("gen-CLIP and the decoder", "train the decoder longer, or give it more of the vectors"),
    "forced": ("what the LLM has learned of the vectors", "train text to vectors longer, or with a larger LLM"),
    "free": ("what the LLM's own errors add up to", "train longer on its own vectors, or write fewer of them"),
}
"""Where the loss of a source lies, and what to try."""


@dataclass
class Diagnosis(JudgedPictures):
    """Drawings of the frozen captions from several sources, judged and compared; the result is plotted too.

    Args:
        generator: the model.
        detectors: judges; the figures are the first one's, the others' scores stand beside them.
        per_category: captions of each of GenEval's categories, at most 60.
        split: ``train``, or ``pairs`` for two things that no training has seen together.
        batch_size: captions at once.
        cutouts: what `open_pisces.datasets.scenes.composer.load_cutouts` gives; None loads the default ones.

    Raises:
        EvaluationError: when it is run, without artwork, without matplotlib, for an unknown split, or a number that is
            not there.
    """

    generator: Generator
    detectors: Sequence[Detector]
    per_category: int = 60
    split: str = "train"
    batch_size: int = 16
    cutouts: Cutouts | None = None
    task = "diagnose"

    def __post_init__(self) -> None:
        self.device = str(self.generator.device)

    @property
    def settings(self) -> Row:
        """Those of the captions and of what is drawn of them."""
        own = {name: getattr(self, name) for name in ("split", "per_category", "batch_size")}
        found = {"scenes": frozen_scenes.VERSION, "pictures": picture_names(self.generator), "probed": PROBED}
        scale = self.generator.pisces.settings.decoder.guidance_scale
        return {**own, **found, "pictures_differ": self._true[1], "guidance_scale": scale}

    def prompts(self) -> Sequence[Prompt]:
        """The short captions."""
        return frozen_prompts(self.split, self.per_category)

    def items(self) -> list[Row]:
        """The prompts, with their detailed captions."""
        rows = super().items()
        return [{**row, "detailed": scene.detailed} for row, scene in zip(rows, self._scenes, strict=True)]

    @cached_property
    def _scenes(self) -> list[FrozenScene]:
        """The scenes behind the captions."""
        by_key = {scene.key: scene for scene in frozen_scenes.load(f"drawing/{self.split}")}
        return [by_key[prompt.key] for prompt in self.prompts()]

    @cached_property
    def _true(self) -> tuple[list[Image], int]:
        """The true pictures, and how many are not what they were when the scenes were frozen."""
        return frozen_scenes.pictures(self._scenes, self._artwork)

    @cached_property
    def _artwork(self) -> Cutouts:
        return load_cutouts() if self.cutouts is None else self.cutouts

    @property
    def stages(self) -> Sequence[str]:
        """What the vectors say, the pictures, then what each detector finds in them."""
        return ["vectors", "images", *super().stages]

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Keep the rows or pictures of a batch."""
        # Vectors are those of all captions, so a batch is found by its places.
        keys = {item["key"] for item in batch}
        places = [place for place, item in enumerate(run.items) if item["key"] in keys]
        if stage == "vectors":
            run.append(stage, [self._vector_rows[place] for place in places])
        elif stage == "images":
            names = run.manifest.settings["pictures"]
            drawn = [_drawn(self.generator, name, places, self._true[0], self._vectors) for name in names]
            run.save_images({item["key"]: pictures for item, *pictures in zip(batch, *drawn, strict=True)})
        else:
            super().answer(run, stage, batch)

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        """Of all captions: the noise is as large as their mean error."""
        return predict_vectors(self.generator, self._scenes, self._true[0], self.batch_size)

    @cached_property
    def _vector_rows(self) -> list[Row]:
        """Of all captions: a picture's own vectors are looked for among those of all."""
        probe = train_probe(self.generator, self._artwork, PROBED, self.batch_size)
        return vector_rows(self.items(), self._vectors, probe)

    def complete(self, run: RunFolder) -> None:
        """As every evaluation, and note how far the empty caption is off."""
        super().complete(run)
        # Of the model as a whole: it belongs to no caption.
        run.note("model", {"null_distance": self.generator.null_distance()})

    def score(self, run: RunFolder) -> DiagnosisScore:
        """By the first detector's rows."""
        return score_run(run, [detector.name for detector in self.detectors])

    def run(self, model: str | Path, folder: str | Path | None = None) -> Row:
        """As every evaluation, and plot the figures; the result names the PNG."""
        if find_spec("matplotlib") is None:
            raise EvaluationError("matplotlib is not installed: pip install 'open-pisces[eval]'")
        scores = super().run(model, folder)
        png = Path(scores["folder"]) / "diagnosis.png"
        plot(scores, png)
        return {**scores, "png": str(png)}


def picture_names(generator: Generator) -> list[str]:
    """What is drawn of every caption, in order."""
    usual = generator.pisces.settings.decoder.guidance_scale
    # The usual scale is drawn already, as `free`.
    sweep = [f"guidance {scale:g}" for scale in GUIDANCE if scale != usual]
    return [*SOURCES, "noise", "detailed", *(f"seed {j}" for j in range(1, SEEDS)), *sweep]


# ----------------------------------------------------------------------------------------------------- the pictures


def _drawn(
    generator: Generator, name: str, places: Sequence[int], true: Sequence[Image], vectors: dict[str, Tensor]
) -> list[Image]:
    """One picture of each caption from one source; picture j of a caption starts from noise of (0, j)."""
    if name == "true":
        return [true[place] for place in places]
    kind, _, value = name.partition(" ")
    own_vectors = {"decoder": "true", "noise": "noise", "forced": "forced", "detailed": "detailed"}
    source = vectors[own_vectors.get(kind, "free")]
    # Guidance turns away from the empty caption: of true vectors that is the data's own, of the LLM's what it says.
    painter = generator.painter
    null_ME = painter.bridge.statistics.null_ME if kind in ("decoder", "noise") else generator.null_condition
    number = int(value) if kind == "seed" else 0
    scale = float(value) if kind == "guidance" else None
    # The decoder is told how wrong its vectors are, and true ones are not (as `Painter.reconstruct`).
    level = 0.0 if kind == "decoder" else None
    return pictures(painter.pixels(source[list(places)], null_ME, [number] * len(places), None, scale, 0, level))


# ------------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class SourceScore:
    """GenEval's score of one picture a caption."""

    score: float | None
    low: float | None
    high: float | None
    n: int
    categories: dict[str, float]


@dataclass(frozen=True)
class NoiseScore(SourceScore):
    """Of true vectors with noise."""

    lost: Interval
    """Against true vectors without."""


@dataclass(frozen=True)
class Diversity:
    """How far pictures of one caption lie apart, against pictures of different captions; and their verdicts."""

    within: float
    """Mean absolute difference of pictures of one caption from other noise, pixels in [0, 1]."""
    between: float
    """Of pictures of neighboring captions."""
    same_verdict: float
    """Share of captions whose pictures are all correct or all wrong."""
    scores: list[float]
    """Share of correct pictures, for each seed."""


@dataclass(frozen=True)
class DiagnosisScore(Score):
    """The first detector's figures; the score is that of the source ``free``."""

    baseline: float
    scenes: str
    split: str
    detector: str
    sources: dict[str, SourceScore]
    by_source: dict[str, float | None]
    losses: dict[str, Interval]
    """What is lost on the way to each source, caption by caption."""
    noise: NoiseScore
    captions: Interval
    """What detailed captions win over short ones."""
    guidance: dict[str, float | None]
    """Score by guidance scale."""
    diversity: Diversity
    vectors: dict[str, VectorFigures]
    retrieval: dict[str, Retrieval]
    probe: dict[str, Row]
    """How often the probe reads the concept of single objects: an interval and ``n``, which may be 0."""
    null_distance: float
    judges: dict[str, Row]
    """What each detector was measured at."""
    agreement: dict[str, float]
    """Share of drawn pictures on which another detector's verdict is the first one's."""
    others: dict[str, dict[str, float | None]]
    """The sources' scores by the other detectors."""
    sentence: str
    """Where the next gain lies."""


def score_run(run: RunFolder, names: Sequence[str] = ()) -> DiagnosisScore:
    """The figures of a run from its rows; the first detector's, the others beside them.

    Args:
        run: complete.
        names: of the detectors; none takes all that have looked, sorted.
    """
    names = names or detectors_of(run)
    settings = run.manifest.settings
    tags = [item["tag"] for item in run.items]
    columns, *others = [_columns(run, name) for name in names]
    sources = {name: _score(tags, columns[name]) for name in SOURCES}
    # What is missing of true pictures is the judge's fault, held against a perfect score.
    losses = {"true": _difference(tags, np.ones(len(tags)), columns["true"])}
    for before, after in zip(SOURCES, SOURCES[1:], strict=False):
        losses[after] = _difference(tags, columns[before], columns[after])
    lost = _difference(tags, columns["decoder"], columns["noise"])
    noise = NoiseScore(**vars(_score(tags, columns["noise"])), lost=lost)
    guidance = {str(settings["guidance_scale"]): sources["free"].score}
    for name in settings["pictures"]:
        if name.startswith("guidance"):
            guidance[name.split()[1]] = _score(tags, columns[name]).score
    agreement = {}
    other_scores = {}
    for name, other in zip(names[1:], others, strict=True):
        # True pictures are left out: on those both are nearly always right.
        same = [columns[source] == other[source] for source in columns if source != "true"]
        agreement[name] = round(float(np.mean(same)), 4)
        other_scores[name] = {source: _score(tags, other[source]).score for source in SOURCES}
    rows = run.rows("vectors")
    return DiagnosisScore(
        name=Diagnosis.task,
        score=sources["free"].score,
        low=sources["free"].low,
        high=sources["free"].high,
        n=sources["free"].n,
        baseline=0.0,
        scenes=settings["scenes"],
        split=settings["split"],
        detector=names[0],
        sources=sources,
        by_source={name: row.score for name, row in {**sources, "noise": noise}.items()},
        losses=losses,
        noise=noise,
        captions=_difference(tags, columns["detailed"], columns["free"]),
        guidance=guidance,
        diversity=_diversity(run, columns),
        vectors=vector_figures(rows),
        retrieval={name: retrieval_score(rows, name) for name in ("forced", "free")},
        probe={name: probe_score(rows, name) for name in ("true", "forced", "free")},
        null_distance=run.noted("model")["null_distance"],
        judges={name: measured(name) for name in names},
        agreement=agreement,
        others=other_scores,
        sentence=sentence(losses, lost.score),
    )


def _columns(run: RunFolder, detector: str) -> dict[str, np.ndarray]:
    """Whether the picture of every caption is correct, for each source."""
    correct = np.array(read_findings(run, detector).correct, dtype=float)
    return dict(zip(run.manifest.settings["pictures"], correct.T, strict=True))


def _score(tags: Sequence[str], hits: np.ndarray) -> SourceScore:
    """GenEval's score of one picture a caption."""
    found = summarize(tags, [[bool(hit)] for hit in hits])
    categories = {tag: row.score for tag, row in found.categories.items()}
    return SourceScore(found.score, found.low, found.high, found.n, categories)


def _difference(tags: Sequence[str], before: np.ndarray, after: np.ndarray) -> Interval:
    """How much is lost between two sources, caption by caption, with its interval."""
    lost: dict[str, list[float]] = {}
    for tag, difference in zip(tags, before - after, strict=True):
        lost.setdefault(tag, []).append(difference)
    return rounded(macro_interval(lost))


def _diversity(run: RunFolder, columns: Mapping[str, np.ndarray]) -> Diversity:
    """The pictures of the source ``free``, and those from other noise."""
    names = ["free", *(f"seed {j}" for j in range(1, SEEDS))]
    places = [run.manifest.settings["pictures"].index(name) for name in names]
    pixels = []
    for item in run.items:
        images = run.images(item["key"])
        pixels.append([np.asarray(images[j].convert("RGB"), dtype=np.float32) / 255 for j in places])
    by_seed = np.array(pixels).swapaxes(0, 1)
    within = [np.abs(a - b).mean() for a, b in combinations(by_seed, 2)]
    # Against the next caption only: one comparison for each is enough for a mean.
    between = np.abs(by_seed[0] - np.roll(by_seed[0], 1, axis=0)).mean()
    hits = np.stack([columns[name] for name in names])
    return Diversity(
        within=round(float(np.mean(within)), 4),
        between=round(float(between), 4),
        same_verdict=round(float((hits == hits[:1]).all(0).mean()), 4),
        scores=[round(float(row.mean()), 4) for row in hits],
    )


def sentence(losses: Mapping[str, Interval], noise: float) -> str:
    """Where the next gain lies, by the largest loss; ``noise`` is what noise of the errors' size loses."""
    # PLACES leaves out the judge's own loss: nothing can be won there by training.
    place = max(PLACES, key=lambda name: losses[name].score)
    loss = losses[place]
    where, advice = PLACES[place]
    rest = ", ".join(f"{PLACES[name][0]} {100 * losses[name].score:.0f}" for name in PLACES if name != place)
    return (
        f"The largest loss, {100 * loss.score:.0f} points [{100 * loss.low:.0f}, {100 * loss.high:.0f}], lies "
        f"in {where} (the others: {rest}): {advice}. White noise of the size of its errors costs {100 * noise:.0f} on "
        f"true vectors: as much a decoder that is used to it could win."
    )
