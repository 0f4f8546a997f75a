"""Pictures: opened safely, cut to what the two encoders see, and put on sheets for people to look at.

Pixels are ``float32 (3, H, W)`` in [0, 1] everywhere; normalisation belongs to the models.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.Image import Image

from open_pisces.errors import PiscesError


class ImageError(PiscesError):
    """A picture that cannot be used; the message names the file, the value and the remedy."""


def open_image(source: str | Path | bytes, max_pixels: int = 64_000_000) -> Image:
    """Open a picture as RGB: upright (EXIF orientation applied), transparency laid on white.

    Args:
        source: a path, or the bytes of a file.
        max_pixels: refuse larger pictures; their size is read from the header before anything is decoded.

    Raises:
        ImageError: missing file, not an image, truncated, or too many pixels.
    """
    name = "picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ImageError(f"{name}: no such file; give the path of a PNG, JPEG or WebP picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)  # the check below says it better
            with Pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                _check_size(image, name, max_pixels)
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except Pillow.DecompressionBombError:
        raise ImageError(f"{name}: more than {max_pixels:,} pixels; make the picture smaller first") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that can be read; give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # what Pillow's decoders raise on broken files
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: the image is damaged or cut short ({error}); get a whole copy") from None


def _check_size(image: Image, name: str, max_pixels: int) -> None:
    """Refuse a bomb while only its header has been read."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is more than {max_pixels:,} pixels; make the picture smaller first"
        )


def _rgb(image: Image) -> Image:
    """Eight-bit RGB; what is transparent becomes white."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit greys to white
        return Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Pillow.new("RGBA", layer.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def understanding_pixels(image: Image, size: int) -> np.ndarray:
    """What the understanding encoder sees: a plain bicubic resize, as SigLIP's processor does; (3, size, size)."""
    return _pixels(image.convert("RGB").resize((size, size), Pillow.Resampling.BICUBIC))


def generation_pixels(image: Image, size: int) -> np.ndarray:
    """What gen-CLIP sees and the decoder draws: short side to ``size`` (bicubic), centre crop; (3, size, size)."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Pillow.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return _pixels(image.crop((left, top, left + size, top + size)))


def _pixels(image: Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255))


def to_pil(pixels: np.ndarray) -> Image:
    """A picture from pixels (3, H, W); values outside [0, 1] are clipped.

    Raises:
        ImageError: for another shape, or values that are not numbers.
    """
    pixels = np.asarray(pixels, dtype=np.float32)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(f"pixels of shape {pixels.shape}: a picture is (3, height, width)")
    if not np.isfinite(pixels).all():
        raise ImageError("pixels hold NaN or infinity: the model that made them has diverged")
    return Pillow.fromarray((pixels.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def save_whole(image: Image, path: Path) -> None:
    """Save a picture so that ``path`` is never half of one."""
    hidden = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        image.save(hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def contact_sheet(images: Sequence[Image], captions: Sequence[str], columns: int, cell: int = 128) -> Image:
    """A labelled grid: each picture scaled to ``cell`` pixels, its caption wrapped underneath.

    Raises:
        ImageError: without pictures, or with a number of captions that is not the number of pictures.
    """
    if not images or len(images) != len(captions):
        raise ImageError(f"a sheet needs as many captions as pictures, found {len(captions)} for {len(images)}")
    height_of_text = max(10, cell // 11)
    font = ImageFont.load_default(size=height_of_text)
    line, margin = math.ceil(height_of_text * 1.25), max(4, cell // 16)
    wrapped = [textwrap.wrap(caption, max(8, int(cell / (height_of_text * 0.56)))) for caption in captions]
    columns = max(1, min(columns, len(images)))
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [cell + 2 * margin + line * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Pillow.new("RGB", (columns * (cell + margin) + margin, sum(heights) + margin), (244, 244, 244))
    draw, top = ImageDraw.Draw(sheet), margin
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = margin + place * (cell + margin)
            sheet.paste(_fit(images[i], cell), (left, top))
            for number, words in enumerate(wrapped[i]):
                draw.text((left, top + cell + 2 + number * line), words, fill=(20, 20, 20), font=font)
        top += height
    return sheet


def _fit(image: Image, cell: int) -> Image:
    """The picture on a white square of ``cell`` pixels; small ones are enlarged without smoothing."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    way = Pillow.Resampling.NEAREST if scale.is_integer() and scale > 1 else Pillow.Resampling.BICUBIC
    square = Pillow.new("RGB", (cell, cell), (255, 255, 255))
    square.paste(image.convert("RGB").resize(size, way), ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square
