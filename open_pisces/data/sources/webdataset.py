"""Tar files of img2dataset and WebDataset (CC12M, LAION, BLIP3-o style): pictures with a text or JSON member, or both.

Tar files are read once, from their start to their end, so that they may lie anywhere. Members of one sample stand
together and agree up to the first dot of their names' last part. Links and all other kinds of members are passed over.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from open_pisces.data.importing import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    choose_field,
    inputs,
    words_of,
)
from open_pisces.data.indexing import kind_of

CAPTION_FIELDS = ("caption", "short", "text", "short_caption")
DETAILED_FIELDS = ("detailed", "detailed_caption", "long_caption", "vlm_caption", "recaption")
FACTS = {"url": "url", "license": "licence", "licence": "licence"}
"""Fields that are kept, and the name they are kept under."""
_AHEAD, _BUFFER = 20, 1 << 18  # samples looked at to learn which fields there are; bytes read at a time


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
    samples = chain.from_iterable(_samples(source) for source in inputs(address, ".tar"))
    first = list(islice(samples, _AHEAD))
    found = list(dict.fromkeys(name for sample in first if isinstance(sample, _Sample) for name in sample.fields))
    caption = choose_field(options.caption_field, CAPTION_FIELDS, found, address)
    detailed = choose_field(options.detailed_field, DETAILED_FIELDS, found, address)
    for sample in chain(_emptied(first), samples):
        if isinstance(sample, BadRecord):
            yield sample
            continue
        text = words_of(sample.fields.get(caption))
        yield Record(
            key=sample.key,
            pictures=sample.pictures,
            short=text if options.caption_field else sample.text or text,
            detailed=words_of(sample.fields.get(detailed)),
            facts={FACTS[n]: value for n, value in sample.fields.items() if n in FACTS and words_of(value)} or None,
        )


def _emptied(first: list[_Sample | BadRecord]) -> Iterator[_Sample | BadRecord]:
    """Let go of each sample as it is used."""
    first.reverse()
    while first:
        yield first.pop()


def _samples(source: Place) -> Iterator[_Sample | BadRecord]:
    for key, members in groupby(_members(source), key=lambda member: member[0]):
        try:
            yield _sample(key, [(ending, content) for _, ending, content in members])
        except BadRecord as bad:
            yield bad


def _sample(key: str, members: list[tuple[str, bytes]]) -> _Sample:
    """The members of one sample by their kinds; the first text and the first JSON object count."""
    pictures, texts = [], dict[str, str]()
    for ending, content in members:
        kind = kind_of(ending)
        if kind == "image":
            number = ending.partition(".")[0]
            pictures.append((int(number) if number.isdigit() else 0, content))
        elif kind:
            texts.setdefault(kind, _decoded(content, key))
    try:
        fields = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(key, "row", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRecord(key, "row", "its JSON member is no object")
    ordered = tuple(content for _, content in sorted(pictures, key=lambda picture: picture[0]))
    return _Sample(key, fields, texts.get("text", "").strip(), ordered)


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
