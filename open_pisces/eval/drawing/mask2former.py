"""A detector for photographs: Mask2Former and CLIP as transformers has them.

**Not GenEval's official detector.** That is mmdet 2.x's Mask2Former (Swin-S, ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e
_coco``) with open_clip's ViT-L/14, and it no longer installs. This one has the same architecture and the weights of
Mask2Former's authors (another training than mmdet's), and the same CLIP weights, so its figures are near the official
ones and not equal to them: they must be marked with `Mask2FormerClip.name`. What the official code does around the
networks is done here as well, each step from its source:

- picture: 800 pixels the short side, 1333 the long one at most, ImageNet's mean and deviation, then zeros to the right
  and below up to multiples of 32 (mmdet's test pipeline). The weights' own processor would squeeze it to 384 x 384;
- the 100 likeliest (query, class) pairs; masks enlarged to the padded picture, cut, resized to the true one, and there
  where the logit is above 0; confidence = probability of the class x mean probability inside the mask; the box is the
  mask's, its right and bottom outside (mmdet's ``MaskFormerFusionHead.instance_postprocess``, ``mask2bbox``);
- color: the object on gray #999, cropped to its box, compared with each color's direction: the mean of three texts'
  normalized embeddings, normalized (GenEval's ``evaluate_images.py``, clip_benchmark's ``zero_shot_classifier``).

Known small differences: Pillow's bilinear filter in place of OpenCV's where a picture shrinks; a CLIP crop's long side
may be rounded to a neighboring pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from open_pisces.data.images import generation_pixels
from open_pisces.device import pick_device
from open_pisces.eval.drawing.detection import Detection, DetectorError
from open_pisces.eval.drawing.prompts import tables

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
GRAY = (0x99, 0x99, 0x99)
"""What surrounds a cut-out object (#999)."""
_INSTANCES = 100  # (query, class) pairs looked at, mmdet's max_per_image
_MULTIPLE = 32  # of the sides of what the backbone sees
_CROPS = 64  # crops CLIP sees at once


class Segmenter(Mask2FormerForUniversalSegmentation):
    """Mask2Former as transformers has it, less its training loss, without which it needs no scipy."""

    _keys_to_ignore_on_load_unexpected = (r"criterion",)

    def __init__(self, config: Mask2FormerConfig) -> None:
        super(Mask2FormerForUniversalSegmentation, self).__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()


class Mask2FormerClip:
    """`detection.Detector` for the 80 classes of COCO and ten colors; see the head of this file.

    Args:
        detector: folder or hub name of a Mask2Former for instances.
        clip: folder or hub name of a CLIP with its tokenizer.
        name: what scores call it; made of the two names if empty.
        device: ``auto``, ``cpu``, ``cuda`` ...
        floor: the confidence above which detections are given; below both thresholds.
        batch_size: pictures of one size that Mask2Former sees at once.
        sides: pixels of the short side, and the most of the long one.

    Raises:
        DetectorError: if weights are not there or are of something else.
    """

    threshold = 0.3
    counting_threshold = 0.9

    def __init__(
        self,
        detector: str | Path = DETECTOR,
        clip: str | Path = CLIP,
        name: str = "",
        device: str = "auto",
        floor: float = 0.05,
        batch_size: int = 4,
        sides: tuple[int, int] = (800, 1333),
    ) -> None:
        self.device = pick_device(device)
        self.mask2former = _load(Segmenter, detector, "Mask2Former").to(self.device)
        self.labels = class_names(self.mask2former.config.id2label)
        self.classes = tuple(dict.fromkeys(self.labels))
        self.reader = ColorReader(clip, self.device)
        self.colors = self.reader.colors
        self.name = name or f"transformers Mask2Former ({Path(detector).name}) + CLIP ({Path(clip).name})"
        self.floor = floor
        self.batch_size = batch_size
        self.sides = sides

    @torch.inference_mode()
    def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
        """Everything above the floor in each picture, with masks, in falling order of confidence.

        Raises:
            DetectorError: if a color is asked of a class that it does not know.
        """
        images = [image.convert("RGB") for image in images]
        for wanted in colored:
            for name in wanted:
                if name not in self.classes:
                    raise DetectorError(f"{self.name} does not know the class {name!r}: it knows {len(self.classes)}")
        prepared = [prepare(image, *self.sides) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}  # one padded size at a time: no picture changes its neighbors
        for number, (pixels, _) in enumerate(prepared):
            groups.setdefault(pixels.shape, []).append(number)
        found: dict[int, list[Detection]] = {}
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                found |= self._instances(batch, [prepared[i] for i in batch], [images[i].size for i in batch])
        return self._colored(images, [found[number] for number in range(len(images))], colored)

    def _instances(
        self, numbers: list[int], prepared: list[tuple[np.ndarray, tuple[int, int]]], sizes: list[tuple[int, int]]
    ) -> dict[int, list[Detection]]:
        """What Mask2Former finds in pictures of one padded size, by their numbers."""
        pixels_BCHW = torch.from_numpy(np.stack([pixels for pixels, _ in prepared])).to(self.device)
        out = self.mask2former(pixel_values=pixels_BCHW)
        padded = tuple(pixels_BCHW.shape[-2:])
        return {
            number: instances(classes, masks, self.labels, padded, inner, (height, width), self.floor)
            for number, classes, masks, (_, inner), (width, height) in zip(
                numbers, out.class_queries_logits, out.masks_queries_logits, prepared, sizes, strict=True
            )
        }

    def _colored(
        self, images: Sequence[Image], found: list[list[Detection]], colored: Sequence[Mapping[str, int]]
    ) -> list[list[Detection]]:
        """The detections with colors where they are wanted; all crops of all pictures go through CLIP together."""
        asked: list[tuple[int, int]] = []  # picture, and place among its detections
        for picture, (detections, wanted) in enumerate(zip(found, colored, strict=True)):
            for name, count in wanted.items():
                places = [place for place, detection in enumerate(detections) if detection.name == name]
                asked += [(picture, place) for place in places[:count]]
        crops = [cut_out(images[picture], found[picture][place]) for picture, place in asked]
        colors = self.reader.probabilities(crops, [found[picture][place].name for picture, place in asked])
        for (picture, place), probabilities in zip(asked, colors, strict=True):
            old = found[picture][place]
            # Detections are frozen, so one with its colors takes the place of the old one.
            found[picture][place] = Detection(old.name, old.box, old.score, probabilities, old.mask)
        return found


def class_names(labels: Mapping[int, str]) -> tuple[str, ...]:
    """The classes behind a detector's outputs, in GenEval's spelling; names that COCO does not have stay as they are.

    Args:
        labels: name of each output, as ``config.id2label`` has them.
    """
    spellings = {}
    for name, others in tables()["classes"].items():
        for other in (name, *others):
            spellings[other] = name
    names = [labels[number] for number in sorted(labels)]
    return tuple(spellings.get(name.lower().replace("_", " "), name) for name in names)


def prepare(image: Image, short: int, long: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture as Mask2Former sees it, and its height and width without the padding.

    Returns:
        ``float32 (3, H, W)``, H and W multiples of 32, and the part of it that is picture, from the upper left.
    """
    # mmcv's rescale: the largest size within both bounds, sides rounded half up.
    scale = min(long / max(image.size), short / min(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Pillow.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = (pixels - np.array(IMAGENET_DEFAULT_MEAN, np.float32)) / np.array(IMAGENET_DEFAULT_STD, np.float32)
    right = -width % _MULTIPLE
    below = -height % _MULTIPLE
    return np.pad(pixels, ((0, below), (0, right), (0, 0))).transpose(2, 0, 1), (height, width)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Sequence[str],
    padded: tuple[int, ...],
    inner: tuple[int, int],
    size: tuple[int, int],
    floor: float,
) -> list[Detection]:
    """Detections from Mask2Former's outputs for one picture, in falling order of confidence.

    Where confidences are equal the later pair comes first, as in GenEval's ``argsort()[::-1]``.

    Args:
        class_logits: ``(queries, classes + 1)``, the last one "nothing".
        mask_logits: ``(queries, h, w)``, of the padded picture, usually a quarter of its sides.
        labels: names of the classes.
        padded: height and width of what the network saw.
        inner: height and width of the picture inside it, from the upper left.
        size: height and width of the true picture.
        floor: confidence above which detections are given.
    """
    chances = class_logits.float().softmax(-1)[:, :-1].flatten()
    chances, pairs = chances.sort(descending=True, stable=True)  # top-k would leave the order of equals open
    pairs = pairs[:_INSTANCES][chances[:_INSTANCES] > floor]  # the mask's mean can only lower a confidence
    queries = pairs // (class_logits.shape[-1] - 1)
    masks = F.interpolate(mask_logits[queries, None].float(), padded, mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    means = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores = (chances[: len(pairs)] * means).cpu().numpy()
    names = (pairs % (class_logits.shape[-1] - 1)).tolist()
    found = inside.cpu().numpy()
    order = np.argsort(scores, kind="stable")[::-1]
    return [
        Detection(labels[names[i]], mask_box(found[i]), float(scores[i]), mask=found[i])
        for i in order
        if scores[i] > floor and found[i].any()
    ]


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is True in ``mask`` (H, W), which must hold something; the ends lie outside."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def cut_out(image: Image, detection: Detection) -> Image:
    """The object on gray, cropped to its box; without a mask the picture inside the box."""
    if detection.mask is not None:
        ground = Pillow.new("RGB", image.size, GRAY)
        image = Pillow.composite(image.convert("RGB"), ground, Pillow.fromarray(detection.mask))
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.crop((left, top, right, bottom))


class ColorReader:
    """Names the colors of cut-out objects with CLIP.

    Args:
        folder: folder or hub name of a CLIP with its tokenizer.
        device: where it computes.
        colors: their names; None takes GenEval's ten.

    Raises:
        DetectorError: if weights or tokenizer are not there or are of something else.
    """

    def __init__(self, folder: str | Path, device: torch.device, colors: Sequence[str] | None = None) -> None:
        self.clip = _load(CLIPModel, folder, "CLIP").to(device)
        self.device = device
        self.colors = tuple(colors or tables()["colours"])
        self.tokenizer = _tokenizer(folder, self.colors)
        # Thirty texts a class: written out once, not for every crop.
        self.directions = lru_cache(maxsize=None)(self._directions)

    @torch.inference_mode()
    def probabilities(self, crops: Sequence[Image], names: Sequence[str]) -> list[dict[str, float]]:
        """Each color's probability for each crop of an object of the class ``names[i]``, as CLIP sees it.

        As for CLIP itself the similarities are multiplied by 100 before the softmax.
        """
        size = self.clip.config.vision_config.image_size
        found: list[dict[str, float]] = []
        for start in range(0, len(crops), _CROPS):
            shown = [_normalized(crop, size) for crop in crops[start : start + _CROPS]]
            pixels_BCHW = torch.from_numpy(np.stack(shown)).to(self.device)
            pooled_BD = self.clip.vision_model(pixel_values=pixels_BCHW).pooler_output
            seen_BE = F.normalize(self.clip.visual_projection(pooled_BD), dim=-1)
            for seen_E, name in zip(seen_BE, names[start : start + _CROPS], strict=True):
                chances = (100 * self.directions(name) @ seen_E).softmax(-1)
                found.append(dict(zip(self.colors, chances.tolist(), strict=True)))
        return found

    def _directions(self, name: str) -> Tensor:
        """For each color the mean direction of its texts about the class ``name``: (colors, E), normalized."""
        templates = tables()["colour_texts"]
        texts = [text.format(colour=color, name=name) for color in self.colors for text in templates]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        pooled_TD = self.clip.text_model(**tokens).pooler_output
        told_TE = F.normalize(self.clip.text_projection(pooled_TD), dim=-1)
        return F.normalize(told_TE.unflatten(0, (len(self.colors), len(templates))).mean(1), dim=-1)


def _normalized(crop: Image, size: int) -> np.ndarray:
    """A crop as CLIP sees it: short side to ``size``, center cut, CLIP's mean and deviation; (3, size, size)."""
    mean, deviation = (np.array(values, np.float32)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels: np.ndarray = (generation_pixels(crop, size) - mean) / deviation
    return pixels


def _load(kind: Any, folder: str | Path, what: str) -> Any:
    """A network in evaluation mode, float32; refused unless it is of the kind and all of its weights are there."""
    remedy = f"give a folder with config.json and model.safetensors of a {what}, or a hub name while online"
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError):
        raise DetectorError(f"{folder}: neither a model's folder nor one that the hub gives: {remedy}") from None
    if config.model_type != kind.config_class.model_type:
        raise DetectorError(f"{folder}: holds a {config.model_type}, needed is a {what}: {remedy}")
    try:
        model, report = kind.from_pretrained(str(folder), config=config, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise DetectorError(f"{folder}: the weights cannot be read ({first}): {remedy}") from None
    if missing := sorted(report["missing_keys"]):
        raise DetectorError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}: {remedy}")
    return model.eval()


def _tokenizer(folder: str | Path, colors: Sequence[str]) -> Any:
    """CLIP's tokenizer, which lies beside its weights; refused if it cannot tell ``colours`` apart."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        told_apart = len({tuple(ids) for ids in tokenizer(list(colors))["input_ids"]})
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise DetectorError(
            f"{folder}: no tokenizer ({first}): put CLIP's tokenizer files beside its weights"
        ) from None
    if told_apart < len(colors):  # without its files transformers makes an empty one
        raise DetectorError(f"{folder}: no tokenizer that knows words: put CLIP's tokenizer files beside its weights")
    return tokenizer
