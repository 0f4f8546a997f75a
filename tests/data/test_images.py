"""Pictures: opened safely, cut as the encoders need them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_pisces.data.images import (
    ImageError,
    generation_pixels,
    open_image,
    to_pil,
    understanding_bytes,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_transparency_lies_on_white() -> None:
    layer = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 255, 0))
    layer.putpixel((2, 0), (0, 0, 0, 128))
    opened = open_image(encoded(layer))
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]


def test_a_palette_with_a_transparent_entry_lies_on_white() -> None:
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((0, 0), 0)
    opened = open_image(encoded(picture, transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 0, 0)]


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    opened = open_image(encoded(Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))))
    assert opened.getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert open_image(encoded(noise(8, 4), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("side", [9_000, 20_000])  # one that Pillow would only warn about, one it refuses itself
def test_a_bomb_is_refused_from_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match=r"bomb\.png.*64,000,000 pixels; make the picture smaller"):
        open_image(path)


def test_the_limit_is_a_setting_and_is_inclusive() -> None:
    raw = encoded(noise(10, 10))
    assert open_image(raw, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10 x 10 is more than 99 pixels"):
        open_image(raw, max_pixels=99)


def test_bad_files_are_named(tmp_path: Path) -> None:
    words, half, nothing = tmp_path / "words.png", tmp_path / "half.png", tmp_path / "nothing.png"
    words.write_text("not a picture")
    half.write_bytes(encoded(noise(64, 64))[:3000])
    nothing.write_bytes(b"")
    for path, why in (
        (words, "not an image"),
        (half, "damaged"),
        (nothing, "not an image"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(ImageError, match=why) as caught:
            open_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="missing.png: no such file"):
        open_image(tmp_path / "missing.png")


RAW = {kind: encoded(noise(24, 24), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(RAW)), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_damage_gives_a_picture_or_our_error(kind: str, at: int, junk: bytes) -> None:
    raw = RAW[kind][:at] + junk + RAW[kind][at + len(junk) :]
    try:
        assert open_image(raw, max_pixels=10_000).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


def as_floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


def test_understanding_pixels_are_siglips_plain_resize() -> None:
    picture = noise(40, 20)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    found = as_floats(understanding_bytes(picture, 16))
    assert found.dtype == np.float32 and found.shape == (3, 16, 16) and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_generation_pixels_keep_proportions_and_the_middle() -> None:
    picture = Image.new("RGB", (60, 20), (255, 0, 0))
    picture.paste((0, 255, 0), (20, 0, 40, 20))
    found = generation_pixels(picture, 20)
    np.testing.assert_array_equal(found, np.broadcast_to(np.array([0, 1, 0])[:, None, None], (3, 20, 20)))


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16]))
@settings(max_examples=60, deadline=None)
def test_any_shape_fits_both_encoders(width: int, height: int, size: int) -> None:
    picture = Image.new("RGB", (width, height), (10, 200, 30))
    for pixels in (as_floats(understanding_bytes(picture, size)), generation_pixels(picture, size)):
        assert pixels.shape == (3, size, size)
        np.testing.assert_allclose(pixels[:, 0, 0] * 255, [10, 200, 30], atol=0.01)


def test_pixels_return_to_the_same_picture() -> None:
    picture = noise(16, 16)
    assert to_pil(as_floats(understanding_bytes(picture, 16))).tobytes() == picture.tobytes()
    assert to_pil(np.stack([np.full((1, 1), v, np.float32) for v in (-1, 0.5, 2)])).getpixel((0, 0)) == (0, 128, 255)


def test_to_pil_refuses_what_is_no_picture() -> None:
    with pytest.raises(ImageError, match=r"\(16, 16, 3\)"):
        to_pil(np.zeros((16, 16, 3), np.float32))
    with pytest.raises(ImageError, match="NaN"):
        to_pil(np.full((3, 2, 2), np.nan, np.float32))
