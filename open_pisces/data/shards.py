"""Datasets on disk: tar shards with a sidecar index, so that any sample is one seek away.

A folder holds ``index.json`` and ``00000.tar``, ``00001.tar`` ...; a sample is ``KEY.png`` (``KEY.0.png``,
``KEY.1.png`` ... with several pictures) and ``KEY.json``, so that WebDataset readers can use the shards too.
"""

from __future__ import annotations

import hashlib
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

from PIL import Image as Pillow

from open_pisces.batch import Question, Sample

FIXTURE = Path(__file__).parent / "fixture"
_BLOCK = 512  # tar's unit: headers and padded contents


class ShardError(ValueError):
    """A dataset that cannot be read or written; the message names the file and the remedy."""


def data_path(path: str) -> Path:
    """Where a dataset of a recipe lies.

    Absolute paths stay; ``fixture`` and what lies under it (``fixture/train``, ``fixture/pairs``) is the small dataset
    inside the package, which ``pisces data build scenes --out fixture/train --count 160 --seed 7`` (and ``pairs``, 40)
    wrote; all else lies under the folder named by ``PISCES_DATA``, by default ``./data``.
    """
    first, *rest = Path(path).parts or ("",)
    if first == "fixture":
        return FIXTURE.joinpath(*rest)
    return Path(os.environ.get("PISCES_DATA") or "data").absolute() / path


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
        self.folder = Path(folder).absolute()
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir()) and not self._is_dataset()):
            raise ShardError(f"{self.folder} is there and is no dataset; choose another folder or empty it")
        self._work = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.part")
        self._per_shard = samples_per_shard
        self._licences = list(licences)
        self._shards: list[dict[str, Any]] = []
        self._samples: list[tuple[int, str, list[tuple[str, int, int, int]]]] = []
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def _is_dataset(self) -> bool:
        return (self.folder / "index.json").is_file()

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self._work, ignore_errors=True)  # of a killed process that had this one's number
        self._work.mkdir(parents=True)
        return self

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            ShardError: for a key that was written before, is empty or holds a dot or slash.
        """
        if not sample.key or sample.key in self._keys or set("./\\") & set(sample.key):
            raise ShardError(f"sample key {sample.key!r}: keys are unique and hold no dots or slashes")
        self._keys.add(sample.key)
        if len(self._samples) == len(self._shards) * self._per_shard:
            self._next_shard()
        several = len(sample.images) > 1
        members = [
            self._add(f"{sample.key}.{i}.png" if several else f"{sample.key}.png", _png(image))
            for i, image in enumerate(sample.images)
        ]
        members.append(self._add(f"{sample.key}.json", _text_of(sample)))
        self._samples.append((len(self._shards) - 1, sample.key, members))

    def _add(self, name: str, content: bytes) -> tuple[str, int, int, int]:
        """Append a member; its name, offset, size and CRC-32."""
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        padded = -(-len(content) // _BLOCK) * _BLOCK
        return name, self._tar.offset - padded, len(content), zlib.crc32(content)

    def _next_shard(self) -> None:
        self._close_shard()
        name = f"{len(self._shards):05d}.tar"
        self._shards.append({"file": name})
        self._tar = tarfile.open(self._work / name, "w")

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._work / self._shards[-1]["file"]
        self._shards[-1] |= {"size": path.stat().st_size, "sha256": _sha256(path)}
        self._tar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close_shard()
                self._write_index()
                self._put_in_place()
        finally:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self._work, ignore_errors=True)

    def _write_index(self) -> None:
        index = {"version": 1, "shards": self._shards, "samples": self._samples, "licences": self._licences}
        (self._work / "index.json").write_text(json.dumps(index, separators=(",", ":")))

    def _put_in_place(self) -> None:
        """Two renames: a reader finds the old dataset or the new one, never a mixture."""
        old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
        if self.folder.exists():
            self.folder.rename(old)
        self._work.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


class ShardReader:
    """Reads a dataset in any order; safe to share between forked workers (it never moves a file position).

    Raises:
        ShardError: no dataset there, an unknown version, or a shard that is missing or of another size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise ShardError(f"no dataset at {self.folder}: build it with `pisces data build scenes`")
        try:
            index = json.loads(path.read_text())
            version = index["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} is damaged ({error}): build the dataset again") from None
        if version != 1:
            raise ShardError(f"{path}: version {version} is not known here (1 is): update open-pisces")
        self.licences: list[dict[str, Any]] = index["licences"]
        self._samples: list[Any] = index["samples"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._files: dict[int, int] = {}
        for shard in self._shards:
            self._check_size(shard)

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["size"]:
            state = "missing" if found is None else f"of {found} bytes"
            raise ShardError(f"{path} is {state}, the index says {shard['size']} bytes: build the dataset again")

    def verify(self) -> None:
        """Compare every shard with its SHA-256.

        Raises:
            ShardError: naming the first shard that differs.
        """
        for shard in self._shards:
            found = _sha256(self.folder / shard["file"])
            if found != shard["sha256"]:
                raise ShardError(
                    f"{self.folder / shard['file']}: SHA-256 {found}, the index says {shard['sha256']}: build it again"
                )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (in the order of writing), its pictures decoded to RGB."""
        shard, key, members = self._samples[index]
        *pictures, last = (self._read(shard, *member) for member in members)
        text = json.loads(last)
        return Sample(
            key=key,
            images=tuple(Pillow.open(io.BytesIO(raw)).convert("RGB") for raw in pictures),
            short=text["short"],
            detailed=text["detailed"],
            questions=tuple(Question(**question) for question in text["questions"]),
            conversation=tuple(text["conversation"]),
            source=text["source"],
            facts=text["facts"],
        )

    def text(self, index: int) -> dict[str, Any]:
        """Everything but the pictures, as a dictionary with the fields of `Sample`."""
        shard, key, members = self._samples[index]
        return {"key": key, **json.loads(self._read(shard, *members[-1]))}

    def _read(self, shard: int, name: str, offset: int, size: int, crc32: int) -> bytes:
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / self._shards[shard]["file"], os.O_RDONLY)
        content = os.pread(self._files[shard], size, offset)
        if zlib.crc32(content) != crc32:
            path = self.folder / self._shards[shard]["file"]
            raise ShardError(f"{path}: member {name} is damaged (checksum differs): build the dataset again")
        return content

    def __getstate__(self) -> dict[str, Any]:
        """A pickled reader opens its files anew."""
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _png(image: Pillow.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _text_of(sample: Sample) -> bytes:
    """A sample's JSON member: all fields but key and pictures."""
    fields = {
        "short": sample.short,
        "detailed": sample.detailed,
        "questions": [asdict(question) for question in sample.questions],
        "conversation": list(sample.conversation),
        "source": sample.source,
        "facts": sample.facts,
    }
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
