"""A folder of pictures with captions: in a CSV, TSV, JSONL or COCO file, or in ``NAME.txt`` beside ``NAME.jpg``.

The list may be named, or lie in the folder (``metadata.*`` and ``captions.*`` first, as the hub's image folders have
it); its pictures are named relative to it, or to ``images``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain, groupby
from typing import Any

from open_pisces.batch import LIST_FIELDS
from open_pisces.datasets.indexing import IMAGES
from open_pisces.datasets.inline import is_inline
from open_pisces.datasets.readers import coco
from open_pisces.datasets.readers.json_rows import json_rows
from open_pisces.datasets.records import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    captions_in,
    choose_field,
    is_text,
    key_of,
    place,
    text_of,
    with_fields,
)

LISTS = (".csv", ".tsv", ".jsonl")
PICTURES = tuple(f".{ending}" for ending in (*IMAGES, "bmp", "tif", "tiff"))
TEXTS = (".txt", ".caption")
KEY_FIELDS = ("id", "key", "uid")
IMAGE_FIELDS = ("file_name", "file", "filename", "filepath", "image", "image_path", "path")
CAPTION_FIELDS = ("caption", "short", "text", "title", *LIST_FIELDS)
DETAILED_FIELDS = ("detailed", "detailed_caption", "long_caption")
_KNOWN = frozenset((*KEY_FIELDS, *IMAGE_FIELDS, *CAPTION_FIELDS, *DETAILED_FIELDS))
_DELIMITERS = (",", ";", "\t", "|")
_EXCEL = re.compile(r"sep=(.)\s*$")  # a first line that names the delimiter


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The pictures of a list in its order, or of a folder in the order of their names.

    Raises:
        DatasetImportError: several lists to choose from, or one without a field for pictures or texts.
    """
    start = place(address)
    if not start.system.exists(start.root):
        raise DatasetImportError(f"{address}: no such folder or list of captions; check the path")
    listing = start if start.is_file() else _listing(start)
    images = place(options.images) if options.images else None
    if listing is not None and coco.is_coco(listing):
        return coco.read(listing, images or listing.parent)
    if listing is not None:
        return _listed(listing, images or listing.parent, options)
    for name in ("caption_field", "detailed_field", "image_field"):
        if value := getattr(options, name):
            raise DatasetImportError(f"{name}={value!r}: {address} has no {', '.join(LISTS)} file to look it up in")
    return _beside(images or start, start)


def _listing(folder: Place) -> Place | None:
    names = folder.files(*LISTS, deep=False)
    if not names:  # other JSON files may stand beside pictures: img2dataset writes one for each
        found = [name for name in folder.files(".json", deep=False) if coco.is_coco(folder.at(name))]
        names = [name for name in found if "caption" in name.lower()] or found
    usual = [n for n in names if n.rpartition(".")[0] in ("metadata", "captions")]
    if len(usual or names) > 1:
        raise DatasetImportError(
            f"{folder.address}: holds {', '.join(names)}; give the one with the captions as source"
        )
    return folder.at((usual or names)[0]) if names else None


# -------------------------------------------------------------------------------------------------------- lists


def _listed(listing: Place, images: Place, options: Options) -> Iterator[Record | BadRecord]:
    name = listing.file
    fields, rows = with_fields(_table(listing) if ".csv" in name or ".tsv" in name else json_rows(listing))
    key = choose_field("", KEY_FIELDS, fields, name)
    image = choose_field(options.image_field, IMAGE_FIELDS, fields, name)
    caption = choose_field(options.caption_field, CAPTION_FIELDS, fields, name)
    detailed = choose_field(options.detailed_field, DETAILED_FIELDS, fields, name)
    if fields and not (image and (caption or detailed)):
        what = "a caption (caption_field)" if image else "the picture's file (image_field)"
        raise DatasetImportError(f"{listing.address}: say which field holds {what}: {', '.join(fields)}")
    for number, row in enumerate(rows):
        if isinstance(row, BadRecord):
            yield row
            continue
        file = text_of(row.get(image))
        numbered = f"{listing.name}-{number:08d}"
        name = key_of(row.get(key), numbered if is_inline(file) else _stem(file) or numbered)
        try:
            captions = captions_in(name, row.get(caption), row.get(detailed))
        except BadRecord as bad:
            yield bad
            continue
        yield Record(name, (file,) if file else (), **captions, source=listing.parent.name, base=images)


def _table(listing: Place) -> Iterator[dict[str, Any] | BadRecord]:
    """The rows of a CSV or TSV file; one with too few cells lacks the last fields.

    Raises:
        DatasetImportError: if its header cannot be read.
    """
    with listing.open_text() as file:
        first = file.readline().removeprefix("\ufeff")
        delimiter = _delimiter(first, "\t" if ".tsv" in listing.file else ",")
        rest = file if _EXCEL.match(first) else chain([first], file)
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        header = _header(reader, listing.address)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield BadRecord(f"{listing.file}:{reader.line_num}", "row", str(error))
                continue
            name = f"{listing.file}:{reader.line_num}"
            if cells is None:
                return
            if len(cells) > len(header):
                yield BadRecord(
                    name, "row", f"{len(cells)} cells, the header has {len(header)}: is a caption not quoted?"
                )
            elif not all(map(is_text, cells)):
                yield BadRecord(name, "not UTF-8")
            elif cells:
                yield dict(zip(header, cells, strict=False))


def _delimiter(line: str, usual: str) -> str:
    """What separates the names in a header: what finds most known names, then most names, then the usual one."""
    if said := _EXCEL.match(line):
        return said[1]

    def found(delimiter: str) -> tuple[int, int, bool]:
        try:
            names = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            return 0, 0, delimiter == usual
        known = sum(name.strip().lower() in _KNOWN for name in names)
        return known, len(names), delimiter == usual

    return max(_DELIMITERS, key=found)


def _header(reader: Iterator[list[str]], address: str) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DatasetImportError(f"{address}: its header cannot be read ({error}); mend the first line") from None
    if not all(map(is_text, header)):
        raise DatasetImportError(f"{address}: its header is not UTF-8; save the file as UTF-8")
    return header


# ------------------------------------------------------------------------------------------------ text beside it


def _beside(images: Place, texts: Place) -> Iterator[Record | BadRecord]:
    """Every picture with the text file of its name; only the names are held."""
    found = [(_stem(name), True, name) for name in images.files(*PICTURES)]
    found += [(_stem(name), False, name) for name in texts.files(*TEXTS)]
    for stem, group in groupby(sorted(found), key=lambda row: row[0]):
        rows = list(group)
        pictures = [name for _, is_picture, name in rows if is_picture]
        try:
            text = next((_text(texts, name) for _, is_picture, name in rows if not is_picture), "")
        except BadRecord as bad:
            yield BadRecord(stem, bad.cause, bad.detail)
            continue
        if not pictures:
            yield BadRecord(stem, "missing image", f"no picture beside {rows[0][2]}")
        for name in pictures:
            yield Record(stem, (name,), short=text, source=images.name, base=images)


def _text(texts: Place, name: str) -> str:
    try:
        return texts.read(name).decode().strip()
    except UnicodeDecodeError:
        raise BadRecord(name, "not UTF-8") from None


def _stem(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"
