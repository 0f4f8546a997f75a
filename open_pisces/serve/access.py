"""Who may ask: keys, host names, origins and sizes, checked on the raw request before any route sees it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from open_pisces.serve.errors import ApiError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
OPEN = "/health"
"""The one path that needs no key and any host name: probes know neither."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAGE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Gate:
    """ASGI middleware in front of the application.

    Args:
        app: the application.
        keys: API keys, any of which opens; none: no key is asked for.
        hosts: names under which the server may be called; ``*`` for any. Web pages can make browsers call a local
            server under a name of theirs (DNS rebinding), which this stops.
        origins: web pages besides the server's own that may call it.
        max_body: bytes of a request.
    """

    def __init__(
        self, app: Any, keys: Sequence[str], hosts: Sequence[str], origins: Sequence[str], max_body: int
    ) -> None:
        self.app = app
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.hosts = {host.lower() for host in hosts}
        self.origins = {origin.rstrip("/") for origin in origins}
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope["headers"])
        origin = headers.one(b"origin")
        extra = list(PAGE_HEADERS)
        if origin and origin in self.origins:
            extra += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"origin")]
        sending = _with_headers(send, extra)
        try:
            # The path as it came: nothing derived from the Host header (CVE-2026-48710).
            if scope["path"] != OPEN:
                self._check_host(headers)
                if origin and scope["method"] == "OPTIONS" and origin in self.origins:
                    return await _preflight(sending)
                self._check_origin(scope["method"], origin, headers)
                self._check_key(headers)
            length = headers.one(b"content-length")
            if length and length.isdigit() and int(length) > self.max_body:
                raise self._too_large()
        except ApiError as error:
            return await _answer(error, sending)
        await self._within_size(scope, receive, sending)

    async def _within_size(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a body without a length that goes on too long ends as if the client had left."""
        seen = 0

        async def counted() -> dict[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= self.max_body else {"type": "http.disconnect"}

        async def sending(message: dict[str, Any]) -> None:
            if seen <= self.max_body:
                await send(message)

        try:
            await self.app(scope, counted, sending)
        except Exception:
            if seen <= self.max_body:
                raise
        if seen > self.max_body:
            await _answer(self._too_large(), send)

    def _check_host(self, headers: Headers) -> None:
        found = headers.all(b"host")
        name = host_name(found[0]) if len(found) == 1 else None
        if "*" not in self.hosts and name not in self.hosts:
            shown = found[0][:100] if len(found) == 1 else f"{len(found)} host headers"
            raise ApiError(400, f"this server is not called {shown!r}: start it with --allow-host", code="invalid_host")

    def _check_origin(self, method: str, origin: str | None, headers: Headers) -> None:
        """A page of another site may not make its visitor's browser draw here."""
        if origin is None or method in ("GET", "HEAD") or origin in self.origins:
            return
        if urlsplit(origin).netloc.lower() != (headers.one(b"host") or "").lower():
            raise ApiError(403, f"pages of {origin[:100]!r} may not call this server: start it with --allow-origin")

    def _check_key(self, headers: Headers) -> None:
        if not self.keys:
            return
        given = hashlib.sha256(given_key(headers).encode()).digest()
        # All keys are compared, each in constant time.
        matches = [hmac.compare_digest(given, key) for key in self.keys]
        if not any(matches):
            remedy = "send one of the server's keys as 'Authorization: Bearer KEY'"
            # Basic lets a browser ask for it: the playground needs no login page of its own.
            asked = {"www-authenticate": 'Basic realm="open_pisces: any name, the API key as password"'}
            raise ApiError(401, f"no valid API key: {remedy}", code="invalid_api_key", headers=asked)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.max_body:,} bytes", code="request_too_large")


class Headers:
    """The raw headers of a request."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self.raw = raw

    def all(self, name: bytes) -> list[str]:
        """All values of a header."""
        return [value.decode("latin-1") for key, value in self.raw if key.lower() == name]

    def one(self, name: bytes) -> str | None:
        """The first value of a header."""
        return next(iter(self.all(name)), None)


def host_name(header: str) -> str | None:
    """The name in a Host header, without its port, in lower case; None for what is no host."""
    try:
        parts = urlsplit(f"//{header}")
        # The port is read so that a wrong one is refused.
        port = parts.port
    except ValueError:
        return None
    name = parts.hostname or ""
    bare = f"[{name}]" if ":" in name else name
    if header.lower() not in (bare, f"{bare}:{port}"):
        return None
    return name


def given_key(headers: Headers) -> str:
    """The key that a request brings: as bearer, as the password of basic authentication; "" for none."""
    kind, _, value = (headers.one(b"authorization") or "").strip().partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _with_headers(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _preflight(send: Send) -> None:
    allowed = [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
    allowed += [(b"access-control-allow-headers", b"authorization, content-type")]
    await send({"type": "http.response.start", "status": 204, "headers": allowed})
    await send({"type": "http.response.body", "body": b""})
