"""Datasets of others into our shards: one loop that checks, counts and writes; how a format is read is in ``sources/``.

A reader is a generator of `Record` in the order of its source. What cannot be used is *yielded* as a `BadRecord`, not
raised, because a generator that has raised is over; all others keep their order. Readers hold one record at a time.

Nothing that comes with a dataset is run or unpickled, and the names of pictures in it reach only the pictures' folder.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import fsspec

from open_pisces.batch import Question, Sample
from open_pisces.data.images import ImageError, open_image
from open_pisces.data.shard_writer import ShardWriter, kept_format
from open_pisces.errors import PiscesError

ENOUGH = 100
"""Records after which the share of bad ones is judged while the import runs."""
NAMED = 5
"""First offenders kept for each cause."""
_LONGEST_KEY = 150


class DatasetImportError(PiscesError):
    """A dataset that cannot be imported; the message names it and the remedy."""


class BadRecord(PiscesError):
    """A record that cannot be used: its name, and the cause it is counted under."""

    def __init__(self, name: str, cause: str, detail: str = "") -> None:
        name, detail = (text.encode(errors="replace").decode() for text in (name, detail))  # to be printed anywhere
        super().__init__(f"{name}: {cause}{f' ({detail})' if detail else ''}")
        self.name, self.cause, self.detail = name, cause, detail


@dataclass(frozen=True)
class Record:
    """One entry of a foreign dataset; pictures that are names of files are read, from ``base``, when it is written."""

    key: str
    pictures: tuple[bytes | str, ...]
    short: str = ""
    detailed: str = ""
    questions: tuple[Question, ...] = ()
    conversation: tuple[dict[str, Any], ...] = ()
    source: str = ""
    facts: dict[str, Any] | None = None
    base: Place | None = None


@dataclass(frozen=True)
class Options:
    """What a reader is told; "" leaves a choice to it."""

    format: str
    caption_field: str = ""
    detailed_field: str = ""
    image_field: str = ""
    images: str = ""
    """Folder or address that names of pictures are relative to."""
    split: str = ""


@dataclass(frozen=True)
class Format:
    """A name for `import_dataset`: the module of ``sources/`` that reads it, and the options it listens to."""

    module: str
    options: tuple[str, ...]
    about: str


_TEXTS = ("caption_field", "detailed_field")
_COLUMNS = (*_TEXTS, "image_field", "images")
FORMATS = {
    "folder": Format("folder", _COLUMNS, "pictures with a CSV, TSV or JSONL of captions, or NAME.txt beside NAME.jpg"),
    "webdataset": Format("webdataset", _TEXTS, "tar files of img2dataset or WebDataset"),
    "huggingface": Format("huggingface", (*_COLUMNS, "split"), "a hub name or local folder, through `datasets`"),
    "llava": Format("llava", ("image_field", "images"), "conversations as a JSON array or JSONL, pictures in a folder"),
    "parquet": Format(
        "parquet", _COLUMNS, "parquet with pictures, or names of pictures, and captions or conversations"
    ),
    "pixelprose": Format("parquet", _COLUMNS, "PixelProse parquet; pictures named by uid or key in the images folder"),
    "cambrian": Format("parquet", ("image_field", "images"), "Cambrian parquet or JSONL, pictures in a folder"),
    "onevision": Format("parquet", ("image_field", "images"), "LLaVA-OneVision parquet"),
}


# ---------------------------------------------------------------------------------------------------- the import


def import_dataset(
    format: str,
    source: str,
    out: str | Path,
    *,
    caption_field: str = "",
    detailed_field: str = "",
    image_field: str = "",
    images: str = "",
    split: str = "",
    limit: int | None = None,
    max_bad: float = 0.01,
    min_side: int = 8,
    max_aspect: float = 20.0,
    samples_per_shard: int = 2000,
    licence: str = "",
) -> dict[str, Any]:
    """Write a foreign dataset as shards; files of pictures are kept byte for byte where shards can hold them.

    Args:
        format: a name of `FORMATS`.
        source: a path or an fsspec address; for ``huggingface`` also a name on the hub.
        out: the dataset's folder, which appears whole at the end or not at all.
        caption_field, detailed_field, image_field: where a record has its short text, long text and picture; "" takes
            the first usual name that is there.
        images: folder or address of the pictures, where records only name them; by default where the source lies.
        split: of a ``huggingface`` dataset; by default ``train``, or the only one.
        limit: read no more records than this.
        max_bad: share of records that may be unusable; judged at the end, and after each record from `ENOUGH` on.
        min_side, max_aspect: pictures with a smaller side in pixels, or a larger ratio of sides, are not used.
        samples_per_shard: samples in one tar file.
        licence: kept in the dataset's licence table.

    Returns:
        ``format, source, folder, read, written``, ``skipped`` by cause and the first ``offenders`` of each cause.

    Raises:
        DatasetImportError: an unknown format or option, a field or file that is not there, a damaged container, or
            too many bad records, whose first are named. Nothing is written then.
        ShardError: if ``out`` holds something else.
    """
    fields = {"caption_field": caption_field, "detailed_field": detailed_field, "image_field": image_field}
    options = Options(format, **fields, images=images, split=split)
    _check(options, limit, max_bad, min_side, max_aspect)
    name = place(source).name
    tally, keys = _Tally(source, max_bad), _Keys()
    licences = [{"package": name, "licence": licence, "attribution": source}] if licence else []
    with ShardWriter(out, samples_per_shard, licences) as writer:
        for record in islice(read_records(source, options), limit):
            usable = _usable(record, min_side, max_aspect)
            tally.note(usable)
            if isinstance(record, Record) and not isinstance(usable, BadRecord):
                words, pictures = usable
                key, origin = keys.next(record.key, writer), record.source or name
                writer.write(Sample(key, (), source=origin, **words), pictures)
        tally.judge()
        return {"format": format, "source": source, "folder": str(out), "written": len(writer), **tally.counts()}


def read_records(source: str, options: Options) -> Iterator[Record | BadRecord]:
    """The records of a dataset, by the reader of its format."""
    # By name, so that a format's libraries load only when it is read, and readers can import this module.
    module = import_module(f"open_pisces.data.sources.{FORMATS[options.format].module}")
    return module.records(source, options)


def _check(options: Options, limit: int | None, max_bad: float, min_side: int, max_aspect: float) -> None:
    if options.format not in FORMATS:
        near = difflib.get_close_matches(options.format, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(FORMATS)}"
        raise DatasetImportError(f"unknown format {options.format!r}: {hint}")
    takes = FORMATS[options.format].options
    for name, value in asdict(options).items():
        if value and name not in ("format", *takes):
            raise DatasetImportError(f"{name}={value!r}: format {options.format} takes only {', '.join(takes)}")
    if not 0 <= max_bad <= 1:
        raise DatasetImportError(f"max_bad={max_bad}: the share of bad records to accept is between 0 and 1")
    if min_side < 1 or max_aspect < 1:
        raise DatasetImportError(f"min_side={min_side}, max_aspect={max_aspect}: both are 1 or more")
    if limit is not None and limit < 1:
        raise DatasetImportError(f"limit={limit}: give a number of records, or leave it out for all")


class _Tally:
    """Counts what was read and skipped, and ends the import when too much was."""

    def __init__(self, source: str, max_bad: float) -> None:
        self.source, self.max_bad, self.read = source, max_bad, 0
        self.skipped = Counter[str]()
        self.offenders: dict[str, list[str]] = defaultdict(list)
        self.first = ""

    def note(self, bad: Any) -> None:
        self.read += 1
        if isinstance(bad, BadRecord):
            self.skipped[bad.cause] += 1
            self.first = self.first or str(bad)
            if len(self.offenders[bad.cause]) < NAMED:
                self.offenders[bad.cause].append(bad.name)
        if self.read >= ENOUGH:
            self.judge()

    def judge(self) -> None:
        if not self.read:
            raise DatasetImportError(f"{self.source}: holds no records; is it of another format?")
        bad = self.skipped.total()
        if bad > self.max_bad * self.read:
            causes = "; ".join(f"{cause} {n} ({', '.join(self.offenders[cause])})" for cause, n in self.skipped.items())
            raise DatasetImportError(
                f"{self.source}: {bad} of the first {self.read} records cannot be used, more than a share of "
                f"{self.max_bad:.3g}: {causes}. The first is {self.first}. Mend them, or accept more (max_bad)"
            )

    def counts(self) -> dict[str, Any]:
        return {"read": self.read, "skipped": dict(self.skipped), "offenders": dict(self.offenders)}


class _Keys:
    """Keys for shards: without dots and slashes, a repeated one numbered."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def next(self, name: str, taken: ShardWriter) -> str:
        key = safe = re.sub(r"[^\w-]+", "-", name).strip("-")[:_LONGEST_KEY] or "sample"
        while key in taken:
            self._last[safe] = self._last.get(safe, 1) + 1
            key = f"{safe}-{self._last[safe]}"
        return key


def _usable(
    record: Record | BadRecord, min_side: int, max_aspect: float
) -> tuple[dict[str, Any], tuple[bytes, ...]] | BadRecord:
    """The words and files of a record that can be used, or why it cannot."""
    if isinstance(record, BadRecord):
        return record
    try:
        return _words(record), _pictures(record, min_side, max_aspect)
    except BadRecord as bad:
        return bad


def _words(record: Record) -> dict[str, Any]:
    """The fields of a sample that are text, or a `BadRecord` where they are missing or no text."""
    names = ("short", "detailed", "questions", "conversation", "facts")
    words = {name: getattr(record, name) for name in names}
    if not any(words[name] for name in names[:-1]):
        raise BadRecord(record.key, "no text")
    plain = {**words, "questions": [asdict(question) for question in record.questions], "source": record.source}
    if not is_text(json.dumps(plain, ensure_ascii=False)):
        raise BadRecord(record.key, "not UTF-8")
    return words


def _pictures(record: Record, min_side: int, max_aspect: float) -> tuple[bytes, ...]:
    """The files of a record's pictures, each of which has been decoded once."""
    if not record.pictures and not record.conversation:
        raise BadRecord(record.key, "missing image")
    files = []
    for picture in record.pictures:
        try:
            raw = picture if isinstance(picture, bytes) else _read(picture, record.base)
            files.append(_checked(raw, min_side, max_aspect))
        except BadRecord as bad:  # it knows the picture, offenders are named by their record
            raise BadRecord(record.key, bad.cause, bad.detail or bad.name) from None
        except ImageError as error:
            raise BadRecord(record.key, "image", str(error)) from None
    return tuple(files)


def _read(name: str, base: Place | None) -> bytes:
    if base is None:
        raise BadRecord(name, "missing image")
    return base.read(name)


def _checked(raw: bytes, min_side: int, max_aspect: float) -> bytes:
    """The file of a picture, as it is or, for a format that shards do not hold, as PNG."""
    image = open_image(raw)
    short, long = sorted(image.size)
    if short < min_side or long > max_aspect * short:
        raise BadRecord("picture", "shape", f"{image.width} x {image.height}")
    if kept_format(raw):
        return raw
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- what readers share


def is_text(value: str) -> bool:
    """Whether a string is whole: one decoded with ``surrogateescape`` from other bytes than UTF-8 is not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def words_of(value: Any) -> str:
    """A text field's value; "" for what is missing or no text."""
    return value.strip() if isinstance(value, str) else ""


def key_of(value: Any, other: str) -> str:
    """A record's name: what its source calls it, a string or number, or another if it does not."""
    return str(value) if isinstance(value, str | int) and value != "" else other


def choose_field(asked: str, usual: Sequence[str], found: Collection[str], where: str) -> str:
    """The field to read: the one asked for, else the first usual name that is there in any case, else "".

    Raises:
        DatasetImportError: if the field asked for is not there, naming those that are.
    """
    if asked and found and asked not in found:
        near = difflib.get_close_matches(asked, found, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DatasetImportError(f"{where}: has no field {asked!r}: {hint}it holds {', '.join(found)}")
    lowered = {name.lower(): name for name in reversed(list(found))}
    return asked or next((lowered[name] for name in usual if name in lowered), "")


def with_fields(rows: Iterator[dict[str, Any] | BadRecord]) -> tuple[list[str], Iterator[dict[str, Any] | BadRecord]]:
    """The fields of the first `ENOUGH` rows, and all the rows: for formats without a header."""
    first = list(islice(rows, ENOUGH))
    names = dict.fromkeys(name for row in first if isinstance(row, dict) for name in row)
    return list(names), chain(first, rows)


@dataclass(frozen=True)
class Place:
    """A file or folder on a local disk or behind an fsspec address (``memory://``, ``s3://`` ...); see `place`."""

    address: str
    system: Any
    root: str

    @property
    def name(self) -> str:
        """The last part without its ending; of a pattern, the folder's."""
        return PurePosixPath(self.root).stem if "*" not in self.file else self.parent.name

    @property
    def file(self) -> str:
        """The last part."""
        return PurePosixPath(self.root).name

    @property
    def parent(self) -> Place:
        """The folder it lies in."""
        return Place(self.address.rpartition("/")[0], self.system, self.root.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self.system.isfile(self.root))

    def files(self, *endings: str, deep: bool = True) -> list[str]:
        """Names of the files with these endings below it, sorted, relative to it; none that are hidden."""
        found = self.system.find(self.root, maxdepth=None if deep else 1)
        names = (path.removeprefix(self.root).lstrip("/") for path in found)
        return sorted(n for n in names if n.lower().endswith(endings) and "/." not in f"/{n}")

    def at(self, name: str) -> Place:
        """A file below it.

        Raises:
            BadRecord: if the name leads out of it.
        """
        name = name.removeprefix(f"{self.root}/")
        if "://" in self.address:
            name = name.removeprefix(f"{self.address.rstrip('/')}/")
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise BadRecord(name, "outside the folder", f"{name} is not below {self.address}")
        return Place(f"{self.address}/{name}", self.system, f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        """A file below it.

        Raises:
            BadRecord: if it is not there, not below it, or cannot be read.
        """
        try:
            return self.system.cat_file(self.at(name).root)
        except BadRecord:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadRecord(name, "missing image") from None
        except (OSError, ValueError) as error:
            raise BadRecord(name, "unreadable", f"{name}: {error}") from None

    def open(self, compression: str | None = None) -> Any:
        """The file's bytes, to be read from its start to its end."""
        return self.system.open(self.root, "rb", compression=compression)

    def open_text(self) -> TextIO:
        """The file's text, unpacked if it ends in ``.gz`` or the like; bytes that are no UTF-8 stay as surrogates."""
        return io.TextIOWrapper(self.open("infer"), encoding="utf-8", errors="surrogateescape", newline="")


def place(address: str) -> Place:
    """What lies at a path or an fsspec address.

    Raises:
        DatasetImportError: for a command (``pipe:``), or an address that fsspec does not know.
    """
    if any(part.strip().lower().startswith("pipe:") for part in address.split("::")):
        raise DatasetImportError(f"{address}: commands are not run; give a path or an address such as s3://bucket/set")
    try:
        system, root = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise DatasetImportError(f"{address}: {error}; give a path or an address such as s3://bucket/set") from None
    return Place(address, system, root.rstrip("/"))


def inputs(address: str, *endings: str, deep: bool = True) -> list[Place]:
    """The files that make up a source: the one it names, those that a pattern (``*``) matches, or those in a folder.

    Raises:
        DatasetImportError: if there are none.
    """
    start = place(address)
    if start.is_file():
        return [start]
    if "*" in start.root:
        found = [Place(path, start.system, path) for path in sorted(start.system.glob(start.root))]
    else:
        found = [start.at(name) for name in start.files(*endings, deep=deep)]
    if not found:
        raise DatasetImportError(f"{address}: there is no {' or '.join(endings)} file; check the path and the format")
    return found
