"""Tar files of img2dataset and WebDataset (CC12M, LAION, BLIP3-o style): pictures with a text or JSON member, or both.

Tar files are read once, from their start to their end, so that they may lie anywhere. Members of one sample stand
together and agree up to the first dot of their names' last part; which of them are read is `read_members`. Links and
all other kinds of members are passed over.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from open_pisces.batch import LIST_FIELDS
from open_pisces.datasets.indexing import kind_of, read_members
from open_pisces.datasets.records import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    captions_in,
    choose_field,
    inputs,
    text_of,
)

CAPTION_FIELDS = ("caption", "short", "text", "short_caption", *LIST_FIELDS)
DETAILED_FIELDS = ("detailed", "detailed_caption", "long_caption", "vlm_caption", "recaption")
FACTS = {"url": "url", "license": "licence", "licence": "licence"}
"""Fields that are kept, and the name they are kept under."""
_SORT = "unpack the tar and pack it with `tar --sort=name -cf`, so that 0001.jpg and 0001.txt stand side by side"
_KEPT_HALVES = 10_000  # keys of incomplete samples that are remembered
_AHEAD = 20  # samples looked at to learn which fields there are
_BUFFER = 1 << 18  # bytes read at a time


class _Sample(NamedTuple):
    key: str
    fields: dict[str, Any]
    text: str
    pictures: tuple[bytes, ...]


class _StrictHeader(tarfile.TarInfo):
    """Python takes a header that is damaged or cut short, anywhere but at the start, for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        """The next header."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise tarfile.ReadError(str(error)) from None
            raise


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The samples of a tar file, or of all tar files of a folder or pattern, in order.

    The text member is the short caption, unless a field of the JSON member is asked for or there is no text member.

    Raises:
        DatasetImportError: no such file, one that is damaged, or a field that the JSON members do not have.
    """
    samples = chain.from_iterable(_samples(source, options.image_field) for source in inputs(address, ".tar"))
    first = list(islice(samples, _AHEAD))
    found: dict[str, None] = {}
    for sample in first:
        if isinstance(sample, _Sample):
            found |= dict.fromkeys(sample.fields)
    caption = choose_field(options.caption_field, CAPTION_FIELDS, found, address)
    detailed = choose_field(options.detailed_field, DETAILED_FIELDS, found, address)
    for sample in chain(_emptied(first), samples):
        if isinstance(sample, BadRecord):
            yield sample
            continue
        said = sample.fields.get(caption)
        facts = {FACTS[n]: value for n, value in sample.fields.items() if n in FACTS and text_of(value)}
        try:
            captions = captions_in(
                sample.key, said if options.caption_field else sample.text or said, sample.fields.get(detailed)
            )
            yield Record(sample.key, sample.pictures, **captions, facts=facts or None)
        except BadRecord as bad:
            yield bad


def _emptied(first: list[_Sample | BadRecord]) -> Iterator[_Sample | BadRecord]:
    """Let go of each sample as it is used."""
    first.reverse()
    while first:
        yield first.pop()


def _samples(source: Place, image: str) -> Iterator[_Sample | BadRecord]:
    halves = _Halves(source.file)
    for key, members in groupby(_members(source), key=lambda member: member[0]):
        try:
            sample = _sample(key, [(ending, content) for _, ending, content in members], image)
            halves.check(sample)
            yield sample
        except BadRecord as bad:
            yield bad


class _Halves:
    """Finds tars whose members of one sample are not next to each other: a picture without text, or the reverse."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._halves: dict[str, bool] = {}

    def check(self, sample: _Sample) -> None:
        """Refuse half a sample.

        Raises:
            BadRecord: "members apart" if the other half came before, else "no text" or "missing image".
        """
        has_picture = bool(sample.pictures)
        has_text = bool(sample.text or sample.fields)
        if has_picture == has_text:
            return
        if self._halves.pop(sample.key, has_picture) != has_picture:
            raise BadRecord(
                sample.key,
                "members apart",
                f"in {self.file}",
                f"The members of a sample are not next to each other: {_SORT}",
            )
        self._halves[sample.key] = has_picture
        if len(self._halves) > _KEPT_HALVES:
            self._halves.pop(next(iter(self._halves)))
        cause = "no text" if has_picture else "missing image"
        raise BadRecord(sample.key, cause, remedy=f"If the members of a sample are not next to each other, {_SORT}")


def _sample(key: str, members: list[tuple[str, bytes]], image: str) -> _Sample:
    """The members of one sample by their kinds; the first text and the first JSON object count."""
    pictures: list[bytes] = []
    texts: dict[str, str] = {}
    for at in read_members([ending for ending, _ in members], image):
        ending, content = members[at]
        kind = kind_of(ending)
        if kind == "image":
            pictures.append(content)
        else:
            texts.setdefault(kind, _decoded(content, key))
    try:
        fields = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(key, "row", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRecord(key, "row", "its JSON member is no object")
    return _Sample(key, fields, texts.get("text", "").strip(), tuple(pictures))


def _decoded(content: bytes, key: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadRecord(key, "not UTF-8") from None


def _members(source: Place) -> Iterator[tuple[str, str, bytes]]:
    """(key, ending, content) of each file in a tar file; what is of no known kind is not read."""
    try:
        with source.open() as raw, tarfile.open(fileobj=raw, mode="r|", bufsize=_BUFFER, tarinfo=_StrictHeader) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # else the headers of all members are kept
                if not info.isfile() or info.issparse():
                    continue
                folder, slash, last = info.name.removeprefix("./").rpartition("/")
                stem, _, ending = last.partition(".")
                file = tar.extractfile(info) if kind_of(ending) else None
                yield f"{folder}{slash}{stem}", ending, file.read() if file else b""
    except tarfile.TarError as error:
        raise DatasetImportError(
            f"{source.address}: cut short, damaged or no plain tar file ({error}); get a whole copy or take it away"
        ) from None
