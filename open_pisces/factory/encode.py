"""``pisces data encode``: run a recipe's frozen encoders over its datasets and keep the outputs as feature stores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from open_pisces.config import RunConfig
from open_pisces.data.features import picture_rows, store_folder
from open_pisces.data.images import ImageError, generation_bytes, open_image, understanding_bytes
from open_pisces.data.shards import DamagedSample, ShardReader, open_dataset
from open_pisces.device import pick_device
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
"""Batches between two points from which an interrupted run can go on."""


def encode(config: RunConfig, batch_size: int = 64, device: str = "auto") -> list[dict[str, Any]]:
    """Write the feature stores that a recipe with ``data.features`` reads; existing ones are kept.

    Args:
        config: the recipe's settings.
        batch_size: pictures encoded together.
        device: where the encoders run, a name for `pick_device`.

    Returns:
        For each source and kind: ``source, kind, pictures, unreadable, folder, was_there``.

    Raises:
        ConfigError: if the recipe reads no features.
    """
    if not config.data.features:
        raise ConfigError(f"{config.name}: data.features is not set: give data.features=float32 or float16")
    where = pick_device(device)
    encoders = load_encoders(config)
    prints = fingerprints(config, encoders)
    done = []
    for source in config.data.sources:
        reader = open_dataset(source.path)
        for kind, key in store_keys(config, reader, prints).items():
            folder = store_folder(key)
            was_there = (folder / "key.json").is_file()
            if not was_there:
                _write(reader, key, folder, encoders[kind].to(where), batch_size)
            row = {"source": source.path, "kind": kind, "pictures": int(picture_rows(reader)[-1])}
            row["unreadable"] = int((~np.load(folder / "valid.npy")).sum())
            done.append({**row, "folder": str(folder), "was_there": was_there})
    return done


def _write(
    reader: ShardReader, key: dict[str, Any], folder: Path, encoder: FrozenEncoder | CaptionPredictor, batch_size: int
) -> None:
    """Encode all pictures into ``folder``, which appears when it is whole; an interrupted run is continued.

    Two runs that want the same store take turns; the second finds it there.
    """
    part = folder.with_name(f".{folder.name}.part")
    rows = int(picture_rows(reader)[-1])
    outputs = _predicted if isinstance(encoder, CaptionPredictor) else _encoded
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")), torch.inference_mode():
        if (folder / "key.json").is_file():
            return
        shape = encoder.output_shape()
        values, valid, start = _open_part(part, (rows, *shape), key["dtype"])
        starts = range(start, rows, batch_size)
        name = f"{Path(str(reader.folder)).name}: {encoder.kind}"
        for number, at in enumerate(track(starts, name, disable=not starts), 1):
            end = min(at + batch_size, rows)
            found, readable = outputs(encoder, reader, at, end)
            values[at:end] = found.float().cpu().numpy().astype(key["dtype"])
            valid[at:end] = readable
            if number % FLUSH == 0:
                _save_progress(part, values, valid, end)
        _save_progress(part, values, valid, rows)
        # `FeatureStore` takes a folder with key.json for finished, so it is written last.
        (part / "done").unlink()
        (part / "key.json").write_text(json.dumps(key, indent=1))
        os.replace(part, folder)


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


def _open_part(part: Path, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The arrays of an unfinished store, and the first row that is still to be encoded."""
    done = part / "done"
    if done.is_file():
        values = np.lib.format.open_memmap(part / "features.npy", "r+")
        if values.shape == shape:  # the name is a hash of the key, so only a damaged part differs
            return values, np.load(part / "valid.npy"), int(done.read_text())
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    values = np.lib.format.open_memmap(part / "features.npy", "w+", dtype=dtype, shape=shape)
    return values, np.zeros(shape[0], bool), 0


def _save_progress(part: Path, values: Any, valid: np.ndarray, end: int) -> None:
    """Flush the rows before ``end``, then write ``end`` into ``done``, so that it never names rows not on disk."""
    values.flush()
    with whole_file(part / "valid.npy") as hidden:
        np.save(hidden, valid)
    write_whole(part / "done", str(end))


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
