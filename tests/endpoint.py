"""A server that speaks OpenAI's chat completions and describes a picture by its colors, well or badly behaved."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "eye-1"
FAULTS = ("500", "429", "close", "garbage", "page", "empty", "slow", "hang")


def describe(picture: Image.Image) -> str:
    """Its mean color, which JPEG hardly changes: the caption shows which picture it is about."""
    red, green, blue = (int(v) for v in np.asarray(picture.convert("RGB"), np.float64).mean((0, 1)).round())
    return f"A picture of {picture.width} by {picture.height} whose mean color is {red} {green} {blue} of 255"


class Endpoint:
    """The server.

    Args:
        faults: share of requests that go wrong, each way as often.
        seed: of the faults.
        script: caption of a picture by what was asked: takes the true one and the prompt, and what it returns is sent.
    """

    def __init__(self, faults: float = 0.0, seed: int = 0, script: Any = None, hang: float = 3.0) -> None:
        self.counts = Counter[str]()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script = script or (lambda text, prompt: text)
        self.seen: list[str] = []
        """True captions of the pictures of well-behaved answers."""
        self.down = False
        self.refuse = 0
        """Status with which every request is refused; 0 for none."""
        chance, lock, endpoint = random.Random(seed), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if endpoint.down:
                    return self.cut()
                return self.send(200, json.dumps({"data": [{"id": MODEL}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    fault = chance.choice(FAULTS) if chance.random() < faults else ""
                    endpoint.counts[fault or "good"] += 1
                    endpoint.bodies.append(body)
                    endpoint.keys.append(self.headers.get("authorization"))
                if endpoint.down:
                    return self.cut()
                if endpoint.refuse:
                    return self.send(endpoint.refuse, b'{"error": {"message": "no"}}')
                try:
                    getattr(self, f"do_{fault or 'good'}")(body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                return None

            def do_good(self, body: Any) -> None:
                picture, words = body["messages"][0]["content"]
                raw = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
                true = describe(Image.open(io.BytesIO(raw)))
                endpoint.seen.append(true)
                said = endpoint.script(true, words["text"])
                reason = "stop"
                if isinstance(said, tuple):
                    said, reason = said
                choice = {"message": {"role": "assistant", "content": said}, "finish_reason": reason}
                self.send(200, json.dumps({"choices": [choice]}).encode())

            def do_500(self, body: Any) -> None:
                self.send(500, b"oops")

            def do_429(self, body: Any) -> None:
                self.send(429, b'{"error": {"message": "slow down"}}', {"retry-after-ms": "20"})

            def do_close(self, body: Any) -> None:
                self.cut()

            def do_garbage(self, body: Any) -> None:
                self.send(200, random.Random(0).randbytes(200))

            def do_page(self, body: Any) -> None:
                self.send(200, b"<html>Bad gateway</html>")

            def do_empty(self, body: Any) -> None:
                self.send(200, b'{"choices": []}')

            def do_slow(self, body: Any) -> None:
                time.sleep(0.2)
                self.do_good(body)

            def do_hang(self, body: Any) -> None:
                time.sleep(hang)
                self.cut()

            def cut(self) -> None:
                self.close_connection = True
                self.connection.close()

            def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving(**how: Any) -> Iterator[Endpoint]:
    """An endpoint that answers while the block runs."""
    endpoint = Endpoint(**how)
    threading.Thread(target=endpoint.server.serve_forever, daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
