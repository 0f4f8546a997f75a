"""A diagnosis of vectors: true ones, those the LLM predicts, and what a linear probe reads from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.eval.intervals import Interval, mean_interval
from open_pisces.eval.run import Row
from open_pisces.eval.scenes.frozen import FrozenScene
from open_pisces.eval.scenes.vqa import fresh_scenes

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator


def predict_vectors(
    generator: Generator, scenes: Sequence[FrozenScene], true: Sequence[Image], batch_size: int
) -> dict[str, Tensor]:
    """True, noisy and predicted vectors (n, M, E) of every caption, in the LLM's space."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("true", "forced", "free", "detailed")}
    for start in track(range(0, len(scenes), batch_size), "vectors", console=Console(stderr=True)):
        batch = scenes[start : start + batch_size]
        encoded = generator.encode(list(true[start : start + batch_size])).float()
        captions = [scene.short for scene in batch]
        found["true"].append(encoded)
        found["forced"].append(generator.vectors(captions, encoded))
        found["free"].append(generator.vectors(captions))
        found["detailed"].append(generator.vectors([scene.detailed for scene in batch]))
    vectors = {name: torch.cat(parts) for name, parts in found.items()}
    draws = torch.randn(vectors["true"].shape, generator=torch.Generator().manual_seed(0)).to(vectors["true"].device)
    # One size for each position: the LLM errs more at some than at others.
    error_M1 = (vectors["forced"] - vectors["true"]).pow(2).mean((0, 2)).sqrt()[:, None]
    return {**vectors, "noise": vectors["true"] + error_M1 * draws}


class Probe:
    """Reads the concept of a single object from its vectors: ridge regression on one-hot names (closed form).

    Beside the vectors themselves it sees their mean and largest value over the positions, for a thing stands anywhere.
    """

    def __init__(self, vectors_BME: Tensor, names: Sequence[str], strength: float = 10.0) -> None:
        self.names = sorted(set(names))
        x = self._seen(vectors_BME)
        self.mean = x.mean(0)
        self.std = x.std(0).clamp_min(1e-6)
        x = (x - self.mean) / self.std
        numbers = torch.tensor([self.names.index(name) for name in names])
        y = torch.nn.functional.one_hot(numbers, len(self.names)).double()
        # In the dual form: as large as there are pictures, however many features a model has.
        inner = x @ x.T + strength * x.shape[1] / 100 * torch.eye(len(x), dtype=torch.float64)
        self.weight = x.T @ torch.linalg.solve(inner, y - 1 / len(self.names))

    def __call__(self, vectors_BME: Tensor) -> list[str]:
        """The likeliest concept of each picture."""
        scores = (self._seen(vectors_BME) - self.mean) / self.std @ self.weight
        return [self.names[int(i)] for i in scores.argmax(1)]

    @staticmethod
    def _seen(vectors_BME: Tensor) -> Tensor:
        # In 64 bits: the system has as many rows as pictures and is solved once.
        x = vectors_BME.double().cpu()
        return torch.cat([x.flatten(1), x.mean(1), x.amax(1)], 1)


def train_probe(generator: Generator, cutouts: Cutouts, count: int, batch_size: int) -> Probe:
    """A probe trained on true vectors of ``count`` fresh single objects."""
    # Seed 2: the frozen scenes are what seeds 0 and 1 composed.
    singles = (one for one in fresh_scenes("train", 2, cutouts) if len((one.facts or {})["objects"]) == 1)
    samples = list(islice(singles, count))
    vectors = []
    for start in range(0, count, batch_size):
        images = [sample.images[0] for sample in samples[start : start + batch_size]]
        vectors.append(generator.encode(images).float())
    return Probe(torch.cat(vectors), [(sample.facts or {})["objects"][0]["concept"] for sample in samples])


def vector_rows(items: Sequence[Row], vectors: dict[str, Tensor], probe: Probe) -> list[Row]:
    """What there is to say of each caption's predicted vectors.

    For each of ``forced`` and ``free``: ``error`` by position (mean squared over channels, in the targets' space),
    ``norm`` and ``variance`` by position (the latter: squared distance from the mean over all captions, mean over
    channels), ``rank`` of the own true picture among all by the distance of vectors (0 is the nearest; equal true
    vectors share the better rank), and whether the probe reads the concept (single objects only). ``true`` likewise.
    """
    true = vectors["true"]
    rows: list[Row] = [{"key": item["key"]} for item in items]
    for name in ("true", "forced", "free"):
        own = vectors[name]
        apart = torch.cdist(own.flatten(1).double(), true.flatten(1).double())
        by_position = {
            "error": (own - true).pow(2).mean(-1),
            "norm": own.norm(dim=-1),
            "variance": (own - own.mean(0)).pow(2).mean(-1),
        }
        # 1e-9: pictures may be equal, and equal ones share the better rank.
        rank = (apart < apart.diagonal()[:, None] - 1e-9).sum(1)
        read = probe(own)
        for i, item in enumerate(items):
            row: Row = {what: _rounded(values[i]) for what, values in by_position.items()}
            row["rank"] = int(rank[i])
            if item["tag"] in ("single_object", "colors"):
                row["probe"] = read[i] == item["include"][0]["class"]
            rows[i][name] = row
    return rows


def _rounded(values: Tensor | np.ndarray, digits: int = 5) -> list[float]:
    return [round(float(value), digits) for value in values]


@dataclass(frozen=True)
class VectorFigures:
    """Means over captions, by position; norms and variances as shares of the true ones."""

    error: list[float]
    mean_error: float
    norm: list[float]
    variance: list[float]


@dataclass(frozen=True)
class Retrieval(Interval):
    """How often predicted vectors lie nearest to those of their own picture."""

    top5: float
    median_rank: float
    n: int


def vector_figures(rows: Sequence[Row]) -> dict[str, VectorFigures]:
    """Of the vectors fed true ones, and of those fed their own."""

    def mean(name: str, what: str) -> np.ndarray:
        found: np.ndarray = np.mean([row[name][what] for row in rows], axis=0)
        return found

    figures = {}
    for name in ("forced", "free"):
        error = mean(name, "error")
        norm = mean(name, "norm") / mean("true", "norm")
        variance = mean(name, "variance") / mean("true", "variance")
        figures[name] = VectorFigures(
            _rounded(error, 4), round(float(error.mean()), 4), _rounded(norm, 4), _rounded(variance, 4)
        )
    return figures


def retrieval_score(rows: Sequence[Row], name: str) -> Retrieval:
    """From the ranks of the own pictures."""
    ranks = np.array([row[name]["rank"] for row in rows])
    return Retrieval(
        **mean_interval(ranks == 0).rounded(),
        top5=round(float((ranks < 5).mean()), 4),
        median_rank=float(np.median(ranks)),
        n=len(ranks),
    )


def probe_score(rows: Sequence[Row], name: str) -> Row:
    """How often the probe reads the concept of single objects."""
    hits = [row[name]["probe"] for row in rows if "probe" in row[name]]
    return {**mean_interval(hits).rounded(), "n": len(hits)} if hits else {"n": 0}
