"""Messages between the server's processes: JSON and bytes, each with its length before it. Nothing is pickled."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

LIMIT = 512 << 20
"""Bytes of one message; more means that the two ends no longer agree on where one begins."""
Message = dict[str, Any]


def pack(message: Message, blobs: Sequence[bytes] = ()) -> bytes:
    """A message and its blobs as they go over the socket."""
    head = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([struct.pack("!I", len(head)), head, *blobs])


def read_frame(file: BinaryIO) -> tuple[Message, list[bytes]] | None:
    """The next message and its blobs; None at the end, also one in the middle of a message."""
    try:
        (length,) = struct.unpack("!I", _exactly(file, 4))
        message = json.loads(_exactly(file, _checked(length)))
        sizes = message.pop("blobs")
        _checked(sum(sizes))
        return message, [_exactly(file, size) for size in sizes]
    except EOFError:
        return None


async def receive_frame(reader: asyncio.StreamReader) -> tuple[Message, list[bytes]] | None:
    """`read_frame`, of a stream of asyncio."""
    try:
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        message = json.loads(await reader.readexactly(_checked(length)))
        sizes = message.pop("blobs")
        _checked(sum(sizes))
        return message, [await reader.readexactly(size) for size in sizes]
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise EOFError
    return found


def _checked(length: int) -> int:
    if length > LIMIT:
        raise RuntimeError(f"a message of {length} bytes, more than {LIMIT}: the two processes lost step")
    return length
