"""The COCO-30K protocol of the Frechet Inception Distance, for any feature network, captions and pictures.

A picture is drawn of each of 30,000 captions of COCO val2014, and the distance of all of them from real pictures is
taken with Inception's features at 256 pixels. Papers differ in what they leave unsaid: which captions, which real
pictures, which resizing. Here the run folder and the result say all of it; compare only what says the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Pillow
from rich.console import Console
from rich.progress import track

from open_pisces.data.draws import stream
from open_pisces.eval.distances.distances import FeatureStatistics, check_enough, check_rulers, compare
from open_pisces.eval.distances.features import FeatureNetwork, Features, extract, pictures_of
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, Row, RunFolder, model_hash

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

COCO = 30_000
"""Captions of COCO val2014 that the protocol asks for, one picture each."""
SIDE = 256
NOISE = 100
"""Pictures of noise behind the upper baseline."""


def evaluate_fid(
    generator: Generator,
    network: FeatureNetwork,
    captions: str | Path,
    real: str | Path,
    model: str | Path,
    folder: str | Path | None = None,
    limit: int = COCO,
    side: int = SIDE,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    biased: bool = False,
) -> dict[str, Any]:
    """Draw a picture of each of ``limit`` captions and measure their distance from real pictures.

    All pictures are cut to ``side`` alike: short side resized bicubically, centre cut out. All pictures of ``real``
    count, not only those whose captions were drawn.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)`` and a ``device``.
        network: `open_pisces.eval.distances.features.Inception` for a FID.
        captions: COCO's ``captions_val2014.json``, or JSON lines with ``caption`` and, if there are several for a
            picture, ``image_id``.
        real: a folder of pictures, or a file of `FeatureStatistics`.
        model: the model's folder, for the manifest.
        folder: the run's; one that was interrupted goes on.
        limit: captions, drawn by ``seed`` if the file has more.
        side: what all pictures are cut to first.
        steps: denoising steps; None is the model's own.
        guidance_scale: None is the model's own.
        seed: of captions and noise; each batch of ``batch_size`` captions starts from noise of its own.
        batch_size: captions at once.
        biased: allow fewer pictures than `check_enough` wants.

    Returns:
        What `compare` returns, ``protocol`` ("COCO-30K" or "own"), ``seconds``, ``folder``.

    Raises:
        EvaluationError: as `compare`, `caption_items` and `distances.features.extract` do; before drawing.
    """
    start = time.time()
    items = caption_items(captions, limit, seed)
    check_enough(limit, network.ruler.width, "drawn", biased)
    reference = measure_real(network, real, side, biased)
    settings = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
    manifest = Manifest("fid", str(model), model_hash(model), settings, device=str(generator.device))
    run = RunFolder.open(folder, manifest, items)
    _draw(run, generator)
    scores = run.write_scores(score_run(run, network, reference, side, biased))
    return {**scores, "seconds": round(time.time() - start, 1), "folder": str(run.folder)}


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
    check_enough(len(sources), ruler.width, "real", biased)
    return extract(network, sources, side)


def score_run(
    run: RunFolder, network: FeatureNetwork, reference: Features | FeatureStatistics, side: int, biased: bool = False
) -> dict[str, Any]:
    """The figures of `evaluate_fid` from a run's pictures alone; ``reference`` is what `measure_real` gives."""
    drawn = extract(network, pictures_of(run), side)
    pixels = stream(0, "eval", "noise").integers(0, 256, (NOISE, drawn.sides[0], drawn.sides[0], 3), dtype=np.uint8)
    noise = extract(network, pictures_of([Pillow.fromarray(picture) for picture in pixels]), side)
    whole = network.ruler.distance == "FID" and len(drawn) == COCO and side == SIDE
    result = compare(reference, drawn, noise, biased, run.manifest.settings["seed"])
    return {**result, "protocol": "COCO-30K" if whole else "own"}


def _draw(run: RunFolder, generator: Generator) -> None:
    """Make the pictures that a run lacks."""
    settings, places = run.manifest.settings, {item["key"]: place for place, item in enumerate(run.items)}
    left = list(run.batches("images", settings["batch_size"]))
    for batch in track(left, "drawing", console=Console(stderr=True), disable=not left):
        noise = stream(settings["seed"], "eval", "fid", "noise", places[batch[0]["key"]])
        prompts, seed = [item["prompt"] for item in batch], int(noise.integers(2**31))
        drawn = generator.image(prompts, 1, settings["steps"], settings["guidance_scale"], seed)
        run.save_images({item["key"]: row for item, row in zip(batch, drawn, strict=True)})


def caption_items(path: str | Path, limit: int, seed: int) -> list[Row]:
    """``limit`` pictures' captions, one of each picture, both drawn by ``seed``, in the order of the file.

    Raises:
        EvaluationError: no such file, no JSON, an entry without a caption, or fewer pictures than asked.
    """
    pictures: dict[str, list[str]] = {}
    for number, row in enumerate(_entries(Path(path))):
        caption = row.get("caption") if isinstance(row, dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise EvaluationError(
                f"{path}: entry {number} has no `caption` in words ({json.dumps(row)[:60]}): COCO's annotations have "
                f"`image_id` and `caption`"
            )
        pictures.setdefault(str(row.get("image_id", f"entry {number}")), []).append(caption.strip())
    if not 0 < limit <= len(pictures):
        raise EvaluationError(f"{path} has captions of {len(pictures):,} pictures, asked are {limit:,}: ask for fewer")
    keys = list(pictures)
    chosen = sorted(stream(seed, "eval", "fid", "pictures").permutation(len(keys))[:limit].tolist())
    draws = stream(seed, "eval", "fid", "captions").random(len(keys))
    return [{"key": keys[i], "prompt": pictures[keys[i]][int(draws[i] * len(pictures[keys[i]]))]} for i in chosen]


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
