"""Writing datasets: our own tar shards, and the index that makes any tar shards readable."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL.Image import Image

from open_pisces.batch import Sample
from open_pisces.data.shards import KINDS, TABLES, VERSION, ShardError
from open_pisces.files import replace_folder, sha256_of, whole_file, write_whole

_BLOCK = 512  # tar's unit: headers and padded contents


class IndexWriter:
    """Collects what an index says of each sample, and writes it: shared by our own shards and those of others."""

    def __init__(self, licences: Iterable[dict[str, Any]] = (), fields: dict[str, str] | None = None) -> None:
        self.licences = list(licences)
        self.fields = fields or {}
        self.shards: list[dict[str, Any]] = []
        # Packed as they are on disk: 20 bytes a sample and 21 a member, so that writing millions stays small.
        self._samples = bytearray()
        self._members = bytearray()
        self._keys = bytearray()

    def __len__(self) -> int:
        return len(self._samples) // TABLES["samples"].itemsize

    def add(self, key: str, members: list[tuple[int, int, int, str]]) -> None:
        """Note a sample of the last shard: (offset, size, CRC-32, kind) of its members, pictures in their order."""
        self._samples += self._row(len(self.shards) - 1)
        self._keys += key.encode()
        rows = [(offset, size, crc, KINDS.index(kind)) for offset, size, crc, kind in members]
        self._members += np.array(rows, TABLES["members"]).tobytes()

    def _row(self, shard: int) -> bytes:
        """Where a sample of a shard begins: in the keys and in the members."""
        members = len(self._members) // TABLES["members"].itemsize
        return np.array((shard, len(self._keys), members), TABLES["samples"]).tobytes()

    def write(self, folder: Path) -> None:
        """Write what was collected."""
        raw = {"samples": self._samples + self._row(len(self.shards)), "members": self._members, "keys": self._keys}
        tables = {name: np.frombuffer(bytes(raw[name]), dtype) for name, dtype in TABLES.items()}
        _write_index(folder, tables, self.shards, self.licences, self.fields)


class ShardWriter:
    """Writes a dataset: all of it appears when the writer closes, none of it after an error.

    Args:
        folder: the dataset's folder; an older dataset there is replaced at the end.
        samples_per_shard: samples in one tar file.
        licences: rows of the licence table kept in the index.
    """

    def __init__(
        self, folder: str | Path, samples_per_shard: int = 2000, licences: Iterable[dict[str, Any]] = ()
    ) -> None:
        if "://" in str(folder):
            raise ShardError(f"{folder}: datasets are written to a local folder; copy it to its address afterwards")
        self.folder = Path(folder).absolute()
        is_dataset = (self.folder / "index.json").is_file()
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir()) and not is_dataset):
            raise ShardError(f"{self.folder} is there and is no dataset; choose another folder or empty it")
        self._work = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.part")
        self._per_shard = samples_per_shard
        self._index = IndexWriter(licences)
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self.beside: dict[str, str] = {}
        """Files that appear with the dataset: name -> content."""

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self._work, ignore_errors=True)  # of a killed process that had this one's number
        self._work.mkdir(parents=True)
        return self

    def __len__(self) -> int:
        """Samples written so far."""
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        """Whether a sample of this key was written."""
        return key in self._keys

    def write(self, sample: Sample, encoded: tuple[bytes, ...] = ()) -> None:
        """Append a sample.

        Args:
            sample: words, and pictures unless they are given as files.
            encoded: the files of its pictures, kept byte for byte (PNG, JPEG, WebP or GIF) instead of ``images``.

        Raises:
            ShardError: for a key that was written before, is empty or holds a dot or slash, or for a picture or text
                that cannot be written; nothing of the sample is then in the shards.
        """
        if not sample.key or sample.key in self._keys or set("./\\") & set(sample.key):
            raise ShardError(f"sample key {sample.key!r}: keys are unique and hold no dots or slashes")
        pictures = encoded or tuple(png_of(image.convert("RGB")) for image in sample.images)
        members = []
        for number, raw in enumerate(pictures):
            numbered = f"{sample.key}.{number}" if len(pictures) > 1 else sample.key
            members.append((f"{numbered}.{_suffix(raw)}", raw, "image"))
        members.append((f"{sample.key}.json", _json_of(sample), "json"))
        # All that can be refused has been: from here on the sample is in the shards.
        if len(self._index) == len(self._index.shards) * self._per_shard:
            self._close_shard()
            name = f"{len(self._index.shards):05d}.tar"
            self._index.shards.append({"file": name})
            self._tar = tarfile.open(self._work / name, "w")
        self._keys.add(sample.key)
        self._index.add(sample.key, [(*self._add(name, raw), kind) for name, raw, kind in members])

    def _add(self, name: str, content: bytes) -> tuple[int, int, int]:
        """Append a member; its offset, size and CRC-32."""
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # else the tar file keeps a record of every member in memory
        padded = -(-len(content) // _BLOCK) * _BLOCK
        return self._tar.offset - padded, len(content), zlib.crc32(content)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._work / self._index.shards[-1]["file"]
        self._index.shards[-1] |= {"size": path.stat().st_size, "sha256": sha256_of(path)}
        self._tar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close_shard()
                for name, content in self.beside.items():
                    write_whole(self._work / name, content)
                self._index.write(self._work)
                replace_folder(self._work, self.folder)
        finally:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self._work, ignore_errors=True)


def join_datasets(folder: Path, parts: Iterable[Path]) -> None:
    """Make one dataset of those in folders below ``folder``, in their order: an index over their shards, no copies.

    Raises:
        ShardError: for a part that is no dataset of ours.
    """
    shards: list[dict[str, Any]] = []
    licences: list[dict[str, Any]] = []
    joined: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in TABLES.items()}
    members = keys = 0
    for part in parts:
        index = json.loads((part / "index.json").read_text())
        tables = {name: np.load(part / "index" / f"{name}.npy", allow_pickle=False) for name in TABLES}
        samples = tables["samples"][:-1].copy()
        for field, before in (("shard", len(shards)), ("key", keys), ("first", members)):
            samples[field] += before
        for name, table in {**tables, "samples": samples}.items():
            joined[name].append(table)
        keys += len(tables["keys"])
        members += len(tables["members"])
        shards += [{**shard, "file": f"{part.relative_to(folder)}/{shard['file']}"} for shard in index["shards"]]
        licences += [row for row in index["licences"] if row not in licences]
    joined["samples"].append(np.array([(len(shards), keys, members)], TABLES["samples"]))
    tables = {name: np.concatenate(some) for name, some in joined.items()}
    _write_index(folder, tables, shards, licences, {})


def _write_index(
    folder: Path,
    tables: dict[str, np.ndarray],
    shards: list[dict[str, Any]],
    licences: list[dict[str, Any]],
    fields: dict[str, str],
) -> None:
    """``index.json`` last: a folder without it is no dataset."""
    (folder / "index").mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)  # tables that are half new have no index
    for name, table in tables.items():
        with whole_file(folder / "index" / f"{name}.npy") as part:  # a reader keeps the table that it has mapped
            np.save(part, table, allow_pickle=False)
    spelled = json.dumps(fields, sort_keys=True).encode()
    digest = sha256_of(tables["members"].tobytes() + tables["keys"].tobytes() + spelled)
    index = {"version": VERSION, "samples": len(tables["samples"]) - 1, "digest": digest, "shards": shards}
    index |= {"licences": licences, **({"fields": fields} if fields else {})}
    write_whole(folder / "index.json", json.dumps(index, indent=1))


def png_of(image: Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def kept_format(raw: bytes) -> str:
    """The usual ending of a picture's format, from its first bytes; "" for one that shards do not hold as it is."""
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if raw[:3] == b"\xff\xd8\xff":
        return "jpg"
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "webp"
    return "gif" if raw[:4] == b"GIF8" else ""


def _suffix(raw: bytes) -> str:
    ending = kept_format(raw)
    if not ending:
        raise ShardError(f"a picture that begins with {raw[:8]!r} is no PNG, JPEG, WebP or GIF: convert it first")
    return ending


def _json_of(sample: Sample) -> bytes:
    """A sample's JSON member: all fields but key and pictures."""
    fields: dict[str, Any] = {
        "short": sample.short,
        "detailed": sample.detailed,
        "questions": [asdict(question) for question in sample.questions],
        "conversation": list(sample.conversation),
        "source": sample.source,
        "facts": sample.facts,
    }
    if sample.more_captions:  # only then: older datasets keep their digests
        fields["more_captions"] = list(sample.more_captions)
    try:
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ShardError(f"sample {sample.key!r}: a text that is no Unicode ({error}): clean it first") from None
