"""COCO captions: an object with ``images`` and ``annotations``, several captions a picture; Karpathy's splits too.

The file is read one element at a time, twice if it has to be: its captions, grouped by picture, are held in memory
(some 150 bytes each, 90 MB for COCO's 590,000), boxes and outlines are not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from open_pisces.batch import CaptionError, captions_of
from open_pisces.datasets.readers.json_rows import object_rows
from open_pisces.datasets.records import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    captions_in,
    inputs,
    key_of,
    place,
    text_of,
)

_PEEK = 1 << 16
_SHAPE = re.compile(r'"(images|annotations)"\s*:\s*\[\s*\{')


def is_coco(source: Place) -> bool:
    """Whether a file looks like one: an object with arrays of images or annotations near its start."""
    if not source.file.lower().endswith((".json", ".json.gz")):
        return False
    with source.open_text() as file:
        start = file.read(_PEEK).removeprefix("\ufeff").lstrip()
    return start[:1] == "{" and bool(_SHAPE.search(start))


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The pictures of a COCO file, or of all those in a folder that hold captions.

    Raises:
        DatasetImportError: no such file, one that is cut short, or one without captions.
    """
    found = inputs(address, ".json", deep=False)
    chosen = [source for source in found if "caption" in source.file.lower()] or found
    for source in chosen:
        yield from read(source, place(options.images) if options.images else source.parent, options.split)


def read(source: Place, images: Place, split: str = "") -> Iterator[Record | BadRecord]:
    """The pictures of one file in its order, each with all its captions.

    Raises:
        DatasetImportError: if the file is cut short, or holds no captions.
    """
    captions, licences = _captions(source)
    seen = False
    for number, (_, row) in enumerate(object_rows(source, ("images",))):
        if not isinstance(row, dict):
            yield BadRecord(f"{source.file}: image {number}", "row", "no JSON object")
        elif not split or row.get("split") == split:
            seen = True
            try:
                yield _record(row, captions, licences, source, images)
            except BadRecord as bad:
                yield bad
    if not seen:
        which = f" of split {split!r}" if split else ""
        raise DatasetImportError(f"{source.address}: holds no images{which}; is it of another format?")


def _captions(source: Place) -> tuple[dict[Any, list[str]], dict[Any, str]]:
    """The captions of each picture, and the names of licences, both by their ids.

    Raises:
        DatasetImportError: if annotations are there, but none is a caption.
    """
    captions: dict[Any, list[str]] = defaultdict(list)
    licences: dict[Any, str] = {}
    others: set[str] = set()
    for key, row in object_rows(source, ("annotations", "licenses")):
        if not isinstance(row, dict):
            continue
        if key == "licenses":
            licences[_hashable(row.get("id"))] = text_of(row.get("name"))
        elif isinstance(row.get("caption"), str):
            captions[_hashable(row.get("image_id"))].append(row["caption"].strip())
        elif not captions:
            others.update(row)
    if others and not captions:
        raise DatasetImportError(
            f"{source.address}: its annotations hold {', '.join(sorted(others))}, no caption; give the file of captions"
        )
    return captions, licences


def _record(
    row: dict[str, Any], captions: dict[Any, list[str]], licences: dict[Any, str], source: Place, images: Place
) -> Record:
    file = text_of(row.get("file_name"))
    if not file:  # Karpathy's
        folder = text_of(row.get("filepath"))
        file = f"{folder}/{text_of(row.get('filename'))}" if folder else text_of(row.get("filename"))
    number = row.get("id", row.get("imgid"))
    name = key_of(number, file or source.name)
    own = row.get("sentences", row.get("captions"))
    try:
        texts = (*captions.get(_hashable(number), ()), *captions_of(own))
    except CaptionError as error:
        raise BadRecord(name, "caption", str(error)) from None
    facts = {
        "url": text_of(row.get("coco_url") or row.get("url")),
        "licence": licences.get(_hashable(row.get("license")), ""),
    }
    return Record(
        key=name,
        pictures=(file,) if file else (),
        **captions_in(name, list(texts)),
        source=source.name,
        facts={key: value for key, value in facts.items() if value} or None,
        base=images,
    )


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else str(value)
