"""``pisces eval rescore``: the scores of a run made again from what it kept, without the model."""

from __future__ import annotations

from pathlib import Path

from open_pisces.eval.distances import fid, reconstruction
from open_pisces.eval.drawing import judged_run as geneval_runs
from open_pisces.eval.drawing.rules import Rules
from open_pisces.eval.run import Row, RunError, RunFolder
from open_pisces.eval.scenes import diagnose, drawing, placement
from open_pisces.eval.scenes import vqa as scenes
from open_pisces.eval.understanding import evaluate as understanding


def rescore(folder: str | Path, model: str | None = None, rules: Rules | None = None) -> Row:
    """Score a run again, and write its ``scores.json``.

    Args:
        folder: of the run.
        model: the hash of the model that it has to be of; None takes any.
        rules: of GenEval, for its runs only; None takes those of the detector.

    Raises:
        RunError: if the run is of another model, is not complete, or keeps no raw rows.
    """
    run = RunFolder.load(folder)
    if model is not None and run.manifest.model_hash != model:
        raise RunError(
            f"{folder} is a run of the model {run.manifest.model_hash[:12]} ({run.manifest.model}), asked is "
            f"{model[:12]}: evaluate that model, in a folder of its own"
        )
    kind, _, subject = run.manifest.task.partition("/")
    ways = {
        "scenes/vqa": lambda: scenes.score_run(run),
        "scenes/drawing": lambda: drawing.score_run(run, _detectors(run)),
        "decoder/placement": lambda: placement.score_run(run),
        "diagnose": lambda: diagnose.score_run(run, _detectors(run)),
        "fid": lambda: fid.score_run(run).row(),
        "decoder/reconstruction": lambda: reconstruction.score_run(run).row(),
        "geneval": lambda: geneval_runs.score(run, rules=rules),
    }
    if kind == "understanding":
        return {**understanding.score(run), "folder": str(run.folder)}
    if run.manifest.task not in ways:
        raise RunError(
            f"{folder}: a run of {run.manifest.task} keeps its pictures only: give it the command that made it"
        )
    return {**run.write_scores(ways[run.manifest.task]()), "folder": str(run.folder)}


def _detectors(run: RunFolder) -> list[str]:
    """The detectors that looked, the one of the scores first."""
    names = [run.rows(path.stem)[0]["detector"] for path in sorted(run.folder.glob("detections-*.jsonl"))]
    if not names:
        raise RunError(f"{run.folder} has no detections yet; the command that began the run goes on with it")
    return sorted(names)
