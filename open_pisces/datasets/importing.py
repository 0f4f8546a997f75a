"""Imports datasets of other formats into our shards: one loop that checks, counts and writes (``readers/`` parse).

A reader is a generator of `Record` in the order of its source. What cannot be used is *yielded* as a `BadRecord`, not
raised, because a generator that has raised is over; all others keep their order. Readers hold one record at a time.

Nothing that comes with a dataset is run or unpickled, and the names of pictures in it reach only the pictures' folder.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from open_pisces.batch import Sample
from open_pisces.data.images import ImageError, open_image
from open_pisces.datasets.formats import FORMATS
from open_pisces.datasets.inline import picture_file
from open_pisces.datasets.records import BadRecord, DatasetImportError, Options, Record, is_text, place
from open_pisces.datasets.shard_writer import ShardWriter, kept_format, png_of

ENOUGH = 100
"""Records after which the share of bad ones is judged while the import runs."""
NAMED = 5
"""First offenders kept for each cause."""
_LONGEST_KEY = 150


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
        split: of a ``huggingface`` dataset; by default ``train``, or the only one. Of Karpathy's: by default all.
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
    tally = _Tally(source, max_bad)
    keys = _Keys()
    licences = [{"package": name, "licence": licence, "attribution": source}] if licence else []
    with ShardWriter(out, samples_per_shard, licences) as writer:
        for record in islice(read_records(source, options), limit):
            usable = _usable(record, min_side, max_aspect)
            tally.note(usable)
            if isinstance(record, Record) and not isinstance(usable, BadRecord):
                words, pictures = usable
                key = keys.next(record.key, writer)
                writer.write(Sample(key, (), source=record.source or name, **words), pictures)
        tally.judge()
        return {"format": format, "source": source, "folder": str(out), "written": len(writer), **tally.counts()}


def read_records(source: str, options: Options) -> Iterator[Record | BadRecord]:
    """The records of a dataset, by the reader of its format."""
    # By name, so that a format's libraries load only when it is read, and readers can import this module.
    module = import_module(f"open_pisces.datasets.readers.{FORMATS[options.format].module}")
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
        self.source = source
        self.max_bad = max_bad
        self.read = 0
        self.skipped = Counter[str]()
        self.offenders: dict[str, list[str]] = defaultdict(list)
        self.first = self.remedy = ""

    def note(self, bad: Any) -> None:
        self.read += 1
        if isinstance(bad, BadRecord):
            self.skipped[bad.cause] += 1
            self.first = self.first or str(bad)
            self.remedy = bad.remedy or self.remedy  # the last knows most: a second half shows what a first one lacked
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
                f"{self.max_bad:.3g}: {causes}. The first is {self.first}. {self.remedy or 'Mend them'}, or accept "
                "more (max_bad)"
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
    names = ("short", "detailed", "questions", "conversation", "more_captions", "facts")
    words = {name: getattr(record, name) for name in names}
    if not any(words[name] for name in names[:4]):
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
            files.append(_checked(picture_file(picture, record.base), min_side, max_aspect))
        except BadRecord as bad:  # it knows the picture, offenders are named by their record
            raise BadRecord(record.key, bad.cause, bad.detail or bad.name, bad.remedy) from None
        except ImageError as error:
            raise BadRecord(record.key, "image", str(error)) from None
    return tuple(files)


def _checked(raw: bytes, min_side: int, max_aspect: float) -> bytes:
    """The file of a picture, as it is or, for a format that shards do not hold, as PNG."""
    image = open_image(raw)
    short, long = sorted(image.size)
    if short < min_side or long > max_aspect * short:
        raise BadRecord("picture", "shape", f"{image.width} x {image.height}")
    return raw if kept_format(raw) else png_of(image)
