"""JSON files of any size, one object at a time: arrays, lines, and the arrays inside one object.

Files may be larger than memory. A broken element of an array or a broken line spoils only itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Any

from open_pisces.datasets.records import BadRecord, DatasetImportError, Place, is_text

_CHUNK = 1 << 20  # characters read at a time
_LARGEST = 256 << 20  # characters of one element, beyond which its brackets are wrong
_BETWEEN = ", \t\r\n"
_OUTSIDE = re.compile(r'["{}\[\]]')  # what matters outside a JSON string ...
_INSIDE = re.compile(r'["\\]')  # ... and inside one
_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR_END = 16  # characters of the longest sign: an escape or a number's exponent

Row = dict[str, Any]


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
    text = ""
    at = 0
    start = 0
    depth = 0
    quoted = False
    for chunk in chunks:
        text = text[start:] + chunk
        at -= start
        start = 0
        if len(text) > _LARGEST:
            raise DatasetImportError(f"{address}: an element that does not end, at {text[:80]!r}; mend its brackets")
        while found := (_INSIDE if quoted else _OUTSIDE).search(text, at):
            mark = found[0]
            at = found.end()
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


# ------------------------------------------------------------------------------------- arrays inside one object


class _Window:
    """The part of a text that is being read; it grows when a value reaches past its end."""

    def __init__(self, chunks: Iterator[str], address: str) -> None:
        self._chunks = chunks
        self._address = address
        self._decoder = json.JSONDecoder()
        self.text = ""
        self.at = 0

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches nothing as well
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def take(self, *allowed: str) -> str:
        """The next character, which is one of some."""
        found = self.peek()
        if found not in allowed or not found:
            raise self._error(f"{found or 'the end'} where one of {' '.join(allowed)} should be")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self._error(str(error)) from None
            except json.JSONDecodeError as error:
                # A value that is only cut fails at the end, or inside a string.
                is_cut = error.pos > len(self.text) - _NEAR_END or error.msg.startswith("Unterminated")
                if not (is_cut and self._grow()):
                    raise self._error(error.msg) from None
                continue
            if end < len(self.text) or not self._grow():  # a number at the end may go on in the next chunk
                self.at = end
                return value

    def _grow(self) -> bool:
        kept = self.text[self.at :]
        chunk = "".join(islice(self._chunks, 1 + len(kept) // _CHUNK))  # as much again: a long value is retried seldom
        self.text = kept + chunk
        self.at = 0
        if len(self.text) > _LARGEST:
            raise self._error("a value that does not end")
        return bool(chunk)

    def _error(self, why: str) -> DatasetImportError:
        why = why.encode(errors="replace").decode()
        return DatasetImportError(f"{self._address}: cut short or no JSON ({why}); get a whole copy")


def object_rows(source: Place, keys: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(key, element) of the arrays under some keys of a file's one object, in the order of the file.

    Raises:
        DatasetImportError: if the file is cut short or no object.
    """
    with source.open_text() as file:
        window = _Window(iter(lambda: file.read(_CHUNK), ""), source.address)
        if window.peek() == "\ufeff":
            window.at += 1
        window.take("{")
        mark = window.peek()
        while mark != "}":
            key = window.value()
            window.take(":")
            if key in keys and window.peek() == "[":
                for element in _array(window):
                    yield key, element
            else:
                window.value()
            mark = window.take(",", "}")


def _array(window: _Window) -> Iterator[Any]:
    window.take("[")
    if window.peek() == "]":
        window.take("]")
        return
    mark = ","
    while mark == ",":
        yield window.value()
        mark = window.take(",", "]")
