"""A look at a dataset: its samples as a contact sheet."""

from __future__ import annotations

from pathlib import Path

from open_pisces.data.shards import ShardError, open_dataset
from open_pisces.sheets import contact_sheet


def look(path: str | Path, out: str | Path = "look.png", count: int = 40, columns: int = 8) -> Path:
    """Write a sheet of samples with their short captions.

    Args:
        path: a dataset's folder, or its name under the data folder (``fixture/train``).
        out: the PNG to write.
        count: how many samples, spread evenly over the dataset.
        columns: pictures in a row.

    Raises:
        ShardError: without a dataset there, or if ``out`` cannot be written there.
    """
    reader = open_dataset(path)
    target = Path(out)
    if not target.parent.is_dir():
        raise ShardError(f"{target}: the folder {target.parent} does not exist; create it first")
    shown = min(count, len(reader))
    samples = [reader[index * len(reader) // shown] for index in range(shown)]
    if not samples:
        raise ShardError(f"nothing to look at in {reader.folder}: {len(reader)} samples, {count} wanted")
    sheet = contact_sheet([sample.images[0] for sample in samples], [sample.short for sample in samples], columns)
    sheet.save(target)
    return target
