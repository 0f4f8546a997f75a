"""A recipe on a number of GPUs: what a step does there, and the memory that each GPU needs.

What follows from shapes is counted (`train.flops`, `plan.memory`). What depends on data that is not at hand is assumed,
by the constants below.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from open_pisces.config import RunConfig
from open_pisces.data.prompts import MULTIPLE
from open_pisces.errors import PiscesError
from open_pisces.plan.memory import Activations, measure_activations
from open_pisces.train.flops import Counts
from open_pisces.train.objectives import OBJECTIVES
from open_pisces.train.objectives.base import Objective, kept_in_half
from open_pisces.train.optim import muon_matrices
from open_pisces.train.shapes import Shape
from open_pisces.train.sharding import blocks, split_frozen

GIB = 2**30
TEXTS = {
    "generate_short": (20, 0),
    "generate_detailed": (120, 0),
    "reconstruct": (0, 0),
    "caption_short": (20, 20),
    "caption_detailed": (120, 120),
    "question": (60, 20),
    "conversation": (250, 150),
}
"""For each task the assumed tokens of a sample's text, and how many of them are supervised."""
FRAME = {"tiny": 5, "llama3": 35, "chatml": 10, "qwen2": 30, "smollm2": 30}
"""Tokens that a chat template puts around one exchange."""
PROMPT = 10
"""Assumed tokens of the request for a picture or a caption."""
CAPTION = 77
"""Tokens of gen-CLIP's captions: padded to the longest, which is truncated there."""
PACKED = 0.97
"""Assumed share of tokens that are no padding in packed rows."""
PADDED = 0.8
"""The same in padded rows of samples of similar length."""
NF4_BYTES = 0.516
"""Of a weight in bitsandbytes' doubly quantized NF4: four bits, a byte of scale for each 64, and the scales' scales."""
RESERVE = 4.0
"""GiB that no tensor shows: CUDA context, buffers of NCCL and cuBLAS, fragmentation. An allowance, not a count."""


class PlanError(PiscesError):
    """A plan that cannot be made, or a training that does not fit; the message says by how much and what to change."""


# ----------------------------------------------------------------------------------------------- the average sample


@dataclass(frozen=True)
class MeanSample:
    """An average sample of the LLM stages."""

    tokens: float
    supervised: float
    """Tokens with a label."""
    seen: float
    """Pictures to understand."""
    drawn: float
    """Pictures to draw."""
    longest: int
    """Tokens of a sample of the longest task."""


def mean_sample(config: RunConfig, seen: int, drawn: int) -> MeanSample:
    """The average over sources and tasks by their weights.

    Args:
        config: the recipe.
        seen: understanding vectors of a picture.
        drawn: generation vectors of a picture.

    Raises:
        PlanError: if the recipe has no tasks.
    """
    total = 0.0
    longest = 0
    sums = [0.0] * 4
    for source in config.data.sources:
        weights = sum(source.tasks.values())
        for task, weight in source.tasks.items():
            share = source.weight * weight / weights
            sample = _sample(config, task, seen, drawn)
            total += share
            longest = max(longest, sample[0])
            sums = [old + share * new for old, new in zip(sums, sample, strict=True)]
    if not total:
        raise PlanError(f"{config.name}: data.sources has no tasks: there is no sample to plan for")
    tokens, supervised, seen_pictures, drawn_pictures = (value / total for value in sums)
    return MeanSample(tokens, supervised, seen_pictures, drawn_pictures, longest)


def _sample(config: RunConfig, task: str, seen: int, drawn: int) -> tuple[int, int, int, int]:
    """Tokens, supervised tokens, pictures to understand and pictures to draw of one task."""
    turns = config.data.questions_per_image if task == "question" else 1
    text, supervised = TEXTS[task]
    prompt = 0 if task in ("question", "conversation") else PROMPT  # their texts hold the questions already
    draws = task.startswith("generate") or task == "reconstruct"
    shows = not task.startswith("generate")
    picture = draws * (drawn + 2) + shows * (seen + 2)  # [IMG] and [/IMG]
    tokens = min(FRAME[config.model.template] + prompt + turns * text + picture, config.data.max_length)
    if draws:
        return tokens, 3, int(shows), 1  # [IMG], [/IMG] and the end of the turn
    return tokens, turns * (supervised + 1), 1, 0


# -------------------------------------------------------------------------------------------------------- one layout


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it is fullest."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    gathered: float
    """Unsharded weights of two blocks and of what belongs to no block, with the gradients that are being reduced."""
    pictures: float
    """Of the whole step: they are on the device before its first micro-batch."""
    activations: float
    working: float
    """On top at the peak: encoders at work, a chunk of logits, a block computed again."""
    reserve: float = RESERVE * GIB

    @property
    def total(self) -> float:
        """The sum, in bytes."""
        return sum(asdict(self).values())


@dataclass
class Layout:
    """A recipe on a number of GPUs, one process each.

    ``measured`` is shared with the layouts that `changed` makes, so that no shape is measured twice.
    """

    config: RunConfig
    gpus: int
    module: nn.Module
    measured: dict[Any, Activations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.config.train
        if self.gpus % settings.replicas:
            found = f"train.replicas = {settings.replicas} does not divide {self.gpus} GPUs"
            raise PlanError(f"{found}: set 1, or the number of machines")
        if settings.batch_size < self.gpus:
            found = f"train.batch_size = {settings.batch_size} is less than {self.gpus} GPUs"
            raise PlanError(f"{found}: take at most {settings.batch_size}, or raise it")

    def changed(self, gpus: int | None = None, **settings: Any) -> Layout:
        """A copy with another number of GPUs, or other ``data.rows`` or keys of ``train``."""
        config = self.config
        for key, value in settings.items():
            room = "data" if key == "rows" else "train"
            config = config.model_copy(update={room: getattr(config, room).model_copy(update={key: value})})
        return Layout(config, gpus or self.gpus, self.module, self.measured)

    # ------------------------------------------------------------------------------------------ how much there is

    @property
    def objective(self) -> type[Objective]:
        """What the recipe trains."""
        return OBJECTIVES[self.config.objective]

    @property
    def has_sequences(self) -> bool:
        """Whether it trains the LLM on sequences."""
        return self.objective.has_sequences

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several samples."""
        return self.has_sequences and bool(self.config.data.row_length)

    @cached_property
    def mean(self) -> MeanSample:
        """The average sample of the LLM stages."""
        module: Any = self.module
        return mean_sample(self.config, module.understanding_encoder.vectors, self.config.model.generation.vectors)

    @property
    def samples_per_gpu(self) -> float:
        """Samples of one GPU in one step."""
        return self.config.train.batch_size / self.gpus

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens of one GPU's rows in one step, padding included, on average."""
        return self.samples_per_gpu * self.mean.tokens / (PACKED if self.is_packed else PADDED)

    @property
    def row_length(self) -> int:
        """Tokens of one row."""
        if not self.is_packed:
            return MULTIPLE * math.ceil(self.mean.longest / MULTIPLE)
        # The loader shortens rows that would stay empty, to a multiple of 8, but never below the longest sample.
        return min(self.config.data.row_length, max(self.mean.longest, 8 * math.ceil(self.tokens_per_gpu / 8)))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one GPU in one step, on average."""
        if not self.is_packed:
            return min(self.config.train.accumulate, math.ceil(self.samples_per_gpu))
        return math.ceil(self.tokens_per_gpu / self.row_length / self.config.data.rows)

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches of a GPU that draws only samples of the longest task."""
        if not self.is_packed:
            return self.micro_batches
        rows = math.ceil(math.ceil(self.samples_per_gpu) * self.mean.longest / self.row_length)
        return math.ceil(rows / self.config.data.rows)

    @property
    def largest_micro_batch(self) -> Shape:
        """The micro-batch that memory has to hold."""
        samples = math.ceil(self.samples_per_gpu)
        rows = math.ceil(samples / self.config.train.accumulate)
        if not self.has_sequences:
            return Shape(pictures=rows, caption=CAPTION, own=samples, everywhere=self.config.train.batch_size)
        held: float = rows  # samples
        if self.is_packed:
            rows = min(self.config.data.rows, math.ceil(samples * self.mean.longest / self.row_length))
            held = rows * self.row_length / self.mean.tokens
        counts = [math.ceil(held * each) for each in (self.mean.supervised, self.mean.seen, self.mean.drawn)]
        return Shape(rows, self.row_length, self.is_packed, *counts)

    @property
    def counts(self) -> Counts:
        """What a step computes, over all GPUs."""
        batch = self.config.train.batch_size
        cached = self.config.data.feature_kinds if self.config.data.features else []
        encodes_drawn = "generation" not in cached
        if not self.has_sequences:
            return Counts(
                pictures=batch,
                drawn_pictures=batch * encodes_drawn,
                caption_tokens=batch * CAPTION,
                caption_pairs=batch * CAPTION**2,
                compared=batch**2,
            )
        module: Any = self.module
        tokens = self.tokens_per_gpu * self.gpus
        seen = batch * self.mean.seen
        drawn = batch * self.mean.drawn
        return Counts(
            tokens=tokens,
            token_pairs=tokens * self.row_length,
            supervised=batch * self.mean.supervised,
            seen_pictures=seen * ("understanding" not in cached),
            drawn_pictures=drawn * encodes_drawn,
            seen_vectors=seen * module.understanding_encoder.vectors,
            drawn_vectors=drawn * self.config.model.generation.vectors,
        )

    # ------------------------------------------------------------------------------------------- what it takes

    @property
    def activations(self) -> Activations:
        """Of the largest micro-batch; measured once for each shape and way of computing."""
        settings = self.config.train
        key = (settings.checkpointing, settings.accumulate > 1, self.largest_micro_batch, self.gpus > 1)
        if key not in self.measured:
            self.measured[key] = measure_activations(
                self._as_held, self.objective.rehearsal, self.config, self.largest_micro_batch, self.gpus > 1
            )
        return self.measured[key]

    @property
    def _as_held(self) -> nn.Module:
        """The model with its frozen weights in the dtype that they are kept in; four bits compute as bfloat16."""
        half = kept_in_half(self.config, self.gpus)
        if not half:
            return self.module
        module = copy.deepcopy(self.module)
        for name in half:
            for parameter in getattr(module, name, nn.Module()).parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return module

    @property
    def _saved_in_half(self) -> float:
        """Bytes that frozen weights in bfloat16 or in four bits take less than in float32."""
        saved = 0.0
        quantized = self.config.train.lora is not None and self.config.train.lora.bits == 4
        for name in kept_in_half(self.config, self.gpus):
            part: Any = getattr(self.module, name, None)
            if part is None:
                continue
            saved += 2 * (count_parameters(part) - count_parameters(part, learning=True))
            if quantized and name == "llm":
                saved += (2 - NF4_BYTES) * _quantized_parameters(part)
        return saved

    @property
    def _moments(self) -> int:
        """Numbers that the optimizer keeps: AdamW two a parameter, Muon one for each of its own."""
        learning = count_parameters(self.module, learning=True)
        if self.config.train.optimizer == "adamw":
            return 2 * learning
        return 2 * learning - sum(p.numel() for p in muon_matrices(self.module))

    @cached_property
    def memory(self) -> Memory:
        """Of the fullest GPU."""
        settings = self.config.train
        shards = self.gpus // settings.replicas
        itemsize = 8 if settings.precision == "fp64" else 4  # of weights and optimizer; bf16 is what is computed in
        learning = count_parameters(self.module, learning=True)
        frozen = count_parameters(self.module) - learning
        unsharded = frozen
        if self.gpus > 1:
            unsharded = sum(
                count_parameters(part) for part in split_frozen(self.module, settings.shard_frozen_above)[0]
            )
        # Without `reduce_each` gradients are reduced after the last micro-batch, and unsharded until then.
        waits = self.most_micro_batches > 1 and not settings.reduce_each
        return Memory(
            weights=itemsize * ((learning + frozen - unsharded) / shards + unsharded) - self._saved_in_half,
            gradients=itemsize * learning / (1 if waits else shards),
            optimizer=itemsize * self._moments / shards,
            averages=itemsize * learning / shards if settings.ema else 0,
            gathered=self.gathered if self.gpus > 1 else 0,
            pictures=self.samples_per_gpu * self.objective.picture_bytes(self.module, self.counts, settings.batch_size),
            activations=self.activations.kept,
            working=self.activations.transient,
        )

    @property
    def total_gib(self) -> float:
        """GiB of the fullest GPU."""
        return self.memory.total / GIB

    @property
    def irreducible_gib(self) -> float:
        """GiB that neither more GPUs nor any setting take away: the reserve, and what is gathered."""
        return RESERVE + self.gathered / GIB

    @property
    def gathered(self) -> float:
        """Bytes of unsharded parameters and gradients on a sharded GPU, at the peak.

        In the compute dtype: weights of two blocks (one computes, the next is gathered) and gradients of one, each with
        what belongs to no block. In float32: the gradient of one block, which is being reduced.
        """
        *parts, rest = group_sizes(self.module, self.config.train.shard_frozen_above)
        itemsize = 2 if self.config.train.precision == "bf16" else 4
        block = max(parts, default=0)
        return itemsize * (2 * block + rest) + itemsize * (block + rest) + 4 * block


def _quantized_parameters(llm: Any) -> int:
    """Weights that bitsandbytes quantizes: of all linear layers but the output layer, without their adapters."""
    output = llm.get_output_embeddings()
    linear = [part for name, part in llm.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name]
    return sum(part.weight.numel() for part in linear if part is not output)


def group_sizes(module: nn.Module, most: int) -> list[int]:
    """Parameters of each FSDP group of a model, blocks first; the last is what belongs to no block.

    Args:
        module: the model.
        most: ``train.shard_frozen_above``: smaller frozen parts are not sharded.
    """
    unsharded, sharded = split_frozen(module, most)
    taken: set[nn.Parameter] = set()
    for part in unsharded:
        taken.update(part.parameters())
    sizes = []
    for part in [*blocks(module), *sharded, module]:
        own = set(part.parameters()) - taken
        sizes.append(sum(p.numel() for p in own))
        taken |= own
    return sizes


def count_parameters(module: nn.Module, learning: bool = False) -> int:
    """Parameters of a module; with ``learning`` only those that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)
