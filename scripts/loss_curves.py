"""Draw docs/loss_curves.png: the losses of `tiny`'s trainings, and of a run of yours over them ("is my loss normal?").

    python scripts/loss_curves.py runs/tiny --keep docs/loss_curves.json --out docs/loss_curves.png
    python scripts/loss_curves.py runs/mine --out mine.png

The first line writes the reference anew; the second draws a run, or a folder of runs, over the reference that is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from open_pisces.recipe import TRAININGS

KEPT = Path(__file__).parent.parent / "docs" / "loss_curves.json"
LOSSES = {"text": "cross-entropy on text", "vectors": "squared error on vectors", "diffusion": "denoising error"}
POINTS = 80
"""Points a curve is averaged to: steps are noisy, and the file is committed."""
Curves = dict[str, dict[str, list[float]]]


def read(folder: Path) -> Curves:
    """The curves of a run folder, or of all run folders below it, by the training's name."""
    found: Curves = {}
    for file in sorted(folder.glob("metrics.jsonl")) or sorted(folder.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        curve = averaged(rows)
        if file.parent.name in TRAININGS or file.parent == folder:
            found[file.parent.name] = curve
    return found


def averaged(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Steps and losses, each the mean over one of `POINTS` equal stretches of the run."""
    losses = [name for name in LOSSES if name in rows[0]]
    chunks = [chunk for chunk in np.array_split(np.arange(len(rows)), POINTS) if len(chunk)]
    curve: dict[str, list[float]] = {name: [] for name in ("step", *losses)}
    for chunk in chunks:
        for name, values in curve.items():
            values.append(round(float(np.mean([rows[i][name] for i in chunk])), 4))
    return curve


def draw(reference: Curves, runs: Curves, out: Path) -> None:
    """One row for each training, one column for each loss."""
    names = [name for name in TRAININGS if name in reference]
    figure, axes = plt.subplots(len(names), 2, figsize=(8, 2.1 * len(names)), squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        losses = [loss for loss in LOSSES if loss in reference[name]]
        for place, loss in zip(row, losses, strict=False):
            place.plot(reference[name]["step"], reference[name][loss], color="#888888", label="reference")
            for own, curve in runs.items():
                if loss in curve and (own == name or own not in reference):
                    place.plot(curve["step"], curve[loss], color="#c0392b", label=own)
            place.set_yscale("log")
            place.set_title(f"{name}: {LOSSES[loss]}", fontsize=9)
            place.tick_params(labelsize=7)
        for place in row[len(losses) :]:
            place.set_visible(False)
    if runs:
        axes[0][0].legend(fontsize=7)
    figure.savefig(out, dpi=100)


def main() -> None:
    """Read, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument("--keep", type=Path, help="write the runs' curves here, as the reference")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args()
    found = read(args.runs)
    if not found:
        parser.error(f"{args.runs}: no metrics.jsonl in it, or in a folder below it named after a training")
    if args.keep:
        args.keep.write_text(json.dumps(found) + "\n")
        draw(found, {}, args.out)
        return
    draw(json.loads(KEPT.read_text()), found, args.out)


if __name__ == "__main__":
    main()
