"""``pisces data encode``: the outputs of a recipe's frozen encoders, written once for every picture of its datasets."""

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

from open_pisces.config import ConfigError, RunConfig
from open_pisces.data.features import picture_rows, store_folder
from open_pisces.data.images import ImageError, generation_bytes, open_image, understanding_bytes
from open_pisces.data.shards import DamagedSample, ShardReader, open_dataset
from open_pisces.device import pick_device
from open_pisces.factory.encoders import FrozenEncoder, encoder_keys, load_encoders
from open_pisces.files import locked, whole_file, write_whole

FLUSH = 64
"""Batches after which an interrupted run can go on."""


def encode(config: RunConfig, batch_size: int = 64, device: str = "auto") -> list[dict[str, Any]]:
    """Write the feature stores that a recipe with ``data.features`` reads; those that are there are kept.

    Args:
        config: the recipe's settings.
        batch_size: pictures encoded together.
        device: where.

    Returns:
        For each source and kind: path, pictures, how many could not be read, folder, and whether it was there.

    Raises:
        ConfigError: if the recipe reads no features.
    """
    if not config.data.features:
        raise ConfigError(f"{config.name}: data.features is not set: give data.features=float32 or float16")
    where = pick_device(device)
    encoders = load_encoders(config)
    done = []
    for source in config.data.sources:
        reader = open_dataset(source.path)
        for kind, key in encoder_keys(config, reader, encoders).items():
            folder = store_folder(key)
            there = (folder / "key.json").is_file()
            if not there:
                _write(reader, key, folder, encoders[kind].to(where), batch_size)
            bad = int((~np.load(folder / "valid.npy")).sum())
            pictures = int(picture_rows(reader)[-1])
            done.append(
                {"source": source.path, "kind": kind, "pictures": pictures, "unreadable": bad, "folder": str(folder)}
                | {"was_there": there}
            )
    return done


def _write(reader: ShardReader, key: dict[str, Any], folder: Path, encoder: FrozenEncoder, batch_size: int) -> None:
    """Encode all pictures into ``folder``, which appears when it is whole; what an interrupted run did is kept.

    Two runs that want the same store take turns; the second finds it there.
    """
    work = folder.with_name(f".{folder.name}.part")
    rows = int(picture_rows(reader)[-1])
    side = encoder.image_size
    kind = encoder.kind
    device = next(encoder.parameters()).device
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")), torch.inference_mode():
        if (folder / "key.json").is_file():
            return
        shape = tuple(encoder(torch.zeros(1, 3, side, side, device=device)).shape[1:])
        values, valid, start = _open(work, (rows, *shape), key["dtype"])
        cut = generation_bytes if kind == "generation" else understanding_bytes
        batches = list(range(start, rows, batch_size))
        for number, at in enumerate(track(batches, f"{Path(str(reader.folder)).name}: {kind}", disable=not batches), 1):
            end = min(at + batch_size, rows)
            pixels, good = zip(*_pictures(reader, at, end, cut, side), strict=True)
            found = encoder(torch.from_numpy(np.stack(pixels)).to(device)).float().cpu().numpy()
            values[at:end] = found.astype(key["dtype"])
            valid[at:end] = good
            if number % FLUSH == 0:
                _note(work, values, valid, end)
        _note(work, values, valid, rows)
        (work / "done").unlink()
        (work / "key.json").write_text(json.dumps(key, indent=1))
        os.replace(work, folder)


def _open(work: Path, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The arrays of an unfinished store, and from which row to go on."""
    done = work / "done"
    if done.is_file():
        values = np.lib.format.open_memmap(work / "features.npy", "r+")
        if values.shape == shape:
            return values, np.load(work / "valid.npy"), int(done.read_text())
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    values = np.lib.format.open_memmap(work / "features.npy", "w+", dtype=dtype, shape=shape)
    return values, np.zeros(shape[0], bool), 0


def _note(work: Path, values: Any, valid: np.ndarray, end: int) -> None:
    """What is on disk up to ``end`` counts from now on."""
    values.flush()
    with whole_file(work / "valid.npy") as part:
        np.save(part, valid)
    write_whole(work / "done", str(end))


def _pictures(
    reader: ShardReader, start: int, end: int, cut: Callable[[Any, int], np.ndarray], side: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """The pixels of pictures ``start`` to ``end``; a blank, and False, for one that cannot be read."""
    rows = picture_rows(reader)
    sample = int(np.searchsorted(rows, start, side="right")) - 1
    for row in range(start, end):
        while rows[sample + 1] <= row:
            sample += 1
        try:
            raw = reader.pictures(sample)[row - int(rows[sample])]
            yield cut(open_image(raw), side), True
        except (DamagedSample, ImageError):
            yield np.zeros((3, side, side), np.uint8), False
