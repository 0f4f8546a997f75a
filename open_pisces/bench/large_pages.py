"""A training on a CPU as `pisces train` starts it, with memory in large pages, against glibc's defaults.

`tiny`'s last stage on the packaged pictures, each run a process of its own; the seconds are those of its steps, from
the first line of its log to the last. How much it is depends on the machine: on virtual ones most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from open_pisces.bench.pairs import summarize
from open_pisces.model.folder import WEIGHTS

NAME = "GLIBC_TUNABLES"
"""Set to nothing, it is what `pisces train` leaves alone (``cli/large_pages.py``)."""
STEPS = 21


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of steps by glibc's defaults over seconds with large pages."""
    seconds = np.array([_pair(number % 2 == 0) for number in range(pairs)])
    ours, other = np.median(seconds, axis=0).tolist()
    return summarize("large_pages", seconds, {"seconds_ours": ours, "seconds_other": other, "steps": STEPS - 1})


def _pair(ours_first: bool) -> tuple[float, float]:
    ways = (True, False) if ours_first else (False, True)
    found = {large: _steps(large) for large in ways}
    return found[True], found[False]


def _steps(large: bool) -> float:
    """Seconds of the steps after the first."""
    environment = {key: value for key, value in os.environ.items() if key != NAME}
    if not large:
        environment[NAME] = ""
    with tempfile.TemporaryDirectory() as folder:
        counts = [f"train.steps={STEPS}", f"train.save_every={STEPS}", f"train.probe_every={STEPS + 1}"]
        place = [
            f"model.start={WEIGHTS}",
            f"out={folder}/run",
            "data.sources=[{path: fixture/train, tasks: {question: 1}}]",
        ]
        command = [sys.executable, "-m", "open_pisces", "train", "tiny/stage3", *counts, *place, "train.batch_size=32"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["seconds"] - json.loads(lines[0])["seconds"])
