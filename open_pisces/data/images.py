"""Pictures: opened safely, turned to 8-bit sRGB, and cut to what the two encoders see.

Depth, range, ICC profile and transparency decide how a file's numbers look (`to_srgb`).

Pixels are ``(3, H, W)``, bytes in batches and float32 in [0, 1] elsewhere; normalization belongs to the models.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, ImageCms, UnidentifiedImageError
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.data.metadata import Parts, split_metadata
from open_pisces.errors import PiscesError

_DIM = 1 / 16  # a deep picture below this share of its range most likely holds fewer bits than it says
_TOLERANCE = 1e-3  # how far floats may lie outside their range
_SAME = 2  # of 255: a profile that moves no color further is taken for sRGB, so that such pictures keep their bytes
# Tags of TIFF 6.0.
_BITS = 258
_PHOTOMETRIC = 262
_LOW = 280
_HIGH = 281
_REAL_LOW = 340
_REAL_HIGH = 341


class ColorError(PiscesError):
    """A picture whose numbers do not say how bright it is; the message names the mode and the remedy."""


def to_srgb(image: Image, profile: bytes = b"") -> Image:
    """A decoded picture as 8-bit sRGB; what is transparent becomes white.

    Args:
        image: of any mode.
        profile: its ICC profile. One that is damaged or meant for other colors is ignored; without one, colors are
            taken as sRGB.

    Raises:
        ColorError: values whose range is not known, or that fill so little of it that the picture would look black.
    """
    opaque, alpha = _split(_eight_bits(image))
    colors = _through_profile(opaque, profile)
    if alpha is None:
        return colors
    colors.putalpha(alpha)
    white = Pillow.new("RGBA", colors.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colors).convert("RGB")


def check_dim(image: Image) -> None:
    """Refuse a picture of 16 bits a channel that would look black.

    Raises:
        ColorError: naming how little of the range it fills.
    """
    least, most = np.array(image.getextrema()).T
    if most.max() < 255 * _DIM and (least < most).any():
        raise ColorError(
            f"16-bit values below {_DIM:.1%} of their range would look black; store it with 8 bits, or scale it"
        )


def _split(image: Image) -> tuple[Image, Image | None]:
    """The colors and the transparency, if there is any."""
    if image.mode == "La":  # Pillow converts premultiplied gray to nothing else
        image = image.convert("LA")
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info:
        return image, None
    is_gray = image.mode in ("1", "L", "LA")
    layer = image.convert("LA" if is_gray else "RGBA")
    return layer.convert("L" if is_gray else "RGB"), layer.getchannel("A")


# ------------------------------------------------------------------------------------------------------- depth


def _eight_bits(image: Image) -> Image:
    """Gray of more than 8 bits scaled by its range: Pillow's own conversion clips it to white or black."""
    if not image.mode.startswith(("I", "F")):
        return image
    low, high = _range(image)
    values = np.asarray(image).astype(np.float64)
    shares = (values - low) / (high - low)
    least = float(shares.min())
    most = float(shares.max())
    if not (least >= -_TOLERANCE and most <= 1 + _TOLERANCE):  # also false for NaN
        found = f"{values.min():.6g} to {values.max():.6g}"
        raise ColorError(f"values from {found} where {low:g} to {high:g} is the range; scale it or store it as 8 bits")
    if least < most < _DIM:
        raise ColorError(
            f"values up to {values.max():.6g} of {high:g} would look black; scale it or store it as 8 bits"
        )
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is zero
        shares = 1 - shares
    # Rounded down, so that 16-bit values keep their high byte.
    gray = Pillow.fromarray((shares.clip(0, 1) * 255.999).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        gray.putalpha(Pillow.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def _range(image: Image) -> tuple[float, float]:
    """The values of black and white.

    Raises:
        ColorError: for 32-bit integers, unless the file says its range.
    """
    tags: Any = getattr(image, "tag_v2", {})
    for low, high in ((_REAL_LOW, _REAL_HIGH), (_LOW, _HIGH)):
        if high in tags:
            bounds = float(_first(tags.get(low, 0))), float(_first(tags[high]))
            if bounds[0] < bounds[1]:
                return bounds
    if image.mode == "F":
        return 0.0, 1.0
    if image.mode.startswith("I;16"):
        return 0.0, 2.0 ** int(_first(tags.get(_BITS, 16))) - 1
    if image.format in ("PNG", "PPM"):  # Pillow scales these to 16 bits
        return 0.0, 65535.0
    raise ColorError("32-bit integers have no usual white; store it with 8 or 16 bits")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------- profiles


def _through_profile(image: Image, profile: bytes) -> Image:
    """The colors that an ICC profile describes, as sRGB."""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    for mode in (image.mode, "RGB") if profile and image.mode == "L" else (image.mode,):
        # Gray pictures often keep the RGB profile of the colors they were made from.
        transform = _transform(profile, mode) if profile else None
        if transform is not None:
            return ImageCms.applyTransform(image.convert(mode), transform) or image.convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it cannot be used for this mode, or is sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # whatever LittleCMS finds wrong: the picture looks as it would without a profile
        return None
    probe = _probe(mode)
    seen = ImageCms.applyTransform(probe, transform)
    moved = np.asarray(seen).astype(np.int16) - np.asarray(probe.convert("RGB")).astype(np.int16)
    return None if mode != "CMYK" and np.abs(moved).max() <= _SAME else transform


def _probe(mode: str) -> Image:
    """Colors all over the space of a mode."""
    if mode == "L":
        return Pillow.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return Pillow.fromarray(grid).convert(mode)


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
    left = (width - size) // 2
    top = (height - size) // 2
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
