"""CLIP score: how well pictures fit their captions, and CLIP's embeddings as features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from open_pisces.device import pick_device
from open_pisces.eval.distances.features import FeatureSpec, as_rows, batch_for, extract, pictures_of
from open_pisces.eval.evaluation import Score, rounded
from open_pisces.eval.intervals import EvaluationError, mean_interval
from open_pisces.eval.run import RunFolder
from open_pisces.model.folder import weights_digest


class ClipImages:
    """CLIP's embeddings of pictures, of length 1, as features (FD-CLIP, and CMMD's features); and of texts.

    Args:
        folder: a folder or hub name that transformers' ``CLIPModel`` loads, with its tokenizer and image processor.
        device: where it computes.

    Raises:
        EvaluationError: if it cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.device = pick_device(device)
        self.folder = str(folder)
        try:
            self.model = CLIPModel.from_pretrained(folder).eval().to(self.device)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            # Pillow's resizing is what CLIP's published figures were made with; the tensor backend differs slightly.
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{folder}: no CLIP model with its processor ({error}): give its folder") from None
        self.batch = batch_for(self.device)
        config = self.model.config
        self.longest: int = config.text_config.max_position_embeddings
        means = "as its image processor, embedding of length 1"
        name = f"CLIP-{Path(folder).name.replace(' ', '-')}"
        size = config.vision_config.image_size
        parts = (self.model.vision_model, self.model.visual_projection, self.model.text_model)
        weights = weights_digest(torch.nn.ModuleList((*parts, self.model.text_projection)))[:16]
        self.ruler = FeatureSpec(name, config.projection_dim, size, weights, means)

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> np.ndarray:
        """Pictures to ``(B, projection width)``."""
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return as_rows(torch.nn.functional.normalize(self.model.visual_projection(seen), dim=-1))

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> tuple[np.ndarray, int]:
        """Captions to ``(B, projection width)``, of length 1; and how many were longer than the model reads.

        Those are cut before their last token, as CLIP's own tokenizer does.
        """
        longer = sum(len(ids) > self.longest for ids in self.tokenizer(list(captions)).input_ids)
        limits: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.longest}
        inputs = self.tokenizer(list(captions), return_tensors="pt", **limits).to(self.device)
        read = self.model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
        return as_rows(torch.nn.functional.normalize(self.model.text_projection(read), dim=-1)), longer


@dataclass(frozen=True)
class ClipScore(Score):
    """The mean of ``100 * max(cos, 0)`` over pairs of a picture and its caption (Hessel et al. 2021).

    Without that paper's factor of 2.5, as text-to-image papers and torchmetrics give it.
    """

    baseline: float
    """The same pictures with the next one's caption."""
    truncated: int
    """Captions longer than the model reads."""
    model: str
    weights: str
    """Scores of different weights cannot be compared."""


def clip_score(
    images: str | Path | RunFolder | Sequence[Image],
    captions: Sequence[str],
    model_folder: str | Path,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> ClipScore:
    """How well pictures fit their captions.

    A run keeps the result as ``clip.json``, with the figure of each picture and its own caption (``right``) and of the
    next one's (``wrong``), so that the score can be made again without the CLIP.

    Args:
        images: anything `pictures_of` takes, in the order of the captions.
        captions: one for each picture.
        model_folder: of a CLIP model.
        batch_size: pictures at once; None is the model's own choice.
        device: where it computes.
        seed: of the interval.

    Raises:
        EvaluationError: no pictures, unreadable ones, another number of captions, an empty caption, no such model.
    """
    sources = pictures_of(images)
    empty = [number for number, caption in enumerate(captions) if not caption.strip()]
    if empty:
        raise EvaluationError(f"caption {empty[0]} is empty ({len(empty)} are): give each picture its words")
    clip = ClipImages(model_folder, device)
    seen = extract(clip, sources, batch_size=batch_size)
    if len(seen) != len(captions):
        raise EvaluationError(f"{len(captions)} captions for {len(seen)} pictures: give one to each")
    parts = [clip.texts(captions[start : start + clip.batch]) for start in range(0, len(captions), clip.batch)]
    read = np.concatenate([rows for rows, _ in parts])
    # Cut at 0 pair by pair, as the paper does: a negative cosine does not offset another pair.
    right = 100 * (seen.rows * read).sum(axis=1).clip(0)
    wrong = 100 * (seen.rows * np.roll(read, -1, axis=0)).sum(axis=1).clip(0)
    found = rounded(mean_interval(right, seed=seed))
    score = ClipScore(
        name="CLIP score",
        score=found.score,
        low=found.low,
        high=found.high,
        n=len(captions),
        baseline=round(float(wrong.mean()), 4),
        truncated=sum(longer for _, longer in parts),
        model=clip.folder,
        weights=clip.ruler.weights,
    )
    if isinstance(images, RunFolder):
        images.note("clip", {**score.row(), "right": right.tolist(), "wrong": wrong.tolist()})
    return score
