"""The file of a picture that a record names: a file below a folder, or written into the record as base64."""

from __future__ import annotations

import base64
import binascii
import re

from open_pisces.datasets.records import BadRecord, Place

LARGEST = 64 << 20
"""Bytes of a picture that is written into a record."""
_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # JPEG, PNG, WebP and GIF in base64
_SHORTEST = 64  # characters of a picture in base64; a file's name may begin like one
_DATA = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_REMOTE = re.compile(r"(https?|ftp)://", re.IGNORECASE)


def is_inline(name: str) -> bool:
    """Whether a string is a picture itself: a data URI, or base64 that begins as a picture's file does."""
    return bool(_DATA.match(name)) or (len(name) >= _SHORTEST and name.startswith(_STARTS))


def picture_file(picture: bytes | str, base: Place | None) -> bytes:
    """The file of a picture.

    Args:
        picture: the file itself, its name below ``base``, a data URI, or base64.
        base: the folder of the pictures.

    Raises:
        BadRecord: "base64" if it cannot be decoded or is larger than `LARGEST`, "remote address" for one on the web,
            "missing image", "outside the folder" or "unreadable" for a file.
    """
    if isinstance(picture, bytes):
        return picture
    if is_inline(picture):
        return _decoded(picture)
    if _REMOTE.match(picture):
        remedy = "Download the pictures first (img2dataset does) and import the files"
        raise BadRecord(picture[:100], "remote address", remedy=remedy)
    if base is None:
        raise BadRecord(picture, "missing image")
    return base.read(picture)


def _decoded(text: str) -> bytes:
    head = _DATA.match(text)
    name = f"{text[:40]}..."
    if head and not head[0].lower().endswith(";base64,"):
        raise BadRecord(name, "base64", f"{head[0][:40]!r} says that it is not base64")
    packed = re.sub(r"\s+", "", text[head.end() if head else 0 :]).translate(str.maketrans("-_", "+/"))
    if len(packed) > LARGEST // 3 * 4 + 4:
        raise BadRecord(name, "base64", f"a picture of more than {LARGEST >> 20} MiB; keep it in a file")
    try:
        raw = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(name, "base64", str(error)) from None
    if not raw:
        raise BadRecord(name, "base64", "it is empty")
    return raw
