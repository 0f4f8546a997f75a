"""Conversations of others as `Sample` has them: LLaVA's ``from`` / ``value``, and the ``role`` / ``content`` form.

A turn's content is a text, in which ``<image>`` stands for the next picture, or a list of parts: ``{"type": "text",
"text"}``, ``{"type": "image"}`` for the next picture, ``{"type": "image_url", "image_url": {"url"}}`` for one of its
own. Turns of one speaker that follow each other are one turn. Pictures that no turn places stand at the head of the
user's first turn, which is LLaVA's own rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from open_pisces.datasets.records import BadRecord

PLACEHOLDER = "<image>"
IMAGE_FIELDS = ("image", "images")
CONVERSATION_FIELDS = ("conversations", "conversation", "messages")
_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model"), "assistant"),
}
_SOURCES = ("image_url", "image", "url", "path")  # where a part may say which picture it is

Picture = bytes | str
Content = list[str | dict[str, int]]


def pictures_of(cells: Iterable[Any], name: str) -> tuple[Picture, ...]:
    """The pictures of the first field that has any: files, names, data URIs; none for a sample of text alone.

    Args:
        cells: the values of fields: a picture, ``{"bytes", "path"}``, or a list of these; None, "" and [] are none.
        name: the record's.

    Raises:
        BadRecord: "missing image" for anything else, or for a list with gaps.
    """
    for cell in cells:
        several = cell if isinstance(cell, list) else [cell]
        found = [_picture(one) for one in several]
        if all(one is None or one == "" for one in found):  # the empty value of a field that other records use
            continue
        if not all(isinstance(one, bytes | str) and one != "" for one in found):
            raise BadRecord(name, "missing image", f"{str(cell)[:80]} names no file")
        return tuple(found)
    return ()


def _picture(value: Any) -> Any:
    """A picture's file or name, out of the object it may stand in."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path") or value.get("url")


def conversation(
    turns: Any, pictures: tuple[Picture, ...], name: str
) -> tuple[tuple[dict[str, Any], ...], tuple[Picture, ...]]:
    """A conversation as `Sample` has it, and its pictures: those given, then those its parts bring along.

    Raises:
        BadRecord: "no text" for a missing or empty turn; "turns" if they do not alternate from user to assistant,
            after at most one system turn; "placeholders" if there are more or fewer than pictures, or one in an
            answer.
    """
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        # A table's column of structs that is kept as a struct of columns.
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns:
        raise BadRecord(name, "no text")
    places = _Places(pictures, name)
    out = list[dict[str, Any]]()
    for number, turn in enumerate(turns, 1):
        role = _role(turn, number, name)
        content = _content(turn, role, number, places)
        if out and out[-1]["role"] == role:
            out[-1]["content"] = _joined(out[-1]["content"], content)
        elif content:  # an empty system turn says nothing
            out.append({"role": role, "content": content})
    _check_order(out, name)
    places.finish(out)
    return tuple(out), places.pictures


class _Places:
    """Which picture each place of a conversation shows."""

    def __init__(self, given: tuple[Picture, ...], name: str) -> None:
        self.name = name
        self._given = given
        self._next = 0
        self._own: list[Picture] = []

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*self._given, *self._own)

    def next(self) -> dict[str, int]:
        """The next of the pictures given."""
        self._next += 1
        return {"image": self._next - 1}

    def own(self, picture: Picture) -> dict[str, int]:
        """A picture that a part brings along; it may be the next of those given."""
        if picture in self._given[self._next : self._next + 1]:
            return self.next()
        self._own.append(picture)
        return {"image": len(self._given) + len(self._own) - 1}

    def finish(self, turns: list[dict[str, Any]]) -> None:
        """Compare places with pictures, and put those without any place at the head."""
        if self._given and not self._next and not self._own:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = [*(self.next() for _ in self._given), *first["content"]]
        if self._next != len(self._given):
            raise BadRecord(self.name, "placeholders", f"{self._next} for {len(self._given)} pictures")


def _role(turn: Any, number: int, name: str) -> str:
    said = turn.get("from") or turn.get("role") if isinstance(turn, dict) else None
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise BadRecord(name, "turns", f"turn {number} is of {said!r}, not of user, assistant or system")
    return role


def _check_order(turns: list[dict[str, Any]], name: str) -> None:
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    for number, turn in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise BadRecord(name, "turns", f"a turn of {turn['role']} where {expected} should speak")
    if len(spoken) % 2 or not spoken:
        raise BadRecord(name, "turns", "the last turn has no answer")


def _content(turn: dict[str, Any], role: str, number: int, places: _Places) -> Content:
    """The parts of a turn."""
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    parts = [{"text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise BadRecord(places.name, "no text", f"turn {number} is empty")
    content: Content = []
    for part in parts:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, dict):
            raise BadRecord(places.name, "no text", f"turn {number} holds {str(part)[:40]!r}")
        content += _part(part, places)
    if not content and role != "system":
        raise BadRecord(places.name, "no text", f"turn {number} is empty")
    if role != "user" and any(isinstance(part, dict) for part in content):
        where = "answer" if role == "assistant" else "system turn"
        raise BadRecord(places.name, "placeholders", f"one in the {where}, turn {number}")
    return content


def _part(part: dict[str, Any], places: _Places) -> Content:
    """One part: a text with its placeholders, or a picture."""
    kind = str(part.get("type") or ("text" if isinstance(part.get("text"), str) else "image"))
    if kind == "text":
        return _with_places(str(part.get("text") or ""), places)
    if kind not in ("image", "image_url", "input_image"):
        raise BadRecord(places.name, "part", f"a part of type {kind!r}")
    found = pictures_of([part.get(key) for key in _SOURCES], places.name)
    return [places.own(picture) for picture in found] or [places.next()]


def _with_places(text: str, places: _Places) -> Content:
    """A text and the pictures in it; line breaks that only set a picture apart are dropped."""
    content: Content = []
    for number, piece in enumerate(text.strip().split(PLACEHOLDER)):
        if number:
            content.append(places.next())
        if piece.strip():
            content.append(piece.strip("\r\n"))
    return content


def _joined(before: Content, after: Content) -> Content:
    """Two turns of one speaker as one; texts that meet are set apart by a line break."""
    if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
        return [*before[:-1], f"{before[-1]}\n{after[0]}", *after[1:]]
    return [*before, *after]
