"""LLaVA-style conversations: a JSON array or JSON lines, their pictures in a folder.

``{"id", "image": NAME | [NAMES], "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}``; without
pictures ``image`` may be missing. The files may be larger than memory: an array is cut into its elements while it is
read. Cambrian and LLaVA-OneVision tables hold conversations of the same form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from open_pisces.data.importing import (
    BadRecord,
    DatasetImportError,
    Options,
    Place,
    Record,
    choose_field,
    inputs,
    is_text,
    key_of,
    place,
    with_fields,
)

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_FIELDS = ("image", "images")
CONVERSATION_FIELDS = ("conversations", "conversation")
_CHUNK, _LARGEST = 1 << 20, 64 << 20  # characters read at a time; of one element, beyond which its brackets are wrong
_BETWEEN = ", \t\r\n"
_OUTSIDE, _INSIDE = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')  # what matters outside and inside a JSON string

Row = dict[str, Any]


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The conversations of a file, or of all ``.json`` and ``.jsonl`` files of a folder, in order.

    Raises:
        DatasetImportError: no such file, one that is cut short, or no conversations in it.
    """
    for source in inputs(address, ".json", ".jsonl", deep=False):
        images = place(options.images) if options.images else source.parent
        fields, rows = with_fields(json_rows(source))
        image = choose_field(options.image_field, (), fields, source.address)
        field = choose_field("", CONVERSATION_FIELDS, fields, source.address)
        if fields and not field:
            raise DatasetImportError(f"{source.address}: has no field 'conversations'; it holds {', '.join(fields)}")
        for number, row in enumerate(rows):
            if isinstance(row, BadRecord):
                yield row
                continue
            name = key_of(row.get("id"), f"{source.name}-{number:08d}")
            try:
                pictures = _names(row, (image,) if image else IMAGE_FIELDS, name)
                turns = conversation_of(row.get(field), len(pictures), name)
                yield Record(name, pictures, conversation=turns, source=source.name, base=images)
            except BadRecord as bad:
                yield bad


def _names(row: Row, fields: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The names of a row's pictures; a row of text alone has none."""
    value: Any = next((row[field] for field in fields if row.get(field) is not None), [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
        raise BadRecord(name, "missing image", f"{value!r} names no file")
    return tuple(names)


def conversation_of(turns: Any, pictures: int, name: str) -> tuple[dict[str, Any], ...]:
    """A conversation as `Sample` has it: each ``<image>`` of a user's turn becomes the next picture, in its place.

    Raises:
        BadRecord: "no text" for a missing or empty turn, "turns" if they do not alternate from user to assistant,
            "placeholders" if there are more or fewer than pictures, or one in an answer.
    """
    if isinstance(turns, dict) and all(
        isinstance(column, list) for column in turns.values()
    ):  # a table's column of structs that is kept as a struct of columns
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns:
        raise BadRecord(name, "no text")
    found, out = 0, list[dict[str, Any]]()
    for number, turn in enumerate(turns):
        role, value = (ROLES.get(str(turn.get("from"))), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role != ("user", "assistant")[number % 2]:
            raise BadRecord(name, "turns", f"turn {number + 1} is not the {('user', 'assistant')[number % 2]}'s")
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(name, "no text", f"turn {number + 1} is empty")
        if role == "assistant" and PLACEHOLDER in value:
            raise BadRecord(name, "placeholders", f"one in the answer, turn {number + 1}")
        content = _content(value, found)
        found += sum(isinstance(part, dict) for part in content)
        out.append({"role": role, "content": content})
    if len(out) % 2:
        raise BadRecord(name, "turns", "the last turn has no answer")
    if found != pictures:
        raise BadRecord(name, "placeholders", f"{found} for {pictures} pictures")
    return tuple(out)


def _content(value: str, first: int) -> list[str | dict[str, int]]:
    """The parts of a turn; line breaks that only set a picture apart are dropped."""
    content: list[str | dict[str, int]] = []
    for number, text in enumerate(value.strip().split(PLACEHOLDER)):
        if number:
            content.append({"image": first + number - 1})
        if text.strip():
            content.append(text.strip("\r\n"))
    return content


# --------------------------------------------------------------------------------------------------------- JSON


def json_rows(source: Place) -> Iterator[Row | BadRecord]:
    """The objects of a JSON array or of JSON lines, one at a time.

    Raises:
        DatasetImportError: if an array is cut short.
    """
    with source.open_text() as file:
        start = file.read(_CHUNK).removeprefix("\ufeff")
        chunks = chain([start], iter(lambda: file.read(_CHUNK), ""))
        pieces = _elements(chunks, source.address) if start.lstrip()[:1] == "[" else _lines(chunks)
        for number, piece in enumerate(pieces, 1):
            if piece.strip():
                yield _row(piece, f"{source.file}:{number}")


def _row(piece: str, name: str) -> Row | BadRecord:
    if not is_text(piece):
        return BadRecord(name, "not UTF-8")
    try:
        row = json.loads(piece)
    except (ValueError, RecursionError) as error:
        return BadRecord(name, "row", str(error))
    return row if isinstance(row, dict) else BadRecord(name, "row", "no JSON object")


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    kept: list[str] = []
    for chunk in chunks:
        *whole, last = chunk.split("\n")
        for line in whole:
            yield "".join((*kept, line))
            kept = []
        kept.append(last)
    yield "".join(kept)


def _elements(chunks: Iterator[str], address: str) -> Iterator[str]:
    """The elements of a JSON array, cut out by counting brackets, so that a broken one spoils only itself."""
    text, at, start, depth, quoted = "", 0, 0, 0, False
    for chunk in chunks:
        text, at, start = text[start:] + chunk, at - start, 0
        if len(text) > _LARGEST:
            raise DatasetImportError(f"{address}: an element that does not end, at {text[:80]!r}; mend its brackets")
        while found := (_INSIDE if quoted else _OUTSIDE).search(text, at):
            mark, at = found[0], found.end()
            if mark == "\\":
                if at == len(text):  # what it escapes is in the next chunk
                    at -= 1
                    break
                at += 1
            elif mark == '"':
                quoted = not quoted
            elif mark in "{[":
                depth += 1
                if depth == 2 and (stray := text[start : at - 1].strip(_BETWEEN)):  # an element that is no object
                    yield stray
                start = at - (depth == 2) if depth <= 2 else start
            else:
                depth -= 1
                if depth <= 1:
                    if piece := text[start : at - (depth == 0)].strip(_BETWEEN):
                        yield piece
                    start = at
                if depth == 0:
                    return
        else:
            at = len(text)
    raise DatasetImportError(f"{address}: the JSON array does not end; get a whole copy")
