"""A recipe on a number of GPUs: what a step has to do there, and the memory that each GPU needs for it.

What follows from shapes is counted (`flops`, `rehearsal`); what depends on data that is not at hand is assumed, by the
constants below.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from open_pisces.config import RunConfig
from open_pisces.data.collate import MULTIPLE
from open_pisces.errors import PiscesError
from open_pisces.plan.memory import Needs, measure_memory
from open_pisces.train.flops import Counts
from open_pisces.train.objectives import OBJECTIVES
from open_pisces.train.objectives.base import Objective
from open_pisces.train.shapes import Shape
from open_pisces.train.sharding import blocks, split_frozen

GIB = 2**30
TEXTS = {
    "generate_short": (20, 0),
    "generate_detailed": (120, 0),
    "caption_short": (20, 20),
    "caption_detailed": (120, 120),
    "question": (60, 20),
    "conversation": (250, 150),
}
"""Assumed tokens of a sample's text for each task, and how many of them the model has to write."""
FRAME = {"tiny": 5, "llama3": 35}
"""Tokens of a template around one exchange."""
PROMPT = 10
"""Assumed tokens of the request for a picture or a caption."""
CAPTION = 77
"""Tokens of gen-CLIP's captions: padded to the longest, which is cut there."""
PACKED, PADDED = 0.97, 0.8
"""Assumed share of places that hold a token, in packed rows and in padded ones of similar length."""
RESERVE = 4.0
"""GiB that no tensor shows: CUDA context, NCCL's and cuBLAS's buffers, gaps. An allowance, not a count."""


class PlanError(PiscesError):
    """A plan that cannot be made, or a training that does not fit; the message says by how much and what to change."""


# ------------------------------------------------------------------------------------------------------ an average


@dataclass(frozen=True)
class Mean:
    """An average sample."""

    tokens: float
    supervised: float
    seen: float
    drawn: float
    longest: int
    """Tokens of the longest task's."""


def mean_sample(config: RunConfig, seen: int, drawn: int) -> Mean:
    """The average over sources and tasks by their weights; ``seen`` and ``drawn`` are the vectors of a picture."""
    total, longest, sums = 0.0, 0, [0.0] * 4
    for source in config.data.sources:
        weights = sum(source.tasks.values())
        for task, weight in source.tasks.items():
            share = source.weight * weight / weights
            sample = _sample(config, task, seen, drawn)
            total, longest = total + share, max(longest, sample[0])
            sums = [old + share * new for old, new in zip(sums, sample, strict=True)]
    if not total:
        raise PlanError(f"{config.name}: data.sources has no tasks: there is no sample to plan for")
    tokens, supervised, shown, drawings = (value / total for value in sums)
    return Mean(tokens, supervised, shown, drawings, longest)


def _sample(config: RunConfig, task: str, seen: int, drawn: int) -> tuple[int, int, int, int]:
    """Tokens, supervised tokens, pictures to understand and pictures to draw of one task."""
    turns = config.data.questions_per_image if task == "question" else 1
    text, written = (turns * tokens for tokens in TEXTS[task])
    frame = FRAME[config.model.template] + (0 if task in ("question", "conversation") else PROMPT)
    draws = task.startswith("generate")
    tokens = frame + text + 2 + (drawn if draws else seen)  # 2: what opens and closes a picture
    return min(tokens, config.data.max_length), 3 if draws else written + turns, int(not draws), int(draws)


# -------------------------------------------------------------------------------------------------------- one layout


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it is fullest."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    gathered: float
    """Whole weights of two blocks and of what belongs to none, with the gradients that are being added up."""
    pictures: float
    """Of the whole step: they are on the device before its first micro-batch."""
    activations: float
    working: float
    """On top for a moment: encoders at work, a chunk of logits, a block computed again."""
    reserve: float = RESERVE * GIB

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass
class Layout:
    """A recipe on a number of GPUs; what has been counted for one is used again for others like it."""

    config: RunConfig
    gpus: int
    module: nn.Module
    counted: dict[Any, Needs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.config.train
        if self.gpus % settings.replicas:
            found = f"train.replicas = {settings.replicas} does not divide {self.gpus} GPUs"
            raise PlanError(f"{found}: set 1, or the number of machines")
        if settings.batch_size < self.gpus:
            found = f"train.batch_size = {settings.batch_size} is less than {self.gpus} GPUs"
            raise PlanError(f"{found}: take at most {settings.batch_size}, or raise it")

    def but(self, **changes: Any) -> Layout:
        """The same with some settings changed: ``gpus``, or keys of ``train`` and ``data``."""
        gpus, config = changes.pop("gpus", self.gpus), self.config
        for key, value in changes.items():
            room = "data" if key == "rows" else "train"
            config = config.model_copy(update={room: getattr(config, room).model_copy(update={key: value})})
        return Layout(config, gpus, self.module, self.counted)

    # ------------------------------------------------------------------------------------------ how much there is

    @property
    def samples(self) -> float:
        """Of one GPU in one step."""
        return self.config.train.batch_size / self.gpus

    @cached_property
    def mean(self) -> Mean:
        """The average sample of the LLM stages."""
        module: Any = self.module
        return mean_sample(self.config, module.understanding_encoder.vectors, self.config.model.generation.vectors)

    @property
    def objective(self) -> type[Objective]:
        """What the recipe trains."""
        return OBJECTIVES[self.config.objective]

    @property
    def has_sequences(self) -> bool:
        """Whether it trains the LLM on sequences."""
        return self.objective.has_sequences

    @property
    def places(self) -> float:
        """Places of one GPU's rows in one step, on average."""
        return self.samples * self.mean.tokens / (PACKED if self.config.data.row_length else PADDED)

    @property
    def row_length(self) -> int:
        """Places of one row."""
        if not self.config.data.row_length:
            return MULTIPLE * math.ceil(self.mean.longest / MULTIPLE)
        return min(self.config.data.row_length, max(self.mean.longest, 8 * math.ceil(self.places / 8)))

    @property
    def micro_batches(self) -> int:
        """Of one GPU in one step, on average."""
        if not self.has_sequences or not self.config.data.row_length:
            return min(self.config.train.accumulate, math.ceil(self.samples))
        return math.ceil(self.places / self.row_length / self.config.data.rows)

    @property
    def most_micro_batches(self) -> int:
        """Of a GPU that draws the longest samples only."""
        if not self.has_sequences or not self.config.data.row_length:
            return self.micro_batches
        rows = math.ceil(math.ceil(self.samples) * self.mean.longest / self.row_length)
        return math.ceil(rows / self.config.data.rows)

    @property
    def largest(self) -> Shape:
        """The micro-batch that memory has to hold."""
        samples, accumulate = math.ceil(self.samples), self.config.train.accumulate
        if not self.has_sequences:
            pictures = math.ceil(samples / accumulate)
            return Shape(pictures=pictures, caption=CAPTION, own=samples, everywhere=self.config.train.batch_size)
        packed, length, mean = bool(self.config.data.row_length), self.row_length, self.mean
        rows = math.ceil(samples / accumulate)
        if packed:
            rows = min(self.config.data.rows, math.ceil(samples * mean.longest / length))
        inside = rows * length / mean.tokens if packed else rows
        counts = (math.ceil(inside * each) for each in (mean.supervised, mean.seen, mean.drawn))
        return Shape(rows, length, packed, *counts)

    @property
    def counts(self) -> Counts:
        """What a step does, over all GPUs."""
        batch = self.config.train.batch_size
        cached = self.config.data.feature_kinds if self.config.data.features else []
        drawn, seen = ("generation" not in cached), ("understanding" not in cached)
        if not self.has_sequences:
            pairs = batch * CAPTION, batch * CAPTION**2
            return Counts(
                pictures=batch,
                drawn_pictures=batch * drawn,
                caption_tokens=pairs[0],
                caption_pairs=pairs[1],
                compared=batch**2,
            )
        module: Any = self.module
        mean, vectors = self.mean, (module.understanding_encoder.vectors, self.config.model.generation.vectors)
        return Counts(
            tokens=self.places * self.gpus,
            token_pairs=self.places * self.gpus * self.row_length,
            supervised=batch * mean.supervised,
            seen_pictures=batch * mean.seen * seen,
            drawn_pictures=batch * mean.drawn * drawn,
            seen_vectors=batch * mean.seen * vectors[0],
            drawn_vectors=batch * mean.drawn * vectors[1],
        )

    # ------------------------------------------------------------------------------------------- what it takes

    @property
    def needs(self) -> Needs:
        """Of the largest micro-batch."""
        settings = self.config.train
        key = (settings.checkpointing, settings.accumulate > 1, self.largest, self.gpus > 1)
        if key not in self.counted:
            self.counted[key] = measure_memory(
                self.module, self.objective.rehearsal, self.config, self.largest, self.gpus > 1
            )
        return self.counted[key]

    @property
    def memory(self) -> Memory:
        """Of the fullest GPU."""
        settings, shards = self.config.train, self.gpus // self.config.train.replicas
        float_, learning = (8 if settings.precision == "fp64" else 4), _numel(self.module, learning=True)
        whole = sum(_numel(part) for part in split_frozen(self.module, settings.shard_frozen_above)[0])
        if self.gpus == 1:
            whole = _numel(self.module) - learning
        spread = _numel(self.module) - learning - whole
        # Where gradients are added up over processes once a step only, each holds them whole until then.
        kept_whole = self.most_micro_batches > 1 and not settings.reduce_each
        return Memory(
            weights=float_ * ((learning + spread) / shards + whole),
            gradients=float_ * learning / (1 if kept_whole else shards),
            optimizer=2 * float_ * learning / shards,
            averages=float_ * learning / shards if settings.ema else 0,
            gathered=self._gathered() if self.gpus > 1 else 0,
            pictures=self.samples * self.objective.picture_bytes(self.module, self.counts, settings.batch_size),
            activations=self.needs.kept,
            working=self.needs.on_top,
        )

    @property
    def least(self) -> float:
        """Bytes that neither more GPUs nor any setting take away: the reserve, and what is gathered."""
        return RESERVE * GIB + self._gathered()

    def _gathered(self) -> float:
        *parts, rest = group_sizes(self.module, self.config.train.shard_frozen_above)
        small = 2 if self.config.train.precision == "bf16" else 4
        block = max(parts, default=0)
        return small * (2 * block + rest) + small * (block + rest) + 4 * block


def group_sizes(module: nn.Module, most: int) -> list[int]:
    """Parameters of what is gathered together when a model is sharded; the last is what belongs to no block."""
    whole, spread = split_frozen(module, most)
    taken = {p for part in whole for p in part.parameters()}
    sizes = []
    for part in [*blocks(module), *spread, module]:
        mine = set(part.parameters()) - taken
        sizes.append(sum(p.numel() for p in mine))
        taken |= mine
    return sizes


def _numel(module: nn.Module, learning: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)
