"""Captioning 2,000 pictures at an endpoint that misbehaves, while processes are killed: none is lost, none twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import MODEL, Endpoint, describe, serving
from PIL import Image

from open_pisces.batch import Sample
from open_pisces.data.shards import ShardReader
from open_pisces.datasets.shard_writer import ShardWriter

pytestmark = pytest.mark.prove
COUNT = 2000
KILLS = 20


def picture(number: int) -> Image.Image:
    """A picture that no other number has: one color, and a size."""
    return Image.new("RGB", (24 + number // 256, 16), (number * 7 % 256, number * 13 % 256, number * 29 % 256))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "in"
    with ShardWriter(folder, 100) as writer:
        for number in range(COUNT):
            writer.write(Sample(f"k{number:05d}", (picture(number),)))
    return folder


def start(source: Path, out: Path, endpoint: Endpoint, *more: str) -> subprocess.Popen[bytes]:
    words = ["data", "caption", str(source), str(out), "--captioner", "endpoint", "--model", MODEL]
    words += ["--url", endpoint.url, "--timeout", "1", "--workers", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "open_pisces", *words], env=environment, start_new_session=True)


def processes(name: str) -> list[int]:
    """Processes whose command line holds a name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if name in line:
            found.append(int(path.parent.name))
    return found


def children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(number) for number in text.split()]


def check(source: Path, out: Path) -> dict[str, Any]:
    """Every picture once, with the words about it; the counts of the manifests add up."""
    reader = ShardReader(out)
    reader.verify()
    keys = Counter(reader.key(index) for index in range(len(reader)))
    manifests = [json.loads(path.read_text()) for path in sorted(out.glob("parts/*/manifest.json"))]
    dropped = Counter(key for m in manifests for keys in m["dropped"].values() for key in keys)
    assert not dropped, dropped
    assert keys == Counter(f"k{number:05d}" for number in range(COUNT))
    assert sum(m["samples"] for m in manifests) == sum(m["written"] for m in manifests) == COUNT
    for index in range(len(reader)):
        number = int(reader.key(index)[1:])
        said, true = reader.words(index).detailed, describe(picture(number))
        numbers = [[int(word) for word in text.split() if word.isdigit()] for text in (said, true)]
        assert max(abs(a - b) for a, b in zip(*numbers, strict=True)) <= 2, (number, said, true)
    assert not list(out.glob("parts/.*.part"))
    return {"pictures": COUNT, "lost": 0, "twice": 0}


def test_killed_captioning_loses_no_picture_and_writes_none_twice(
    source: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    chance, out = random.Random(7), tmp_path / "out"
    kills = Counter[str]()
    with serving(faults=0.2, seed=3) as endpoint:
        run = start(source, out, endpoint)
        while run.poll() is None and kills.total() < KILLS:
            time.sleep(chance.uniform(0.5, 4.0))
            if run.poll() is not None:
                break
            workers = children(run.pid)
            if workers and chance.random() < 0.5:
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills["workers"] += 1
            else:
                run.kill()
                run.wait()
                kills["runs"] += 1
                run = start(source, out, endpoint)
        assert run.wait() == 0
        faults = endpoint.counts.total() - endpoint.counts["good"]
        requests = endpoint.counts.total()
    assert kills.total() == KILLS and faults > 200
    record(**check(source, out), kills=dict(kills), requests=requests, faults=faults)


def test_on_ray_a_killed_worker_loses_no_picture_and_writes_none_twice(
    source: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    chance, out, kills = random.Random(8), tmp_path / "out", 0
    with serving(faults=0.2, seed=4) as endpoint:
        run = start(source, out, endpoint, "--ray")
        while run.poll() is None:
            time.sleep(chance.uniform(0.5, 3.0))
            busy = processes("ray::MapWorker")
            begun = len(list(out.glob("parts/*/manifest.json")))
            if busy and begun > 2 * kills and kills < 5:
                os.kill(chance.choice(busy), signal.SIGKILL)
                kills += 1
        assert run.returncode == 0
        faults = endpoint.counts.total() - endpoint.counts["good"]
    assert kills >= 1 and faults > 200
    record(**check(source, out), kills_on_ray=kills, faults=faults)
