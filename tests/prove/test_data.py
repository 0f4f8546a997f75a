"""Proofs about data: any number of processes, kills at random steps, ten thousand samples of every format."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_pisces.data.shards import ShardReader

pytestmark = pytest.mark.prove
STREAM = Path(__file__).parent / "stream.py"
STEPS = 60
COUNT = 10_000


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(out: Path, first: int, last: int, ranks: int = 1) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(STREAM), str(out), str(first), str(last)]
    return [
        subprocess.Popen([*command, str(rank), str(ranks), str(port)], env=environment, start_new_session=True)
        for rank in range(ranks)
    ]


def lines(out: Path) -> list[str]:
    """The whole lines of a stream's file."""
    text = out.read_text() if out.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("whole") / "steps"
    assert all(process.wait() == 0 for process in start(out, 0, STEPS))
    assert len(lines(out)) == STEPS and len(set(lines(out))) == STEPS
    return lines(out)


def test_any_number_of_processes_goes_on_with_the_same_batches(
    uninterrupted: list[str], tmp_path: Path, record: Callable[..., None]
) -> None:
    """Stop at 1 process, continue at 2, at 4, at 3 and back at 1; two workers each."""
    cuts = [(0, 12, 1), (12, 25, 2), (25, 38, 4), (38, 47, 3), (47, STEPS, 1)]
    out = tmp_path / "steps"
    for first, last, ranks in cuts:
        assert all(process.wait() == 0 for process in start(out, first, last, ranks))
    assert lines(out) == uninterrupted
    record(steps=STEPS, processes=[ranks for *_, ranks in cuts], workers=2, batches_that_differ=0)


def test_kills_at_twenty_random_steps_change_no_batch(
    uninterrupted: list[str], tmp_path: Path, record: Callable[..., None]
) -> None:
    """kill -9, then on from the last step that was written, as a training goes on from its last checkpoint."""
    chance, out, kills = random.Random(5), tmp_path / "steps", 0
    while len(lines(out)) < STEPS:
        done = len(lines(out))
        out.write_text("".join(f"{line}\n" for line in lines(out)))  # a line cut in half is a step that was not done
        (process,) = start(out, done, STEPS)
        target = done + chance.randint(1, 3) if kills < 20 else STEPS + 1
        while process.poll() is None and len(lines(out)) < target:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert lines(out) == uninterrupted and kills == 20
    record(steps=STEPS, kills=kills, batches_that_differ=0)


# ------------------------------------------------------------------------------------- ten thousand samples


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Number {number}."}]


def write_folder(folder: Path, count: int) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for number in range(count):
            (folder / f"{number:05d}.png").write_bytes(picture(number))
            table.writerow([f"{number:05d}.png", f"caption {number}"])


def write_webdataset(folder: Path, count: int) -> None:
    for shard in range(0, count, 1000):
        with tarfile.open(folder / f"{shard // 1000:05d}.tar", "w") as tar:
            for number in range(shard, min(shard + 1000, count)):
                for ending, content in (("png", picture(number)), ("txt", f"caption {number}".encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_llava(folder: Path, count: int) -> None:
    with (folder / "chat.json").open("w") as file:
        file.write("[")
        for number in range(count):
            (folder / f"{number:05d}.png").write_bytes(picture(number))
            row = {"id": f"{number:05d}", "image": f"{number:05d}.png", "conversations": conversation(number)}
            file.write(("," if number else "") + json.dumps(row))
        file.write("]")


def write_parquet(folder: Path, count: int, chats: bool = False) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(first: int, last: int) -> dict[str, list[object]]:
        numbers = range(first, last)
        words: dict[str, list[object]] = {"caption": [f"caption {n}" for n in numbers]}
        if chats:
            words = {"conversations": [conversation(n) for n in numbers]}
        images: list[object] = [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers]
        return {"id": [f"{n:05d}" for n in numbers], "image": images, **words}

    writer = None
    for first in range(0, count, 500):
        table = pa.table(rows(first, min(first + 500, count)))
        writer = writer or pq.ParquetWriter(folder / "data.parquet", table.schema, write_batch_size=64)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_named(folder: Path, count: int) -> None:
    """PixelProse: rows name pictures that lie in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(count):
        (folder / f"{number:05d}.png").write_bytes(picture(number))
    columns = {"uid": [f"{n:05d}" for n in range(count)], "original_caption": [f"caption {n}" for n in range(count)]}
    columns["vlm_caption"] = [f"This image displays: thing {n}" for n in range(count)]
    pq.write_table(pa.table(columns), folder / "data.parquet")


FORMATS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "folder": (write_folder, ""),
    "webdataset": (write_webdataset, ""),
    "llava": (write_llava, "chat.json"),
    "parquet": (write_parquet, "data.parquet"),
    "huggingface": (write_parquet, ""),
    "onevision": (lambda folder, count: write_parquet(folder, count, chats=True), "data.parquet"),
    "cambrian": (write_llava, "chat.json"),
    "pixelprose": (write_named, "data.parquet"),
}
MEASURED = """
import json, sys
from open_pisces.datasets.importing import import_dataset
format, source, out, images = sys.argv[1:]
found = import_dataset(format, source, out, **({"images": images} if images else {}))
# The peak of this program alone: getrusage would count what its parent held when it was forked.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({**found, "megabytes": int(peak.split()[1]) / 1024}))
"""


def test_ten_thousand_samples_of_every_format_come_back_in_flat_memory(
    tmp_path: Path, record: Callable[..., None]
) -> None:
    figures: dict[str, dict[str, float]] = {}
    for name, (write, source) in FORMATS.items():
        peaks = {}
        for count in (COUNT // 10, COUNT):
            folder, out = tmp_path / f"{name}-{count}", tmp_path / f"{name}-{count}-out"
            folder.mkdir()
            write(folder, count)
            images = str(folder) if name in ("pixelprose", "cambrian") else ""
            command = [sys.executable, "-c", MEASURED, name, str(folder / source), str(out), images]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["written"] == count and not any(found["skipped"].values()), found
            peaks[count] = found["megabytes"]
        check(ShardReader(out), COUNT)
        figures[name] = {"megabytes_at_1k": round(peaks[COUNT // 10], 1), "megabytes_at_10k": round(peaks[COUNT], 1)}
        assert peaks[COUNT] < 1.15 * peaks[COUNT // 10] + 8, figures
    record(samples=COUNT, formats=figures)


def check(reader: ShardReader, count: int) -> None:
    """Every picture byte for byte, every text, in order."""
    assert len(reader) == count
    reader.verify()
    for number in range(count):
        assert reader.pictures(number) == [picture(number)]
        words = reader.words(number)
        if words.conversation:
            assert words.conversation[1]["content"] == [f"Number {number}."]
            assert words.conversation[0]["content"] == [{"image": 0}, "What is it?"]
        else:
            assert words.short == f"caption {number}"
