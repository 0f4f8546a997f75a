"""The small version of `make prove`: a stream that is killed, and goes on with two processes, holds its batches."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from prove import stream

STREAM, STEPS = Path(stream.__file__), 5


def start(out: Path, first: int, last: int, *ranks: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(STREAM), str(out), str(first), str(last), *map(str, ranks)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


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
    alone = start(out, 0, 100_000)
    while alone.poll() is None and not (out.is_file() and out.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.killpg(alone.pid, signal.SIGKILL)
    alone.wait()
    whole = out.read_text().splitlines()[:2]  # as a checkpoint would have it: two steps are done
    assert whole == wanted[:2]
    out.write_text("".join(f"{line}\n" for line in whole))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(out, 2, STEPS, rank, 2, port) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert out.read_text().splitlines() == wanted
