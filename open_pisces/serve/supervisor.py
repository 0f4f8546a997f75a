"""Keeps the worker alive: starts it, hands it requests, notices its death or silence, and starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from open_pisces.errors import PiscesError
from open_pisces.serve.children import Child
from open_pisces.serve.frames import Message

log = logging.getLogger("open_pisces.serve")
PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each start after another one that failed; as many in a row may fail. A worker that was ready once did
not fail to start, however soon it died."""
Told = tuple[Message, list[bytes]]


class ServerError(PiscesError):
    """A server that cannot be started; the message says why."""


class Unavailable(Exception):
    """No worker takes requests now: it starts, or has died."""


class Supervisor:
    """A worker that is there again soon after it died.

    Args:
        settings: see `Worker`.
        patience: seconds without a word from a worker that has something to do, after which it is killed.
    """

    def __init__(self, settings: dict[str, Any], patience: float = 120.0) -> None:
        self.settings = settings
        self.patience = patience
        self.about: Message = {}
        """What the worker says about its model."""
        self.ready = False
        self.failed = asyncio.Event()
        """Set when it gave up."""
        self.reason = ""
        self.restarts = 0
        self.child: Child | None = None
        self.task: asyncio.Task[None] | None = None
        self.waiting: dict[str, asyncio.Queue[Told]] = {}
        self.numbers = itertools.count()
        self.heard = time.monotonic()

    async def start(self) -> None:
        """Start the worker and wait until its model is loaded.

        Raises:
            ServerError: if it cannot be loaded.
        """
        self.task = asyncio.create_task(self._keep())
        while not self.ready and not self.failed.is_set():
            await asyncio.sleep(0.02)
        if self.failed.is_set():
            raise ServerError(self.reason)

    async def stop(self) -> None:
        """End the worker."""
        self.ready = False
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task

    async def ask(self, message: Message, blobs: Sequence[bytes] = ()) -> AsyncGenerator[Told]:
        """Hand over a request; yields what happens, up to ``done`` or ``error``. Leaving early cancels it.

        Raises:
            Unavailable: if there is no worker now.
        """
        if not self.ready or self.child is None:
            raise Unavailable
        id = str(next(self.numbers))
        told: asyncio.Queue[Told] = asyncio.Queue()
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting[id] = told
        child = self.child
        child.send({**message, "kind": "submit", "id": id}, blobs)
        ended = False
        try:
            while not ended:
                event = await told.get()
                ended = event[0]["kind"] in ("done", "error")
                yield event
        finally:
            self.waiting.pop(id, None)
            if not ended:
                child.send({"kind": "cancel", "id": id})

    async def _keep(self) -> None:
        """Run one worker after another."""
        failures = 0
        while failures < len(PAUSES):
            await asyncio.sleep(PAUSES[failures])
            began = time.monotonic()
            self.child = Child("open_pisces.serve.worker", self.settings)
            watch = None
            try:
                await self.child.start()
                watch = asyncio.create_task(self._watch(self.child))
                refused = await self._listen(self.child)
            finally:
                started = self.ready
                self.ready = False
                if watch is not None:
                    watch.cancel()
                self._fail_all()
                self.child.kill()
                code = await self.child.ended()
            self.reason = refused or f"the worker ended with code {code}"
            if refused:
                break
            failures = 0 if started else failures + 1
            self.restarts += 1
            seconds = time.monotonic() - began
            log.error("the worker ended with code %s after %.1f s; it is started again", code, seconds)
        self.failed.set()

    async def _listen(self, child: Child) -> str:
        """Pass on what a worker tells, until it ends; the reason if it refused to start."""
        while (found := await child.receive()) is not None:
            message, blobs = found
            self.heard = time.monotonic()
            if message["kind"] == "ready":
                self.about = message
                self.ready = True
            elif message["kind"] == "refused":
                return str(message["message"])
            elif message["id"] in self.waiting:
                self.waiting[message["id"]].put_nowait((message, blobs))
        return ""

    async def _watch(self, child: Child) -> None:
        """Kill a worker that has fallen silent over its work."""
        while True:
            await asyncio.sleep(min(1.0, self.patience / 4))
            if self.waiting and self.ready and time.monotonic() - self.heard > self.patience:
                log.error("the worker said nothing for %.0f s: it is killed", self.patience)
                child.kill()
                return

    def _fail_all(self) -> None:
        died = "the worker that served this request has died; send the request again"
        for told in self.waiting.values():
            told.put_nowait(({"kind": "error", "message": died, "died": True}, []))
