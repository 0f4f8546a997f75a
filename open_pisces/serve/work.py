"""The process that holds the model: it reads requests from a socket, steps the engine, and tells what happened.

It ends when the socket does, so it never outlives its server.
"""

from __future__ import annotations

import io
import queue
import signal
import socket
import threading
import traceback
from typing import Any, BinaryIO

import torch
from PIL import Image as Pillow
from PIL.Image import Image
from transformers.utils.logging import disable_progress_bar

from open_pisces.batch import Turn
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import read_card
from open_pisces.serve.engine import Engine
from open_pisces.serve.frames import Message, pack, read_frame
from open_pisces.serve.requests import Event, Request, asked_to_draw

Frame = tuple[Message, list[bytes]]


class Worker:
    """An engine behind a socket.

    Args:
        connection: the socket.
        settings: ``model`` (a folder), ``device``, ``int8``, ``threads`` and the arguments of `Engine`.
    """

    def __init__(self, connection: socket.socket, settings: dict[str, Any]) -> None:
        self.connection = connection
        self.settings = settings
        if settings.get("threads"):
            torch.set_num_threads(settings["threads"])
        device, int8 = settings.get("device", "auto"), settings.get("int8", False)
        self.generator = Generator.from_pretrained(settings["model"], device, int8=int8)
        self.engine = self._engine()
        self.formats: dict[str, Message] = {}
        """Of each request: how its pictures are written."""

    def _engine(self) -> Engine:
        names = ("slots", "context", "prefix_bytes")
        return Engine(self.generator, **{name: self.settings[name] for name in names if name in self.settings})

    def run(self) -> None:
        """Work until the socket closes."""
        inbox: queue.Queue[Frame | None] = queue.Queue()
        threading.Thread(target=_listen, args=(self.connection.makefile("rb"), inbox), daemon=True).start()
        self._send({"kind": "ready", **self._about()})
        while True:
            while not self.engine.busy or not inbox.empty():
                frame = inbox.get()
                if frame is None:
                    return
                self._take(*frame)
            try:
                events = self.engine.step()
            except Exception:  # a fault of ours, or no memory left: whoever was being served is told, the others go on
                traceback.print_exc()
                self._fail_all()
                continue
            for event in events:
                self._tell(event)

    def _about(self) -> Message:
        """What the server wants to know of the model."""
        record = read_card(self.settings["model"])["record"]
        tasks = {task for training in record for task in training.get("tasks", ())}
        return {
            "image_size": self.generator.pisces.settings.decoder.image_size,
            "redraws": "reconstruct" in tasks,
            "converses": "conversation" in tasks,
        }

    def _take(self, message: Message, blobs: list[bytes]) -> None:
        """Do what a message asks for."""
        if message["kind"] == "cancel":
            self.engine.cancel(message["id"])
            self.formats.pop(message["id"], None)
            return
        try:
            self.engine.submit(
                message["id"], _request(message, blobs, "system" in self.generator.renderer.frame["open"])
            )
            self.formats[message["id"]] = message.get("format", {})
        except PiscesError as error:
            self._tell(Event(message["id"], "error", {"message": str(error), "bad_input": True}))

    def _tell(self, event: Event) -> None:
        how = self.formats.get(event.id, {})
        blobs = [] if event.image is None else [_written(event.image, how)]
        if event.kind in ("done", "error"):
            self.formats.pop(event.id, None)
        self._send({"kind": event.kind, "id": event.id, **event.data}, blobs)

    def _fail_all(self) -> None:
        for id in list(self.formats):
            self._tell(Event(id, "error", {"message": "the model failed on this request; the server's log says why"}))
        self.engine = self._engine()

    def _send(self, message: Message, blobs: list[bytes] | None = None) -> None:
        self.connection.sendall(pack(message, blobs or ()))


def _listen(file: BinaryIO, inbox: queue.Queue[Frame | None]) -> None:
    while True:
        frame = read_frame(file)
        inbox.put(frame)
        if frame is None:
            return


def _request(message: Message, blobs: list[bytes], system_turns: bool) -> Request:
    """A request of the server's, with its pictures.

    Raises:
        ValueError: for turns of which no request can be made.
    """
    turns = [Turn(role, tuple(content)) for role, content in message["turns"]]
    if turns[0].role == "system" and not system_turns:
        # As in training: without a place for it in the template, it opens the user's turn.
        said = "\n".join(str(part) for part in turns[0].content)
        turns[:2] = [Turn("user", (said, *turns[1].content))]
    images = [_picture(size, blob) for size, blob in zip(message["sizes"], blobs, strict=True)]
    settings = dict(message["settings"])
    settings["stop"] = tuple(settings.get("stop", ()))
    return Request(tuple(turns), tuple(images), message["mode"], to_draw=asked_to_draw(tuple(turns)), **settings)


def _picture(size: list[int], raw: bytes) -> Image:
    return Pillow.frombytes("RGB", (size[0], size[1]), raw)


def _written(image: Image, how: Message) -> bytes:
    """A picture as a file."""
    if side := how.get("side"):
        image = image.resize(
            (side, side), Pillow.Resampling.NEAREST if side % image.width == 0 else Pillow.Resampling.BICUBIC
        )
    kind = how.get("kind", "png")
    more = {} if kind == "png" else {"quality": how.get("quality", 95)}
    file = io.BytesIO()
    image.save(file, kind.upper(), **more)
    return file.getvalue()


def work(descriptor: int, settings: Message) -> int:
    """Run a worker on a socket; 0 when the server closed it, 2 for a model that cannot be loaded."""
    # Ctrl-C goes to the whole group: the server decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    disable_progress_bar()
    connection = socket.socket(fileno=descriptor)
    try:
        Worker(connection, settings).run()
    except PiscesError as error:
        connection.sendall(pack({"kind": "refused", "message": str(error)}))
        return 2
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server is gone
    return 0
