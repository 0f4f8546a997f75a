"""Proofs about the server: many clients at once, ten minutes of work, fifty deaths of its worker, twenty thousand bad
requests. ``PISCES_SOAK`` (seconds) shortens the ten minutes."""

from __future__ import annotations

import base64
import copy
import http.client
import io
import json
import os
import random
import signal
import string
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image as Pillow
from servers import Server, running

pytestmark = pytest.mark.prove
SOAK = float(os.environ.get("PISCES_SOAK", "600"))
KILLS = 50
REQUESTS = 20_000


def picture(draw: random.Random, side: int = 64) -> str:
    """A data URL of noise."""
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def request(draw: random.Random, known: list[str]) -> tuple[str, dict[str, Any]]:
    """A request as clients send them: drawings, questions about new and known pictures, words; some are streamed."""
    streamed = draw.random() < 0.3
    kind = draw.choice(["draw", "draw", "ask", "ask", "say"])
    if kind == "draw":
        body = {"prompt": draw.choice(["a cat", "two red stars", "a tree"]), "n": draw.choice([1, 1, 2]), "steps": 4}
        return "/v1/images/generations", {**body, "seed": draw.randrange(2**32), "stream": streamed}
    content: list[dict[str, Any]] = [
        {"type": "text", "text": draw.choice(["What is it?", "Describe the image in detail."])}
    ]
    if kind == "ask":
        url = picture(draw) if draw.random() < 0.5 else draw.choice(known)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    message = [{"role": "user", "content": content}]
    return "/v1/chat/completions", {"messages": message, "stream": streamed, "max_tokens": 24}


def test_seventy_two_requests_at_once_are_all_served(record: Callable[..., None]) -> None:
    draw = random.Random(0)
    known = [picture(draw) for _ in range(3)]
    found: Counter[int] = Counter()
    with running("--max-queue", "72") as server:
        asked = [request(draw, known) for _ in range(72)]

        def ask(path: str, body: dict[str, Any]) -> None:
            found[server.ask("POST", path, body, timeout=300)[0]] += 1

        threads = [threading.Thread(target=ask, args=one) for one in asked]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        assert server.ask("GET", "/health")[0] == 200 and server.metric("pisces_requests_in_flight") == 0
    assert found == {200: 72}
    record(requests=72, served=found[200], seconds=round(seconds, 1))


def memory(server: Server) -> float:
    """Megabytes of the server and its processes."""
    parent = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 2**20


def test_ten_minutes_of_work_take_no_more_memory(record: Callable[..., None]) -> None:
    """The slope is the median of all pairs of points after the first quarter, by when every cache is full.

    32 MB of prefixes are full within a minute here; the default's 256 MB take half of the time.
    """
    found: Counter[int] = Counter()
    draw = random.Random(1)
    known = [picture(draw) for _ in range(3)]
    until = time.monotonic() + SOAK
    with running("--prefix-mb", "32") as server:

        def work(seed: int) -> None:
            own = random.Random(seed)
            while time.monotonic() < until:
                found[server.ask("POST", *request(own, known), timeout=300)[0]] += 1

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        points = []
        while time.monotonic() < until:
            points.append((time.monotonic() / 60, memory(server)))
            time.sleep(max(SOAK / 150, 0.5))
        for thread in threads:
            thread.join()
    assert set(found) == {200}
    later = points[len(points) // 4 :]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(later) for b in later[i + 1 :]]
    slope = float(np.median(slopes))
    record(minutes=SOAK / 60, requests=found[200], mb_per_minute=round(slope, 3), mb=round(later[-1][1]))
    assert slope < 1


def test_fifty_deaths_of_the_worker_lose_no_client(record: Callable[..., None]) -> None:
    draw = random.Random(2)
    known = [picture(draw) for _ in range(3)]
    answers: Counter[int] = Counter()
    latest: dict[int, float] = {}
    died_at = [0.0]
    slowest = slowest_health = 0.0
    stop = threading.Event()
    with running() as server:

        def work(seed: int) -> None:
            own = random.Random(seed)
            while not stop.is_set():
                path, body = request(own, known)
                status, told, _ = server.ask(
                    "POST", path, {**body, "stream": False, "steps": 60} if "prompt" in body else body
                )
                answers[status] += 1
                assert status in (200, 503) and (status == 200 or told["error"]["message"]), told
                latest[seed] = time.monotonic()
                if status == 503:
                    time.sleep(0.05)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(KILLS):
            server.wait_for(200, 120)
            time.sleep(draw.uniform(0, 1.5))
            (worker,) = server.children()
            os.kill(worker, signal.SIGKILL)
            died_at[0] = time.monotonic()
            slowest_health = max(slowest_health, server.wait_for(503, 5))
            while any(latest.get(seed, 0) < died_at[0] for seed in range(3)):  # each client was told
                assert time.monotonic() - died_at[0] < 30, "a client hangs"
                time.sleep(0.01)
            slowest = max(slowest, time.monotonic() - died_at[0])
        server.wait_for(200, 120)
        stop.set()
        for thread in threads:
            thread.join()
        assert server.metric("pisces_worker_restarts") == KILLS
    record(kills=KILLS, health_503_s=round(slowest_health, 2), told_s=round(slowest, 2), served=answers[200], hangs=0)
    assert slowest_health < 1 and slowest < 2


# --------------------------------------------------------------------------------------------------------- bad requests

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**63,
    1e308,
    -0.5,
    "",
    "a",
    "\u0000",
    "\ud83d\ude00",
    [],
    {},
    [[]],
    {"a": 1},
]
VALUES += ["x" * 5000, "data:image/png;base64,AAAA", "http://127.0.0.1/", ["text"], [{"type": "text"}], "[IMG]", "1e3"]
TREES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "modalities": ["text"],
            "stop": ["a"],
            "temperature": 1,
            "top_p": 0.5,
            "max_tokens": 1,
        },
    ),
    ("/v1/images/generations", {"prompt": "a", "n": 1, "size": "64x64", "steps": 1, "seed": 1, "output_format": "png"}),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 1, "tools": [], "stream": False},
    ),
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested lists and objects."""
    found = [path]
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        found += places(value, (*path, key))
    return found


def mutated(draw: random.Random, tree: Any) -> Any:
    """A request in which one to three places hold something else, are gone, or have a neighbor."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice([1, 1, 2, 3])):
        path = draw.choice(places(tree))
        if not path:
            if draw.random() < 0.05:
                return copy.deepcopy(draw.choice(VALUES))
            tree[draw.choice(["foo", "n", "prompt", "messages", "seed", "tools", "steps"])] = copy.deepcopy(
                draw.choice(VALUES)
            )
            continue
        owner = tree
        for key in path[:-1]:
            owner = owner[key]
        if draw.random() < 0.2:
            del owner[path[-1]]
        else:
            owner[path[-1]] = copy.deepcopy(draw.choice(VALUES))
        if not isinstance(tree, dict):
            return tree
    return tree


def fuzzed(draw: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of a request that no client should send."""
    path, tree = draw.choice(TREES)
    body = json.dumps(mutated(draw, tree)).encode()
    method, headers = "POST", {"content-type": "application/json"}
    kind = draw.random()
    if kind < 0.1:
        body = draw.randbytes(draw.randrange(200))
    elif kind < 0.2:  # damaged JSON
        at = draw.randrange(len(body))
        body = body[:at] + draw.randbytes(2) + body[at + draw.randrange(3) :]
    elif kind < 0.25:
        headers["content-type"] = draw.choice(
            ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x"]
        )
    elif kind < 0.3:
        method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
    elif kind < 0.35:
        letters = "".join(draw.choices(string.ascii_letters + "/%.-_~?#;:@", k=12))
        path = draw.choice(["/", "/v1/", "/v1/models/", "/static/", "/%00", "/v1/images/"]) + letters
    elif kind < 0.4:
        headers[draw.choice(["host", "origin", "authorization", "expect", "range"])] = draw.choice(
            ["", "localhost", "evil", "*", "Bearer x", "bytes=0-", "100-continue", "\xff\xfe", "a" * 3000]
        )
    elif kind < 0.45:
        path = "/v1/images/edits"
        headers["content-type"] = "multipart/form-data; boundary=b"
        name = draw.choice(["image", "image[]", "mask", "prompt", ""])
        file = draw.choice(['; filename="a.png"', ""])
        body = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + draw.randbytes(30)
        body += draw.choice([b"\r\n--b--\r\n", b"\r\n--b", b""])
    return method, path, body, headers


def test_twenty_thousand_bad_requests_make_no_500(nano_folder: Path, record: Callable[..., None]) -> None:
    found: Counter[int] = Counter()
    faults: list[Any] = []
    with running("--model", str(nano_folder), "--max-queue", "32") as server:

        def work(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(REQUESTS // 4):
                method, path, body, headers = fuzzed(draw)
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    connection.request(method, path, body, headers)
                    answer = connection.getresponse()
                    told = answer.read()
                except (http.client.HTTPException, ConnectionError, ValueError):
                    found[0] += 1  # what is no HTTP: the client's library refuses it, or the server hangs up
                    continue
                finally:
                    connection.close()
                found[answer.status] += 1
                if answer.status >= 500 or (answer.status >= 400 and method != "HEAD" and not _is_error(told)):
                    faults.append((answer.status, method, path, body, headers, told))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.ask("GET", "/health")[0] == 200 and server.metric("pisces_worker_restarts") == 0
        code, errors = server.stop()
    assert not faults, faults[:3]
    assert code == 0 and "Traceback" not in errors, errors[-3000:]
    assert found[400] > REQUESTS / 3 and found[200] > 100
    record(requests=REQUESTS, **{f"status_{status}": count for status, count in sorted(found.items())})


def _is_error(told: bytes) -> bool:
    """Whether a body is an error in OpenAI's form, or uvicorn's own word on what is no HTTP."""
    if told.startswith(b"Invalid HTTP request"):
        return True
    try:
        return set(json.loads(told)["error"]) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False
