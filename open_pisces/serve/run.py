"""Runs the application under uvicorn until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn

from open_pisces.serve.access import LOOPBACK
from open_pisces.serve.app import build_app
from open_pisces.serve.service import ServeSettings
from open_pisces.serve.supervisor import ServerError

KEY_VARIABLE = "PISCES_API_KEY"
"""Environment variable with keys, separated by commas; on a command line every user of the machine could read them."""


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys of the environment and of a file, one a line.

    Raises:
        ServerError: for a file that cannot be read, or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"the keys in {file} cannot be read: {error}") from None
        if not any(lines):
            raise ServerError(f"{file} holds no key: write one a line")
        keys += lines
    return tuple(key for key in keys if key)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(settings: ServeSettings, host: str, port: int) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish what was begun.

    Returns:
        The exit code: 0, or 1 when the worker died again and again, so that a service manager starts it anew.

    Raises:
        ServerError: for an address that is taken, a model that cannot be loaded, or a wide bind without a key.
    """
    if not is_loopback(host) and not settings.keys:
        raise ServerError(
            f"listening on {host} lets anyone in who reaches this machine: set a key (the environment variable "
            f"{KEY_VARIABLE}, or --api-key-file), or listen on 127.0.0.1"
        )
    names = [*LOOPBACK, *settings.hosts]
    if host not in ("0.0.0.0", "::"):
        names.append(host)
    return asyncio.run(_serve(replace(settings, hosts=tuple(dict.fromkeys(names))), host, port))


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with our exit code and not by the signal that stopped it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to those who start it."""
        yield


async def _serve(settings: ServeSettings, host: str, port: int) -> int:
    listening = _listen(host, port)
    app = build_app(settings)
    service = app.state.service
    try:
        await service.start()
    except BaseException:
        await service.stop()
        listening.close()
        raise
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
    name = f"[{host}]" if ":" in host else host
    print(f"pisces: {settings.name} at http://{name}:{listening.getsockname()[1]}/v1", flush=True)

    async def stop_when_lost() -> None:
        await service.supervisor.failed.wait()
        server.should_exit = True

    watching = asyncio.create_task(stop_when_lost())
    await server.serve(sockets=[listening])
    watching.cancel()
    return 1 if service.supervisor.failed.is_set() else 0


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a port that is taken is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ServerError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return listening
