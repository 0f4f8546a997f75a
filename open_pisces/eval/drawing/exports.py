"""Pictures for the scorers of others: their prompts as a run's items, a run's pictures in their layouts.

``geneval``   ``00000/metadata.jsonl`` (the prompt's official line), ``00000/samples/0000.png`` ...
              (djghosh13/geneval, ``generation/diffusers_generate.py``; `official_layout.GenEvalOfFolder`)
``geneval2``  ``00000.png`` ... and ``images.json``, which maps each prompt to its picture's path
              (facebookresearch/GenEval2, README, ``--image_filepath_data``)
``wise``      ``1.png`` to ``1000.png``, by ``prompt_id`` (PKU-YuanGroup/WISE, ``gpt_eval.py``)
``dpg``       one PNG for each prompt file, of the same stem: four square pictures, first and second above, third and
              fourth below; its scorer cuts them by ``--resolution``, a picture's side, and reads every file in the
              folder, so nothing else lies there (TencentQQGYLab/ELLA, ``dpg_bench/compute_dpg_bench.py``)

A layout is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.eval.drawing.judged_run import items_of
from open_pisces.eval.drawing.prompts import read_prompts
from open_pisces.eval.evaluation import draw, missing
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, Row, RunFolder, model_hash
from open_pisces.files import whole_folder

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

_USUAL = 4  # pictures of each prompt where a layout takes any number


@cache
def layouts() -> dict[str, dict[str, int]]:
    """``exports.yaml``: the layouts by name, with the numbers of prompts and of pictures of each."""
    found: dict[str, dict[str, int]] = yaml.safe_load((Path(__file__).parent / "exports.yaml").read_text("utf-8"))
    return found


# ------------------------------------------------------------------------------------------------------ what to draw


def items(layout: str, source: str | Path) -> list[Row]:
    """The prompts of a benchmark as items of a run, to be drawn by `draw_prompts`.

    Args:
        layout: one of `layouts`.
        source: the benchmark's own file or folder: ``evaluation_metadata.jsonl``, ``geneval2_data.jsonl``, WISE's
            ``data/`` with JSON files, DPG's ``prompts/`` with text files.

    Raises:
        EvaluationError: if the layout is unknown, or the source is missing, empty or of another form.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {
        "geneval": lambda path: items_of(read_prompts(path)),
        "geneval2": _geneval2_items,
        "wise": _wise_items,
        "dpg": _dpg_items,
    }
    _known(layout)
    if not Path(source).exists():
        raise EvaluationError(f"{source}: not there; give {layout}'s prompts, from its own repository")
    try:
        found = readers[layout](Path(source))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{source}: not in the form of {layout}'s prompts ({error!r})") from None
    if not found:
        raise EvaluationError(f"{source}: holds no prompts of {layout}")
    return found


def _geneval2_items(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [{"key": f"{number:05d}", "prompt": row["prompt"]} for number, row in enumerate(rows)]


def _wise_items(path: Path) -> list[Row]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows = []
    for file in files:
        rows += json.loads(file.read_text("utf-8"))
    # WISE spreads its prompts over files by subject; its scorer goes by number.
    rows.sort(key=lambda row: int(row["prompt_id"]))
    return [{"key": f"{row['prompt_id']:04d}", "prompt": row["Prompt"], "id": row["prompt_id"]} for row in rows]


def _dpg_items(path: Path) -> list[Row]:
    return [{"key": file.stem, "prompt": file.read_text("utf-8").strip()} for file in sorted(path.glob("*.txt"))]


def draw_prompts(
    generator: Generator,
    model: str | Path,
    layout: str,
    source: str | Path,
    folder: str | Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> RunFolder:
    """Draw a benchmark's prompts, as many pictures of each as its layout takes; an interrupted run goes on.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        model: its folder, for the manifest.
        layout: one of `layouts`.
        source: see `items`.
        folder: the run's; None chooses one by the manifest (`RunFolder.open`).
        steps: of the decoder; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of the noise.
        batch_size: prompts at once.

    Raises:
        EvaluationError: see `items`.
        RunError: if the folder holds another run.
    """
    asked = items(layout, source)
    settings = {
        "n": layouts()[layout]["pictures"] or _USUAL,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "batch_size": batch_size,
    }
    manifest = Manifest(f"drawings/{layout}", str(model), model_hash(model), settings, device=str(generator.device))
    run = RunFolder.open(folder, manifest, asked)
    for batch in missing(run, "images", batch_size):
        draw(generator, run, batch)
    return run


# -------------------------------------------------------------------------------------------------- where it belongs


def export(run: RunFolder, layout: str, target: str | Path, part: bool = False) -> Path:
    """Write a run's pictures in a benchmark's layout.

    Args:
        run: with all of its pictures; a layout that takes fewer of each prompt gets the first ones.
        layout: one of `layouts`.
        target: the folder to make; it must not be there, or be empty.
        part: also take fewer prompts than the benchmark has, for a trial.

    Returns:
        the folder.

    Raises:
        EvaluationError: if the numbers of prompts or pictures do not fit, or the folder holds something.
        RunError: if a picture is missing, damaged or changed.
    """
    writers = {"geneval": _write_geneval, "geneval2": _write_geneval2, "wise": _write_wise, "dpg": _write_dpg}
    target = Path(target)
    _known(layout)
    _check_numbers(run, layout, part)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise EvaluationError(f"{target} holds something: name a new folder")
    with whole_folder(target) as work:
        writers[layout](run, work, target.resolve())
        if target.exists():
            target.rmdir()  # fails if somebody has put something into it meanwhile
    return target


def _known(layout: str) -> None:
    if layout not in layouts():
        raise EvaluationError(f"unknown layout {layout!r}: one of {', '.join(layouts())}")


def _check_numbers(run: RunFolder, layout: str, part: bool) -> None:
    """Raise unless the run has as many prompts, and enough pictures of each, as the layout takes."""
    asked = layouts()[layout]
    prompts = len(run.items)
    pictures = run.manifest.settings["n"]
    wanted = asked.get("prompts", prompts)
    if prompts > wanted or (prompts < wanted and not part):
        raise EvaluationError(f"{run.folder}: {prompts} prompts, {layout} has {wanted}: draw all of them and no others")
    # More are no fault: the first ones are taken.
    if pictures < asked["pictures"]:
        raise EvaluationError(f"{run.folder}: {pictures} pictures of each prompt, {layout} takes {asked['pictures']}")


def _write_geneval(run: RunFolder, work: Path, target: Path) -> None:
    for number, item in enumerate(run.items):
        folder = work / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        row = {name: value for name, value in item.items() if name != "key"}  # the official lines have none
        line = json.dumps(row, ensure_ascii=False)
        (folder / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
        for place, picture in enumerate(run.images(item["key"])):
            picture.save(folder / "samples" / f"{place:04d}.png")


def _write_geneval2(run: RunFolder, work: Path, target: Path) -> None:
    # Its images.json maps prompts to pictures, so one of two equal prompts would be lost.
    repeated = [prompt for prompt, times in Counter(item["prompt"] for item in run.items).items() if times > 1]
    if repeated:
        raise EvaluationError(f"{run.folder}: {repeated[0]!r} comes twice, and geneval2 knows pictures by prompt")
    places: dict[str, str] = {}
    for number, item in enumerate(run.items):
        run.images(item["key"])[0].save(work / f"{number:05d}.png")
        places[item["prompt"]] = str(target / f"{number:05d}.png")
    (work / "images.json").write_text(json.dumps(places, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_wise(run: RunFolder, work: Path, target: Path) -> None:
    numbers = [item.get("id") for item in run.items]
    wanted = layouts()["wise"]["prompts"]
    bad = [n for n in numbers if type(n) is not int or not 1 <= n <= wanted or numbers.count(n) > 1]
    if bad:
        raise EvaluationError(f"{run.folder}: `id` of an item is {bad[0]}: wise numbers its prompts from 1 to {wanted}")
    for number, item in zip(numbers, run.items, strict=True):
        run.images(item["key"])[0].save(work / f"{number}.png")


def _write_dpg(run: RunFolder, work: Path, target: Path) -> None:
    for item in run.items:
        if "." in item["key"] or "/" in item["key"]:
            raise EvaluationError(f"{run.folder}: key {item['key']!r}: dpg's keys are the stems of its prompt files")
        grid(run.images(item["key"])[:4]).save(work / f"{item['key']}.png")


def grid(pictures: list[Image]) -> Image:
    """Four square pictures of one size in one: first and second above, third and fourth below.

    Raises:
        EvaluationError: if they are not four, not square or not of one size.
    """
    sizes: Any = sorted({picture.size for picture in pictures})
    if len(pictures) != 4 or len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        raise EvaluationError(f"{len(pictures)} pictures of {sizes}: a grid is made of four squares of one size")
    side = sizes[0][0]
    whole = Pillow.new("RGB", (2 * side, 2 * side))
    for place, picture in enumerate(pictures):
        whole.paste(picture, (side * (place % 2), side * (place // 2)))
    return whole
