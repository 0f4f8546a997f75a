"""Pictures: opened safely, and cut to what the two encoders see.

Pixels are ``(3, H, W)``, bytes in batches and float32 in [0, 1] elsewhere; normalization belongs to the models.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.data.colors import ColorError, check_dim, to_srgb
from open_pisces.data.metadata import Parts, split_metadata
from open_pisces.errors import PiscesError

_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""What turns a picture of each EXIF orientation upright."""


class ImageError(PiscesError):
    """A picture that cannot be used; the message names the file, the value and the remedy."""


def open_image(source: str | Path | bytes, max_pixels: int = 64_000_000) -> Image:
    """Open a picture as 8-bit sRGB: upright (EXIF orientation applied), transparency laid on white.

    Metadata never costs a picture: what of it cannot be read is ignored.

    Args:
        source: a path, or the bytes of a file.
        max_pixels: refuse larger pictures; their size is read from the header before anything is decoded.

    Raises:
        ImageError: missing file, not an image, truncated, too many pixels, or values of an unknown range.
    """
    name = "picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ImageError(f"{name}: no such file; give the path of a PNG, JPEG or WebP picture")
    try:
        return _decoded(source, name, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything on broken files: struct.error, TypeError, MemoryError ...
        if isinstance(error, PermissionError):
            raise ImageError(f"{name}: may not be read; change its permissions") from None
        raw = source if isinstance(source, bytes) else Path(source).read_bytes()
        parts = split_metadata(raw)
        if parts is None or parts.bare == raw:
            raise _damaged(name, error) from None
    # A damaged block of metadata must not cost the picture: once more without any.
    try:
        return _decoded(parts.bare, name, max_pixels, parts)
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from None


def image_size(raw: bytes) -> tuple[int, int]:
    """(width, height) of a picture as it is stored, from its header alone.

    Raises:
        ImageError: if the header cannot be read.
    """
    parts = split_metadata(raw)
    failure: Exception | None = None
    for content in (raw, parts.bare) if parts else (raw,):
        try:
            with _quiet(), Pillow.open(io.BytesIO(content)) as image:
                return image.size
        except Exception as error:  # as in `open_image`
            failure = error
    raise ImageError(f"picture: the header cannot be read ({failure}); get a whole copy")


def _decoded(source: str | Path | bytes, name: str, max_pixels: int, parts: Parts | None = None) -> Image:
    """Decode once; ``parts`` holds the metadata where the file itself has none any more."""
    try:
        with _quiet(), Pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            _check_size(image, name, max_pixels)
            is_deep = ";16" in str(image.tile)  # Pillow keeps the high byte of each channel
            image.load()
            profile = parts.profile if parts else image.info.get("icc_profile") or b""
            colors = to_srgb(image, profile if isinstance(profile, bytes) else b"")
            if is_deep:
                check_dim(colors)
            orientation = _orientation(image, parts)
            return colors.transpose(_UPRIGHT[orientation]) if orientation > 1 else colors
    except Pillow.DecompressionBombError:
        raise ImageError(f"{name}: more than {max_pixels:,} pixels; make the picture smaller first") from None
    except ColorError as error:
        raise ImageError(f"{name}: {error}") from None


def _damaged(name: str, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name}: not an image that can be read; give a PNG, JPEG or WebP file")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name}: the image is damaged or cut short ({reason}); get a whole copy")


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large pictures and odd metadata: the first is checked here, the second does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _check_size(image: Image, name: str, max_pixels: int) -> None:
    """Refuse a bomb while only its header has been read."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is more than {max_pixels:,} pixels; make the picture smaller first"
        )


def _orientation(image: Image, parts: Parts | None) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if it cannot be read."""
    try:
        exif = image.getexif()
        if parts:
            exif = Pillow.Exif()
            exif.load(parts.exif)
        found = exif.get(ExifTags.Base.Orientation, 1)  # one tag is read: another that is damaged does not matter
    except Exception:
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def understanding_bytes(image: Image, size: int) -> np.ndarray:
    """What the understanding encoder sees: a plain bicubic resize, as SigLIP's processor does.

    Returns:
        uint8 ``(3, size, size)``. Batches carry bytes, a quarter of the memory of floats; models divide by 255.
    """
    return _channels_first(image.convert("RGB").resize((size, size), Pillow.Resampling.BICUBIC))


def generation_bytes(image: Image, size: int) -> np.ndarray:
    """What gen-CLIP sees and the decoder draws: short side to ``size`` (bicubic), center crop.

    Returns:
        uint8 ``(3, size, size)``, as `understanding_bytes`.
    """
    image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Pillow.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return _channels_first(image.crop((left, top, left + size, top + size)))


def generation_pixels(image: Image, size: int) -> np.ndarray:
    """`generation_bytes` as float32 in [0, 1]."""
    return generation_bytes(image, size).astype(np.float32) / np.float32(255)


def _channels_first(image: Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


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
