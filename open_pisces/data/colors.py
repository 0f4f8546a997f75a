"""Decoded pictures to 8-bit sRGB: depth, range, ICC profile and transparency decide how their numbers look."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageCms
from PIL.Image import Image

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
