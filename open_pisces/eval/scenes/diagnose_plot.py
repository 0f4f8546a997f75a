"""The picture of a diagnosis: six panels on one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from open_pisces.eval.drawing.prompts import CATEGORIES
from open_pisces.eval.run import Row

SOURCES = ("true", "decoder", "forced", "free")
"""What is drawn from; see `open_pisces.eval.scenes.diagnose`."""


def plot(scores: Row, path: Path) -> None:
    """Write the PNG for the figures of `scenes.diagnose.Diagnosis`."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    figure.suptitle(scores["sentence"], fontsize=11, wrap=True)
    _plot_sources(axes[0], scores)
    _plot_categories(axes[1], scores)
    _plot_errors(axes[2], scores)
    _plot_drift(axes[3], scores)
    _plot_found(axes[4], scores)
    _plot_guidance(axes[5], scores)
    figure.savefig(path, dpi=110)


_LABELS = {
    "true": "true\npictures",
    "decoder": "true\nvectors",
    "forced": "LLM, fed\ntrue vectors",
    "free": "LLM, fed\nits own",
}
_INK = {"true": "#9aa0a6", "decoder": "#1f6feb", "forced": "#e8710a", "free": "#b3261e"}


def _plot_sources(axis: Any, scores: Row) -> None:
    values = [scores["sources"][name] for name in SOURCES]
    heights = [v["score"] for v in values]
    below = [abs(v["low"] - v["score"]) for v in values]
    above = [abs(v["high"] - v["score"]) for v in values]
    axis.bar(range(4), heights, color=[_INK[name] for name in SOURCES], yerr=[below, above], capsize=4)
    for i, height in enumerate(heights):
        axis.text(i, 0.03, f"{height:.2f}", ha="center", color="white", fontweight="bold")
    axis.set_xticks(range(4), [_LABELS[name] for name in SOURCES])
    axis.set(ylim=(0, 1.02), title="score by GenEval's rules, drawn from ...")


def _plot_categories(axis: Any, scores: Row) -> None:
    tags = [tag for tag in CATEGORIES if tag in scores["sources"]["true"]["categories"]]
    columns = [scores["sources"][name]["categories"] for name in SOURCES]
    table = np.array([[column[tag] for column in columns] for tag in tags])
    axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center")
    axis.set_xticks(range(4), [_LABELS[name] for name in SOURCES])
    axis.set_yticks(range(len(tags)), tags)
    axis.set_title("by category")


def _plot_errors(axis: Any, scores: Row) -> None:
    for name, label in (("forced", "fed true vectors"), ("free", "fed its own")):
        errors = scores["vectors"][name]["error"]
        axis.plot(range(1, len(errors) + 1), errors, marker="o", color=_INK[name], label=label)
    axis.set(title="squared error of predicted vectors", xlabel="position", ylim=(0, None))
    axis.legend()


def _plot_drift(axis: Any, scores: Row) -> None:
    for name in ("forced", "free"):
        for what, line in (("norm", "-"), ("variance", ":")):
            values = scores["vectors"][name][what]
            axis.plot(range(1, len(values) + 1), values, line, color=_INK[name], label=f"{what}, {name}")
    axis.axhline(1, color="#9aa0a6", linewidth=0.8)
    axis.set(title="drift: norm and variance as shares of the true ones", xlabel="position", ylim=(0, None))
    axis.legend()


def _plot_found(axis: Any, scores: Row) -> None:
    bars = [("probe,\ntrue vectors", scores["probe"]["true"], "true")]
    bars += [(f"probe,\n{name}", scores["probe"][name], name) for name in ("forced", "free")]
    bars += [(f"own picture\nnearest, {name}", scores["retrieval"][name], name) for name in ("forced", "free")]
    bars = [bar for bar in bars if bar[1]["n"]]
    heights = [row["score"] for _, row, _ in bars]
    axis.bar(range(len(bars)), heights, color=[_INK[name] for *_, name in bars])
    for i, height in enumerate(heights):
        axis.text(i, height + 0.01, f"{height:.2f}", ha="center")
    axis.set_xticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    axis.set(ylim=(0, 1.08), title="what the vectors hold: concept (probe), own picture among all")


def _plot_guidance(axis: Any, scores: Row) -> None:
    points = sorted((float(scale), score) for scale, score in scores["guidance"].items())
    axis.plot(*zip(*points, strict=True), marker="o", color=_INK["free"])
    seeds = scores["diversity"]
    lost = scores["captions"]["score"]
    text = (
        f"other seeds: {', '.join(f'{s:.2f}' for s in seeds['scores'])}\npictures of one caption differ by "
        f"{seeds['within']:.3f}, of two by {seeds['between']:.3f}\ndetailed captions: {lost:+.2f}\n"
        f"empty caption off by {scores['null_distance']:.2f}"
    )
    text += f"\ntrue vectors under noise of the error's size: {scores['noise']['score']:.2f}"
    axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", fontsize=9)
    axis.set(title="guidance, and the rest", xlabel="scale", ylim=(0, 1))
