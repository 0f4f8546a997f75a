"""The blocks of a picture's file: its pixels apart from its metadata (EXIF, ICC, XMP, text, comments).

A decoder may fail on a damaged block that is not the picture. `split_metadata` gives it a file that has none.
Sources: PNG 3rd edition, section 5; ITU-T T.81, annex B; the WebP container specification (RFC 9649).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_FLAGS = 0x12  # of VP8X: transparency and animation stay, the flags of ICC, EXIF and XMP go
# JPEG markers, and how the contents of two of them begin.
_SCAN = 0xDA
_EXIF_SEGMENT = 0xE1
_ICC_SEGMENT = 0xE2
_COMMENT = 0xFE
_EXIF = b"Exif\0\0"
_ICC = b"ICC_PROFILE\0"
_LARGEST_PROFILE = 16 << 20


@dataclass(frozen=True)
class Parts:
    """A picture's file without metadata, and the two blocks that say how it looks ("" if they are not there)."""

    bare: bytes
    exif: bytes = b""
    profile: bytes = b""


def split_metadata(raw: bytes) -> Parts | None:
    """Take a PNG, JPEG or WebP file apart; None for other formats and for files whose blocks cannot be followed."""
    try:
        if raw.startswith(PNG):
            return _png(raw)
        if raw.startswith(JPEG):
            return _jpeg(raw)
        if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
            return _webp(raw)
    except (struct.error, IndexError):
        return None
    return None


def _png(raw: bytes) -> Parts:
    bare = [PNG]
    exif = b""
    profile = b""
    for name, start, end in _png_chunks(raw):
        content = raw[start + 8 : end - 4]
        if name in _PNG_KEPT:
            bare.append(raw[start:end])
        elif name == b"eXIf":
            exif = content
        elif name == b"iCCP":
            profile = _inflated(content.partition(b"\0")[2][1:])
    return Parts(b"".join(bare), exif, profile)


def _png_chunks(raw: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk; the last may be cut short."""
    at = len(PNG)
    while at + 8 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        end = at + 12 + length
        yield raw[at + 4 : at + 8], at, end
        at = end


def _inflated(packed: bytes) -> bytes:
    """An ICC profile; "" if it is damaged, or so large that it may be a bomb."""
    try:
        unpacker = zlib.decompressobj()
        profile = unpacker.decompress(packed, _LARGEST_PROFILE)
    except zlib.error:
        return b""
    return profile if unpacker.eof else b""


def _jpeg(raw: bytes) -> Parts:
    bare = [JPEG]
    exif = b""
    profile: list[bytes] = []
    at = len(JPEG)
    while raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == _SCAN:
            break
        end = at + 2 + struct.unpack_from(">H", raw, at + 2)[0]
        content = raw[at + 4 : end]
        if marker == _EXIF_SEGMENT and content.startswith(_EXIF):
            exif = content
        elif marker == _ICC_SEGMENT and content.startswith(_ICC):
            profile.append(content[len(_ICC) + 2 :])  # two bytes: its number, and of how many
        if not _is_jpeg_metadata(marker, content):
            bare.append(raw[at:end])
        at = end
    return Parts(b"".join((*bare, raw[at:])), exif, b"".join(profile))


def _is_jpeg_metadata(marker: int, content: bytes) -> bool:
    """Application segments and comments, but for JFIF and Adobe, which say how colors are stored."""
    if content.startswith((b"JFIF\0", b"Adobe")):
        return False
    return 0xE0 <= marker <= 0xEF or marker == _COMMENT


def _webp(raw: bytes) -> Parts:
    bare: list[bytes] = []
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(raw):
        name = raw[at : at + 4]
        (length,) = struct.unpack_from("<I", raw, at + 4)
        end = at + 8 + length + length % 2
        block = raw[at:end]
        if name == b"VP8X" and length:
            block = block[:8] + bytes([block[8] & _WEBP_FLAGS]) + block[9:]
        if name in _WEBP_KEPT:
            bare.append(block)
        else:
            found[name] = raw[at + 8 : at + 8 + length]
        at = end
    body = b"WEBP" + b"".join(bare)
    return Parts(b"RIFF" + struct.pack("<I", len(body)) + body, found.get(b"EXIF", b""), found.get(b"ICCP", b""))
