"""``pisces data encode``: run a recipe's frozen encoders over its datasets and keep the outputs as feature stores."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from open_pisces.config import RunConfig
from open_pisces.data.features import Kind, picture_rows, store_folder
from open_pisces.data.images import ImageError, generation_bytes, open_image, understanding_bytes
from open_pisces.data.shards import DamagedSample, ShardReader, open_dataset
from open_pisces.device import pick_device
from open_pisces.factory.cluster import Workers, run_stage
from open_pisces.factory.encoders import (
    CaptionPredictor,
    FrozenEncoder,
    caption_of,
    fingerprints,
    load_encoders,
    store_keys,
)
from open_pisces.files import locked, whole_file, write_whole
from open_pisces.settings import ConfigError

FLUSH = 64
"""Batches in one range of rows: what a worker takes, and what an interrupted run does again."""


def encode(
    config: RunConfig, batch_size: int = 64, device: str = "auto", workers: Workers | None = None
) -> list[dict[str, Any]]:
    """Write the feature stores that a recipe with ``data.features`` reads; existing ones are kept.

    The bytes of a store do not depend on the workers: each encodes whole batches, the same as one alone would.

    Args:
        config: the recipe's settings.
        batch_size: pictures encoded together.
        device: where the encoders run, a name for `pick_device`.
        workers: who does it; by default this process. All have to see the data folder.

    Returns:
        For each source and kind: ``source, kind, pictures, unreadable, folder, was_there``.

    Raises:
        ConfigError: if the recipe reads no features.
    """
    if not config.data.features:
        raise ConfigError(f"{config.name}: data.features is not set: give data.features=float32 or float16")
    encoders = load_encoders(config)
    prints = fingerprints(config, encoders)
    done = []
    for source in config.data.sources:
        reader = open_dataset(source.path)
        for kind, key in store_keys(config, reader, prints).items():
            folder = store_folder(key)
            was_there = (folder / "key.json").is_file()
            if not was_there:
                _write(config, reader, kind, key, encoders[kind], batch_size, device, workers or Workers())
            row = {"source": source.path, "kind": kind, "pictures": int(picture_rows(reader)[-1])}
            row["unreadable"] = int((~np.load(folder / "valid.npy")).sum())
            done.append({**row, "folder": str(folder), "was_there": was_there})
    return done


def _write(
    config: RunConfig,
    reader: ShardReader,
    kind: Kind,
    key: dict[str, Any],
    encoder: FrozenEncoder | CaptionPredictor,
    batch_size: int,
    device: str,
    workers: Workers,
) -> None:
    """Encode all pictures of a dataset; the store appears when it is whole, and an interrupted run is continued.

    Two runs that want the same store take turns; the second finds it there.
    """
    folder = store_folder(key)
    part = folder.with_name(f".{folder.name}.part")
    rows = int(picture_rows(reader)[-1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / "key.json").is_file():
            return
        span = batch_size * FLUSH
        _open_part(part, (rows, *encoder.output_shape()), key["dtype"], span)
        ranges = range(0, rows, span)
        todo = [start for start in ranges if not _mark(part, start).is_file()]
        alone = workers.ray is None and workers.count == 1
        given = encoder if alone else None  # other processes load their own
        build = partial(EncodeStage, config, reader.folder, kind, part, batch_size, span, device, given)
        done = run_stage(build, todo, workers)
        for _ in track(done, f"{Path(str(reader.folder)).name}: {kind}", total=len(todo), disable=not todo):
            pass
        marks = [np.load(_mark(part, start)) for start in ranges]
        with whole_file(part / "valid.npy") as hidden:
            np.save(hidden, np.concatenate([np.empty(0, bool), *marks]))
        # `FeatureStore` takes a folder with key.json for finished, so it is written last.
        shutil.rmtree(part / "ranges")
        (part / "span").unlink()
        (part / "key.json").write_text(json.dumps(key, indent=1))
        os.replace(part, folder)


class EncodeStage:
    """Encodes one range of a dataset's pictures at a time; what workers run.

    Args:
        config: the recipe.
        source: the dataset's folder or address.
        kind: which encoder.
        part: the folder of the unfinished store.
        batch_size: pictures encoded together.
        span: rows of a range, a multiple of ``batch_size``.
        device: where.
        encoder: if it is loaded already.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Path | str,
        kind: Kind,
        part: Path,
        batch_size: int,
        span: int,
        device: str,
        encoder: FrozenEncoder | CaptionPredictor | None = None,
    ) -> None:
        self.reader = ShardReader(source)
        self.part = part
        self.batch_size = batch_size
        self.span = span
        self.encoder = (encoder or load_encoders(config)[kind]).to(pick_device(device))
        self.outputs = _predicted if isinstance(self.encoder, CaptionPredictor) else _encoded

    @torch.inference_mode()
    def __call__(self, start: int) -> dict[str, Any]:
        """Write the rows of the range that begins at ``start``."""
        mark = _mark(self.part, start)
        if not mark.is_file():
            rows = int(picture_rows(self.reader)[-1])
            end = min(start + self.span, rows)
            readable: list[bool] = []
            values = np.lib.format.open_memmap(self.part / "features.npy", "r")
            # Written and not mapped: machines that share a mapped page over a network would overwrite each other.
            with (self.part / "features.npy").open("r+b") as file:
                file.seek(values.offset + start * values.strides[0])
                for at in range(start, end, self.batch_size):
                    found, valid = self.outputs(self.encoder, self.reader, at, min(at + self.batch_size, end))
                    file.write(found.float().cpu().numpy().astype(values.dtype).tobytes())
                    readable += valid
                file.flush()
                os.fsync(file.fileno())  # the mark never names rows that are not on disk
            with whole_file(mark) as hidden, hidden.open("wb") as written:
                np.save(written, np.array(readable, bool))
        return {"start": start}


def _mark(part: Path, start: int) -> Path:
    """The file that says of a finished range which of its pictures could be read."""
    return part / "ranges" / f"{start:012d}.npy"


def _open_part(part: Path, shape: tuple[int, ...], dtype: str, span: int) -> None:
    """The folder of an unfinished store; one of other ranges, or damaged, is begun anew."""
    with contextlib.suppress(OSError, ValueError):
        values = np.lib.format.open_memmap(part / "features.npy", "r")
        if values.shape == shape and (part / "span").read_text() == str(span):
            return
    shutil.rmtree(part, ignore_errors=True)
    (part / "ranges").mkdir(parents=True)
    np.lib.format.open_memmap(part / "features.npy", "w+", dtype=dtype, shape=shape)
    write_whole(part / "span", str(span))


def _encoded(encoder: Any, reader: ShardReader, start: int, end: int) -> tuple[Tensor, list[bool]]:
    """Features of pictures ``start`` to ``end``, and which of them could be read."""
    cut = generation_bytes if encoder.kind == "generation" else understanding_bytes
    pixels, readable = zip(*_pictures(reader, start, end, cut, encoder.image_size), strict=True)
    device = next(encoder.parameters()).device
    return encoder(torch.from_numpy(np.stack(pixels)).to(device)), list(readable)


def _predicted(predictor: Any, reader: ShardReader, start: int, end: int) -> tuple[Tensor, list[bool]]:
    """What the LLM predicts for a caption of each picture, and which captions could be read."""
    rows = picture_rows(reader)
    captions = []
    for row in range(start, end):
        sample = int(np.searchsorted(rows, row, side="right")) - 1
        try:
            captions.append(caption_of(reader.words(sample), row))
        except DamagedSample:
            captions.append("")
    return predictor(captions), [bool(caption) for caption in captions]


def _pictures(
    reader: ShardReader, start: int, end: int, cut: Callable[[Any, int], np.ndarray], side: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Pixels of pictures ``start`` to ``end``, with True; for one that cannot be read, zeros with False."""
    rows = picture_rows(reader)
    sample = int(np.searchsorted(rows, start, side="right")) - 1
    for row in range(start, end):
        while rows[sample + 1] <= row:
            sample += 1
        try:
            raw = reader.pictures(sample)[row - int(rows[sample])]
            yield cut(open_image(raw), side), True
        except (DamagedSample, ImageError):  # keeps its row, so that rows stay those of the dataset's index
            yield np.zeros((3, side, side), np.uint8), False
