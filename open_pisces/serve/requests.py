"""What clients want of the engine, and what it tells them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.config import PresetName
from open_pisces.data.prompts import generation_turns


@dataclass(frozen=True)
class Request:
    """What one client wants: the assistant's next turn in a conversation."""

    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    mode: Literal["text", "image", "auto"] = "text"
    """Whether the turn is text or a picture; ``auto`` leaves it to the model."""
    to_draw: tuple[Turn, ...] = ()
    """The conversation as it is put when a picture is drawn; none: as ``turns``."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    seed: int = 0
    n: int = 1
    """Pictures."""
    preset: PresetName | None = None
    """Settings that are not given come from it."""
    steps: int | None = None
    guidance_scale: float | None = None
    vector_guidance: float | None = None
    variety: float = 1.0
    """Temperature of a head that samples (`Generator.image`)."""
    previews: int = 0
    """Unfinished states of each picture that are shown on the way."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request."""

    id: str
    kind: Literal["text", "vectors", "step", "preview", "picture", "done", "error"]
    data: dict[str, Any] = field(default_factory=dict)
    image: Image | None = None


ASKS_TO_DRAW = re.compile(
    r"^(?:please\s+)?(?:can you\s+|could you\s+)?(?:draw|paint|generate|create|make)\b(?:\s+me\b)?\s*"
    r"(?:(?:a|an)\s+(?:picture|image|drawing|photo)\s+(?:of|showing|with)\s+|:\s*)?",
    re.IGNORECASE,
)
"""How people begin a request for a picture: what follows is the caption."""


def caption_of(text: str) -> str:
    """What is to be drawn, without the words that ask for it."""
    rest = ASKS_TO_DRAW.sub("", text.strip(), count=1).strip()
    return rest or text.strip()


def asked_to_draw(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A conversation whose last words are put as the model learnt to be asked for a picture."""
    *before, last = turns
    if not all(isinstance(part, str) for part in last.content):
        return turns
    words = "\n".join(str(part) for part in last.content)
    return (*before, *generation_turns(caption_of(words)))
