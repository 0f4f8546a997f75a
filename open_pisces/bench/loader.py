"""Reading shards in training order, against a plain tar read and against the `webdataset` library.

The samples are JPEGs of 256 px with a JSON of captions, as img2dataset writes them; all of it lies in the page cache,
so that the loaders are compared and not the disk. Ours checks every byte against the index and reads in a shuffled
order; the other two read front to back and check nothing.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_pisces.batch import Sample
from open_pisces.bench.pairs import compare
from open_pisces.config import DataConfig, SourceConfig
from open_pisces.data.order import Mixture, stream
from open_pisces.data.shards import ShardReader
from open_pisces.datasets.shard_writer import ShardWriter

SAMPLES = 1000
SIDE = 256


def run(pairs: int = 15) -> dict[str, Any]:
    """Whole samples as bytes against a tar read (the ratio), and decoded ones against `webdataset` (``decoded``)."""
    with tempfile.TemporaryDirectory() as folder:
        reader = _write(Path(folder) / "set")
        tars = sorted(Path(folder, "set").glob("*.tar"))
        mixture = Mixture(DataConfig(sources=[SourceConfig(path=str(reader.folder))]), 0, lambda _: reader)
        order = [mixture.draw(g).index for g in range(SAMPLES)]
        if sorted(order) != list(range(SAMPLES)) or _bytes(reader, order) != _tar(tars):
            raise AssertionError("the two ways did not read the same bytes")
        # Two comparisons: decoding takes so long that it would hide what reading costs.
        raw = compare("loader", lambda: _bytes(reader, order), lambda: _tar(tars), pairs)
        decoded = compare("loader", lambda: _decoded(reader, order), lambda: _webdataset(tars), pairs)
        size = _tar(tars)
    raw["figures"] |= {"samples": SAMPLES, "megabytes": size / 1e6}
    raw["figures"] |= {"megabytes_per_second_ours": size / 1e6 / raw["figures"]["seconds_ours"]}
    raw["figures"] |= {"decoded_per_second_ours": SAMPLES / decoded["figures"]["seconds_ours"]}
    return {**raw, "decoded": {key: decoded[key] for key in ("ratio", "low", "high", "n", "figures")}}


def _write(folder: Path) -> ShardReader:
    """Smooth pictures with some noise, which compress as photographs do."""
    with ShardWriter(folder, 250) as writer:
        for number in range(SAMPLES):
            random = stream(0, "bench picture", number)
            coarse = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
            pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            caption = f"picture {number} of a benchmark, which shows nothing but soft colours"
            writer.write(Sample(f"{number:09d}", (), caption, caption * 4), (buffer.getvalue(),))
    return ShardReader(folder)


def _bytes(reader: ShardReader, order: list[int]) -> int:
    """Every member of every sample in training order; how many bytes that is."""
    total = 0
    for index in order:
        total += sum(len(content) for content in reader.members(index))
    return total


def _tar(tars: list[Path]) -> int:
    total = 0
    for path in tars:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                total += len(content.read()) if content else 0
    return total


def _decoded(reader: ShardReader, order: list[int]) -> int:
    return sum(len(reader[index].images) for index in order)


def _webdataset(tars: list[Path]) -> int:
    import webdataset

    found = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False, empty_check=False).decode("pil")
    return sum("jpg" in sample and "json" in sample for sample in found)
