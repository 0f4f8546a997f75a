"""Awkward pictures that people meet, one test a kind: metadata never costs a picture, and none changes its look."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from open_pisces.data.images import ImageError, image_size, open_image
from open_pisces.data.metadata import split_metadata

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>1</tiff:Orientation></x:xmpmeta>'


def noise(width: int = 24, height: int = 16, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(raw: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    at = raw.index(b"IDAT") - 4
    return raw[:at] + chunk(name, content) + raw[at:]


def with_exif(raw: bytes, *entries: tuple[int, int, int, bytes], orientation: int = 6) -> bytes:
    """A JPEG with EXIF entries (tag, type, count, four bytes of value), and an orientation."""
    rows = sorted([(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *entries])
    ifd = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in rows)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + ifd + b"\0\0\0\0" + b"\xff\xff\xff\xff\0\0\0\0"
    return raw[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + raw[2:]


RATIONAL_AT = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # offset of the last eight bytes above, for two entries


# ---------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param((0x0100, 1, 1, b"\xff\0\0\0"), id="byte_neg"),
        pytest.param((0x011A, 5, 1, RATIONAL_AT), id="rational_minus1_0"),
        pytest.param((0x011A, 2, 3, b"72\0\0"), id="res_as_ascii"),
        pytest.param((0x9C9B, 1, 1 << 30, b"\xff\xff\xff\x7f"), id="too_long"),
        pytest.param((0x8769, 4, 1, b"\x08\0\0\0"), id="directory_in_itself"),
    ],
)
def test_a_damaged_exif_entry_costs_neither_the_picture_nor_its_orientation(entry: tuple[int, int, int, bytes]) -> None:
    plain = encoded(noise(), "JPEG")
    upright = np.rot90(np.asarray(open_image(plain)), -1)
    np.testing.assert_array_equal(np.asarray(open_image(with_exif(plain, entry))), upright)
    np.testing.assert_array_equal(
        np.asarray(open_image(with_exif(plain, entry, orientation=1))), np.asarray(open_image(plain))
    )


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    plain = encoded(noise(), "JPEG")
    assert open_image(with_exif(plain, orientation=orientation)).size == open_image(plain).size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param(b"eXIf", b"garbage", id="png_exif_junk"),
        pytest.param(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 << 20)), id="big_icc"),
        pytest.param(b"iCCP", b"icc\0\0no zlib", id="icc_junk"),
        pytest.param(b"zTXt", b"key\0\0" + zlib.compress(bytes(70 << 20)), id="text_bomb"),
        pytest.param(b"iTXt", b"key", id="text_cut"),
        pytest.param(b"pHYs", b"", id="size_cut"),
        pytest.param(b"acTL", b"\0", id="animation_cut"),
    ],
)
def test_a_damaged_block_of_a_png_is_ignored(name: bytes, content: bytes) -> None:
    plain = encoded(noise())
    assert open_image(with_chunk(plain, name, content)).tobytes() == noise().tobytes()
    broken = with_chunk(plain, name, content)
    at = broken.index(name) + 4 + len(content)
    assert open_image(broken[:at] + b"\0\0\0\0" + broken[at + 4 :]).tobytes() == noise().tobytes()  # its checksum
    assert image_size(broken) == noise().size


def test_a_profile_too_large_for_pillow_still_counts() -> None:
    green = Image.new("RGB", (4, 4), (60, 200, 60))
    padded = WIDE + bytes(2 << 20)
    raw = with_chunk(encoded(green), b"iCCP", b"icc\0\0" + zlib.compress(padded))
    assert open_image(raw).tobytes() == open_image(encoded(green, icc_profile=WIDE)).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_that_are_cut_short_are_still_refused(kind: str) -> None:
    raw = DRESSED[kind]
    with pytest.raises(ImageError, match="damaged"):
        open_image(raw[: len(raw) // 2])


def test_any_exception_of_a_decoder_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (struct.error("x"), TypeError("y"), MemoryError(), RecursionError("z"), KeyError("k")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(ImageError, match="damaged"):
            open_image(DRESSED["PNG"])
        with pytest.raises(ImageError, match="header"):
            image_size(DRESSED["PNG"])


# ------------------------------------------------------------------------------------------------------- depth


def tiff(values: np.ndarray, **tags: Any) -> bytes:
    return encoded(Image.fromarray(values), "TIFF", tiffinfo={int(name[1:]): value for name, value in tags.items()})


def grays(raw: bytes) -> list[int]:
    return [int(value) for value in np.asarray(open_image(raw))[0, :, 0]]


def twelve_bits(*values: int) -> bytes:
    """A TIFF of one row, two values in three bytes."""
    bits = "".join(f"{value:012b}" for value in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    shape = [(256, 4, len(values)), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries = [*shape, (277, 3, 1), (278, 4, 1), (279, 4, len(row))]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    start = 8 + len(row)
    return b"II*\0" + struct.pack("<I", start) + row + struct.pack("<H", len(entries)) + rows + b"\0\0\0\0"


def deep_png(color: int, *values: int, transparent: bytes = b"") -> bytes:
    """A PNG of one row of 16-bit values: gray (color 0) or RGB (2)."""
    width = len(values) // (3 if color == 2 else 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values)))
    return b"\x89PNG\r\n\x1a\n" + header + transparent + pixels + chunk(b"IEND", b"")


FLOATS = np.array([[0, 0.25, 0.5, 1]], np.float32)
SIXTEEN = np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(tiff(FLOATS), [0, 63, 127, 255], id="float01"),
        pytest.param(tiff(FLOATS * 200, t340=0.0, t341=200.0), [0, 63, 127, 255], id="float_with_range"),
        pytest.param(tiff(FLOATS, t262=0), [255, 191, 127, 0], id="float_white_is_zero"),
        pytest.param(twelve_bits(0, 0x400, 0x800, 0xFFF), [0, 64, 128, 255], id="12_bits"),
        pytest.param(tiff(SIXTEEN), [0, 64, 128, 255], id="16_bits"),
        pytest.param(tiff(SIXTEEN, t262=0), [255, 191, 127, 0], id="16_bits_white_is_zero"),
        pytest.param(tiff(SIXTEEN >> 4, t281=4095), [0, 64, 128, 255], id="12_bits_in_16"),
        pytest.param(encoded(Image.fromarray(SIXTEEN)), [0, 64, 128, 255], id="16_bit_png"),
        pytest.param(
            deep_png(2, *(v for v in (0, 0x4000, 0x8000, 0xFFFF) for _ in "rgb")), [0, 64, 128, 255], id="rgb"
        ),
        pytest.param(b"P5 4 1 1000\n" + struct.pack(">4H", 0, 250, 500, 1000), [0, 64, 128, 255], id="pgm"),
        pytest.param(encoded(Image.fromarray(np.array([[False, True]]))), [0, 255], id="1_bit"),
        pytest.param(
            deep_png(0, 5000, 5001, 0xFFFF, transparent=chunk(b"tRNS", struct.pack(">H", 5001))),
            [19, 255, 255],
            id="16_bits_transparent",
        ),
    ],
)
def test_values_are_scaled_by_what_the_mode_means(raw: bytes, expected: list[int]) -> None:
    assert grays(raw) == expected


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        pytest.param(tiff(FLOATS * 200), "0 to 200 where 0 to 1 is the range", id="float_0_to_200"),
        pytest.param(tiff(FLOATS - 1), "-1 to 0 where", id="negative"),
        pytest.param(tiff(np.full((2, 2), np.nan, np.float32)), "nan", id="nan"),
        pytest.param(tiff(np.array([[0, 1 << 20]], np.int32)), "32-bit integers", id="int32"),
        pytest.param(tiff(SIXTEEN >> 4), "4095 of 65535 would look black", id="12_bits_in_16_unsaid"),
        pytest.param(deep_png(2, 0, 100, 200, 4000, 3000, 2000), "would look black", id="dark_rgb"),
    ],
)
def test_values_of_an_unknown_range_are_refused_by_name(raw: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=f"{why}.*store it"):
        open_image(raw)


def test_what_is_black_stays_black() -> None:
    assert grays(tiff(np.zeros((1, 2), np.uint16))) == [0, 0] == grays(tiff(np.zeros((1, 2), np.float32)))


# ------------------------------------------------------------------------------------------------------ colors


def profile_of(red: tuple[float, float], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A matrix profile: sRGB's green and blue, another red and gamma (or a gray profile)."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if space == b"RGB ":
        columns = (red[0], red[1], 0.0), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
            tags[name] = b"XYZ " + bytes(4) + fixed(*column)
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags[b"kTRC"] = curve
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2025, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + bytes(4) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


WIDE = profile_of((0.61, 0.31), 2.2)
GRAY = profile_of((0, 0), 1.0, b"GRAY")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E], EXIF[0x011A] = 1, "a description", 72.5
TEXT = PngInfo()
TEXT.add_text("Title", "noise")
TEXT.add_text("Long", "noise " * 20, zip=True)
TEXT.add_itxt("XML:com.adobe.xmp", XMP.decode())
METADATA: dict[str, Any] = {"exif": EXIF.tobytes(), "icc_profile": WIDE}
DRESSED = {
    "PNG": encoded(noise(), **METADATA, pnginfo=TEXT),
    "JPEG": encoded(noise(), "JPEG", **METADATA, xmp=XMP, comment=b"noise"),
    "WEBP": encoded(noise(), "WEBP", **METADATA, xmp=XMP),
}


def test_wide_gamut_is_converted_to_srgb() -> None:
    red = Image.new("RGB", (2, 2), (200, 60, 60))
    expected = ImageCms.profileToProfile(red, io.BytesIO(WIDE), ImageCms.createProfile("sRGB"))
    assert expected is not None and expected.getpixel((0, 0)) != (200, 60, 60)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        raw = encoded(red, kind, icc_profile=WIDE, **options)
        assert open_image(raw).tobytes() == expected.tobytes()
    half = red.convert("RGBA")
    half.putalpha(0)
    assert open_image(encoded(half, icc_profile=WIDE)).getpixel((0, 0)) == (255, 255, 255)


def test_gray_and_palette_pictures_follow_their_profile() -> None:
    gray = Image.new("L", (2, 2), 60)
    linear = open_image(encoded(gray, icc_profile=GRAY)).getpixel((0, 0))
    assert linear == (133, 133, 133)  # 60 / 255 of the light
    assert open_image(encoded(gray.convert("LA"), icc_profile=GRAY)).getpixel((0, 0)) == linear
    red = Image.new("RGB", (2, 2), (200, 60, 60))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    assert (
        open_image(encoded(palette, icc_profile=WIDE)).tobytes() == open_image(encoded(red, icc_profile=WIDE)).tobytes()
    )
    assert open_image(encoded(gray, icc_profile=WIDE)).getpixel((0, 0)) != (60, 60, 60)  # its gamma still counts


@pytest.mark.parametrize("profile", [SRGB, b"junk", WIDE[:300], b""], ids=["srgb", "junk", "cut", "none"])
def test_srgb_and_unusable_profiles_change_nothing(profile: bytes) -> None:
    assert open_image(encoded(noise(), icc_profile=profile)).tobytes() == noise().tobytes()
    cmyk = noise().convert("CMYK")
    assert open_image(encoded(cmyk, "TIFF", icc_profile=profile)).tobytes() == cmyk.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX", "RGBA", "LA"])
def test_every_mode_keeps_white_black_and_what_is_between(mode: str) -> None:
    ramp = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    picture = ramp.convert("RGB")
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), lab, outputMode="LAB") or picture
    else:
        picture = picture.convert(mode)
    found = np.asarray(open_image(encoded(picture, "TIFF")))[..., 0].astype(int)
    np.testing.assert_allclose(found, np.asarray(ramp), atol=1)


# ------------------------------------------------------------------------------------------------------- fuzz


def png_payloads(raw: bytes) -> list[tuple[int, int]]:
    """(start, end) of the contents of blocks that are not the picture."""
    found, at = [], 8
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        if raw[at + 4 : at + 8] in (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            found.append((at + 8, at + 8 + length))
        at += 12 + length
    return found


def jpeg_payloads(raw: bytes) -> list[tuple[int, int]]:
    found, at = [], 2
    while raw[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", raw, at + 2)
        if raw[at + 1] in (0xE1, 0xE2, 0xFE):
            found.append((at + 4, at + 2 + length))
        at += 2 + length
    return found


def webp_payloads(raw: bytes) -> list[tuple[int, int]]:
    found, at = [], 12
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at + 4)
        if raw[at : at + 4] in (b"EXIF", b"XMP ", b"ICCP"):
            found.append((at + 8, at + 8 + length))
        at += 8 + length + length % 2
    return found


PAYLOADS = {
    "PNG": png_payloads(DRESSED["PNG"]),
    "JPEG": jpeg_payloads(DRESSED["JPEG"]),
    "WEBP": webp_payloads(DRESSED["WEBP"]),
}
HEADER = {
    kind: max(end for _, end in spans) if kind != "WEBP" else len(DRESSED[kind]) for kind, spans in PAYLOADS.items()
}
KINDS = st.sampled_from(sorted(DRESSED))
JUNK = st.binary(min_size=1, max_size=6)


def repaired(raw: bytes) -> bytes:
    """The same PNG with checksums that fit, so that decoders look into the damaged blocks."""
    out, at = raw[:8], 8
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        out += chunk(raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length])
        at += 12 + length
    return out


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(KINDS, st.integers(0, 10_000), st.integers(0, 4000), JUNK, st.booleans())
def test_damage_inside_metadata_never_costs_the_picture(
    kind: str, block: int, at: int, junk: bytes, repair: bool
) -> None:
    start, end = PAYLOADS[kind][block % len(PAYLOADS[kind])]
    at = start + at % (end - start)
    junk = junk[: end - at]
    raw = DRESSED[kind][:at] + junk + DRESSED[kind][at + len(junk) :]
    opened = open_image(repaired(raw) if repair and kind == "PNG" else raw)
    assert opened.mode == "RGB" and sorted(opened.size) == sorted(noise().size)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(KINDS, st.integers(0, 10_000), JUNK, st.integers(0, 8))
def test_damage_anywhere_in_the_header_gives_a_picture_or_our_error(kind: str, at: int, junk: bytes, cut: int) -> None:
    at %= HEADER[kind]
    raw = DRESSED[kind][:at] + junk + DRESSED[kind][at + cut :]
    for read in (lambda: open_image(raw, max_pixels=10_000).mode == "RGB", lambda: len(image_size(raw)) == 2):
        try:
            assert read()
        except ImageError as error:
            assert "\n" not in str(error)


def test_a_picture_without_metadata_is_itself() -> None:
    bare: Callable[[bytes], bytes] = lambda raw: parts.bare if (parts := split_metadata(raw)) else b""  # noqa: E731
    for kind in DRESSED:
        stripped = bare(DRESSED[kind])
        assert len(stripped) < len(DRESSED[kind]) and bare(stripped) == stripped
        with Image.open(io.BytesIO(stripped)) as image:
            assert not {"exif", "icc_profile", "xmp", "comment"} & image.info.keys()
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(DRESSED[kind]))))
    assert split_metadata(b"GIF89a") is None and split_metadata(b"\xff\xd8\xff") is None
