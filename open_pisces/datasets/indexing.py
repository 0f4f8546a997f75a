"""An index for tar shards that others wrote (img2dataset, WebDataset): they are then read in place.

A sample is what WebDataset calls one: the members whose names agree up to the first dot of their last part.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from open_pisces.data.shards import ShardError
from open_pisces.datasets.shard_writer import IndexWriter
from open_pisces.files import sha256_of

IMAGES = ("png", "jpg", "jpeg", "webp", "gif")
TEXTS = ("txt", "caption")
_PREFERRED = ("jpg", "jpeg", "png", "webp", "gif")  # of several unnumbered pictures, the first of these is the picture
_BLOCK = 512
Members = list[tuple[int, int, int, str]]


def index_folder(
    folder: str | Path, fields: dict[str, str] | None = None, licences: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write ``index.json`` and ``index/`` beside the tar files of a folder, which stay as they are.

    Args:
        folder: holds ``*.tar``, in whose order samples are numbered.
        fields: where a sample's words are: ``{"short": "caption"}`` names fields of its JSON member, ``"txt"`` its
            text member; ``{}`` means the layout of our own shards. ``{"image": "depth.png"}`` names another member as
            the picture. None keeps what an index that is there says.
        licences: rows of the licence table; None keeps those of an index that is there.

    Returns:
        Counts: ``samples``, ``shards``, and ``skipped`` by cause.

    Raises:
        ShardError: no tar files there, a tar that is cut short or whose members of one sample are not next to each
            other, or no sample with a picture or text in any of them.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ShardError(f"{folder}: holds no .tar files; give the folder of the shards")
    before = _before(folder)
    fields = before.get("fields", {}) if fields is None else fields
    licences = before.get("licences", []) if licences is None else licences
    writer = IndexWriter(licences, fields)
    skipped = Counter[str]()
    keys: set[str] = set()
    for path in paths:
        writer.shards.append({"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)})
        halves: dict[str, bool] = {}
        for key, members in samples_of(path, fields.get("image", "")):
            _check_together(path, key, members, halves)
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


def _check_together(path: Path, key: str, members: Members, halves: dict[str, bool]) -> None:
    """Refuse a tar in which a sample's picture and text are not next to each other; ``halves`` is what came before.

    Raises:
        ShardError: naming the first such sample.
    """
    kinds = {kind for *_, kind in members}
    has_picture = "image" in kinds
    if not kinds or kinds > {"image"}:
        return
    if halves.setdefault(key, has_picture) != has_picture:
        raise ShardError(
            f"{path}: picture and text of sample {key!r} are not next to each other, so it cannot be read in place: "
            "unpack it and pack it with `tar --sort=name -cf`"
        )


def samples_of(path: Path, image: str = "") -> Iterator[tuple[str, Members]]:
    """The samples of a tar file in their order: key, and (offset, size, CRC-32, kind) of each member that is read.

    Raises:
        ShardError: if the file is cut short or no tar.
    """
    key = ""
    members: list[tuple[str, tuple[int, int, int, str]]] = []
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for info in tar:
                if not info.isfile() or info.name.rpartition("/")[2].startswith("."):
                    continue  # folders, and the companions that macOS puts beside each file
                # WebDataset's rule: the key ends at the first dot of the last part of the path.
                parent, slash, last = info.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                stem = f"{parent}{slash}{stem}".removeprefix("./").replace("/", "-")
                if stem != key and key:
                    yield key, _read_of(members, image)
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
        yield key, _read_of(members, image)


def kind_of(suffix: str) -> str:
    """What a member is by its name's ending: ``json``, ``image``, ``text``, or "" for what is not read."""
    last = suffix.rpartition(".")[2].lower()
    return "json" if last == "json" else "image" if last in IMAGES else "text" if last in TEXTS else ""


def _read_of(members: list[tuple[str, tuple[int, int, int, str]]], image: str) -> Members:
    suffixes = [suffix for suffix, _ in members]
    return [members[at][1] for at in read_members(suffixes, image)]


def read_members(suffixes: Sequence[str], image: str = "") -> list[int]:
    """Which members of a sample are read, by what their names have after the key: pictures in order, then texts.

    The picture is ``jpg`` (or ``png`` ...), or ``0.jpg``, ``1.jpg`` ... by number. What has another name before its
    ending (``depth.png``, ``seg.png``, ``ocr.txt``) is something about the picture and not read; ``image`` may name
    one to be the picture. Only where all members have one (a key with dots in it: ``photo.v2.jpg``), all are read.
    """
    known = [at for at, suffix in enumerate(suffixes) if kind_of(suffix)]
    plain = [at for at in known if (front := suffixes[at].rpartition(".")[0]) == "" or front.isdigit()]
    read = plain or known
    texts = [at for at in read if kind_of(suffixes[at]) != "image"]
    if image:
        return [at for at in known if suffixes[at].lower() == image.lower()] + texts
    pictures = [at for at in read if kind_of(suffixes[at]) == "image"]
    alone = [at for at in pictures if suffixes[at].lower() in _PREFERRED]
    alone = sorted(alone, key=lambda at: _PREFERRED.index(suffixes[at].lower()))
    pictures = [at for at in pictures if at not in alone[1:]]
    return sorted(pictures, key=lambda at: _number(suffixes[at])) + texts


def _number(suffix: str) -> int:
    front = suffix.partition(".")[0]
    return int(front) if front.isdigit() else 0
