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

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from open_pisces.datasets.scenes.composer import Cutouts, load_cutouts
from open_pisces.eval.drawing.detection import Detector
from open_pisces.eval.drawing.judged_run import detect, items_of, verdicts
from open_pisces.eval.drawing.rules import summarise
from open_pisces.eval.intervals import EvaluationError, macro_interval, mean_interval
from open_pisces.eval.run import Manifest, Row, RunFolder, model_hash
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes.diagnose_plot import SOURCES, plot
from open_pisces.eval.scenes.drawing import frozen_prompts, measured
from open_pisces.eval.scenes.vqa import fresh_scenes

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


def diagnose(
    generator: Generator,
    model: str | Path,
    detectors: Sequence[Detector],
    folder: str | Path | None = None,
    per_category: int = 60,
    split: str = "train",
    batch_size: int = 16,
    cutouts: Cutouts | None = None,
) -> Row:
    """Draw, judge and compare; what is there already of the same run is not made again.

    Args:
        generator: the model.
        model: its folder, for the manifest.
        detectors: judges; the figures are the first one's, the others' scores stand beside them.
        folder: the run's; None chooses one by the manifest (`RunFolder.open`).
        per_category: captions of each of GenEval's categories, at most 60.
        split: ``train``, or ``pairs`` for two things that no training has seen together.
        batch_size: captions at once.
        cutouts: what `open_pisces.datasets.scenes.composer.load_cutouts` gives; None loads the default ones.

    Returns:
        ``score`` (free), ``sources``, ``losses``, ``captions``, ``guidance``, ``diversity``, ``vectors``,
        ``retrieval``, ``probe``, ``null_distance``, ``others``, ``sentence``, ``png`` and ``folder``.

    Raises:
        EvaluationError: without artwork, without matplotlib, for an unknown split, or a number that is not there.
    """
    if find_spec("matplotlib") is None:
        raise EvaluationError("matplotlib is not installed: pip install 'open-pisces[eval]'")
    cutouts = load_cutouts() if cutouts is None else cutouts
    asked = items_of(frozen_prompts(split, per_category))
    by_key = {scene.key: scene for scene in frozen_scenes.load(f"drawing/{split}")}
    scenes = [by_key[item["key"]] for item in asked]
    true, differ = frozen_scenes.pictures(scenes, cutouts)
    names = picture_names(generator)
    settings = {"scenes": frozen_scenes.VERSION, "split": split, "per_category": per_category, "pictures": names}
    settings |= {"batch_size": batch_size, "pictures_differ": differ, "probed": PROBED}
    settings["guidance_scale"] = generator.pisces.settings.decoder.guidance_scale
    items = [{**item, "detailed": scene.detailed} for item, scene in zip(asked, scenes, strict=True)]
    manifest = Manifest("diagnose", str(model), model_hash(model), settings, device=str(generator.device))
    run = RunFolder.open(folder, manifest, items)
    if not (run.has("vectors") and run.has("images")):
        vectors = _vectors(generator, items, true, batch_size)
        if not run.has("vectors"):
            probe = _probe(generator, cutouts, batch_size)
            run.append("vectors", vector_rows(items, vectors, probe))
        _draw(generator, run, true, vectors)
    for detector in detectors:
        detect(detector, run)
    run.note("model", {"null_distance": generator.null_distance()})
    scores = run.write_scores(score_run(run, [detector.name for detector in detectors]))
    plot(scores, run.folder / "diagnosis.png")
    return {**scores, "png": str(run.folder / "diagnosis.png"), "folder": str(run.folder)}


def picture_names(generator: Generator) -> list[str]:
    """What is drawn of every caption, in order."""
    usual = generator.pisces.settings.decoder.guidance_scale
    sweep = [scale for scale in GUIDANCE if scale != usual]
    return [
        *SOURCES,
        "noise",
        "detailed",
        *(f"seed {j}" for j in range(1, SEEDS)),
        *(f"guidance {scale:g}" for scale in sweep),
    ]


# ----------------------------------------------------------------------------------------------------- the pictures


def _vectors(generator: Generator, items: Sequence[Row], true: Sequence[Image], batch_size: int) -> dict[str, Tensor]:
    """True and predicted vectors (n, M, E) of every caption, in the LLM's space."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("true", "forced", "free", "detailed")}
    for start in track(range(0, len(items), batch_size), "vectors", console=Console(stderr=True)):
        batch = items[start : start + batch_size]
        encoded = generator.encode(list(true[start : start + batch_size])).float()
        captions = [item["prompt"] for item in batch]
        found["true"].append(encoded)
        found["forced"].append(generator.vectors(captions, encoded))
        found["free"].append(generator.vectors(captions))
        found["detailed"].append(generator.vectors([item["detailed"] for item in batch]))
    vectors = {name: torch.cat(parts) for name, parts in found.items()}
    draws = torch.randn(vectors["true"].shape, generator=torch.Generator().manual_seed(0)).to(vectors["true"].device)
    spread_M1 = (vectors["forced"] - vectors["true"]).pow(2).mean((0, 2)).sqrt()[:, None]
    return {**vectors, "noise": vectors["true"] + spread_M1 * draws}


def _draw(generator: Generator, run: RunFolder, true: Sequence[Image], vectors: dict[str, Tensor]) -> None:
    """Pictures of every caption from every source, as named in the manifest."""
    places = {item["key"]: number for number, item in enumerate(run.items)}
    size: int = run.manifest.settings["batch_size"]
    batches = list(run.batches("images", size))
    for batch in track(batches, "drawing", console=Console(stderr=True), disable=not batches):
        rows = [places[item["key"]] for item in batch]
        drawn = [_drawn(generator, name, rows, true, vectors) for name in run.manifest.settings["pictures"]]
        run.save_images({item["key"]: [part[i] for part in drawn] for i, item in enumerate(batch)})


def _drawn(
    generator: Generator, name: str, rows: Sequence[int], true: Sequence[Image], vectors: dict[str, Tensor]
) -> list[Image]:
    """One picture of each caption from one source; picture j of a caption starts from noise of (0, j)."""
    if name == "true":
        return [true[row] for row in rows]
    kind, _, value = name.partition(" ")
    source = {"decoder": "true", **{own: own for own in ("noise", "forced", "detailed")}}.get(kind, "free")
    painter = generator.painter
    null_ME = painter.bridge.statistics.null_ME if kind in ("decoder", "noise") else generator.null_vectors
    number, scale = int(value) if kind == "seed" else 0, float(value) if kind == "guidance" else None
    return painter.paint(vectors[source][list(rows)], null_ME, [number] * len(rows), None, scale, 0)


# ------------------------------------------------------------------------------------------------------ the vectors


class Probe:
    """Reads the concept of a single object from its vectors: ridge regression on one-hot names (closed form).

    Beside the vectors themselves it sees their mean and largest value over the positions, for a thing stands anywhere.
    """

    def __init__(self, vectors_BME: Tensor, names: Sequence[str], strength: float = 10.0) -> None:
        self.names = sorted(set(names))
        x = self._seen(vectors_BME)
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = (x - self.mean) / self.std
        y = torch.tensor([[float(name == own) for name in self.names] for own in names], dtype=torch.float64)
        inner = x @ x.T + strength * x.shape[1] / 100 * torch.eye(len(x), dtype=torch.float64)
        self.weight = x.T @ torch.linalg.solve(inner, y - 1 / len(self.names))

    def __call__(self, vectors_BME: Tensor) -> list[str]:
        """The likeliest concept of each picture."""
        scores = (self._seen(vectors_BME) - self.mean) / self.std @ self.weight
        return [self.names[int(i)] for i in scores.argmax(1)]

    @staticmethod
    def _seen(vectors_BME: Tensor) -> Tensor:
        x = vectors_BME.double().cpu()
        return torch.cat([x.flatten(1), x.mean(1), x.amax(1)], 1)


def _probe(generator: Generator, cutouts: Cutouts, batch_size: int) -> Probe:
    """A probe trained on true vectors of fresh single objects."""
    singles = (s for s in fresh_scenes("train", 2, cutouts) if len((s.facts or {})["objects"]) == 1)
    samples = [sample for sample, _ in zip(singles, range(PROBED), strict=False)]
    parts = [samples[start : start + batch_size] for start in range(0, PROBED, batch_size)]
    vectors = torch.cat([generator.encode([s.images[0] for s in part]).float() for part in parts])
    return Probe(vectors, [(s.facts or {})["objects"][0]["concept"] for s in samples])


def vector_rows(items: Sequence[Row], vectors: dict[str, Tensor], probe: Probe) -> list[Row]:
    """What there is to say of each caption's predicted vectors.

    For each of ``forced`` and ``free``: ``error`` by position (mean squared over channels, in the targets' space),
    ``norm`` and ``variance`` by position (the latter: squared distance from the mean over all captions, mean over
    channels), ``rank`` of the own true picture among all by the distance of vectors (0 is the nearest; equal true
    vectors share the better rank), and whether the probe reads the concept (single objects only). ``true`` likewise.
    """
    true = vectors["true"]
    found: dict[str, dict[str, Any]] = {}
    for name in ("true", "forced", "free"):
        own = vectors[name]
        apart = torch.cdist(own.flatten(1).double(), true.flatten(1).double())
        found[name] = {
            "error": (own - true).pow(2).mean(-1),
            "norm": own.norm(dim=-1),
            "variance": (own - own.mean(0)).pow(2).mean(-1),
            "rank": (apart < apart.diagonal()[:, None] - 1e-9).sum(1),
            "read": probe(own),
        }
    return [
        {"key": item["key"], **{name: _of_one(part, i, item) for name, part in found.items()}}
        for i, item in enumerate(items)
    ]


def _of_one(part: dict[str, Any], i: int, item: Row) -> Row:
    """One caption's row."""
    row: Row = {name: [round(float(x), 5) for x in part[name][i]] for name in ("error", "norm", "variance")}
    row["rank"] = int(part["rank"][i])
    if item["tag"] in ("single_object", "colors"):
        row["probe"] = part["read"][i] == item["include"][0]["class"]
    return row


# ------------------------------------------------------------------------------------------------------- the figures


def score_run(run: RunFolder, detectors: Sequence[str]) -> Row:
    """The figures of `diagnose` from a run's rows; the first detector's, the others beside them."""
    names: list[str] = run.manifest.settings["pictures"]
    tags = [item["tag"] for item in run.items]
    judged = {name: _correct(run, name) for name in detectors}
    correct = judged[detectors[0]]
    columns = dict(zip(names, correct.T, strict=True))
    sources = {name: _score(tags, columns[name]) for name in SOURCES}
    losses = {
        after: _difference(tags, columns[before], columns[after])
        for before, after in zip(SOURCES, SOURCES[1:], strict=False)
    }
    noise = {**_score(tags, columns["noise"]), "lost": _difference(tags, columns["decoder"], columns["noise"])}
    rows, usual = run.rows("vectors"), run.manifest.settings["guidance_scale"]
    scores: Row = {
        "name": "diagnose",
        **{key: sources["free"][key] for key in ("score", "low", "high", "n")},
        "baseline": 0.0,
        "scenes": run.manifest.settings["scenes"],
        "split": run.manifest.settings["split"],
        "detector": detectors[0],
        "sources": sources,
        "by_source": {name: row["score"] for name, row in {**sources, "noise": noise}.items()},
        "losses": {"true": _difference(tags, np.ones_like(columns["true"]), columns["true"]), **losses},
        "noise": noise,
        "captions": _difference(tags, columns["detailed"], columns["free"]),
        "guidance": {str(usual): sources["free"]["score"]}
        | {n.split()[1]: _score(tags, columns[n])["score"] for n in names if n.startswith("guidance")},
        "diversity": _diversity(run, names, columns),
        "vectors": _vector_figures(rows),
        "retrieval": {name: _retrieval(rows, name) for name in ("forced", "free")},
        "probe": {name: _probe_score(rows, name) for name in ("true", "forced", "free")},
        **run.noted("model"),
        "judges": {name: measured(name) for name in detectors},
        "agreement": {name: _agreement(judged[detectors[0]], other, names) for name, other in list(judged.items())[1:]},
        "others": {
            name: {s: _score(tags, other.T[names.index(s)])["score"] for s in SOURCES}
            for name, other in list(judged.items())[1:]
        },
    }
    return {**scores, "sentence": sentence(scores)}


def _correct(run: RunFolder, detector: str) -> np.ndarray:
    """Whether picture j of caption i is correct, (captions, pictures)."""
    found = verdicts(run, detector)
    return np.array([[verdict.correct for verdict in found[item["key"]]] for item in run.items], dtype=float)


def _score(tags: Sequence[str], hits: np.ndarray) -> Row:
    """GenEval's score of one picture a caption."""
    found = summarise(tags, [[bool(hit)] for hit in hits])
    kept = {key: found[key] for key in ("score", "low", "high", "n")}
    return {**kept, "categories": {tag: row["score"] for tag, row in found["categories"].items()}}


def _difference(tags: Sequence[str], before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """How much is lost between two sources, caption by caption, with its interval."""
    apart = before - after
    lost = {tag: [x for own, x in zip(tags, apart, strict=True) if own == tag] for tag in dict.fromkeys(tags)}
    return macro_interval(lost).rounded()


def _agreement(one: np.ndarray, other: np.ndarray, names: Sequence[str]) -> float:
    """Share of drawn pictures (not the true ones) on which two detectors' verdicts are the same."""
    drawn = [j for j, name in enumerate(names) if name != "true"]
    return round(float((one[:, drawn] == other[:, drawn]).mean()), 4)


def _diversity(run: RunFolder, names: Sequence[str], columns: dict[str, np.ndarray]) -> Row:
    """How far pictures of one caption lie apart, against pictures of different captions; and their verdicts."""
    seeds = [names.index(name) for name in ("free", *(f"seed {j}" for j in range(1, SEEDS)))]
    pixels = np.stack([[_pixels(run.images(item["key"])[j]) for j in seeds] for item in run.items])
    within = np.mean([np.abs(pixels[:, a] - pixels[:, b]).mean() for a in range(SEEDS) for b in range(a)])
    between = np.abs(pixels[:, 0] - np.roll(pixels[:, 0], 1, axis=0)).mean()
    hits = np.stack([columns[names[j]] for j in seeds])
    return {
        "within": round(float(within), 4),
        "between": round(float(between), 4),
        "same_verdict": round(float((hits == hits[:1]).all(0).mean()), 4),
        "scores": [round(float(row.mean()), 4) for row in hits],
    }


def _pixels(image: Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _vector_figures(rows: Sequence[Row]) -> Row:
    """Means over captions, by position; norms and variances as shares of the true ones."""
    mean = {
        (name, what): np.mean([row[name][what] for row in rows], axis=0)
        for name in ("true", "forced", "free")
        for what in ("error", "norm", "variance")
    }
    figures: Row = {}
    for name in ("forced", "free"):
        figures[name] = {
            "error": [round(float(x), 4) for x in mean[name, "error"]],
            "mean_error": round(float(mean[name, "error"].mean()), 4),
            **{w: [round(float(x), 4) for x in mean[name, w] / mean["true", w]] for w in ("norm", "variance")},
        }
    return figures


def _retrieval(rows: Sequence[Row], name: str) -> Row:
    """How often the predicted vectors lie nearest to those of their own picture."""
    ranks = np.array([row[name]["rank"] for row in rows])
    top = mean_interval(ranks == 0).rounded()
    return {**top, "top5": round(float((ranks < 5).mean()), 4), "median_rank": float(np.median(ranks)), "n": len(ranks)}


def _probe_score(rows: Sequence[Row], name: str) -> Row:
    """How often the probe reads the concept of single objects."""
    hits = [row[name]["probe"] for row in rows if "probe" in row[name]]
    return {**mean_interval(hits).rounded(), "n": len(hits)} if hits else {"n": 0}


def sentence(scores: Row) -> str:
    """Where the next gain lies, by the largest loss."""
    place = max(PLACES, key=lambda name: scores["losses"][name]["score"])
    loss, (where, advice) = scores["losses"][place], PLACES[place]
    noise = 100 * scores["noise"]["lost"]["score"]
    rest = ", ".join(
        f"{PLACES[name][0]} {100 * scores['losses'][name]['score']:.0f}" for name in PLACES if name != place
    )
    return (
        f"The largest loss, {100 * loss['score']:.0f} points [{100 * loss['low']:.0f}, {100 * loss['high']:.0f}], lies "
        f"in {where} (the others: {rest}): {advice}. White noise of the size of its errors costs {noise:.0f} on true "
        f"vectors: as much a decoder that is used to it could win."
    )
