"""The application as a Ray Serve deployment, on a real local Ray."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.prove


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, path: str, body: Any = None, key: str = "sesame") -> tuple[int, Any]:
    raw = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", raw, headers)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_local_ray_serves_the_same_application() -> None:
    from ray import serve

    from open_pisces.model.folder import WEIGHTS
    from open_pisces.serve.ray_serve import deployment
    from open_pisces.serve.service import ServeSettings

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = ServeSettings(model=str(WEIGHTS), threads=1, keys=("sesame",))
        serve.run(deployment(settings, ray_actor_options={"num_cpus": 0.5}))
        assert ask(port, "/health")[1] == {"status": "ok"}
        assert ask(port, "/v1/models", key="no")[0] == 401
        assert ask(port, "/v1/models")[1]["data"][0]["id"] == "pisces"
        status, drawn = ask(port, "/v1/images/generations", {"prompt": "a red heart on a blue background"})
        assert status == 200
        url = "data:image/png;base64," + drawn["data"][0]["b64_json"]
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
        status, said = ask(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
        assert (status, said["choices"][0]["message"]["content"]) == (200, "red heart")
        assert ask(port, "/v1/images/generations", {"prompt": ""})[0] == 400
    finally:
        serve.shutdown()
        ray.shutdown()
