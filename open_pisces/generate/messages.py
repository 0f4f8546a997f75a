"""Requests of evaluation harnesses as conversations of this package: pictures and words in the order they came."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.data.images import open_image
from open_pisces.errors import PiscesError

_PICTURE = ("value", "image", "url", "path")
"""Keys under which a picture may stand: VLMEvalKit's, transformers', lmms-eval's."""


class HarnessError(PiscesError):
    """A request of a harness that cannot be served; the message names it and the remedy."""


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the user's, and the pictures that they name by index."""

    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()


def read_messages(messages: Iterable[Mapping[str, Any]]) -> Conversation:
    """Messages ``{"role", "content"}`` of lmms-eval, VLMEvalKit and transformers.

    A message's content is a string or a list of ``{"type": "text" | "image", ...}``, whose value stands under
    ``text``, ``url``, ``image`` or ``path``, or under ``value`` (VLMEvalKit). Neighbouring texts become lines of one.
    Pisces learns no system turns, so a system message opens the user's turn that follows.

    Raises:
        HarnessError: for videos, sounds, unknown roles, and conversations that do not end with the user.
        ImageError: for a picture that cannot be read.
    """
    images: list[Image] = []
    turns: list[tuple[str, list[str | int]]] = []
    for message in messages:
        role = _role(message["role"])
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        content = message["content"]
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            _add(item, role, turns[-1][1], images)
    if not turns or turns[-1][0] != "user":
        raise HarnessError(f"{len(turns)} turns that do not end with the user's: the model has nothing to answer")
    return Conversation(tuple(Turn(role, tuple(parts)) for role, parts in turns), tuple(images))


def _role(role: str) -> str:
    if role not in ("system", "user", "assistant"):
        raise HarnessError(f"a message of the role {role!r}: this model knows system, user and assistant")
    return "assistant" if role == "assistant" else "user"


def _add(item: Mapping[str, Any], role: str, parts: list[str | int], images: list[Image]) -> None:
    """Append one item of a message's content."""
    kind = item["type"]
    if kind == "text":
        add_text(parts, item["value"] if "value" in item else item["text"])
    elif kind == "image" and role == "user":
        parts.append(len(images))
        images.append(as_image(next(item[key] for key in _PICTURE if key in item)))
    else:
        raise HarnessError(f"a message of the {role} holds a {kind}: this model takes text, and pictures of the user")


def add_text(parts: list[str | int], text: str) -> None:
    """The words without the blanks around them: in training nothing stands between a picture and the words."""
    text = text.strip()
    if text and parts and isinstance(parts[-1], str):
        parts[-1] += f"\n{text}"
    elif text:
        parts.append(text)


def as_image(visual: Any) -> Image:
    """A picture as RGB, what is transparent on white, from a path or from what a dataset decoded.

    Raises:
        HarnessError: for anything else, such as frames of a video.
        ImageError: for a file that cannot be read.
    """
    if isinstance(visual, str | Path):
        return open_image(visual)
    if not isinstance(visual, Image):
        raise HarnessError(f"a visual of type {type(visual).__name__}: this model takes pictures and paths of pictures")
    if visual.has_transparency_data or visual.mode.startswith("I;16"):  # `convert` would make it black, or clip it
        buffer = io.BytesIO()
        visual.save(buffer, "PNG")
        return open_image(buffer.getvalue())
    return visual.convert("RGB")
