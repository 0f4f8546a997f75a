"""Several processes of one training on this machine, without torchrun: ``pisces train RECIPE --nproc N``.

Not `torch.distributed.run`: after a signal it exits with 1 although all ranks have saved; it hides their codes (LOG).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from open_pisces.train.signals import SIGNALS

PATIENCE = 60.0
"""Seconds that the others get to notice that one has failed and to end by themselves."""


def launch(command: list[str], count: int) -> int:
    """Run ``python -m open_pisces COMMAND`` in ``count`` processes that train together.

    Signals to stop are passed on. When one fails the others are ended, too; starting them again is for torchrun.

    Returns:
        0 if all ended well, else the first code that is not 0.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    full = [sys.executable, "-m", "open_pisces", *command]
    started = [
        subprocess.Popen(full, env={**os.environ, **threads, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]

    def pass_on(number: int, frame: Any) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return _watch(started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in started:
            process.kill()


def _watch(started: list[subprocess.Popen[bytes]]) -> int:
    failed = float("inf")
    while any(process.poll() is None for process in started):
        if any(process.returncode for process in started):
            failed = min(failed, time.monotonic())
        if time.monotonic() - failed > PATIENCE:
            break
        time.sleep(0.1)
    codes = [process.poll() for process in started]
    return next((1 if code is None or code < 0 else code for code in codes if code != 0), 0)
