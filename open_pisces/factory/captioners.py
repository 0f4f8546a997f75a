"""What captioners have in common: what they are asked, what they write, and their settings.

Those behind an address are in `endpoint_captioner`, those in the worker's own process in `local_captioners`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from PIL.Image import Image, Resampling


class Asked(NamedTuple):
    """A picture and what is asked about it."""

    picture: Image
    prompt: str


class Written(NamedTuple):
    """What a captioner made of a picture."""

    text: str
    finished: bool = True
    failed: str = ""
    """Why there is none: ``refused by the endpoint`` or ``no reply``."""


class Captioner(Protocol):
    """Writes captions, in the order of the pictures; takes no more of them at a time than it works on."""

    def write(self, asked: Iterable[Asked]) -> Iterator[Written]:
        """A caption for each picture.

        Raises:
            CaptioningError: if it cannot go on at all.
        """


@dataclass(frozen=True)
class CaptionerSettings:
    """Which captioner.

    Args:
        kind: ``endpoint`` speaks OpenAI's chat completions, ``transformers`` is any image-text-to-text model of that
            library, ``pisces`` a model folder of ours.
        model: its name at the endpoint, or its folder or hub name.
        max_tokens: the longest caption.
        temperature: 0 takes the likeliest words.
        max_side: longer sides of pictures are made so long before they are sent; 0 sends them as they are.
        url: of an endpoint, up to ``/chat/completions``.
        key_variable: environment variable with the endpoint's key.
        timeout: seconds for one request.
        tries: requests for one caption.
        concurrency: requests at once, of each worker.
        batch_size: pictures at once, of a model in this process.
        device: of a model in this process.
    """

    kind: Literal["endpoint", "transformers", "pisces"]
    model: str
    max_tokens: int = 300
    temperature: float = 0.0
    max_side: int = 1024
    url: str = "http://127.0.0.1:8000/v1"
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 8
    concurrency: int = 16
    batch_size: int = 8
    device: str = "auto"

    def as_settings(self) -> dict[str, Any]:
        """What captions depend on; the rest may change between two runs of one captioning."""
        names = ("kind", "model", "max_tokens", "temperature", "max_side")
        return {name: getattr(self, name) for name in names}


def fitted(picture: Image, max_side: int) -> Image:
    """A picture whose longer side is at most ``max_side``, unless that is 0."""
    if not max_side or max(picture.size) <= max_side:
        return picture
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Resampling.LANCZOS)
