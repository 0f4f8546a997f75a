"""Batches of a step: a closed-form function of (seed, step, mixture), so a resumed run reads what it would have.

Every rank gets its part of the same global batch, whatever their number. A sample that cannot be used leaves a
hole: it is skipped, counted and named, and no other sample moves. Packing, where several samples share a row, happens
inside one rank's part of one global batch, from the lengths alone: there is nothing to resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.batch import PairBatch, Sample, SequenceBatch, Skip, StepBatches
from open_pisces.config import DataConfig
from open_pisces.data.features import KINDS, FeatureStore, Kind
from open_pisces.data.images import generation_bytes
from open_pisces.data.order import Draw, Mixture, stream
from open_pisces.data.prompts import (
    IGNORED,
    MULTIPLE,
    LengthError,
    Rendered,
    Renderer,
    SampleError,
    collate,
    collate_packed,
    sample_turns,
)
from open_pisces.data.shards import DamagedSample
from open_pisces.errors import PiscesError

PAIR_KINDS: tuple[Kind, ...] = ("generation", "predicted")
"""Cached vectors that pairs may come with."""
TRIES = 32
"""Row lengths tried for a batch."""


class PackingError(PiscesError):
    """A sample that fits in no row; the message names its length and the remedy."""


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most ``capacity``: the longest sample first, each into the first row with room.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Returns:
        The samples of each row, by their place in ``lengths``.

    Raises:
        PackingError: for a sample longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[sample] > capacity:
            raise PackingError(f"a sample of {lengths[sample]} tokens, rows have {capacity}: raise data.row_length")
        row = next((r for r, left in enumerate(room) if left >= lengths[sample]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows


def pack(lengths: Sequence[int], row_length: int, multiple: int = 8) -> tuple[list[list[int]], int]:
    """Rows by first fit, of the length up to ``row_length`` that leaves the fewest places empty.

    Few samples seldom fill rows of a given length; rows a little shorter, or one more of them, often do.

    Args:
        lengths: tokens of each sample.
        row_length: the longest row.
        multiple: the length of the rows is a multiple of this, or ``row_length``.

    Returns:
        The samples of each row, and the rows' length.
    """
    if not lengths:
        return [], min(multiple, row_length)
    shortest = max(*lengths, row_length // 2) if len(lengths) > 1 else lengths[0]
    choices = [row_length, *range(row_length // multiple * multiple, shortest - 1, -multiple)]
    tried = choices[:: -(-len(choices) // TRIES)]
    rows = {length: first_fit_decreasing(lengths, length) for length in tried}
    best = min(tried, key=lambda length: (len(rows[length]) * length, length))
    return rows[best], best


# ---------------------------------------------------------------------------------------------- bad samples


class TooManyDamaged(PiscesError):
    """More samples had to be skipped than the run allows; the message names the first of them."""


@dataclass
class SkipTally:
    """Counts what was skipped since the run began, by cause.

    Args:
        allowed: share of all samples read; up to a thousand samples, of a thousand.
    """

    allowed: float
    read: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    first: list[Skip] = field(default_factory=list)

    def add(self, step: StepBatches) -> None:
        """Count a step's samples.

        Raises:
            TooManyDamaged: above the allowed share.
        """
        self.read += step.read
        self.causes.update(skip.cause for skip in step.skipped)
        self.first += step.skipped[: 5 - len(self.first)]
        skipped = sum(self.causes.values())
        if skipped > self.allowed * max(self.read, 1000):
            causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.causes.items()))
            named = "; ".join(skip.message for skip in self.first)
            raise TooManyDamaged(
                f"{skipped} of {self.read:,} samples could not be used ({causes}), data.max_bad allows "
                f"{self.allowed:.2%}: {named}: filter the dataset (`pisces data filter`) or raise data.max_bad"
            )


def _tried(read: Callable[[Draw], Any], draws: list[Draw], mixture: Mixture) -> tuple[list[Any], tuple[Skip, ...]]:
    """What could be read, in order, and what could not."""
    done = []
    skipped = []
    for draw in draws:
        try:
            done.append(read(draw))
        except (DamagedSample, SampleError) as error:
            source = mixture.sources[draw.source].path
            skipped.append(Skip(source, mixture.readers[draw.source].key(draw.index), error.cause, str(error)))
    return done, tuple(skipped)


# -------------------------------------------------------------------------------------------------- loaders


@dataclass(frozen=True)
class _Read:
    """A rendered sample with its pictures, or with what the encoders make of them."""

    rendered: Rendered
    images: tuple[Image, ...]
    features: dict[Kind, tuple[np.ndarray, ...]]
    epoch: int
    name: str
    """Of the sample, unlike that of any other in the mixture."""

    @property
    def draws(self) -> list[tuple[int, str]]:
        """(epoch, name) of each picture it generates."""
        return [(self.epoch, f"{self.name}/{image}") for image in self.rendered.generation_images]


class SequenceLoader:
    """Global batches for the LLM stages: a rank's part, packed into rows or padded, cut into micro-batches.

    Batches carry no totals yet: the loop sums those of all ranks and writes them in.

    Args:
        mixture: the order and the samples.
        renderer: samples to tokens.
        config: the data settings.
        seed: the run's seed.
        batch_size: samples of the global batch.
        micro_batches: parts an unpacked batch is cut into.
        sizes: sides of the understanding and the generation encoder's input in pixels.
        features: a feature store for each source, where the encoders' outputs are read from a cache.
        multiple: lengths are a multiple of this.
        rank: of this process.
        ranks: their number.
    """

    def __init__(
        self,
        mixture: Mixture,
        renderer: Renderer,
        config: DataConfig,
        seed: int,
        batch_size: int,
        micro_batches: int,
        sizes: tuple[int, int],
        features: Sequence[FeatureStore] = (),
        multiple: int = MULTIPLE,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.mixture = mixture
        self.renderer = renderer
        self.config = config
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.sizes = sizes
        self.features = features
        self.multiple = multiple
        # What comes from the cache needs no pixels: size 0.
        cached = [bool(features) and kind in features[0] for kind in KINDS]
        self._cut = (0 if cached[0] else sizes[0], 0 if cached[1] else sizes[1])
        self.rank = rank
        self.ranks = ranks

    def __call__(self, step: int) -> StepBatches:
        """The micro-batches of a step."""
        draws = self.mixture.batch(step, self.batch_size, self.rank, self.ranks)
        read, skipped = _tried(self._read, draws, self.mixture)
        batches = self._packed(read) if self.config.row_length else self._padded(read)
        totals: dict[str, Any] = {
            "total_text": sum(len(batch.labels_K) for batch in batches),
            "total_vectors": sum(len(batch.generation_at_K) for batch in batches),
            "total_seen": sum(len(batch.understanding_at_K) for batch in batches),
        }
        # What fills the rows, and how many places there are: the share of padding in the log.
        real = sum(len(r.rendered.ids) for r in read)
        all_ = sum(batch.ids_BS.numel() for batch in batches)
        return StepBatches(batches, len(draws), skipped, totals, real, all_)

    def blank(self) -> SequenceBatch:
        """A micro-batch that weighs nothing, for a rank with fewer rows than another."""
        if self.config.row_length:
            return self._with_samples(collate_packed([[]], self.multiple, [], [], self.renderer, *self._cut), [])
        nothing = Rendered(ids=[self.renderer.pad], labels=[IGNORED], understanding=[False], generation=[False])
        return self._with_samples(collate([nothing], [()], self.renderer, *self._cut, multiple=self.multiple), [])

    def _packed(self, read: list[_Read]) -> list[SequenceBatch]:
        rows, length = pack([len(r.rendered.ids) for r in read], self.config.row_length, self.multiple)
        parts = [rows[at : at + self.config.rows] for at in range(0, len(rows), self.config.rows)]
        rendered = [r.rendered for r in read]
        images = [r.images for r in read]
        batches = []
        for part in parts:
            laid_out = [read[i] for i in chain.from_iterable(part)]
            batch = collate_packed(part, length, rendered, images, self.renderer, *self._cut)
            batches.append(self._with_samples(batch, laid_out))
        return batches or [self.blank()]

    def _padded(self, read: list[_Read]) -> list[SequenceBatch]:
        """Micro-batches of similar length; fewer samples than micro-batches leave some blank."""
        # Neighbors in length share a micro-batch, so little is padded.
        by_length = sorted(read, key=lambda r: len(r.rendered.ids))
        batches = []
        for cut in np.array_split(np.arange(len(read)), self.micro_batches):
            if not len(cut):
                batches.append(self.blank())
                continue
            part = [by_length[i] for i in cut]
            rendered = [r.rendered for r in part]
            images = [r.images for r in part]
            batch = collate(rendered, images, self.renderer, *self._cut, multiple=self.multiple)
            batches.append(self._with_samples(batch, part))
        return batches

    def _with_samples(self, batch: SequenceBatch, read: list[_Read]) -> SequenceBatch:
        """What the samples add to their layout: names to draw from, and cached features."""
        batch = replace(batch, draws=tuple(chain.from_iterable(one.draws for one in read)))
        if not self.features:
            return batch
        seen: list[np.ndarray] = []
        drawn: list[np.ndarray] = []
        for one in read:  # a kind that is not cached has no features, and its pictures are pixels in the batch
            if "understanding" in one.features:
                seen += [one.features["understanding"][i] for i in one.rendered.understanding_images]
            if "generation" in one.features:
                drawn += [one.features["generation"][i] for i in one.rendered.generation_images]
        store = self.features[0]
        if "understanding" in store:
            batch = replace(batch, understanding_features_BNE=_tensor(seen, store.shape("understanding")))
        if "generation" in store:
            batch = replace(batch, generation_features_BME=_tensor(drawn, store.shape("generation")))
        return batch

    def _read(self, draw: Draw) -> _Read:
        reader = self.mixture.readers[draw.source]
        sample = reader[draw.index] if any(self._cut) else reader.without_pixels(draw.index)
        # Keyed by the sample, not by its place: the same sample gets the same wording wherever it is drawn in an epoch.
        random = stream(self.seed, "render", draw.source, draw.epoch, sample.key)
        turns = sample_turns(
            sample,
            draw.task,
            random,
            self.config.drop_caption,
            self.config.questions_per_image,
            keep_system=self.config.system == "keep",
        )
        rendered = self.renderer.render(turns)
        if len(rendered.ids) > self.config.max_length:
            raise LengthError(
                f"sample {sample.key!r} of {sample.source!r} takes {len(rendered.ids)} tokens as {draw.task}; "
                f"data.max_length is {self.config.max_length}"
            )
        store = self.features[draw.source] if self.features else None
        features = {kind: store.read(kind, draw.index) for kind in KINDS if store and kind in store}
        shown = max((*rendered.understanding_images, *rendered.generation_images), default=-1)
        count = len(sample.images)
        if shown >= count:
            raise SampleError(f"sample {sample.key!r} of {sample.source!r}: picture {shown} is named, it has {count}")
        return _Read(rendered, sample.images, features, draw.epoch, f"{draw.source}/{sample.key}")


def _tensor(features: list[np.ndarray], shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack(features).astype(np.float32)) if features else torch.zeros(0, *shape)


def _digest(ids: list[int]) -> int:
    return int.from_bytes(blake2b(str(ids).encode(), digest_size=8).digest(), "big", signed=True)


class PairLoader:
    """Global batches of pictures and captions for gen-CLIP and the decoder: a rank's part of them."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Any,
        seed: int,
        batch_size: int,
        micro_batches: int,
        sizes: tuple[int, int],
        features: Sequence[FeatureStore] = (),
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.sizes = sizes
        self.features = features
        self.rank = rank
        self.ranks = ranks

    def __call__(self, step: int) -> StepBatches:
        """The micro-batches of a step."""
        draws = self.mixture.batch(step, self.batch_size, self.rank, self.ranks)
        read, skipped = _tried(self._read, draws, self.mixture)
        cuts = [cut for cut in np.array_split(np.arange(len(read)), self.micro_batches) if len(cut)]
        batches = [self.collate([read[i] for i in cut]) for cut in cuts]
        return StepBatches(batches, len(draws), skipped, {"total": len(read)})

    def blank(self) -> PairBatch:
        """A micro-batch that weighs nothing, for a rank with fewer than another."""
        end = self.tokenizer.eos_token_id
        return PairBatch(
            pixels_BCHW=torch.zeros(1, 3, self.sizes[0], self.sizes[0], dtype=torch.uint8),
            targets_BCHW=torch.zeros(1, 3, self.sizes[1], self.sizes[1], dtype=torch.uint8),
            ids_BS=torch.tensor([[end]]),
            mask_BS=torch.tensor([[True]]),
            draws=((0, "blank"),),
            captions_B=torch.zeros(1, dtype=torch.int64),
            blank=True,
            features_BME=self._blank("generation"),
            predicted_BME=self._blank("predicted"),
        )

    def _blank(self, kind: Kind) -> Tensor | None:
        store = self.features[0] if self.features else None
        return torch.zeros(1, *store.shape(kind)) if store and kind in store else None

    def collate(self, read: list[tuple[Draw, Sample, str, dict[Kind, np.ndarray]]]) -> PairBatch:
        """(draw, sample, caption, features) to one batch."""
        input_size, output_size = self.sizes
        # CLIP's text tower takes 77 tokens, the last of which is the end.
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"][:76] for _, _, text, _ in read]
        ids = [row + [self.tokenizer.eos_token_id] for row in ids]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        pixels = np.stack([generation_bytes(sample.images[0], input_size) for _, sample, *_ in read])
        targets = pixels
        if output_size != input_size:
            targets = np.stack([generation_bytes(sample.images[0], output_size) for _, sample, *_ in read])
        features = [found["generation"] for *_, found in read if "generation" in found]
        predicted = [found["predicted"] for *_, found in read if "predicted" in found]
        return PairBatch(
            pixels_BCHW=torch.from_numpy(pixels),
            targets_BCHW=torch.from_numpy(targets),
            ids_BS=torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
            mask_BS=torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids]),
            draws=tuple((draw.epoch, sample.key) for draw, sample, *_ in read),
            captions_B=torch.tensor([_digest(row) for row in ids]),
            features_BME=self._stacked("generation", features),
            predicted_BME=self._stacked("predicted", predicted),
        )

    def _stacked(self, kind: Kind, found: list[np.ndarray]) -> Tensor | None:
        """Cached vectors of a batch; None for a kind that is not cached."""
        store = self.features[0] if self.features else None
        return _tensor(found, store.shape(kind)) if store and kind in store else None

    def _read(self, draw: Draw) -> tuple[Draw, Sample, str, dict[Kind, np.ndarray]]:
        """A sample with a picture, one of its captions (which one is drawn per epoch), and its cached features."""
        sample = self.mixture.sample(draw)
        texts = [text for text in (*sample.short_captions, sample.detailed) if text]
        if not texts or not sample.images:
            lacks = "no caption" if sample.images else "no picture"
            raise SampleError(f"sample {sample.key!r} of {sample.source!r} has {lacks}: drop it from the source")
        chosen = stream(self.seed, "caption", draw.epoch, sample.key).integers(len(texts))
        store = self.features[draw.source] if self.features else None
        features = {kind: store.read(kind, draw.index)[0] for kind in PAIR_KINDS if store and kind in store}
        return draw, sample, texts[int(chosen)], features
