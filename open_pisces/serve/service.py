"""What the routes share: pictures in, requests to the worker, limits, counts."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from open_pisces.generate.messages import add_text
from open_pisces.serve.decoding import PictureError, PictureReader
from open_pisces.serve.errors import ApiError
from open_pisces.serve.fetching import FetchError, fetch, read_data_url
from open_pisces.serve.schemas import MOST_PICTURES, ChatMessage, Part
from open_pisces.serve.supervisor import Supervisor, Told, Unavailable

Result = TypeVar("Result")
Picture = tuple[tuple[int, int], bytes]
"""Size and RGB pixels."""
LARGEST_SIDE = 2048
LOADING = "the model is being loaded: try again in a moment"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class ServeSettings:
    """How a server runs; ``pisces serve --help`` says what each means."""

    model: str
    name: str = "pisces"
    device: str = "auto"
    threads: int | None = None
    slots: int = 8
    context: int | None = None
    int8: bool = False
    prefix_bytes: int = 256 << 20
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    origins: tuple[str, ...] = ()
    fetch: tuple[str, ...] = ()
    max_queue: int = 64
    max_body: int = 32 << 20
    max_picture: int = 16 << 20
    patience: float = 120.0
    drain: float = 30.0


@dataclass(frozen=True)
class Conversation:
    """Turns as the worker takes them, and their pictures."""

    turns: list[tuple[str, list[str | int]]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


class Service:
    """A worker, a picture reader, and a door that closes when too many wait."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        engine: dict[str, Any] = {"model": settings.model, "device": settings.device, "slots": settings.slots}
        engine["prefix_bytes"] = settings.prefix_bytes
        more = {"context": settings.context, "threads": settings.threads, "int8": settings.int8}
        engine |= {name: value for name, value in more.items() if value}
        self.supervisor = Supervisor(engine, settings.patience)
        self.reader = PictureReader()
        self.created = int(time.time())
        self.pending = 0
        """Requests that were taken and are not finished."""
        self.draining = False
        self.mean_seconds = 1.0
        """Of a request, a running mean: how long a client that is sent away should wait."""
        self.counts = Counts()

    async def start(self) -> None:
        """Load the model.

        Raises:
            ServerError: if it cannot be loaded.
        """
        if self.supervisor.task is None:
            await self.supervisor.start()

    async def stop(self) -> None:
        """Take nothing new, finish what was begun, end the processes."""
        self.draining = True
        until = time.monotonic() + self.settings.drain
        while self.pending and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await self.supervisor.stop()
        await self.reader.close()

    @property
    def healthy(self) -> bool:
        """Whether a request would be served now."""
        return self.supervisor.ready and not self.draining

    def about(self) -> dict[str, Any]:
        """What the worker says about its model.

        Raises:
            ApiError: while no worker has been ready yet.
        """
        if not self.supervisor.about:
            raise ApiError(503, LOADING, headers={"retry-after": "2"})
        return self.supervisor.about

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name."""
        if name not in (None, "", self.settings.name):
            raise ApiError(
                404, f"no model {name!r} here: this server has {self.settings.name!r}", "model", "model_not_found"
            )

    # ------------------------------------------------------------------------------------------------- requests

    async def ask(
        self,
        conversation: Conversation,
        mode: str,
        settings: dict[str, Any],
        written: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Told]:
        """Hand a conversation to the worker; yields its events up to ``done``.

        Args:
            conversation: ends with the user's turn.
            mode: ``text``, ``image`` or ``auto``.
            settings: of `requests.Request`.
            written: how pictures are written: ``kind``, ``quality``, ``side``.

        Raises:
            ApiError: 429 if too many wait, 503 without a worker, 400 for what the model cannot do.
        """
        self._admit()
        message: dict[str, Any] = {
            "turns": conversation.turns,
            "mode": mode,
            "settings": settings,
            "format": written or {},
        }
        message["sizes"] = [size for size, _ in conversation.pictures]
        began = time.monotonic()
        self.pending += 1
        self.counts.in_flight.set(self.pending)
        try:
            async with aclosing(self.supervisor.ask(message, [raw for _, raw in conversation.pictures])) as told:
                async for event in told:
                    self._count(event, time.monotonic() - began)
                    yield event
        except Unavailable:
            raise ApiError(503, LOADING, headers={"retry-after": "2"}) from None
        finally:
            self.pending -= 1
            self.counts.in_flight.set(self.pending)

    def _admit(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "10"})
        if self.pending >= self.settings.max_queue:
            seconds = max(1, math.ceil(self.mean_seconds * self.pending / self.settings.slots))
            raise ApiError(
                429,
                f"{self.pending} requests are waiting or being served, as many as are taken: try again later",
                code="queue_full",
                headers={"retry-after": str(min(seconds, 600))},
            )

    def _count(self, event: Told, seconds: float) -> None:
        """Count an event; an error is raised as what the client is told."""
        message, _ = event
        kind = message["kind"]
        if kind == "done":
            self.mean_seconds += 0.1 * (seconds - self.mean_seconds)
            self.counts.seconds.observe(seconds)
            self.counts.prompt_tokens.inc(message["prompt"])
            self.counts.cached_tokens.inc(message["known"])
            self.counts.new_tokens.inc(message["new"])
        elif kind == "picture":
            self.counts.pictures.inc()
        elif kind == "error" and message.get("bad_input"):
            raise ApiError(400, message["message"])
        elif kind == "error":
            raise ApiError(503 if message.get("died") else 500, message["message"])

    # ------------------------------------------------------------------------------------------------- pictures

    async def conversation(self, messages: Sequence[ChatMessage]) -> Conversation:
        """The turns and pictures of messages; neighbours of one role become one turn.

        Raises:
            ApiError: for a conversation that does not end with the user, or a picture that cannot be taken.
        """
        found = Conversation()
        for number, message in enumerate(messages):
            role = "system" if message.role == "developer" else message.role
            if role == "system" and found.turns and found.turns[-1][0] != "system":
                role = "user"  # later instructions stand with what the user says next
            if not found.turns or found.turns[-1][0] != role:
                found.turns.append((role, []))
            await self._add(message, number, role, found)
        if not found.turns or found.turns[-1][0] != "user" or not found.turns[-1][1]:
            raise ApiError(400, "the last message must be the user's, and say something", "messages")
        found.turns[:] = [turn for turn in found.turns if turn[1]]
        return found

    async def _add(self, message: ChatMessage, number: int, role: str, found: Conversation) -> None:
        parts = found.turns[-1][1]
        content = message.content
        listed = [Part(type="text", text=content)] if isinstance(content, str) else list(content or [])
        if not any(part.image_url for part in listed):
            listed += message.images or []
        for part in listed:
            if part.text is not None and part.image_url is None:
                add_text(parts, part.text)
                continue
            if role == "system":
                raise ApiError(400, "a system message holds text only", f"messages[{number}].content")
            if len(found.pictures) == MOST_PICTURES:
                raise ApiError(400, f"more than {MOST_PICTURES} pictures in one conversation", "messages")
            parts.append(len(found.pictures))
            found.pictures.append(await self.picture(part.url, f"messages[{number}].content"))

    async def picture(self, url: str, param: str) -> Picture:
        """The pixels of a picture at a data URL, or at an address on the allow-list.

        Raises:
            ApiError: naming what is wrong with it.
        """
        most = self.settings.max_picture
        try:
            if url[:5].lower() == "data:":
                raw = read_data_url(url[5:], most)
            else:
                raw = await asyncio.to_thread(fetch, url, self.settings.fetch, most)
        except FetchError as error:
            raise ApiError(400, str(error), param, "invalid_image") from None
        return await self.read_picture(raw, param)

    async def read_picture(self, raw: bytes, param: str) -> Picture:
        """The pixels of a picture's file.

        Raises:
            ApiError: naming what is wrong with it.
        """
        try:
            return await self.reader.read(raw)
        except PictureError as error:
            raise ApiError(400, str(error), param, "invalid_image") from None


def side_of(size: str | None, native: int) -> dict[str, Any]:
    """The side that pictures are enlarged or reduced to; nothing for the model's own.

    Raises:
        ApiError: for a size that is not square, or out of range.
    """
    if size is None or size == "auto":
        return {}
    width, height = (int(number) for number in size.split("x"))
    if width != height or not 16 <= width <= LARGEST_SIDE:
        remedy = f"this model draws squares of {native}x{native}, which are scaled to squares of 16 to {LARGEST_SIDE}"
        raise ApiError(400, f"size {size!r}: {remedy}", "size", "invalid_size")
    return {} if width == native else {"side": width}


async def unless_gone(request: Any, answer: Awaitable[Result]) -> Result:
    """The answer, whose making is cancelled when the client goes away."""
    making = asyncio.ensure_future(answer)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        making.cancel()

    watching = asyncio.ensure_future(gone())
    try:
        return await making
    finally:
        watching.cancel()
        making.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


class Counts:
    """Numbers for Prometheus, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to: Any = {"registry": self.registry}
        self.answers = Counter("pisces_http_answers", "HTTP answers by route and status", ["route", "status"], **to)
        self.pictures = Counter("pisces_pictures", "Pictures drawn", **to)
        self.prompt_tokens = Counter("pisces_prompt_tokens", "Tokens of prompts", **to)
        self.cached_tokens = Counter("pisces_cached_tokens", "Tokens of prompts that were read before", **to)
        self.new_tokens = Counter("pisces_new_tokens", "Tokens and vectors written", **to)
        self.in_flight = Gauge("pisces_requests_in_flight", "Requests taken and not finished", **to)
        self.worker_ready = Gauge("pisces_worker_ready", "1 while a worker takes requests", **to)
        self.worker_restarts = Gauge("pisces_worker_restarts", "Starts after a worker's death", **to)
        self.seconds = Histogram("pisces_request_seconds", "Seconds of a request", buckets=SECONDS, **to)
