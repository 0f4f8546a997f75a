"""Datasets: tar shards with an index beside them, on a local disk or behind any fsspec address.

A folder holds ``index.json`` (shards, licences), ``index/*.npy`` (where each sample and each of its members lies) and
``00000.tar``, ``00001.tar`` ...; a sample is ``KEY.png`` (``KEY.0.png``, ``KEY.1.png`` ... with several pictures) and
``KEY.json``, so that WebDataset readers can use the shards too. The tables are memory-mapped: opening a dataset of 150
million samples costs what opening one of a hundred does. Shards of others are read in place once ``pisces data index``
has written an index for them (``datasets/indexing.py``).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from open_pisces.batch import CaptionError, Question, Sample, captions_of
from open_pisces.data.images import ImageError, open_image
from open_pisces.errors import PiscesError

FIXTURE = Path(__file__).parent / "fixture"
VERSION = 2
KINDS = ("json", "image", "text")
TABLES = {
    "samples": np.dtype([("shard", "<u4"), ("key", "<u8"), ("first", "<u8")]),
    "members": np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4"), ("kind", "u1")]),
    "keys": np.dtype("u1"),
}
_READ_AHEAD = 1 << 20  # bytes that one request of a remote shard fetches
_KEPT_BLOCKS = 256  # such blocks that are kept
_OPEN_FILES = 128


class ShardError(PiscesError):
    """A dataset that cannot be read or written; the message names the file and the remedy."""


class DamagedSample(ShardError):
    """A sample that cannot be used; ``cause`` is a short word for counting, the message says which and why."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.cause)


def data_path(path: str) -> Path:
    """Where a dataset of a recipe lies.

    Absolute paths stay; ``fixture`` and what lies under it (``fixture/train``, ``fixture/pairs``) is the small dataset
    inside the package (``pisces data build scenes --out open_pisces/data/fixture/train --count 160 --seed 7``, and
    ``pairs``, 40); all else lies under the folder named by ``PISCES_DATA``, by default ``./data``.
    """
    first, *rest = Path(path).parts or ("",)
    if first == "fixture":
        return FIXTURE.joinpath(*rest)
    return Path(os.environ.get("PISCES_DATA") or "data").absolute() / path


def open_dataset(path: str | Path) -> ShardReader:
    """A dataset by its address (``s3://bucket/set``), its folder, or its name under the data folder.

    Raises:
        ShardError: as `ShardReader` does.
    """
    if "://" in str(path) or Path(path).is_dir():
        return ShardReader(path)
    return ShardReader(data_path(str(path)))


# --------------------------------------------------------------------------------------------------- the reader


class ShardReader:
    """Reads a dataset in any order; safe to share between forked workers (it never moves a file position).

    Args:
        folder: a folder, or an fsspec address (``s3://bucket/set``), whose index is then held in memory.
        keep_damaged: open a dataset in which shards are missing or of another size; `damaged_shards` names them.

    Raises:
        ShardError: no dataset there, an unknown version, a damaged index, or a shard that is missing or of another
            size.
    """

    def __init__(self, folder: str | Path, keep_damaged: bool = False) -> None:
        self.folder = folder if "://" in str(folder) else Path(folder)
        self._remote: Any = None
        self._root = str(folder)
        if isinstance(self.folder, str):
            self._remote, self._root = _open_address(self.folder)
        try:
            index = json.loads(self._whole("index.json"))
            version = index["version"]
        except FileNotFoundError:
            raise ShardError(
                f"no dataset at {folder}: build one (`pisces data build scenes`), import one (`pisces data import`), "
                "or index the tar files there (`pisces data index`)"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{folder}/index.json is damaged ({error}): index the dataset again") from None
        if version != VERSION:
            raise ShardError(f"{folder}/index.json: version {version}, not {VERSION}: run `pisces data index {folder}`")
        self.licences: list[dict[str, Any]] = index["licences"]
        self.digest: str = index["digest"]
        """Changes with any byte of any sample."""
        self._fields: dict[str, str] = index.get("fields", {})
        self._shards: list[dict[str, Any]] = index["shards"]
        self._samples, self._members, self._keys = (self._table(name) for name in TABLES)
        self._count = int(index["samples"])
        last = self._samples[-1] if len(self._samples) else None
        ends = (self._count + 1, len(self._members), len(self._keys))
        if last is None or (len(self._samples), int(last["first"]), int(last["key"])) != ends:
            raise ShardError(f"{folder}/index: the tables do not fit index.json: index the dataset again")
        self._files: dict[int, int] = {}
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._process = os.getpid()
        self._lock = threading.Lock()
        self.damaged_shards = self._wrong_sizes()
        """Of the shards that are missing or of another size: number -> what is wrong."""
        if self.damaged_shards and not keep_damaged:
            raise ShardError(next(iter(self.damaged_shards.values())))

    # -------------------------------------------------------------------------------------------- opening

    def _opened(self, name: str) -> Any:
        return Path(self._root, name).open("rb") if self._remote is None else self._remote.open(f"{self._root}/{name}")

    def _whole(self, name: str) -> bytes:
        with self._opened(name) as file:
            return file.read()

    def _table(self, name: str) -> np.ndarray:
        path = f"index/{name}.npy"
        try:
            if self._remote is None:
                table = np.load(Path(self._root, path), mmap_mode="r", allow_pickle=False)
            else:
                table = np.load(io.BytesIO(self._whole(path)), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ShardError(f"{self.folder}/{path}: cannot be read ({error}): index the dataset again") from None
        if table.dtype != TABLES[name] or table.ndim != 1:
            raise ShardError(f"{self.folder}/{path}: holds {table.dtype}: index the dataset again")
        return table

    def _wrong_sizes(self) -> dict[int, str]:
        wrong = {}
        for number, shard in enumerate(self._shards):
            found = self._size_of(shard["file"])
            if found != shard["size"]:
                state = "missing" if found is None else f"of {found} bytes"
                said = f"the index says {shard['size']} bytes"
                remedy = "get a whole copy, or index the dataset again"
                wrong[number] = f"{self.folder}/{shard['file']} is {state}, {said}: {remedy}"
        return wrong

    def _size_of(self, name: str) -> int | None:
        try:
            if self._remote is None:
                return Path(self._root, name).stat().st_size
            return int(self._remote.info(f"{self._root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def verify(self) -> None:
        """Compare every shard with its SHA-256.

        Raises:
            ShardError: naming the first shard that differs.
        """
        for shard in self._shards:
            with self._opened(shard["file"]) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                differs = f"SHA-256 {found}, the index says {shard['sha256']}"
                raise ShardError(f"{self.folder}/{shard['file']}: {differs}: get a whole copy")

    # -------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return self._count

    @property
    def shards(self) -> list[str]:
        """The names of the shards' files, in their order."""
        return [shard["file"] for shard in self._shards]

    def samples_of(self, shard: int) -> range:
        """The samples of a shard, by its number."""
        first, end = np.searchsorted(self._samples["shard"][:-1], [shard, shard + 1])
        return range(int(first), int(end))

    def key(self, index: int) -> str:
        """The key of a sample, from the index alone."""
        start = self._samples[index]["key"]
        end = self._samples[index + 1]["key"]
        return bytes(self._keys[start:end]).decode()

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (in the order of the shards), its pictures decoded to RGB.

        Raises:
            DamagedSample: bytes that differ from the index, a picture or text that cannot be read.
        """
        sample = self.words(index)
        images = []
        for number, raw in enumerate(self.pictures(index)):
            try:
                images.append(open_image(raw))
            except ImageError as error:
                raise DamagedSample(
                    f"{self.folder}: sample {sample.key!r}, picture {number}: {error}", "image"
                ) from None
        return replace(sample, images=tuple(images))

    def words(self, index: int) -> Sample:
        """A sample without its pictures."""
        text = self.text(index)
        try:
            return Sample(
                key=text["key"],
                images=(),
                short=_string(text.get("short")),
                detailed=_string(text.get("detailed")),
                questions=tuple(Question(**question) for question in text.get("questions") or ()),
                conversation=tuple(text.get("conversation") or ()),
                source=_string(text.get("source")) or Path(str(self.folder)).name,
                facts=text.get("facts"),
                more_captions=captions_of(text.get("more_captions")),
            )
        except (TypeError, CaptionError) as error:
            raise DamagedSample(f"{self.folder}: sample {text['key']!r}: {error}", "text") from None

    def without_pixels(self, index: int) -> Sample:
        """A sample with its pictures counted but not read: ``images`` holds None for each."""
        images: Any = (None,) * len(self.image_members(index))
        return replace(self.words(index), images=images)

    def text(self, index: int) -> dict[str, Any]:
        """Everything but the pictures, as a dictionary with the fields of `Sample`."""
        key = self.key(index)
        raw = self._read_kinds(index, ("json", "text"))
        try:
            written = {kind: content.decode() for kind, content in raw}
            fields = json.loads(written["json"]) if "json" in written else {}
        except ValueError as error:
            raise DamagedSample(f"{self.folder}: sample {key!r}: its text cannot be read ({error})", "text") from None
        if not isinstance(fields, dict):
            raise DamagedSample(f"{self.folder}: sample {key!r}: its JSON is no object", "text")
        for name, field in self._fields.items():
            value = written.get("text") if field == "txt" else fields.get(field)
            fields[name] = value.strip() if isinstance(value, str) else value
        if isinstance(fields.get("short"), list | dict) and "short" in self._fields:
            fields["short"], *fields["more_captions"] = self._captions(key, fields["short"]) or ("",)
        return {**fields, "key": key}

    def _captions(self, key: str, value: Any) -> tuple[str, ...]:
        """The captions of a foreign shard's list."""
        try:
            return captions_of(value)
        except CaptionError as error:
            raise DamagedSample(f"{self.folder}: sample {key!r}: {error}", "text") from None

    def pictures(self, index: int) -> list[bytes]:
        """The files of a sample's pictures, as they were written."""
        return [content for _, content in self._read_kinds(index, ("image",))]

    def members(self, index: int) -> list[bytes]:
        """All files of a sample that are read: its pictures and its texts."""
        return [content for _, content in self._read_kinds(index, KINDS)]

    def image_members(self, index: int) -> list[tuple[int, int]]:
        """(size, CRC-32) of a sample's pictures, from the index alone: what their content is known by."""
        members = self._members_of(index)
        return [(int(m["size"]), int(m["crc32"])) for m in members if KINDS[m["kind"]] == "image"]

    def picture_counts(self) -> np.ndarray:
        """Pictures of each sample, from the index alone: ``(samples,)``."""
        starts = self._samples["first"][:-1].astype(np.int64)
        pictures = np.asarray(self._members["kind"] == KINDS.index("image"), np.int64)
        total = np.concatenate([[0], np.cumsum(pictures)])
        return total[self._samples["first"][1:].astype(np.int64)] - total[starts]

    def text_bytes(self) -> np.ndarray:
        """Bytes of each sample's texts, JSON's own signs included, from the index alone: ``(samples,)``."""
        sizes = np.where(self._members["kind"] == KINDS.index("image"), 0, self._members["size"]).astype(np.int64)
        total = np.concatenate([[0], np.cumsum(sizes)])
        starts = self._samples["first"].astype(np.int64)
        return total[starts[1:]] - total[starts[:-1]]

    @property
    def image_digest(self) -> str:
        """Changes with any byte of any picture, and with nothing else."""
        pictures = self._members[self._members["kind"] == KINDS.index("image")]
        content = np.stack([pictures["size"].astype("<u8"), pictures["crc32"].astype("<u8")])
        return hashlib.sha256(content.tobytes() + self.picture_counts().astype("<u8").tobytes()).hexdigest()

    def _members_of(self, index: int) -> np.ndarray:
        return self._members[self._samples[index]["first"] : self._samples[index + 1]["first"]]

    def _read_kinds(self, index: int, kinds: tuple[str, ...]) -> list[tuple[str, bytes]]:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        shard = int(self._samples[index]["shard"])
        found = []
        for offset, size, crc32, kind in self._members_of(index).tolist():
            if KINDS[kind] not in kinds:
                continue
            content = self._bytes(shard, offset, size)
            if zlib.crc32(content) != crc32:
                name = f"{self.folder}/{self._shards[shard]['file']}"
                raise DamagedSample(
                    f"{name}: sample {self.key(index)!r} is damaged (checksum differs): get a whole copy", "checksum"
                )
            found.append((KINDS[kind], content))
        return found

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if self._remote is not None:
            return self._remote_bytes(shard, offset, size)
        with self._lock:  # threads share a reader, and one may close what another reads from
            if shard not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[shard] = os.open(Path(self._root, self._shards[shard]["file"]), os.O_RDONLY)
            return os.pread(self._files[shard], size, offset)

    def _remote_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Through blocks of `_READ_AHEAD` bytes, the last few of which are kept: the order of training stays near."""
        if os.getpid() != self._process:  # a forked worker: file systems with an event loop do not survive that
            self._remote, _ = _open_address(str(self.folder))
            self._process = os.getpid()
            self._blocks = {}
        first = offset // _READ_AHEAD
        last = (offset + size - 1) // _READ_AHEAD
        path = f"{self._root}/{self._shards[shard]['file']}"
        end = self._shards[shard]["size"]
        parts = []
        for block in range(first, last + 1):
            if (shard, block) not in self._blocks:
                start = block * _READ_AHEAD
                self._blocks[shard, block] = self._remote.cat_file(path, start, min(start + _READ_AHEAD, end))
                while len(self._blocks) > _KEPT_BLOCKS:
                    self._blocks.pop(next(iter(self._blocks)))
            parts.append(self._blocks[shard, block])
        start = offset - first * _READ_AHEAD
        return b"".join(parts)[start : start + size]

    def __getstate__(self) -> dict[str, Any]:
        """A pickled reader opens its files anew."""
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            if os is not None:  # the interpreter may have let go of it at its end
                os.close(file)


def _string(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError(f"a text that is {value!r}")


def _open_address(address: str) -> tuple[Any, str]:
    """The file system of an fsspec address, and the path on it."""
    try:
        system, root = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise ShardError(f"{address}: {error}; give a folder or an address such as s3://bucket/set") from None
    return system, root.rstrip("/")
