"""The feature cache: outputs of the frozen encoders for a dataset's pictures, computed once (``pisces data encode``).

A store is known by all that its numbers depend on: the bytes of the pictures, the encoder's weights, how pixels are
prepared, and the precision. If any of these changes, it is another store; an old one is never read in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from open_pisces.data.shards import DamagedSample, ShardReader, data_path
from open_pisces.errors import PiscesError
from open_pisces.files import sha256_of

Kind = Literal["understanding", "generation", "predicted"]
"""Outputs of an encoder; or the generation vectors that an LLM predicts for a picture's caption."""
KINDS: tuple[Kind, ...] = ("understanding", "generation")
"""What the LLM's stages read; ``predicted`` is for the decoder."""


class FeatureError(PiscesError):
    """A feature cache that is missing, unfinished or of something else; the message says what differs."""


def feature_key(
    reader: ShardReader, kind: Kind, encoder: str, preprocessing: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """All that a store's numbers depend on.

    Args:
        reader: the dataset.
        kind: which encoder; ``predicted`` depends on captions too, so any change of the dataset makes it another store.
        encoder: a digest of its weights (`model.folder.weights_digest`).
        preprocessing: how pictures become its input, and what is done with its output.
        dtype: ``float32`` or ``float16``.
    """
    return {
        "pictures": reader.digest if kind == "predicted" else reader.image_digest,
        "kind": kind,
        "encoder": encoder,
        "preprocessing": preprocessing,
        "dtype": dtype,
    }


def store_folder(key: Mapping[str, Any]) -> Path:
    """Where the store of a key lies: ``features/`` in the data folder."""
    name = sha256_of(json.dumps(key, sort_keys=True).encode())[:20]
    return data_path("features") / name


def picture_rows(reader: ShardReader) -> np.ndarray:
    """The row of each sample's first picture in a store, and one entry more: the number of pictures."""
    return np.concatenate([[0], np.cumsum(reader.picture_counts())])


class FeatureStore:
    """Features of one dataset, memory-mapped.

    Args:
        reader: the dataset.
        keys: the key of each kind to read.

    Raises:
        FeatureError: if there is no finished store of a key.
    """

    def __init__(self, reader: ShardReader, keys: Mapping[Kind, dict[str, Any]]) -> None:
        self.keys = dict(keys)
        self._name = str(reader.folder)
        self._rows = picture_rows(reader)
        self._values: dict[Kind, np.ndarray] = {}
        self._valid: dict[Kind, np.ndarray] = {}
        for kind, key in self.keys.items():
            folder = store_folder(key)
            if not (folder / "key.json").is_file():
                raise FeatureError(_why_missing(self._name, key))
            self._values[kind] = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
            self._valid[kind] = np.load(folder / "valid.npy", allow_pickle=False)

    def __contains__(self, kind: str) -> bool:
        return kind in self._values

    def shape(self, kind: Kind) -> tuple[int, int]:
        """Vectors of a picture, and their width."""
        values = self._values[kind]
        return int(values.shape[1]), int(values.shape[2])

    def read(self, kind: Kind, index: int) -> tuple[np.ndarray, ...]:
        """The features of each picture of a sample, ``(vectors, width)``.

        Raises:
            DamagedSample: if one of the pictures could not be read when the store was made.
        """
        rows = range(int(self._rows[index]), int(self._rows[index + 1]))
        if not self._valid[kind][rows.start : rows.stop].all():
            message = f"{self._name}: sample {index}: a picture could not be read when it was encoded"
            raise DamagedSample(message, "image")
        return tuple(np.array(self._values[kind][row]) for row in rows)


def _why_missing(name: str, key: dict[str, Any]) -> str:
    """What the nearest store of this kind was made of instead."""
    message = f"{name}: no {key['kind']} features for this encoder and these pictures: run `pisces data encode RECIPE`"
    kept = [json.loads(path.read_text()) for path in data_path("features").glob("*/key.json")]
    same_kind = [other for other in kept if other["kind"] == key["kind"]]
    if not same_kind:
        return message
    differences = [[name for name in key if other.get(name) != key[name]] for other in same_kind]
    fewest: list[str] = min(differences, key=len)
    return f"{message} (there is a store, but of other {' and '.join(fewest)})"
