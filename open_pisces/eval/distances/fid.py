"""The COCO-30K protocol of the Frechet Inception Distance, for any feature network, captions and pictures.

A picture is drawn of each of 30,000 captions of COCO val2014, and the distance of all of them from real pictures is
taken with Inception's features at 256 pixels. Papers differ in what they leave unsaid: which captions, which real
pictures, which resizing. Here the run folder and the result say all of it; compare only what says the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image as Pillow

from open_pisces.data.order import stream
from open_pisces.eval.distances.distances import (
    GROUPS,
    FeatureStatistics,
    check_enough,
    check_rulers,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    real_baselines,
)
from open_pisces.eval.distances.features import FeatureNetwork, Features, FeatureSpec, extract, pictures_of
from open_pisces.eval.distances.run_features import RunFeatures
from open_pisces.eval.evaluation import Evaluation, Score, draw, rounded
from open_pisces.eval.intervals import EvaluationError, Interval
from open_pisces.eval.run import Row, RunFolder

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

COCO = 30_000
"""Captions of COCO val2014 that the protocol asks for, one picture each."""
SIDE = 256
NOISE = 100
"""Pictures of noise behind the upper baseline."""


@dataclass(frozen=True)
class FidScore(Score):
    """How far drawn pictures are from real ones; ``name`` is `FeatureSpec.distance`, ``score`` the Frechet distance."""

    n_real: int
    biased: bool
    """Too few pictures for the width of the features."""
    kid: Interval | None
    """The kernel distance; None where only the real pictures' statistics are known."""
    baseline: float | None
    """About what as many other real pictures would score, hence a perfect model; None as ``kid``."""
    baselines: dict[str, float]
    """``real`` and ``halves`` of `real_baselines`, and ``noise``, the score of pictures of noise."""
    interval: str
    """How it was made."""
    ruler: FeatureSpec
    sides: dict[str, tuple[int, int] | None]
    """Least and greatest side of the ``real`` and the ``drawn`` pictures, in pixels."""
    protocol: str
    """``COCO-30K`` or ``own``."""


@dataclass
class FidEvaluation(Evaluation):
    """Draw a picture of each of ``limit`` captions and measure their distance from real pictures.

    All pictures are cut to ``side`` alike: short side resized bicubically, centre cut out. All pictures of ``real``
    count, not only those whose captions were drawn. The run keeps the features (`RunFeatures`); a command with another
    network, side or real pictures goes on with the same drawn ones, and measures them anew.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        network: `open_pisces.eval.distances.features.Inception` for a FID.
        captions: COCO's ``captions_val2014.json``, or JSON lines with ``caption`` and, if there are several for a
            picture, ``image_id``.
        real: a folder of pictures, or a file of `FeatureStatistics`.
        limit: captions, drawn by ``seed`` if the file has more.
        side: what all pictures are cut to first.
        steps: denoising steps; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of captions and noise; each batch of ``batch_size`` captions starts from noise of its own.
        batch_size: captions at once.
        biased: allow fewer pictures than `check_enough` wants.

    Raises:
        EvaluationError: as `compare`, `caption_items`, `measure_real` and `extract` do; before drawing.
    """

    task: ClassVar[str] = "fid"
    stages: ClassVar[Sequence[str]] = ("images",)

    generator: Generator
    network: FeatureNetwork
    captions: str | Path
    real: str | Path
    limit: int = COCO
    side: int = SIDE
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    biased: bool = False

    def __post_init__(self) -> None:
        self.device = str(self.generator.device)

    @property
    def settings(self) -> Row:
        """What shapes the pictures. What measures them is kept with the features."""
        return {name: getattr(self, name) for name in ("seed", "steps", "guidance_scale", "batch_size")}

    def items(self) -> list[Row]:
        """The captions."""
        rows = caption_items(self.captions, self.limit, self.seed)
        check_enough(self.limit, self.network.ruler.width, "drawn", self.biased)
        self.reference  # measured now, so that what cannot be compared is refused before a run begins  # noqa: B018
        return rows

    @cached_property
    def reference(self) -> Features | FeatureStatistics:
        """What the drawn pictures are compared with."""
        return measure_real(self.network, self.real, self.side, self.biased)

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Draw a batch. Its noise depends on its place, so that an interrupted run goes on with the same."""
        # The official protocol says nothing of noise. One seed for all batches would repeat the same few starts.
        place = run.items.index(batch[0])
        noise = stream(self.seed, "eval", "fid", "noise", place)
        draw(self.generator, run, batch, int(noise.integers(2**31)))

    def complete(self, run: RunFolder) -> None:
        """Draw what is missing, then keep all features."""
        super().complete(run)
        drawn, noise = self._measured(run)
        rows = {"drawn": drawn, "noise": noise}
        statistics = {}
        if isinstance(self.reference, Features):
            rows["real"] = self.reference
        else:
            statistics["real"] = self.reference
        RunFeatures(rows, statistics, {"side": self.side, "biased": self.biased}).save(run)

    def _measured(self, run: RunFolder) -> tuple[Features, Features]:
        """Features of the drawn pictures and of noise: those that the run keeps, if the same ruler made them."""
        kept = RunFeatures.made_with(self.network.ruler.after_cut(self.side), run)
        if kept:
            return kept["drawn"], kept["noise"]
        drawn = extract(self.network, pictures_of(run), self.side)
        # Of the drawn pictures' size, for noise that is resized is smoother.
        shape = (NOISE, drawn.sides[0], drawn.sides[0], 3)
        pixels = stream(0, "eval", "noise").integers(0, 256, shape, dtype=np.uint8)
        pictures = [Pillow.fromarray(picture) for picture in pixels]
        return drawn, extract(self.network, pictures_of(pictures), self.side)

    def score(self, run: RunFolder) -> FidScore:
        """From the features that the run keeps."""
        return score_run(run)


def score_run(run: RunFolder) -> FidScore:
    """The score of a run from the features that it keeps.

    Raises:
        RunError: if it keeps none yet.
    """
    kept = RunFeatures.load(run)
    real = kept.statistics["real"] if "real" in kept.statistics else kept.rows["real"]
    seed = run.manifest.settings["seed"]
    return compare(real, kept.rows["drawn"], kept.rows["noise"], kept.facts["side"], kept.facts["biased"], seed)


def compare(
    real: Features | FeatureStatistics,
    drawn: Features,
    noise: Features,
    side: int | None = None,
    biased: bool = False,
    seed: int = 0,
) -> FidScore:
    """How far drawn pictures are from real ones.

    Args:
        real: features of the real pictures, or only their statistics.
        drawn: features of the drawn ones.
        noise: features of pictures of noise, for the upper baseline.
        side: what all were cut to first.
        biased: give a figure even if there are too few pictures for the width of the features.
        seed: of groups and halves.

    Raises:
        EvaluationError: too few pictures, or sets that were measured differently.
    """
    rows = real if isinstance(real, Features) else None
    whole = FeatureStatistics.of(real) if isinstance(real, Features) else real
    for n, what in ((whole.n, "real"), (len(drawn), "drawn")):
        check_enough(n, drawn.ruler.width, what, biased)
    found = rounded(frechet_interval(real, drawn, seed=seed))
    baselines = real_baselines(rows, len(drawn), seed) if rows else {}
    baselines["noise"] = round(frechet_distance(whole, FeatureStatistics.of(noise)), 4)
    # A figure that differs in any of the three does not compare with published ones.
    published = drawn.ruler.distance == "FID" and len(drawn) == COCO and side == SIDE
    return FidScore(
        name=drawn.ruler.distance,
        score=found.score,
        low=found.low,
        high=found.high,
        n=len(drawn),
        n_real=whole.n,
        biased=min(whole.n, len(drawn)) <= drawn.ruler.width,
        kid=rounded(kernel_distance(rows, drawn, seed), 6) if rows else None,
        baseline=baselines.get("real"),
        baselines=baselines,
        interval=f"95 %, jackknife over {GROUPS} groups of {'both sets' if rows else 'the drawn set alone'}",
        ruler=drawn.ruler,
        sides={"real": rows.sides if rows else None, "drawn": drawn.sides},
        protocol="COCO-30K" if published else "own",
    )


def measure_real(
    network: FeatureNetwork, real: str | Path, side: int = SIDE, biased: bool = False
) -> Features | FeatureStatistics:
    """Features of a folder of real pictures, or the statistics of a file.

    Raises:
        EvaluationError: too few or unreadable pictures, statistics of another network or preparation.
    """
    ruler = network.ruler.after_cut(side)
    if Path(real).is_file():
        known = FeatureStatistics.load(real)
        check_rulers(known.ruler, ruler)
        check_enough(known.n, ruler.width, "real", biased)
        return known
    sources = pictures_of(real)
    # Checked before 30,000 pictures go through the network, and again by `compare`.
    check_enough(len(sources), ruler.width, "real", biased)
    return extract(network, sources, side)


def caption_items(path: str | Path, limit: int, seed: int) -> list[Row]:
    """``limit`` pictures' captions, one of each picture, both drawn by ``seed``, in the order of the file.

    Raises:
        EvaluationError: no such file, no JSON, an entry without a caption, or fewer pictures than asked.
    """
    pictures: dict[str, list[str]] = {}
    for number, row in enumerate(_entries(Path(path))):
        caption = row.get("caption") if isinstance(row, dict) else None  # boxes and image lists have none
        if not isinstance(caption, str) or not caption.strip():
            raise EvaluationError(
                f"{path}: entry {number} has no `caption` in words ({json.dumps(row)[:60]}): COCO's annotations have "
                f"`image_id` and `caption`"
            )
        pictures.setdefault(str(row.get("image_id", f"entry {number}")), []).append(caption.strip())
    if not 0 < limit <= len(pictures):
        raise EvaluationError(f"{path} has captions of {len(pictures):,} pictures, asked are {limit:,}: ask for fewer")
    keys = list(pictures)
    # In the order of the file, and a draw for every picture of it: a larger limit keeps the captions of a smaller one.
    chosen = sorted(stream(seed, "eval", "fid", "pictures").permutation(len(keys))[:limit].tolist())
    draws = stream(seed, "eval", "fid", "captions").random(len(keys))
    rows = []
    for place in chosen:
        captions = pictures[keys[place]]
        rows.append({"key": keys[place], "prompt": captions[int(draws[place] * len(captions))]})
    return rows


def _entries(path: Path) -> list[Any]:
    """The annotations of a file of captions."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
        rows = found["annotations"] if isinstance(found, dict) else found
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file; give COCO's captions_val2014.json or JSON lines") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: not valid JSON ({error}); give JSON, or JSON lines as .jsonl") from None
    except KeyError:
        raise EvaluationError(f"{path}: no `annotations`; give COCO's file of captions, not of boxes") from None
    return rows if isinstance(rows, list) else [rows]
