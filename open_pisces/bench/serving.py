"""The server under several clients against the same requests one after another, over HTTP, the shipped model.

Eight drawings at once, and sixteen questions about as many pictures; what HTTP and the processes add to a question that
the engine answers in this process; and a second question about a picture against the first.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.bench.pairs import compare
from open_pisces.data.order import stream
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS
from open_pisces.serve.engine import Engine
from open_pisces.serve.requests import Request

CLIENTS = 8
PROMPTS = ("a red heart", "two green frogs", "a cat", "three blue stars", "a banana", "a tree", "a dog", "a yellow car")
QUESTION = "Describe the image in detail."
SECOND = "What color is the background?"
Ask = Callable[[str, dict[str, Any]], Any]


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of eight drawings one by one over seconds of the same at once; at least 1.5 is wanted.

    ``questions``: likewise, at least 2 is wanted. ``second_question``: seconds of a first question about a picture over
    those of a second one, at least 2 is wanted. ``http_ms``: what HTTP adds, median of the paired differences; at most
    10 is wanted.
    """
    with server() as ask, ThreadPoolExecutor(CLIENTS) as threads:
        fresh = pictures()

        def draw(number: int) -> Any:
            return ask("/v1/images/generations", {"prompt": PROMPTS[number], "seed": number})

        def question(url: str) -> Any:
            return ask("/v1/chat/completions", chat(url, QUESTION))

        drawings = compare(
            "serving",
            lambda: list(threads.map(draw, range(CLIENTS))),
            lambda: [draw(number) for number in range(CLIENTS)],
            pairs,
        )
        questions = compare(
            "serving",
            lambda: list(threads.map(question, [next(fresh) for _ in range(CLIENTS)])),
            lambda: [question(next(fresh)) for _ in range(CLIENTS)],
            pairs,
        )
        second = second_question(ask, fresh, pairs)
        added = http_ms(ask, fresh, pairs)
    keys = ("ratio", "low", "high", "n", "figures")
    more = {
        name: {key: found[key] for key in keys}
        for name, found in (("questions", questions), ("second_question", second))
    }
    return {**drawings, **more, "http_ms": added}


def second_question(ask: Ask, fresh: Iterator[str], pairs: int) -> dict[str, Any]:
    """A first question about a picture against a second one about a picture that was asked about before."""
    known = next(fresh)
    ask("/v1/chat/completions", chat(known, "What is in the picture?"))
    words = count()

    def first() -> None:
        ask("/v1/chat/completions", chat(next(fresh), SECOND))

    def again() -> None:  # words that were not asked before, so that the picture alone is known
        ask("/v1/chat/completions", chat(known, f"{SECOND} {next(words)}") | {"max_tokens": 1})

    def once() -> None:
        ask("/v1/chat/completions", chat(next(fresh), f"{SECOND} {next(words)}") | {"max_tokens": 1})

    return compare("serving", again, once, pairs)


def http_ms(ask: Ask, fresh: Iterator[str], pairs: int) -> dict[str, float]:
    """Milliseconds that HTTP, the check of the picture and the socket add to a question."""
    generator = Generator.from_pretrained(WEIGHTS, "cpu")
    engine = Engine(generator)
    added = []
    for number in range(pairs + 2):
        url = next(fresh)
        picture = Pillow.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        start = time.perf_counter()
        ask("/v1/chat/completions", chat(url, SECOND))
        middle = time.perf_counter()
        engine.submit(str(number), Request((Turn("user", (0, SECOND)),), (picture,)))
        while engine.busy:
            engine.step()
        added.append(1000 * ((middle - start) - (time.perf_counter() - middle)))
    found = np.array(added[2:])
    return {"median": float(np.median(found)), "low": float(found.min()), "high": float(found.max()), "n": pairs}


def chat(url: str, words: str) -> dict[str, Any]:
    """A question about a picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 24}


def pictures() -> Iterator[str]:
    """Data URLs of pictures without end, each of which is new to the server: blobs of random colours."""
    for number in count():
        draw = stream(0, "serving", number)
        small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        yield _data_url(Pillow.fromarray(small).resize((64, 64), Pillow.Resampling.BICUBIC))


def _data_url(picture: Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@contextmanager
def server() -> Iterator[Ask]:
    """``pisces serve`` on a free port, with one thread; yields what posts to it."""
    command = [sys.executable, "-m", "open_pisces", "serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/v1", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line}")
        port = int(found[1])

        def ask(path: str, body: dict[str, Any]) -> Any:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read())
            connection.close()
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status}, {told}")
            return told

        try:
            yield ask
        finally:
            process.terminate()
