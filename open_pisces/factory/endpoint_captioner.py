"""The captioner behind an address."""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from PIL.Image import Image

from open_pisces.factory.caption_checks import CaptioningError
from open_pisces.factory.captioners import Asked, CaptionerSettings, Written, fitted
from open_pisces.generate.chat_model import ChatModel, ChatModelError, NoReply, RefusedError

PER_PICTURE = (400, 413, 415, 422)
"""Statuses with which an endpoint refuses one picture, and not the run."""
IN_A_ROW = 8
"""Pictures in a row without a caption, each after all its tries, after which an endpoint counts as useless."""


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
