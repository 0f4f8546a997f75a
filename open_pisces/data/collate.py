"""Rendered sequences and their pictures to one batch: padded, a sequence a row, or packed, several in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.batch import SequenceBatch
from open_pisces.data.images import generation_bytes, understanding_bytes
from open_pisces.data.prompts import IGNORED, Rendered, Renderer

MULTIPLE = 64
"""Sequences are padded to a multiple of this, so that a compiled model meets few shapes."""


def collate(
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    renderer: Renderer,
    understanding_size: int,
    generation_size: int,
    left: bool = False,
    multiple: int = MULTIPLE,
) -> SequenceBatch:
    """Sequences and their pictures to one padded batch, a sequence a row.

    Args:
        rendered: B sequences.
        images: the pictures of each, which its places refer to.
        renderer: knows the padding token.
        understanding_size: side of the understanding encoder's input in pixels.
        generation_size: side of the generation encoder's input in pixels.
        left: pad on the left (generation) instead of on the right (training, where causality hides the padding).
        multiple: the padded length is a multiple of this.
    """
    longest = max(len(r.ids) for r in rendered)
    S = -(-longest // multiple) * multiple
    starts = [S - len(r.ids) for r in rendered] if left else [0] * len(rendered)
    laid = _lay_out(rendered, list(enumerate(starts)), (len(rendered), S), renderer.pad)
    return _batch(laid, rendered, images, understanding_size, generation_size)


def collate_packed(
    rows: list[list[int]],
    length: int,
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    renderer: Renderer,
    understanding_size: int,
    generation_size: int,
) -> SequenceBatch:
    """Packed rows: the sequences of a row one after another, each with positions of its own from 0.

    Args:
        rows: the sequences of each row, by their place in ``rendered``; an empty row is all padding and weighs nothing.
        length: S.
        rendered: all sequences.
        images: the pictures of each.
        renderer: knows the padding token.
        understanding_size: side of the understanding encoder's input in pixels.
        generation_size: side of the generation encoder's input in pixels.
    """
    chosen: list[Rendered] = []
    shown: list[tuple[Image, ...]] = []
    places: list[tuple[int, int]] = []
    samples_BS, positions_BS = np.zeros((2, len(rows), length), np.int64)
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(rendered[i].ids)
            chosen.append(rendered[i])
            shown.append(images[i])
            places.append((number, start))
            samples_BS[number, start:end] = len(chosen)  # from 1 on: 0 is padding
            positions_BS[number, start:end] = np.arange(end - start)
            start = end
    laid = _lay_out(chosen, places, (len(rows), length), renderer.pad)
    batch = _batch(laid, chosen, shown, understanding_size, generation_size)
    return replace(batch, samples_BS=torch.from_numpy(samples_BS), positions_BS=torch.from_numpy(positions_BS))


def _lay_out(
    rendered: list[Rendered], places: list[tuple[int, int]], shape: tuple[int, int], pad: int
) -> tuple[np.ndarray, ...]:
    """ids, labels and the two kinds of places, (B, S) each; sequence i begins at ``places[i]``, (row, column)."""
    ids_BS = np.full(shape, pad, np.int64)
    labels_BS = np.full(shape, IGNORED, np.int64)
    understanding_BS, generation_BS = np.zeros((2, *shape), bool)
    for r, (row, start) in zip(rendered, places, strict=True):
        at = slice(start, start + len(r.ids))
        ids_BS[row, at] = r.ids
        labels_BS[row, at] = r.labels
        understanding_BS[row, at] = r.understanding
        generation_BS[row, at] = r.generation
    return ids_BS, labels_BS, understanding_BS, generation_BS


def _batch(
    laid: tuple[np.ndarray, ...],
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    understanding_size: int,
    generation_size: int,
) -> SequenceBatch:
    ids_BS, labels_BS, understanding_BS, generation_BS = laid
    supervised = np.flatnonzero(labels_BS != IGNORED)
    seen: list[Image] = []
    drawn: list[Image] = []
    for r, pictures in zip(rendered, images, strict=True):
        seen += [pictures[i] for i in r.understanding_images]
        drawn += [pictures[i] for i in r.generation_images]
    return SequenceBatch(
        ids_BS=torch.from_numpy(ids_BS),
        understanding_at_K=torch.from_numpy(np.flatnonzero(understanding_BS)),
        generation_at_K=torch.from_numpy(np.flatnonzero(generation_BS)),
        text_at_K=torch.from_numpy(supervised - 1),
        labels_K=torch.from_numpy(labels_BS.reshape(-1)[supervised]),
        understanding_pixels_BCHW=_stack(seen if understanding_size else [], understanding_bytes, understanding_size),
        generation_pixels_BCHW=_stack(drawn if generation_size else [], generation_bytes, generation_size),
    )


def _stack(images: list[Image], cut: Callable[[Image, int], np.ndarray], size: int) -> Tensor:
    if not images:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([cut(image, size) for image in images]))
