"""Runs of GenEval: pictures drawn, what detectors find in them, and the scores of that; each can be gone on with.

A run folder (`open_pisces.eval.run`) holds the prompts in the official form, the pictures in the official layout and,
for each detector that looked, ``detections-NAME.jsonl``: everything it found, with the thresholds it brought. Scores
come from those rows alone, so they can be made again under other rules without model or pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from rich.console import Console
from rich.progress import track

from open_pisces.data.images import open_image
from open_pisces.eval.drawing.detection import Detection, Detector
from open_pisces.eval.drawing.prompts import Prompt, PromptSetError, check_known, from_row, to_row
from open_pisces.eval.drawing.rules import Rules, Verdict, judge, summarise
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, Row, RunError, RunFolder, digest

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


def draw(generator: Generator, run: RunFolder) -> None:
    """Draw what is missing of a run's pictures: ``n`` of every item's ``prompt``, by the settings of the manifest.

    ``batch_size`` is in prompts. Picture j of every prompt starts from noise of (seed, j), as the official sampler
    resets its seed before each prompt.
    """
    settings = run.manifest.settings
    how = {name: settings[name] for name in ("n", "steps", "guidance_scale", "seed")}
    for batch in _watched(list(run.batches("images", settings["batch_size"])), "drawing"):
        drawn = generator.image([item["prompt"] for item in batch], **how)
        run.save_images({item["key"]: images for item, images in zip(batch, drawn, strict=True)})


def detect(
    detector: Detector,
    run: RunFolder,
    pictures: Callable[[str], list[Image]] | None = None,
    rules: Rules | None = None,
) -> str:
    """Note what a detector finds in a run's pictures, as far as it is missing; several may look at one run.

    Args:
        detector: it is asked for colours of those detections that the rules may look at.
        run: its setting ``batch_size`` is the number of prompts whose pictures are shown at once.
        pictures: of an item, by key; None takes the run's own.
        rules: whose overlap suppression the rows have to serve; None is the official ones.

    Returns:
        the name of the rows: ``detections-`` and the detector's name.

    Raises:
        PromptSetError: if it does not know a class or colour.
        RunError: if a picture is missing or damaged.
    """
    prompts = {prompt.key: prompt for prompt in prompts_of(run)}
    check_known(prompts.values(), detector.classes, detector.colours, detector.name)
    name, look, rules = rows_name(detector.name), pictures or run.images, rules or Rules.of(detector)
    for batch in _watched(list(run.batches(name, run.manifest.settings["batch_size"])), "detecting"):
        shown = {item["key"]: look(item["key"]) for item in batch}
        coloured = [_coloured(prompts[key], rules) for key, images in shown.items() for _ in images]
        found = iter(detector.detect([image for images in shown.values() for image in images], coloured))
        rows = [{"key": key, "pictures": [_packed(next(found)) for _ in images]} for key, images in shown.items()]
        run.append(name, [{**row, "detector": detector.name, **_thresholds(detector)} for row in rows])
    return name


def rows_name(detector: str) -> str:
    """The name of a detector's rows in a run folder."""
    return f"detections-{re.sub(r'[^a-z0-9]+', '-', detector.lower()).strip('-')}"


def _watched(batches: list[list[Row]], what: str) -> Any:
    """Batches with a progress bar on standard error; none where there is nothing to do."""
    return track(batches, what, console=Console(stderr=True), disable=not batches)


def _coloured(prompt: Prompt, rules: Rules) -> dict[str, int]:
    """Of how many detections of each class the rules may ask the colour."""
    asked: dict[str, int] = {}
    for wanted in prompt.include:
        if wanted.colour:  # where overlapping ones are dropped, any of those that count may move up
            count = wanted.count if rules.max_overlap >= 1 else rules.max_objects
            asked[wanted.name] = max(count, asked.get(wanted.name, 0))
    return asked


def _thresholds(detector: Detector) -> Row:
    return {"threshold": detector.threshold, "counting_threshold": detector.counting_threshold}


def _packed(detections: Sequence[Detection]) -> list[Row]:
    return [
        {"class": d.name, "box": [float(x) for x in d.box], "score": float(d.score), "colours": dict(d.colours)}
        for d in detections
    ]


def _unpacked(rows: Sequence[Mapping[str, Any]]) -> list[Detection]:
    return [Detection(row["class"], tuple(row["box"]), row["score"], row["colours"]) for row in rows]


def verdicts(run: RunFolder, detector: str = "", rules: Rules | None = None) -> dict[str, list[Verdict]]:
    """The verdict on every picture of every prompt, by key, from raw detections alone.

    Args:
        run: neither its pictures nor a model is needed.
        detector: whose rows; "" if only one has looked.
        rules: None takes the official ones with the detector's own thresholds.

    Raises:
        RunError: if rows are missing or of several detectors.
        EvaluationError: if the rules ask for less confident detections than the detector promises to give.
    """
    rows, own = _detections(run, detector)
    rules = rules or own
    if (low := min(rules.threshold, rules.counting_threshold)) < min(own.threshold, own.counting_threshold):
        raise EvaluationError(
            f"a threshold of {low} is below those of {rows[0]['detector']}, so what it found between may not have been "
            f"noted: detect again with a detector of that threshold"
        )
    prompts = prompts_of(run)
    return {
        prompt.key: [judge(prompt, _unpacked(picture), rules) for picture in row["pictures"]]
        for prompt, row in zip(prompts, rows, strict=True)
    }


def found(run: RunFolder, detector: str = "") -> tuple[Rules, dict[str, list[list[Detection]]]]:
    """The official rules with a detector's own thresholds, and what it noted of every picture, by key.

    Raises:
        RunError: if rows are missing or of several detectors.
    """
    rows, own = _detections(run, detector)
    return own, {row["key"]: [_unpacked(picture) for picture in row["pictures"]] for row in rows}


def _detections(run: RunFolder, detector: str) -> tuple[list[Row], Rules]:
    """A detector's rows, and the rules with its thresholds."""
    names = [rows_name(detector)] if detector else sorted(path.stem for path in run.folder.glob("detections-*.jsonl"))
    if len(names) != 1:
        which = f"{' and '.join(names)}: say which" if names else "none yet: detect first"
        raise RunError(f"{run.folder} has detections of {which}")
    rows = run.rows(names[0])
    kinds = sorted({(row["detector"], row["threshold"], row["counting_threshold"]) for row in rows})
    if len(kinds) > 1:
        both = " and ".join(f"{name} (thresholds {low}, {high})" for name, low, high in kinds)
        raise RunError(f"{run.folder}/{names[0]}.jsonl holds rows of {both}: delete it and detect again")
    return rows, Rules(*kinds[0][1:])


def score(run: RunFolder, detector: str = "", rules: Rules | None = None) -> Row:
    """The scores of a run by one detector's rows: those of `summarise`, the rules, the first wrong pictures.

    Raises:
        RunError: if rows are missing or of several detectors.
        EvaluationError: see `verdicts`.
    """
    rows, own = _detections(run, detector)
    judged = verdicts(run, detector, rules)
    prompts = prompts_of(run)
    wrong: dict[str, list[Row]] = {}
    for prompt in prompts:
        for number, verdict in enumerate(judged[prompt.key]):
            row = {"key": prompt.key, "prompt": prompt.prompt, "picture": number, "reasons": list(verdict.reasons)}
            wrong.setdefault(prompt.tag, []).extend([] if verdict.correct else [row])
    correct = [[verdict.correct for verdict in judged[prompt.key]] for prompt in prompts]
    return {
        "name": "geneval",
        **summarise([prompt.tag for prompt in prompts], correct),
        "detector": rows[0]["detector"],
        "rules": asdict(rules or own),
        "examples": [row for rows in wrong.values() for row in rows[:_SHOWN]],
    }


def evaluate(
    generator: Generator,
    prompts: Sequence[Prompt],
    folder: str | Path | None,
    detector: Detector,
    model: str,
    model_hash: str,
    n: int = 4,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 42,
    batch_size: int = 16,
) -> Row:
    """Draw, detect and score; what is there already of the same run is not made again.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        prompts: of `open_pisces.eval.drawing.prompts`.
        folder: the run's; None chooses one by the manifest (`RunFolder.open`).
        detector: which judges.
        model: what the scores call the model, usually its folder.
        model_hash: of `open_pisces.eval.run.model_hash`.
        n: pictures of each prompt; official 4.
        steps: of the decoder's sampler; None is the model's own (official sampler: 50).
        guidance_scale: None is the model's own (official sampler: 9.0).
        seed: of the noise; official 42.
        batch_size: prompts at once.

    Returns:
        the scores as written to ``scores.json``.

    Raises:
        PromptSetError: if the detector does not know a class or colour; nothing is drawn then.
        RunError: if the folder holds another run.
    """
    check_known(prompts, detector.classes, detector.colours, detector.name)
    how = {"n": n, "steps": steps, "guidance_scale": guidance_scale, "seed": seed, "batch_size": batch_size}
    manifest = Manifest("geneval", model, model_hash, how, device=str(generator.device))
    run = RunFolder.open(folder, manifest, items_of(prompts))
    draw(generator, run)
    detect(detector, run)
    return run.write_scores(score(run, detector.name))


def score_folder(
    path: str | Path,
    detector: Detector,
    folder: str | Path | None = None,
    n: int = 4,
    batch_size: int = 16,
    prompts: Sequence[Prompt] | None = None,
) -> Row:
    """Score pictures that any model made, in the official layout: ``00000/metadata.jsonl``, ``00000/samples/0000.png``.

    As in the official scorer folders and pictures count whose names are digits. Nothing is written below ``path``.

    Args:
        path: of the folder with the numbered folders.
        detector: which judges.
        folder: of the run with the raw detections, to go on with after an interruption and to score again; None
            chooses one by the manifest (`RunFolder.open`).
        n: pictures that each prompt has to have.
        batch_size: prompts whose pictures are shown at once.
        prompts: whose pictures have to be there, and no others; None takes what there is.

    Raises:
        EvaluationError: naming the folder whose metadata or pictures are missing or of another number.
        ImageError: naming the picture that cannot be read.
    """
    files, there = _official_layout(Path(path), n)
    if prompts is not None:
        _check_complete(Path(path), there, prompts)
    every = [file for group in files.values() for file in group]
    sums = {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in every}
    manifest = Manifest("geneval", str(path), digest(sums), {"n": n, "batch_size": batch_size})
    run = RunFolder.open(folder, manifest, items_of(there))
    detect(detector, run, lambda key: [open_image(file) for file in files[key]])
    return run.write_scores(score(run, detector.name))


def _official_layout(path: Path, n: int) -> tuple[dict[str, list[Path]], list[Prompt]]:
    """The pictures of each prompt, by key, and the prompts; in the order of the folders' numbers."""
    folders = sorted(
        (f for f in path.glob("*") if f.is_dir() and f.name.isdigit()), key=lambda f: (int(f.name), f.name)
    )
    if not folders:
        raise EvaluationError(f"{path}: holds no numbered folders; GenEval's layout is 00000/samples/0000.png")
    files, prompts = {}, []
    for folder in folders:
        prompt = _metadata(folder)
        prompt = replace(prompt, key=f"{folder.name}-{prompt.tag}")
        prompts.append(prompt)
        files[prompt.key] = _samples(folder / "samples", n)
    return files, prompts


def _metadata(folder: Path) -> Prompt:
    """The prompt of a numbered folder."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; it holds the prompt's line of evaluation_metadata.jsonl")
    try:
        return from_row(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSON's errors, bytes that are no text, and prompts that are none
        raise EvaluationError(f"{path}: {error}") from None


def _samples(folder: Path, n: int) -> list[Path]:
    """The pictures of a prompt in the order of their numbers."""
    files = [file for file in folder.glob("*") if re.fullmatch(r"\d+\.png", file.name)]
    if len(files) != n:
        others = sorted(file.name for file in folder.glob("*") if file not in files)
        beside = f" beside {', '.join(others[:3])}, whose names are not digits and .png" if others else ""
        raise EvaluationError(f"{folder}: {len(files)} pictures{beside}, expected are {n}; add them or say how many")
    return sorted(files, key=lambda file: int(file.stem))


def _check_complete(path: Path, present: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
    """Raise unless the folders are of ``prompts``, each once."""
    there, wanted = (Counter(json.dumps(to_row(p)) for p in group) for group in (present, prompts))
    for rows, what in (
        (wanted - there, "has no pictures"),
        (there - wanted, "is not one of those asked, or comes twice"),
    ):
        if rows:
            prompt = json.loads(next(iter(rows)))["prompt"]
            raise EvaluationError(f"{path}: {prompt!r} {what} ({rows.total()} such of {len(prompts)} prompts)")
