"""Parquet tables: pictures inside them or named by them, with captions or conversations.

A picture's cell is bytes, ``{"bytes", "path"}``, a file's name, or a list of these. Which column is what is chosen
once, by the names below; PixelProse, Cambrian and LLaVA-OneVision tables have their own. Files are read some rows at a
time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from open_pisces.batch import LIST_FIELDS
from open_pisces.datasets.readers import llava
from open_pisces.datasets.readers.conversations import CONVERSATION_FIELDS, IMAGE_FIELDS, conversation, pictures_of
from open_pisces.datasets.records import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    captions_in,
    choose_field,
    inputs,
    key_of,
    place,
    text_of,
)

ROWS = 16
"""Rows held at a time; those of picture tables may weigh megabytes each."""
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "parquet": {
        "key": ("id", "uid", "key", "__key__", "image_id", "sample_id"),
        "image": ("image", "images", "img", "jpg", "png", "webp", "jpeg", "image_path", "file_name", "path"),
        "caption": ("caption", "short", "short_caption", "text", "txt", "original_caption", "alt_text", *LIST_FIELDS),
        "detailed": ("detailed", "detailed_caption", "long_caption", "vlm_caption", "recaption"),
        "conversation": CONVERSATION_FIELDS,
        "source": ("data_source",),
        "url": ("url",),
        "licence": ("licence", "license"),
    },
    "pixelprose": {
        "key": ("uid", "key"),
        "file": ("uid", "key"),
        "caption": ("original_caption",),
        "detailed": ("vlm_caption",),
        "url": ("url",),
    },
    "cambrian": {
        "key": ("id",),
        "image": IMAGE_FIELDS,
        "conversation": CONVERSATION_FIELDS,
        "source": ("source",),
    },
    "onevision": {
        "key": ("id",),
        "image": IMAGE_FIELDS,
        "conversation": CONVERSATION_FIELDS,
        "source": ("data_source",),
    },
}
LEAD = re.compile(r"\A\s*This image displays:\s*")
"""How the detailed captions of PixelProse begin."""
ENDINGS = (".jpg", ".png", ".webp", ".jpeg")


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The rows of a parquet file, or of all of a folder or pattern, in order; Cambrian's also from JSON.

    Raises:
        DatasetImportError: no such file, one that is damaged, or columns that are not there.
    """
    start = place(address)
    if options.format == "cambrian" and not (start.file.endswith(".parquet") or start.files(".parquet")):
        yield from llava.records(address, options)
        return
    for source in inputs(address, ".parquet"):
        base = place(options.images) if options.images else source.parent
        yield from table_records(source, options, base)


def table_records(source: Place, options: Options, base: Place) -> Iterator[Record | BadRecord]:
    """The rows of one parquet file; ``base`` is where pictures that are only named lie.

    Raises:
        DatasetImportError: if it is damaged, or lacks columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # In pieces, or each column of a row group, which may hold every picture of the file, would be read at once.
        with source.open() as raw, pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False) as table:
            columns = Columns(table.schema_arrow.names, options, source.address)
            for batch in table.iter_batches(ROWS, columns=columns.used, use_threads=False):
                yield from columns.records(batch, base)
    except (pa.ArrowException, OSError) as error:
        raise DatasetImportError(
            f"{source.address}: cut short, damaged or no parquet ({error}); get a whole copy"
        ) from None


@dataclass
class Columns:
    """Which column of a table is what.

    Raises:
        DatasetImportError: a column asked for that is not there, or none for texts or pictures, naming those found.
    """

    found: list[str]
    options: Options
    where: str
    names: dict[str, str] = field(init=False)
    row: int = 0

    def __post_init__(self) -> None:
        asked = {role: getattr(self.options, f"{role}_field") for role in ("caption", "detailed", "image")}
        self.layout = LAYOUTS.get(self.options.format, LAYOUTS["parquet"])
        roles = dict.fromkeys((*self.layout, *(role for role, name in asked.items() if name)))
        chosen = {r: choose_field(asked.get(r, ""), self.layout.get(r, ()), self.found, self.where) for r in roles}
        self.names = {role: name for role, name in chosen.items() if name}
        texts = self.names.keys() & {"caption", "detailed", "conversation"}
        if not texts or not self.names.keys() & {"image", "file", "conversation"}:
            what = "the picture (image_field)" if texts else "a caption (caption_field)"
            raise DatasetImportError(f"{self.where}: say which column holds {what}: {', '.join(self.found)}")

    @property
    def used(self) -> list[str]:
        """The columns to read."""
        used = {*self.names.values(), *self._file_names}
        return [name for name in self.found if name in used]

    @property
    def _file_names(self) -> list[str]:
        """Columns that may hold the name of the picture's file without its ending."""
        return [name for name in self.layout.get("file", ()) if name in self.found and "image" not in self.names]

    def records(self, batch: Any, base: Place) -> Iterator[Record | BadRecord]:
        """The rows of an Arrow record batch."""
        for row in range(batch.num_rows):
            name = f"{PurePosixPath(self.where).stem}-{self.row:08d}"
            self.row += 1
            try:
                yield self._record(_cells(batch, row, name), name, base)
            except BadRecord as bad:
                yield bad

    def _record(self, row: dict[str, Any], name: str, base: Place) -> Record:
        cells = {role: row[column] for role, column in self.names.items()}
        name = key_of(cells.get("key"), name)
        pictures = pictures_of([cells.get("image")], name)
        if self._file_names:
            pictures = (_file_of(base, [key_of(row[c], "") for c in self._file_names if row[c]], name),)
        captions = captions_in(name, cells.get("caption"), cells.get("detailed"))
        turns: tuple[dict[str, Any], ...] = ()
        if cells.get("conversation") is not None:
            turns, pictures = conversation(cells["conversation"], pictures, name)
        return Record(
            key=name,
            pictures=pictures,
            **{**captions, "detailed": LEAD.sub("", captions["detailed"], count=1)},
            conversation=turns,
            source=text_of(cells.get("source")),
            facts={role: cells[role] for role in ("url", "licence") if text_of(cells.get(role))} or None,
            base=base,
        )


def _cells(batch: Any, row: int, name: str) -> dict[str, Any]:
    """A row as Python values, cell by cell: one text that is no UTF-8 must not take its neighbours along."""
    try:
        return {column: batch.column(number)[row].as_py() for number, column in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        raise BadRecord(name, "not UTF-8") from None


def _file_of(base: Place, stems: list[str], name: str) -> str:
    """The file that one of these names, in the folder or in one of img2dataset's (the first five digits)."""
    for stem in stems:
        for path in (stem, f"{stem[:5]}/{stem}"):
            for ending in ENDINGS:
                if base.system.isfile(base.at(f"{path}{ending}").root):
                    return f"{path}{ending}"
    raise BadRecord(name, "missing image", f"no {' or '.join(stems)} with {' or '.join(ENDINGS)}")
