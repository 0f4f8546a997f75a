"""Stages for tests of workers: a module that is imported in no time, as each of them does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from open_pisces.errors import PiscesError


class Square:
    """Squares its items; on ``bad`` it raises, on ``deadly`` its process is killed, as often as the file says."""

    def __init__(self, folder: Path, bad: int = -1, deadly: int = -1, deaths: int = 0) -> None:
        self.folder, self.bad, self.deadly, self.deaths = folder, bad, deadly, deaths

    def __call__(self, item: int) -> dict[str, Any]:
        if item == self.bad:
            raise PiscesError(f"item {item} is bad")
        marks = self.folder / "deaths"
        if item == self.deadly and (len(marks.read_text()) if marks.exists() else 0) < self.deaths:
            with marks.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item, "square": item * item, "process": os.getpid()}


class Sleep:
    """Takes long, but for the first item."""

    def __call__(self, item: int) -> dict[str, Any]:
        time.sleep(0 if item == 0 else 60)
        return {"process": os.getpid()}
