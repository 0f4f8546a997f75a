"""The small version of `make prove`: a stream that is killed, and goes on with two processes, holds its batches."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from prove import stream
from together import free_port, start

STEPS = 5


def streaming(out: Path, *given: int) -> Any:
    return start(stream.main, str(out), *given, environment=dict(os.environ), log=out.with_suffix(".log"))


def expected() -> list[str]:
    lines, load = [], stream.loader(0, 1)
    for step in range(STEPS):
        every = sorted(digest for batch in load(step).batches for digest in stream.samples(batch))
        assert len(every) == stream.BATCH
        lines.append(f"{step} {len(every)} {hashlib.sha256(' '.join(every).encode()).hexdigest()}")
    return lines


def test_a_killed_stream_goes_on_with_two_processes(tmp_path: Path) -> None:
    out, wanted = tmp_path / "steps", expected()
    assert len(set(wanted)) == STEPS
    alone = streaming(out, 0, 100_000)
    while alone.is_alive() and not (out.is_file() and out.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.killpg(alone.pid, signal.SIGKILL)
    alone.join()
    whole = out.read_text().splitlines()[:2]  # as a checkpoint would have it: two steps are done
    assert whole == wanted[:2]
    out.write_text("".join(f"{line}\n" for line in whole))
    port = int(free_port())
    both = [streaming(out, 2, STEPS, rank, 2, port) for rank in (0, 1)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert out.read_text().splitlines() == wanted
