"""Processes of the server: started with a socket to talk over, watched, killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Sequence
from typing import Any

from open_pisces.serve.frames import Message, pack, receive_frame


class Child:
    """A Python process that runs a module of this package, at the other end of a socket.

    Args:
        module: it is called with the socket's file descriptor and ``settings`` as JSON.
        settings: what it needs to know.
    """

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        self.module = module
        self.settings = settings
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; it may take long until it answers."""
        ours, theirs = socket.socketpair()
        arguments = "-m", self.module, str(theirs.fileno()), json.dumps(self.settings)
        try:
            self.process = await asyncio.create_subprocess_exec(sys.executable, *arguments, pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.reader, self.writer = await asyncio.open_unix_connection(sock=ours)

    def send(self, message: Message, blobs: Sequence[bytes] = ()) -> None:
        """Send a message; to a process that has died it is lost, which `receive` tells."""
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.writer.write(pack(message, blobs))

    async def receive(self) -> tuple[Message, list[bytes]] | None:
        """Its next message; None when it has ended."""
        return await receive_frame(self.reader)

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def ended(self) -> int:
        """Close the socket, wait for the end, and tell the exit code."""
        assert self.process is not None
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        return await self.process.wait()
