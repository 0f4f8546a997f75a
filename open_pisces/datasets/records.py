"""What all readers share: `Record`, `BadRecord`, reading of fields, and `Place`, a file on disk or behind fsspec."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, TextIO

import fsspec

from open_pisces.batch import CaptionError, Question, captions_of, one_text
from open_pisces.errors import PiscesError

_FIRST = 100  # rows looked at to learn which fields there are


class DatasetImportError(PiscesError):
    """A dataset that cannot be imported; the message names it and the remedy."""


class BadRecord(PiscesError):
    """A record that cannot be used: its name, the cause it is counted under, and what helps ("" if nothing special)."""

    def __init__(self, name: str, cause: str, detail: str = "", remedy: str = "") -> None:
        self.name = name.encode(errors="replace").decode()  # half a surrogate pair could not be printed
        self.cause = cause
        self.detail = detail.encode(errors="replace").decode()
        self.remedy = remedy
        super().__init__(f"{self.name}: {cause}{f' ({self.detail})' if detail else ''}")


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
    more_captions: tuple[str, ...] = ()


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


def is_text(value: str) -> bool:
    """Whether a string is whole: one decoded with ``surrogateescape`` from other bytes than UTF-8 is not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(value: Any) -> str:
    """A text field's value; "" for what is missing or no text."""
    return value.strip() if isinstance(value, str) else ""


def captions_in(name: str, short: Any, detailed: Any = None) -> dict[str, Any]:
    """The captions of a `Record`, by its fields, from what a source holds in its own: of several, all are kept.

    Raises:
        BadRecord: "caption" for a value of no known form.
    """
    try:
        captions = captions_of(short)
        long = one_text(detailed)
    except CaptionError as error:
        raise BadRecord(name, "caption", str(error)) from None
    return {"short": captions[0] if captions else "", "more_captions": captions[1:], "detailed": long}


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
    """The fields of the first `_FIRST` rows, and all the rows: for formats without a header."""
    first = list(islice(rows, _FIRST))
    names: dict[str, None] = {}
    for row in first:
        if isinstance(row, dict):
            names |= dict.fromkeys(row)
    return list(names), chain(first, rows)


# ------------------------------------------------------------------------------------------------------- places


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
        if "://" in name or name.startswith("/") or ".." in re.split(r"[/\\]", name):
            raise BadRecord(name, "outside the folder", f"{name} is not below {self.address}")
        return Place(f"{self.address}/{name}", self.system, f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        """A file below it; where there is none, backslashes in the name count as Windows separators.

        Raises:
            BadRecord: if it is not there, not below it, or cannot be read.
        """
        try:
            return self.system.cat_file(self.at(name).root)
        except BadRecord:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if "\\" in name:
                return self.read(re.sub(r"\\+", "/", name))
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
