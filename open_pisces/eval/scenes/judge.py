"""The judge for scenes: two small detectors of the 48 concepts, of different kinds, and what they were measured at.

``OneStage`` looks once at the whole picture: for each cell of a 16 x 16 grid whether an object's middle lies there, its
box, class and color (after CenterNet, Zhou et al. 2019, arXiv 1904.07850). ``TwoStage`` first finds boxes, then cuts
each out of the picture, scales it to one size and names it (after R-CNN, Girshick et al. 2014, arXiv 1311.2524). They
share no weights, were trained on different draws, and err differently: where they disagree a score is in doubt.

Both know pictures of 64 x 64 pixels on a plain ground and nothing else. How often they are right on real scenes and on
drawn pictures that a person labeled stands in their card (`card`), which every score that they give carries along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_pisces.data.images import generation_pixels
from open_pisces.datasets.scenes.layout import SIZE, vocabulary
from open_pisces.eval.drawing.detection import Detection, DetectorError

COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's ten, which are also the scenes' nine and pink."""
JUDGES = Path(__file__).parent / "judges"
STRIDE = 4
GRID = SIZE // STRIDE
CROP = 24
"""Side to which the second stage scales what it names."""
MOST = 16
"""Objects looked for in one picture (GenEval's most per class)."""
FLOOR = 0.05
"""Detections below this confidence are not reported; both thresholds lie above."""
SAME = 0.5
"""Overlap (intersection over union) above which two boxes are one object: the surer one stays."""
_CONTEXT = 1.15  # a cut is this much wider than its box


@cache
def classes() -> tuple[str, ...]:
    """The 48 concepts, in a fixed order."""
    words = vocabulary()
    return tuple(sorted({thing.concept for thing in (*words.objects, *words.shapes)}))


class Found(NamedTuple):
    """The most likely objects of each picture, K = `MOST` of them, the surest first."""

    score_BK: Tensor
    box_BK4: Tensor
    """Left, top, right, bottom in pixels."""
    classes_BKV: Tensor
    """Probabilities over `classes`."""
    colors_BKV: Tensor
    """Probabilities over `COLORS`."""


# ----------------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """Depthwise 5 x 5, then two layers at each place, added to the input (after ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int, wider: int = 2) -> None:
        super().__init__()
        self.across = nn.Conv2d(width, width, 5, padding=2, groups=width)
        # Not BatchNorm: what is found in a picture must not depend on its batch.
        self.norm = nn.GroupNorm(1, width)
        self.up = nn.Conv2d(width, wider * width, 1)
        self.down = nn.Conv2d(wider * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, H, W)`` to the same shape."""
        return x + self.down(F.gelu(self.up(self.norm(self.across(x)))))


class Trunk(nn.Sequential):
    """Pixels (B, 3, 64, 64) in [0, 1] to features (B, width, 16, 16)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(
            # 64 x 64 is small: pixels are folded into channels, not thrown away by a stride.
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            *(Block(width) for _ in range(blocks)),
            nn.GroupNorm(1, width),
        )


class OneStage(nn.Module):
    """Finds, boxes and names in one look."""

    def __init__(self, width: int = 96, blocks: int = 5) -> None:
        super().__init__()
        self.trunk = Trunk(width, blocks)
        self.middle = nn.Conv2d(width, 1, 1)
        self.box = nn.Conv2d(width, 4, 1)
        self.classes = nn.Conv2d(width, len(classes()), 1)
        self.colours = nn.Conv2d(width, len(COLORS), 1)
        _expect_little(self.middle)

    def maps(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits of middles (B, 1, 16, 16), boxes (B, 4, ...), classes (B, 48, ...) and colors (B, 10, ...)."""
        x = self.trunk(pixels_BCHW * 2 - 1)
        return {name: getattr(self, name)(x).float() for name in ("middle", "box", "classes", "colours")}

    def forward(self, pixels_BCHW: Tensor) -> Found:
        """What is in pictures (B, 3, 64, 64)."""
        maps = self.maps(pixels_BCHW)
        score_BK, cell_BK = peaks(maps["middle"].sigmoid())
        picked = {name: at_cells(maps[name], cell_BK) for name in ("box", "classes", "colours")}
        return Found(
            score_BK, boxes(picked["box"], cell_BK), picked["classes"].softmax(-1), picked["colours"].softmax(-1)
        )


class TwoStage(nn.Module):
    """Finds boxes first; names what it cuts out of them."""

    def __init__(self, width: int = 48, blocks: int = 3, naming: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        self.trunk = Trunk(width, blocks)
        self.middle = nn.Conv2d(width, 1, 1)
        self.box = nn.Conv2d(width, 4, 1)
        _expect_little(self.middle)
        layers: list[nn.Module] = []
        for before, after in zip((3, *naming), naming, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(1, after), nn.GELU(), nn.MaxPool2d(2)]
        self.naming = nn.Sequential(*layers, nn.Flatten())
        flat = naming[-1] * (CROP // 2 ** len(naming)) ** 2
        self.nothing_or_class = nn.Linear(flat, 1 + len(classes()))
        self.colours = nn.Linear(flat, len(COLORS))

    def maps(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits of middles (B, 1, 16, 16) and boxes (B, 4, 16, 16)."""
        x = self.trunk(pixels_BCHW * 2 - 1)
        return {name: getattr(self, name)(x).float() for name in ("middle", "box")}

    def name(self, crops_KCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K, 1 + 48) of nothing and the classes, and (K, 10) of the colors, for cuts (K, 3, 24, 24)."""
        x = self.naming(crops_KCHW * 2 - 1)
        return self.nothing_or_class(x).float(), self.colours(x).float()

    def forward(self, pixels_BCHW: Tensor) -> Found:
        """What is in pictures (B, 3, 64, 64); a box that holds nothing loses its confidence."""
        maps = self.maps(pixels_BCHW)
        score_BK, cell_BK = peaks(maps["middle"].sigmoid())
        box_BK4 = boxes(at_cells(maps["box"], cell_BK), cell_BK)
        B, K = score_BK.shape
        picture_K = torch.arange(B, device=pixels_BCHW.device).repeat_interleave(K)
        named, colors = self.name(cut(pixels_BCHW, box_BK4.flatten(0, 1), picture_K))
        # The second stage may overrule the first: blots look like objects until they are named.
        something = 1 - named.softmax(-1)[:, :1].view(B, K)
        of_classes = named[:, 1:].softmax(-1).view(B, K, -1)
        return Found(score_BK * something, box_BK4, of_classes, colors.softmax(-1).view(B, K, -1))


def _expect_little(middle: nn.Conv2d) -> None:
    """Begin with low chances: few cells hold a middle."""
    assert middle.bias is not None
    nn.init.constant_(middle.bias, -4.0)


def peaks(middle_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and cell ``(B, K)`` of the places that stand above their eight neighbors, the surest first."""
    highest = F.max_pool2d(middle_B1HW, 3, 1, 1)
    # CenterNet's stand-in for non-maximum suppression.
    alone = torch.where(middle_B1HW == highest, middle_B1HW, 0.0)
    top = alone.flatten(1).topk(MOST, dim=1)
    return top.values, top.indices


def boxes(raw_BK4: Tensor, cell_BK: Tensor) -> Tensor:
    """Boxes (B, K, 4) in pixels from the network's offsets of the middle (in cells) and logarithms of the sides."""
    x = (cell_BK % GRID + 0.5 + raw_BK4[..., 0]) * STRIDE
    y = (cell_BK // GRID + 0.5 + raw_BK4[..., 1]) * STRIDE
    # Clamped: an untrained network would overflow.
    width, height = (SIZE / 2 * raw_BK4[..., 2:].clamp(-3, 1).exp()).unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1).clamp(0, SIZE)


def cut(pixels_BCHW: Tensor, box_K4: Tensor, picture_K: Tensor) -> Tensor:
    """The boxes' contents, a little wider and square, scaled to (K, 3, `CROP`, `CROP`) without cutting the pictures."""
    middle = (box_K4[:, :2] + box_K4[:, 2:]) / 2
    side = (box_K4[:, 2:] - box_K4[:, :2]).amax(-1, keepdim=True).clamp_min(2) * _CONTEXT
    steps = (torch.arange(CROP, device=box_K4.device) + 0.5) / CROP - 0.5
    x = middle[:, :1] + side * steps
    y = middle[:, 1:] + side * steps
    grid = torch.stack([x[:, None].expand(-1, CROP, -1), y[:, :, None].expand(-1, -1, CROP)], -1) / SIZE * 2 - 1
    return F.grid_sample(pixels_BCHW[picture_K], grid, mode="bilinear", padding_mode="border", align_corners=False)


def at_cells(map_BCHW: Tensor, cell_BK: Tensor) -> Tensor:
    """Columns (B, K, C) of a map at cells."""
    flat = map_BCHW.flatten(2)
    return flat.gather(2, cell_BK[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


NETWORKS: dict[str, type[OneStage] | type[TwoStage]] = {"one-stage": OneStage, "two-stage": TwoStage}


def load_network(kind: str, folder: str | Path = JUDGES) -> nn.Module:
    """A trained network, in float32.

    Raises:
        DetectorError: for another kind than those of `NETWORKS`, or a folder without it.
    """
    if kind not in NETWORKS:
        raise DetectorError(f"no judge {kind!r}: choose {' or '.join(NETWORKS)}")
    path = Path(folder) / f"{kind}.safetensors"
    if not path.is_file():
        raise DetectorError(f"no judge at {path}: train it with `pisces eval judge --train {folder}`")
    network = NETWORKS[kind]()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network


# ----------------------------------------------------------------------------------------------------- the judge


class SceneJudge:
    """One of the two networks as a detector; see `open_pisces.eval.drawing.detection.Detector`."""

    def __init__(self, kind: str, network: nn.Module, threshold: float) -> None:
        self.kind = kind
        self.network = network.eval()
        self.name = f"scene judge ({kind})"
        self.classes = classes()
        self.colors = COLORS
        self.threshold = self.counting_threshold = threshold

    @classmethod
    def from_pretrained(cls, kind: str = "one-stage", folder: str | Path = JUDGES) -> SceneJudge:
        """Load the ``one-stage`` or the ``two-stage`` judge, by default those in the package.

        Raises:
            DetectorError: for another kind, or a folder without it.
        """
        return cls(kind, load_network(kind, folder), card(folder)[kind]["threshold"])

    def save(self, folder: str | Path) -> None:
        """Write the weights, in bfloat16."""
        # Half the size in the package; the card is measured on these weights, not on those of training.
        tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, Path(folder) / f"{self.kind}.safetensors")

    @torch.inference_mode()
    def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]] = ()) -> list[list[Detection]]:
        """Everything found in pictures, brought to 64 x 64 pixels first; boxes are in the picture's own pixels.

        Colors are given for every object, asked for or not.
        """
        if not images:
            return []
        pixels = torch.stack([torch.from_numpy(generation_pixels(image, SIZE)) for image in images])
        found = self.network(pixels)
        pictures = (Found(*parts) for parts in zip(*found, strict=True))
        return [_detections(one, image) for one, image in zip(pictures, images, strict=True)]


def _detections(found: Found, image: Image) -> list[Detection]:
    """One picture's objects above `FLOOR`; of boxes that overlap only the surest."""
    score_K, box_K4, classes_KV, colors_KV = (part.numpy() for part in found)
    score_K = score_K * classes_KV.max(-1)
    # Back from the square that was cut out of the middle to the picture's own pixels.
    scale = min(image.size) / SIZE
    shift = np.array([(side - SIZE * scale) / 2 for side in image.size] * 2)
    kept: list[Detection] = []
    for k in np.argsort(-score_K, kind="stable"):
        left, top, right, bottom = (float(edge) for edge in box_K4[k] * scale + shift)
        box = (left, top, right, bottom)
        if score_K[k] < FLOOR or any(overlap(other.box, box) > SAME for other in kept):
            continue
        colors = {name: round(float(p), 4) for name, p in zip(COLORS, colors_KV[k], strict=True)}
        kept.append(Detection(classes()[int(np.argmax(classes_KV[k]))], box, float(score_K[k]), colors))
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes with continuous edges; `drawing.rules.pixel_overlap` counts whole pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / max(1e-9, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def card(folder: str | Path = JUDGES) -> dict[str, Any]:
    """What is known of the judges: threshold, training, accuracy on real scenes and on labeled drawings."""
    path = Path(folder) / "card.json"
    if not path.is_file():
        raise DetectorError(f"no judges at {folder}: train them with `pisces eval judge --train {folder}`")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
