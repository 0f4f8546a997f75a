"""An index for tar shards that others wrote (img2dataset, WebDataset): they are then read in place.

A sample is what WebDataset calls one: the members whose names agree up to the first dot of their last part.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_pisces.data.shard_writer import IndexWriter, sha256_of
from open_pisces.data.shards import ShardError

IMAGES = ("png", "jpg", "jpeg", "webp", "gif")
TEXTS = ("txt", "caption")
_BLOCK = 512
Members = list[tuple[int, int, int, str]]


def index_folder(
    folder: str | Path, fields: dict[str, str] | None = None, licences: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write ``index.json`` and ``index/`` beside the tar files of a folder, which stay as they are.

    Args:
        folder: holds ``*.tar``, in whose order samples are numbered.
        fields: where a sample's words are: ``{"short": "caption"}`` names fields of its JSON member, ``"txt"`` its
            text member; ``{}`` means the layout of our own shards. None keeps what an index that is there says.
        licences: rows of the licence table; None keeps those of an index that is there.

    Returns:
        Counts: ``samples``, ``shards``, and ``skipped`` by cause.

    Raises:
        ShardError: no tar files there, a tar that is cut short, or no sample with a picture or text in any of them.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ShardError(f"{folder}: holds no .tar files; give the folder of the shards")
    before = _before(folder)
    fields = before.get("fields", {}) if fields is None else fields
    licences = before.get("licences", []) if licences is None else licences
    writer, skipped, keys = IndexWriter(licences, fields), Counter[str](), set[str]()
    for path in paths:
        writer.shards.append({"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)})
        for key, members in samples_of(path):
            if not any(kind in ("json", "text") for *_, kind in members) and fields:
                skipped["no text"] += 1
            elif not members:
                skipped["no known member"] += 1
            elif key in keys:
                skipped["repeated key"] += 1
            else:
                keys.add(key)
                writer.add(key, members)
    if not len(writer):
        raise ShardError(f"{folder}: no sample in {len(paths)} tar files: are they WebDataset shards?")
    writer.write(folder)
    return {"samples": len(writer), "shards": len(paths), "skipped": dict(skipped)}


def _before(folder: Path) -> dict[str, Any]:
    """What an index that is there says, of whatever version; nothing if it cannot be read."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def samples_of(path: Path) -> Iterator[tuple[str, Members]]:
    """The samples of a tar file in their order: key, and (offset, size, CRC-32, kind) of each known member.

    Raises:
        ShardError: if the file is cut short or no tar.
    """
    key, members = "", list[tuple[str, tuple[int, int, int, str]]]()
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for info in tar:
                if not info.isfile() or info.name.rpartition("/")[2].startswith("."):
                    continue  # folders, and the companions that macOS puts beside each file
                stem, suffix = _split(info.name)
                if stem != key and key:
                    yield key, _in_order(members)
                    members = []
                key = stem
                if kind := kind_of(suffix):
                    raw.seek(info.offset_data)
                    content = raw.read(info.size)
                    if len(content) != info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    members.append((suffix, (info.offset_data, info.size, zlib.crc32(content), kind)))
                tar.members.clear()  # type: ignore[attr-defined]
            raw.seek(tar.offset)
            rest = raw.read(_BLOCK)
            if any(rest) or len(rest) % _BLOCK:
                raise tarfile.ReadError(f"no header where one should be, at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ShardError(f"{path}: cut short or no tar file ({error}): get a whole copy or take it away") from None
    if key:
        yield key, _in_order(members)


def kind_of(suffix: str) -> str:
    """What a member is by its name's ending: ``json``, ``image``, ``text``, or "" for what is not read."""
    last = suffix.rpartition(".")[2].lower()
    return "json" if last == "json" else "image" if last in IMAGES else "text" if last in TEXTS else ""


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last part of the path."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return (f"{folder}{slash}{stem}".removeprefix("./").replace("/", "-"), suffix)


def _in_order(members: list[tuple[str, tuple[int, int, int, str]]]) -> Members:
    """Pictures by the number before their ending (``0.png``, ``10.png``), then the rest as it came."""

    def place(member: tuple[str, Any]) -> tuple[int, int]:
        number = member[0].partition(".")[0]
        return (0 if member[1][3] == "image" else 1, int(number) if number.isdigit() else 0)

    return [member for _, member in sorted(members, key=place)]
