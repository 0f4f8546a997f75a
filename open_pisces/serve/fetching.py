"""Pictures from other servers: none by default; from hosts on an allow-list, with the address pinned before it is used.

An address that a client names is looked up once, every result must be public, and the connection goes to that very
result: a name that changes between check and use gains nothing. Redirects are not followed.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from open_pisces.errors import PiscesError

TIMEOUT = 10.0
"""Seconds for a whole download."""


class FetchError(PiscesError):
    """A picture's address that is not taken; the message says why."""


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data URL.

    Raises:
        FetchError: if it is none, or too large.
    """
    head, comma, data = url.partition(",")
    if not comma:
        raise FetchError("a data URL needs a comma before its data: data:image/png;base64,...")
    if len(data) > 2 * max_bytes:
        raise FetchError(f"the picture is larger than {max_bytes:,} bytes")
    try:
        raw = base64.b64decode(data, validate=True) if head.endswith(";base64") else unquote_to_bytes(data)
    except (binascii.Error, ValueError) as error:
        raise FetchError(f"the data URL's base64 cannot be read: {error}") from None
    if len(raw) > max_bytes:
        raise FetchError(f"the picture is larger than {max_bytes:,} bytes")
    return raw


def fetch(url: str, allowed: Sequence[str], max_bytes: int) -> bytes:
    """Download a picture from an allowed host.

    Args:
        url: ``http`` or ``https``.
        allowed: host names, exactly as they may stand in the address.
        max_bytes: the largest picture.

    Raises:
        FetchError: for a host that is not allowed, an address that is not public, a redirect, or a failed download.
    """
    parts = checked_url(url, allowed)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    address = public_address(host, port)
    deadline = time.monotonic() + TIMEOUT
    try:
        connection = _Pinned(host, port, address, parts.scheme == "https")
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "open_pisces"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise FetchError(f"{host} answers {answer.status}: redirects are not followed, give the final address")
            return _read(answer, max_bytes, deadline)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"the picture at {host} cannot be fetched: {type(error).__name__}") from None


def checked_url(url: str, allowed: Sequence[str]) -> SplitResult:
    """The parts of an address that may be fetched.

    Raises:
        FetchError: for another scheme, a name and password in it, or a host that is not allowed.
    """
    remedy = "send the picture itself, as a data URL (data:image/png;base64,...)"
    if any(ord(character) <= 32 or ord(character) == 127 or character == "\\" for character in url):
        raise FetchError(f"the picture's address holds blanks or control characters: {remedy}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FetchError(f"the picture's address cannot be read: {remedy}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"the picture's address is neither a data URL nor http(s): {remedy}")
    if not allowed:
        raise FetchError(f"this server fetches nothing from other servers: {remedy}")
    if parts.username is not None or parts.password is not None or parts.hostname not in allowed:
        raise FetchError(f"this server does not fetch from {parts.hostname!r}: {remedy}")
    if port not in (None, 80, 443):
        raise FetchError(f"this server does not fetch from port {port}: {remedy}")
    return parts


def public_address(host: str, port: int) -> str:
    """The one address that a name is fetched from.

    Raises:
        FetchError: if any of its addresses is not a public one.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"{host!r} is not found") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses:
        if not is_public(address):
            raise FetchError(f"{host!r} leads to an address that is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also inside IPv6's ways to write an IPv4 address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Pinned(http.client.HTTPConnection):
    """A connection to one address; the certificate is checked for the name."""

    def __init__(self, host: str, port: int, address: str, secure: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT)
        self.address = address
        self.secure = secure

    def connect(self) -> None:
        """Connect to the address, whatever the name leads to now."""
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _read(answer: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    found = bytearray()
    while piece := answer.read(65536):
        found += piece
        if len(found) > max_bytes:
            raise FetchError(f"the picture is larger than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise FetchError(f"the picture took more than {TIMEOUT:g} s to download")
    return bytes(found)
