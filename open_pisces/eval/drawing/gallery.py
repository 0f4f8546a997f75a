"""``pisces eval gallery``: fixed prompts, drawn by each model and set side by side, to be looked at.

In the manner of the paper's Figure 3 there are simple prompts (one or two things) and complex ones (a whole picture
in words). Each model has a run folder of its own (`open_pisces.eval.run`) with a sheet; nothing is picked, nothing is
scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml
from PIL.Image import Image

from open_pisces.eval.evaluation import draw, missing
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, Row, RunError, RunFolder, model_hash
from open_pisces.files import whole_file
from open_pisces.sheets import PALE, Page

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

TASK = "gallery"
KINDS = ("simple", "complex")
SHEET = "sheet.png"
"""The name of a model's sheet in its run folder."""

PICTURE = 256
"""Pixels of a picture's side."""
MARGIN = 24
"""Pixels between prompts."""
GAP = 6
"""Pixels between pictures of one prompt."""
WORDS = 300
"""Pixels of a prompt's width beside its pictures."""
COLUMNS = 4
"""Pictures in a row of a model's own sheet."""
SMALL = 15
MIDDLE = 18
LARGE = 24


def prompt_sets() -> dict[str, dict[str, Any]]:
    """The prompts of ``gallery.yaml``: for each set its ``version`` and the texts of each of `KINDS`."""
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "gallery.yaml").read_text("utf-8"))
    return table


def items_of(prompt_set: str) -> list[Row]:
    """The items of a gallery's run: ``key``, ``kind``, ``prompt``; the simple ones first.

    Raises:
        EvaluationError: if there is no such set.
    """
    # All prompts of a set, in the order of the file: nothing is picked.
    sets = prompt_sets()
    if prompt_set not in sets:
        raise EvaluationError(f"no gallery is called {prompt_set!r}: choose {' or '.join(sets)}")
    items = []
    for kind in KINDS:
        for number, prompt in enumerate(sets[prompt_set][kind]):
            items.append({"key": f"{kind}-{number:02d}", "kind": kind, "prompt": prompt})
    return items


def draw_gallery(
    generator: Generator,
    folder: str | Path | None,
    model: str | Path,
    prompt_set: str = "scenes",
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 4,
) -> RunFolder:
    """Draw a gallery into a run folder, or go on with one, and write its sheet.

    Args:
        generator: the model.
        folder: the run's folder, one for each model and its settings; None takes one named after both.
        model: the model's folder, for its name and hash.
        prompt_set: ``scenes`` for models of the scenes' world, ``open`` for models of full size.
        n: pictures of a prompt; picture j of every prompt starts from noise of (seed, j).
        seed: of the noise.
        steps: denoising steps; None is the model's own.
        guidance_scale: None is the model's own.
        batch_size: prompts at a time.

    Raises:
        EvaluationError: if there is no such set.
        RunError: if the folder holds another run.
    """
    own = generator.pisces.settings.decoder
    settings: dict[str, Any] = {
        "prompt_set": prompt_set,
        "n": n,
        "seed": seed,
        "steps": own.steps if steps is None else steps,
        "guidance_scale": own.guidance_scale if guidance_scale is None else guidance_scale,
        "batch_size": batch_size,
    }
    items = items_of(prompt_set)
    # Two versions of a set are two runs, even where the prompts' keys are the same.
    settings["version"] = prompt_sets()[prompt_set]["version"]
    manifest = Manifest(TASK, str(model), model_hash(model), settings, device=str(generator.device))
    run = RunFolder.open(folder, manifest, items)
    for batch in missing(run, "images", batch_size):
        draw(generator, run, batch)
    # Also after a run that was complete: the sheet may have been deleted.
    with whole_file(run.folder / SHEET) as hidden:
        sheet(run).save(hidden)
    return run


def compare(folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Set the galleries of several models side by side: a row for each prompt, a column for each model.

    Args:
        folders: run folders that `draw_gallery` has completed.
        out: the sheet's file.

    Returns:
        ``file``, ``models`` (what the columns are called), ``prompts`` (their number).

    Raises:
        EvaluationError: for fewer than two folders.
        RunError: if one is no gallery, is not complete, or drew other prompts than the first.
    """
    if len(folders) < 2:
        raise EvaluationError(
            f"name two galleries or more, not {len(folders)}: one model's own sheet is FOLDER/{SHEET}"
        )
    runs = [_gallery(folder) for folder in folders]
    for run in runs[1:]:
        _check_same_prompts(runs[0], run)
    heads = headings(runs)
    with whole_file(Path(out)) as hidden:
        side_by_side(runs, heads).save(hidden)
    return {
        "file": str(out),
        "models": [", ".join(filter(None, head)) for head in heads],
        "prompts": len(runs[0].items),
    }


def _gallery(folder: str | Path) -> RunFolder:
    """A gallery's run folder.

    Raises:
        RunError: if the run is of something else.
    """
    run = RunFolder.load(folder)
    if run.manifest.task != TASK:
        raise RunError(f"{folder} is a run of {run.manifest.task!r}: only galleries can be set side by side")
    return run


def _check_same_prompts(first: RunFolder, run: RunFolder) -> None:
    """Raise if two galleries do not draw the same prompts."""
    if run.manifest.items == first.manifest.items:
        return
    raise RunError(
        f"{run.folder} drew other prompts ({_prompt_set(run)}) than {first.folder} ({_prompt_set(first)}): draw one of "
        f"them anew, in a folder of its own"
    )


def _prompt_set(run: RunFolder) -> str:
    """Which prompts a gallery drew."""
    settings = run.manifest.settings
    return f"{settings.get('prompt_set')!r}, version {settings.get('version')}"


# ------------------------------------------------------------------------------------------------------- their names


def model_names(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model folder: the shortest endings of their paths that differ.

    A training's result lies in ``model/``, which says nothing, so that part is left out: ``runs/tiny/stage3/model``
    is "stage3", or "tiny/stage3" beside ``runs/nano/stage3/model``.
    """
    parts: dict[str, list[str]] = {}
    for model in models:
        own = [part for part in PurePath(model).parts if part not in ("/", "..")] or ["model"]
        parts[model] = own[:-1] if len(own) > 1 and own[-1] == "model" else own
    names = {model: p[-1] for model, p in parts.items()}
    longest = max((len(p) for p in parts.values()), default=0)
    # Longer endings only for those that are still alike.
    for length in range(2, longest + 1):
        times = Counter(names.values())
        for model, name in list(names.items()):
            if times[name] > 1:
                names[model] = "/".join(parts[model][-length:])
    return names


def headings(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """What the columns of a comparison are called: the model's name, and below it whatever else tells them apart."""
    every = [run.manifest for run in runs]
    names = model_names([manifest.model for manifest in every])
    hashes: dict[str, set[str]] = {}  # of each name: a folder that was trained on has several
    for manifest in every:
        hashes.setdefault(names[manifest.model], set()).add(manifest.model_hash)
    keys = []
    for key in every[0].settings:
        values = {str(manifest.settings.get(key)) for manifest in every}
        if len(values) > 1:
            keys.append(key)
    heads = []
    for manifest in every:
        name = names[manifest.model]
        told = [f"{_words(key)} {manifest.settings.get(key)}" for key in keys]
        if len(hashes[name]) > 1:
            told.append(f"weights {manifest.model_hash[:8]}")
        heads.append((name, ", ".join(told)))
    if len(set(heads)) == len(heads):
        return heads
    return [(head[0], run.folder.name) for head, run in zip(heads, runs, strict=True)]  # drawn twice, or elsewhere


def _words(key: str) -> str:
    """A setting's name for people."""
    return "pictures" if key == "n" else key.removesuffix("_scale").replace("_", " ")


# -------------------------------------------------------------------------------------------------------- the sheets


def sheet(run: RunFolder) -> Image:
    """One model's gallery: each prompt under its pictures, the simple ones first."""
    settings = run.manifest.settings
    wide = _width(run)
    page = Page(MARGIN, PICTURE, GAP)
    columns = max(1, COLUMNS // settings["n"])
    told = ", ".join(f"{_words(key)} {settings[key]}" for key in ("guidance_scale", "steps", "seed"))
    page.down(page.write(model_names([run.manifest.model])[run.manifest.model], MARGIN, columns * wide, LARGE))
    page.down(page.write(told, MARGIN, columns * wide, SMALL, PALE) + MARGIN // 2)
    for kind in KINDS:
        _title(page, f"{kind} prompts")
        items = [item for item in run.items if item["kind"] == kind]
        for start in range(0, len(items), columns):
            row = items[start : start + columns]
            lefts = [MARGIN + place * (wide + MARGIN) for place in range(len(row))]
            for item, left in zip(row, lefts, strict=True):
                page.show(run.images(item["key"]), left)
            page.down(PICTURE + 8)
            page.down(max(page.write(item["prompt"], left, wide, SMALL) for item, left in zip(row, lefts, strict=True)))
            page.down(MARGIN)
    return page.image()


def side_by_side(runs: Sequence[RunFolder], heads: Sequence[tuple[str, str]]) -> Image:
    """Several models' galleries of the same prompts: the prompt, then a column for each model."""
    wide = [_width(run) for run in runs]
    page = Page(MARGIN, PICTURE, GAP)
    lefts = [WORDS + 2 * MARGIN + sum(wide[:place]) + place * MARGIN for place in range(len(runs))]
    columns = list(zip(runs, heads, lefts, wide, strict=True))
    page.down(max(page.write(head[0], left, width, LARGE) for _, head, left, width in columns))
    if any(detail for _, detail in heads):
        page.down(max(page.write(head[1], left, width, SMALL, PALE) for _, head, left, width in columns))
    for kind in KINDS:
        _title(page, f"{kind} prompts")
        for item in runs[0].items:
            if item["kind"] != kind:
                continue
            for run, _, left, _ in columns:
                page.show(run.images(item["key"]), left)
            page.down(max(page.write(item["prompt"], MARGIN, WORDS, MIDDLE), PICTURE) + MARGIN)
    return page.image()


def _width(run: RunFolder) -> int:
    """Pixels that a prompt's pictures take beside each other."""
    n = run.manifest.settings["n"]
    return n * PICTURE + (n - 1) * GAP


def _title(page: Page, text: str) -> None:
    """A heading of a part, with room around it."""
    page.down(MARGIN // 2)
    page.down(page.write(text, MARGIN, WORDS, LARGE, PALE) + MARGIN // 2)
