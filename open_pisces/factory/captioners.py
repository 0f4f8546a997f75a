"""Who writes captions: a model behind an address here; those in the worker's own process in `local_captioners`."""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, NamedTuple, Protocol

from PIL.Image import Image, Resampling

from open_pisces.factory.caption_checks import CaptioningError
from open_pisces.generate.chat_model import ChatModel, ChatModelError, NoReply, RefusedError

PER_PICTURE = (400, 413, 415, 422)
"""Statuses with which an endpoint refuses one picture, and not the run."""
IN_A_ROW = 8
"""Pictures in a row without a caption, each after all its tries, after which an endpoint counts as useless."""


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


def build_captioner(settings: CaptionerSettings) -> Captioner:
    """The captioner, loaded.

    Raises:
        CaptioningError: if it cannot be used; the message says why.
    """
    if settings.kind == "endpoint":
        return EndpointCaptioner(settings)
    # Later: workers that only wait for a server need no PyTorch.
    from open_pisces.factory.local_captioners import OwnModel, VisionLLM

    return VisionLLM(settings) if settings.kind == "transformers" else OwnModel(settings)


def check_captioner(settings: CaptionerSettings) -> None:
    """Find out before any worker starts whether a captioner can be reached.

    Raises:
        CaptioningError: nothing answers at the address, or it does not have the model.
    """
    if settings.kind != "endpoint":
        return
    try:
        found = _chat_model(settings).models()
    except ChatModelError as error:
        raise CaptioningError(str(error)) from None
    if found and settings.model not in found:
        some = ", ".join(sorted(found)[:8])
        raise CaptioningError(f"{settings.url} has no model {settings.model!r}; it names {some}")


# ---------------------------------------------------------------------------------------------------------- endpoint


def _chat_model(settings: CaptionerSettings) -> ChatModel:
    return ChatModel(settings.model, settings.url.rstrip("/"), settings.key_variable, settings.timeout, settings.tries)


class EndpointCaptioner:
    """Any server that speaks OpenAI's chat completions, such as vLLM, SGLang, llama.cpp or a paid one."""

    def __init__(self, settings: CaptionerSettings) -> None:
        self.settings = settings
        self.model = _chat_model(settings)
        self.pool = ThreadPoolExecutor(settings.concurrency)
        self.without = 0
        """Pictures in a row without a caption."""
        self.lock = Lock()

    def write(self, asked: Iterable[Asked]) -> Iterator[Written]:
        """A caption for each picture; ``concurrency`` of them are asked for at once."""
        running: deque[Future[Written]] = deque()
        try:
            for one in asked:
                running.append(self.pool.submit(self._ask, one))
                # Twice as many: one slow answer at the front must not hold the others up.
                if len(running) >= 2 * self.settings.concurrency:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def _ask(self, asked: Asked) -> Written:
        url = f"data:image/jpeg;base64,{base64.b64encode(_as_jpeg(asked.picture, self.settings.max_side)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": asked.prompt}]
        how = self.settings.temperature, self.settings.max_tokens
        try:
            reply = self.model.complete([{"role": "user", "content": content}], *how)
        except RefusedError as error:
            if error.status in PER_PICTURE:
                return self._none("refused by the endpoint", error)
            raise CaptioningError(str(error)) from None
        except NoReply as error:
            return self._none("no reply", error)
        except ChatModelError as error:
            raise CaptioningError(str(error)) from None
        with self.lock:
            self.without = 0
        return Written(reply.text, reply.finished)

    def _none(self, why: str, error: Exception) -> Written:
        """No caption of a picture, if that is the picture's fault.

        Raises:
            CaptioningError: if the endpoint is gone, or gives no captions any more.
        """
        try:
            self.model.models()
        except ChatModelError as gone:
            raise CaptioningError(f"{gone}; run the same command again to go on") from None
        with self.lock:
            self.without += 1
            useless = self.without >= IN_A_ROW
        if useless:
            raise CaptioningError(f"{IN_A_ROW} pictures in a row without a caption ({why}): {error}")
        return Written("", failed=why)


def _as_jpeg(picture: Image, max_side: int) -> bytes:
    buffer = io.BytesIO()
    fitted(picture, max_side).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def fitted(picture: Image, max_side: int) -> Image:
    """A picture whose longer side is at most ``max_side``, unless that is 0."""
    if not max_side or max(picture.size) <= max_side:
        return picture
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Resampling.LANCZOS)
