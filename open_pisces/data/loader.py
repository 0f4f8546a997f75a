"""Batches of a step: a closed-form function of (seed, step, mixture), so a resumed run reads what it would have."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.batch import PairBatch, Sample, SequenceBatch
from open_pisces.config import DataConfig
from open_pisces.data.draws import stream
from open_pisces.data.images import generation_pixels, understanding_pixels
from open_pisces.data.mixture import Mixture
from open_pisces.data.prompts import IGNORED, Rendered, Renderer, SampleError, sample_turns

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
    """Sequences and their pictures to one padded batch.

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
    ids_BS = np.full((len(rendered), S), renderer.pad, np.int64)
    labels_BS = np.full((len(rendered), S), IGNORED, np.int64)
    understanding_BS, generation_BS = np.zeros((2, len(rendered), S), bool)
    for row, r in enumerate(rendered):
        at = slice(S - len(r.ids), S) if left else slice(0, len(r.ids))
        ids_BS[row, at], labels_BS[row, at] = r.ids, r.labels
        understanding_BS[row, at], generation_BS[row, at] = r.understanding, r.generation
    supervised = np.flatnonzero(labels_BS != IGNORED)
    seen = [pictures[i] for r, pictures in zip(rendered, images, strict=True) for i in r.understanding_images]
    drawn = [pictures[i] for r, pictures in zip(rendered, images, strict=True) for i in r.generation_images]
    return SequenceBatch(
        ids_BS=torch.from_numpy(ids_BS),
        understanding_at_K=torch.from_numpy(np.flatnonzero(understanding_BS)),
        generation_at_K=torch.from_numpy(np.flatnonzero(generation_BS)),
        text_at_K=torch.from_numpy(supervised - 1),
        labels_K=torch.from_numpy(labels_BS.reshape(-1)[supervised]),
        understanding_pixels_BCHW=_stack(seen, understanding_pixels, understanding_size),
        generation_pixels_BCHW=_stack(drawn, generation_pixels, generation_size),
    )


def _stack(images: list[Image], cut: Callable[[Image, int], np.ndarray], size: int) -> Tensor:
    return torch.from_numpy(np.stack([cut(i, size) for i in images])) if images else torch.zeros(0, 3, size, size)


class SequenceLoader:
    """Global batches for the LLM stages, cut into micro-batches of similar length."""

    def __init__(
        self,
        mixture: Mixture,
        renderer: Renderer,
        config: DataConfig,
        seed: int,
        batch_size: int,
        micro_batches: int,
        sizes: tuple[int, int],
    ) -> None:
        self.mixture, self.renderer, self.config, self.seed = mixture, renderer, config, seed
        self.batch_size, self.micro_batches, self.sizes = batch_size, micro_batches, sizes

    def __call__(self, step: int) -> list[SequenceBatch]:
        """The micro-batches of a step; every one carries the counts of the whole batch."""
        pairs = [self._read(g) for g in range(step * self.batch_size, (step + 1) * self.batch_size)]
        pairs.sort(key=lambda pair: len(pair[0].ids))
        cuts = np.array_split(np.arange(len(pairs)), self.micro_batches)
        batches = [
            collate([pairs[i][0] for i in cut], [pairs[i][1] for i in cut], self.renderer, *self.sizes) for cut in cuts
        ]
        text = sum(len(batch.labels_K) for batch in batches)
        vectors = sum(len(batch.generation_at_K) for batch in batches)
        return [replace(batch, total_text=text, total_vectors=vectors) for batch in batches]

    def _read(self, g: int) -> tuple[Rendered, tuple[Image, ...]]:
        draw = self.mixture.draw(g)
        sample = self.mixture.sample(draw)
        random = stream(self.seed, "render", draw.source, draw.epoch, sample.key)
        turns = sample_turns(sample, draw.task, random, self.config.drop_caption, self.config.questions_per_image)
        rendered = self.renderer.render(turns)
        if len(rendered.ids) > self.config.max_length:
            raise SampleError(
                f"sample {sample.key!r} of {sample.source!r} takes {len(rendered.ids)} tokens as {draw.task}; "
                f"data.max_length is {self.config.max_length}"
            )
        return rendered, sample.images


class PairLoader:
    """Global batches of pictures and captions for gen-CLIP and the decoder."""

    def __init__(
        self, mixture: Mixture, tokenizer: Any, seed: int, batch_size: int, micro_batches: int, sizes: tuple[int, int]
    ) -> None:
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.batch_size, self.micro_batches, self.sizes = batch_size, micro_batches, sizes

    def __call__(self, step: int) -> list[PairBatch]:
        """The micro-batches of a step."""
        draws = [self.mixture.draw(g) for g in range(step * self.batch_size, (step + 1) * self.batch_size)]
        read = [(draw.epoch, self.mixture.sample(draw)) for draw in draws]
        cuts = np.array_split(np.arange(len(read)), self.micro_batches)
        return [self.collate([read[i] for i in cut]) for cut in cuts]

    def collate(self, read: list[tuple[int, Sample]]) -> PairBatch:
        """(epoch, sample) pairs to one batch; which of its two captions a sample shows is drawn per epoch."""
        input_size, output_size = self.sizes
        ids = [self.tokenizer(self._caption(*pair), add_special_tokens=False)["input_ids"][:76] for pair in read]
        ids = [row + [self.tokenizer.eos_token_id] for row in ids]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        pixels = np.stack([generation_pixels(sample.images[0], input_size) for _, sample in read])
        targets = pixels
        if output_size != input_size:
            targets = np.stack([generation_pixels(sample.images[0], output_size) for _, sample in read])
        return PairBatch(
            pixels_BCHW=torch.from_numpy(pixels),
            targets_BCHW=torch.from_numpy(targets),
            ids_BS=torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
            mask_BS=torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids]),
            draws=tuple((epoch, sample.key) for epoch, sample in read),
            total=self.batch_size,
        )

    def _caption(self, epoch: int, sample: Sample) -> str:
        texts = [text for text in (sample.short, sample.detailed) if text]
        if not texts:
            raise SampleError(f"sample {sample.key!r} of {sample.source!r} has no caption: drop it from the source")
        return texts[int(stream(self.seed, "caption", epoch, sample.key).integers(len(texts)))]


def prefetch(load: Callable[[int], Any], steps: range, depth: int = 4) -> Iterator[Any]:
    """``load(step)`` for every step, prepared by a thread while the last one trains; its errors surface here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        for step in steps:
            try:
                item: tuple[Any, BaseException | None] = (load(step), None)
            except BaseException as error:
                item = (None, error)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or item[1] is not None:
                return

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in steps:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
