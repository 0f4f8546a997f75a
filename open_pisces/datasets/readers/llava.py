"""LLaVA-style conversations: a JSON array or JSON lines, their pictures in a folder or written into them.

``{"id", "image": NAME | [NAMES], "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}``, or
``messages`` with ``role`` and ``content``; what turns may be is in ``conversations.py``. The files may be
larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from open_pisces.datasets.readers.conversations import CONVERSATION_FIELDS, IMAGE_FIELDS, conversation, pictures_of
from open_pisces.datasets.readers.json_rows import json_rows
from open_pisces.datasets.records import (
    BadRecord,
    DatasetImportError,
    Options,
    Record,
    choose_field,
    inputs,
    key_of,
    place,
    with_fields,
)


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The conversations of a file, or of all ``.json`` and ``.jsonl`` files of a folder, in order.

    Raises:
        DatasetImportError: no such file, one that is cut short, or no conversations in it.
    """
    for source in inputs(address, ".json", ".jsonl", deep=False):
        images = place(options.images) if options.images else source.parent
        fields, rows = with_fields(json_rows(source))
        image = choose_field(options.image_field, (), fields, source.address)
        image_fields = (image,) if image else IMAGE_FIELDS
        field = choose_field("", CONVERSATION_FIELDS, fields, source.address)
        if fields and not field:
            usual = " or ".join(repr(one) for one in CONVERSATION_FIELDS)
            raise DatasetImportError(f"{source.address}: has no field {usual}; it holds {', '.join(fields)}")
        for number, row in enumerate(rows):
            if isinstance(row, BadRecord):
                yield row
                continue
            name = key_of(row.get("id"), f"{source.name}-{number:08d}")
            try:
                given = pictures_of([row.get(one) for one in image_fields], name)
                turns, pictures = conversation(row.get(field), given, name)
                yield Record(name, pictures, conversation=turns, source=source.name, base=images)
            except BadRecord as bad:
                yield bad
