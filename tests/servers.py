"""A server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


class Server:
    """``pisces serve`` on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "open_pisces", "serve", "--port", "0", "--threads", "1", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://(\S+):(\d+)/v1", line)
        if found is None:
            raise AssertionError(f"{line}{self.process.communicate()[1]}")
        self.port = int(found[2])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            raw = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
            sent = {"content-type": "application/json"} if raw else {}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, raw, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
            found = dict((name.lower(), value) for name, value in answer.getheaders())
            with contextlib.suppress(ValueError):
                return answer.status, json.loads(text), found
            return answer.status, text, found
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A number of ``/metrics``."""
        text = self.ask("GET", "/metrics")[1]
        return float(next(line.split()[1] for line in text.splitlines() if line.split()[0] == name))

    def children(self) -> list[int]:
        """Process ids of its children."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(line.split()[0]) for line in listed.stdout.splitlines() if "serve.worker" in line]

    def wait_for(self, status: int, seconds: float = 30) -> float:
        """Seconds until ``/health`` answers with a status."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.ask("GET", "/health")[0] == status:
                return time.monotonic() - began
            time.sleep(0.02)
        raise AssertionError(f"/health is not {status} after {seconds} s")

    def stop(self) -> tuple[int, str]:
        """End it as a service manager does; its exit code, and what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
