"""Who may ask: host names, origins, keys and sizes, on the raw request."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from typing import Any

import pytest

from open_pisces.serve import fetching
from open_pisces.serve.access import Gate, Headers, given_key, host_name
from open_pisces.serve.fetching import FetchError, checked_url, fetch, is_public, public_address, read_data_url

KEY = "a key"
HOSTS = ("localhost", "127.0.0.1", "::1")


def ask(
    headers: dict[str, str] | list[tuple[str, str]],
    path: str = "/v1/models",
    method: str = "GET",
    body: tuple[bytes, ...] = (b"",),
    **settings: Any,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of an answer; 200 and ``"in"`` from behind the gate."""

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'"in"'})

    pieces = [{"type": "http.request", "body": one, "more_body": i + 1 < len(body)} for i, one in enumerate(body)]
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    gate = Gate(inside, **{"keys": (), "hosts": HOSTS, "origins": (), "max_body": 1000, **settings})
    asyncio.run(gate(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in told[0]["headers"]}
    return told[0]["status"], found, json.loads(told[1]["body"] or b"null")


# ------------------------------------------------------------------------------------------------------ host names


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_its_own_names_open(host: str) -> None:
    assert ask({"host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example/health",
        "localhost/health",
        "localhost/../health",
        "localhost?x",
        "localhost#x",
        "localhost@evil.example",
        "evil.example@localhost",
        "user:pass@localhost",
        "localhost:8000:1",
        "localhost:port",
        "localhost:99999",
        "[::1",
        "::1",
        "[::1]x",
        "",
        " ",
        "local host",
        "localhost\t",
        "\\localhost",
        "localhost\\@evil",
        "127.0.0.1.",
        "0x7f.1",
        "localhost,evil.example",
        "lócalhost",
    ],
)
def test_other_and_forged_host_names_are_refused(host: str) -> None:
    status, _, body = ask({"host": host})
    assert status == 400 and body["error"]["code"] == "invalid_host"
    assert "--allow-host" in body["error"]["message"]


def test_a_request_without_a_host_name_or_with_two_is_refused() -> None:
    assert ask({})[0] == 400
    assert ask([("host", "localhost"), ("host", "evil.example")])[0] == 400


def test_any_name_opens_where_it_was_asked_for() -> None:
    assert ask({"host": "evil.example"}, hosts=("*",))[0] == 200
    assert ask({"host": "draw.example:443"}, hosts=("draw.example",))[0] == 200


def test_a_host_name_is_read_strictly() -> None:
    assert host_name("Draw.Example:80") == "draw.example" and host_name("[::1]:80") == "::1"
    assert host_name("a:b") is None and host_name("a/b") is None


# ------------------------------------------------------------------------------------------------------------ keys


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer  {KEY} ", basic(KEY), "Bearer second"])
def test_a_key_opens(value: str) -> None:
    assert ask({"host": "localhost", "authorization": value}, keys=(KEY, "second"))[0] == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer a", f"Bearer {KEY}x", KEY, basic("no"), "Basic %%", "Basic /w==", "Token x"],
)
def test_a_wrong_key_does_not(value: str) -> None:
    status, headers, body = ask({"host": "localhost", "authorization": value}, keys=(KEY,))
    assert status == 401 and body["error"]["type"] == "authentication_error"
    assert body["error"]["code"] == "invalid_api_key" and headers["www-authenticate"].startswith("Basic ")
    assert KEY not in json.dumps(body)


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/v1/models", "/health/", "//health", "/health/..", "/HEALTH", "/healthx"]
)
def test_every_path_but_health_needs_a_key(path: str) -> None:
    assert ask({"host": "localhost"}, path, keys=(KEY,))[0] == 401
    assert ask({"host": "localhost/health"}, path, keys=(KEY,))[0] == 400


def test_health_needs_neither_key_nor_name() -> None:
    assert ask({"host": "10.0.0.7"}, "/health", keys=(KEY,))[0] == 200


def test_a_key_may_hold_any_character() -> None:
    assert given_key(Headers([(b"authorization", "Bearer é".encode("latin-1"))])) == "é"
    assert given_key(Headers([])) == ""


# ---------------------------------------------------------------------------------------------------------- origins


def test_a_page_of_another_site_may_not_call() -> None:
    to = {"host": "localhost:8000", "origin": "https://evil.example"}
    assert ask(to, method="POST")[0] == 403
    assert ask({**to, "origin": "null"}, method="POST")[0] == 403
    assert ask({**to, "origin": "http://localhost:8000"}, method="POST")[0] == 200
    assert ask({**to, "origin": "http://localhost:9999"}, method="POST")[0] == 403
    status, headers, _ = ask(to, method="POST", origins=("https://evil.example",))
    assert status == 200 and headers["access-control-allow-origin"] == "https://evil.example"
    status, headers, _ = ask(to, method="OPTIONS", origins=("https://evil.example",), keys=(KEY,))
    assert status == 204 and "authorization" in headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in ask(to)[1]


# ------------------------------------------------------------------------------------------------------------ sizes


def test_a_request_that_is_too_large_is_refused_with_and_without_a_length() -> None:
    status, _, body = ask({"host": "localhost", "content-length": "1001"}, method="POST")
    assert status == 413 and body["error"]["code"] == "request_too_large"
    assert ask({"host": "localhost"}, method="POST", body=(b"x" * 600, b"x" * 400))[0] == 200
    status, _, body = ask({"host": "localhost"}, method="POST", body=(b"x" * 600, b"x" * 401))
    assert status == 413 and body["error"]["message"] == "the request is larger than 1,000 bytes"


# ------------------------------------------------------------------------------------------ addresses in requests

ALLOWED = ("pictures.example",)
PAYLOADS = """
http://127.0.0.1/a.png http://localhost/a.png http://[::1]/a.png http://0.0.0.0/ http://0/ http://127.1/ http://2130706433/
http://0x7f000001/ http://0177.0.0.1/ http://127.0.0.1:22/ http://169.254.169.254/latest/meta-data/ http://[fd00::1]/
http://[::ffff:127.0.0.1]/ http://[::ffff:a9fe:a9fe]/ http://[64:ff9b::7f00:1]/ http://10.0.0.1/ http://192.168.1.1/
http://172.16.0.1/ http://100.64.0.1/ http://metadata.google.internal/ http://evil.example/ https://evil.example/
http://pictures.example.evil.example/ http://evil.example#pictures.example http://evil.example?pictures.example
http://pictures.example@evil.example/ http://evil.example@pictures.example/ http://user:pass@pictures.example/
http://pictures.example:22/ http://pictures.example:8000/ http://pictures.example:0/ http://pictures.example:99999/
http://pictures.example./ http://pictures.example\\@evil.example/ http:\\\\pictures.example/ http://pictures%2eexample/
file:///etc/passwd ftp://pictures.example/a.png gopher://pictures.example/ dict://pictures.example/ //pictures.example/a
javascript:alert(1) /etc/passwd pictures.example/a.png http:///a.png http://[/ https://[::1]:443/ jar:http://pictures.example/
netdoc:///etc/passwd unix:///var/run/docker.sock http://pictures.example:80:80/ http://ⓟictures.example/
""".split()


@pytest.mark.parametrize(
    "url", [*PAYLOADS, "http://pictures.example/a b", "http://pictures.example/\r\nHost:x", "http://\tx"]
)
def test_addresses_that_are_not_allowed_reach_no_socket(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up"))
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    for allowed in ((), ALLOWED):
        with pytest.raises(FetchError):
            fetch(url, allowed, 1000)


def test_forty_of_them() -> None:
    assert len(PAYLOADS) >= 40


def test_by_default_nothing_is_fetched() -> None:
    with pytest.raises(FetchError, match="fetches nothing from other servers.*data URL"):
        checked_url("https://pictures.example/a.png", ())


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 172.31.0.1 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: "
    "fe80::1 fd00::1 ff02::1 ::ffff:10.0.0.1 64:ff9b::a00:1 2002:7f00:1:: 192.0.2.1 198.18.0.1 240.0.0.1".split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_an_allowed_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: entries)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(FetchError, match="not public"):
        fetch("http://pictures.example/a.png", ALLOWED, 1000)


def test_the_address_that_was_checked_is_the_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time (DNS rebinding) is asked once."""
    answers = [[(0, 0, 0, "", ("8.8.8.8", 80))], [(0, 0, 0, "", ("127.0.0.1", 80))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers.pop(0))
    called = []

    def connect(address: Any, timeout: Any = None) -> Any:
        called.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(FetchError, match="cannot be fetched: ConnectionRefusedError"):
        fetch("http://pictures.example/a.png", ALLOWED, 1000)
    assert called == [("8.8.8.8", 80)] and len(answers) == 1


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
            "answers 302: redirects are not",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000, "larger than 1,000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "larger than 1,000 bytes"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
    ],
)
def test_what_an_allowed_server_answers(answer: bytes, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "public_address", lambda host, port: "8.8.8.8")
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: ours)
    if isinstance(found, bytes):
        assert fetch("http://pictures.example/a.png?x=1", ALLOWED, 1000) == found
        assert theirs.recv(1000).startswith(b"GET /a.png?x=1 HTTP/1.1\r\nHost: pictures.example\r\n")
    else:
        with pytest.raises(FetchError, match=found):
            fetch("http://pictures.example/a.png", ALLOWED, 1000)
    theirs.close()


def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match="is not found"):
        public_address("pictures.example", 80)


def test_data_urls() -> None:
    assert read_data_url("image/png;base64," + base64.b64encode(b"abc").decode(), 10) == b"abc"
    assert read_data_url("text/plain,a%20b", 10) == b"a b"
    for url, why in (
        ("image/png;base64", "comma"),
        ("image/png;base64,a", "base64"),
        ("x;base64,YWJj", "larger"),
        ("x,abcd", "larger"),
    ):
        with pytest.raises(FetchError, match=why):
            read_data_url(url, 2)
