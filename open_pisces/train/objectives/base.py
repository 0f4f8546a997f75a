"""What the loop, the plan and the probes need to know of an objective: one interface, one class a file beside it.

Everything random about a sample is drawn from (seed, epoch, sample, purpose), so neither the order of work nor the
number of ranks can change it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from open_pisces.batch import Losses, Sample, StepBatches
from open_pisces.config import RunConfig
from open_pisces.data.features import FeatureStore
from open_pisces.data.images import generation_bytes
from open_pisces.data.order import Mixture, stream
from open_pisces.data.shards import DamagedSample, open_dataset
from open_pisces.data.tokenizer import byte_tokenizer, load_tokenizer, special_tokens, train_tokenizer
from open_pisces.errors import PiscesError
from open_pisces.factory.encoders import fingerprints, store_keys
from open_pisces.model.adapters import keep_trainable, nf4
from open_pisces.model.folder import get_part, in_start
from open_pisces.model.parts import llm_config
from open_pisces.train.flops import Cost, Counts, structure_of
from open_pisces.train.shapes import Shape
from open_pisces.train.world import World


class Loads(Protocol):
    """What gives a training its batches."""

    mixture: Mixture

    def __call__(self, step: int) -> StepBatches:
        """This rank's part of a step."""

    def blank(self) -> Any:
        """A micro-batch that weighs nothing."""


class Objective(ABC):
    """One of the trainings' objectives, built: data read, parts built or loaded, what is frozen frozen.

    Args:
        config: the recipe.
        world: the ranks; all build the same but for their batches.
    """

    has_sequences: ClassVar[bool] = False
    """Whether it trains the LLM on sequences, or towers on pairs of a picture and a caption."""

    module: nn.Module
    """Everything that is moved, saved and resumed; parameters that need a gradient learn."""
    load: Loads
    """What a step trains on."""
    parts: dict[str, Any]
    """The parts of the model folder that this training writes."""
    tokenizer: Any
    weights: dict[nn.Parameter, Tensor]
    """With several ranks: on rank 0 the weights of ``module``, whose parameters are then on the meta device."""
    compiled: nn.Module | None = None
    """What ``train.compile`` compiles, if anything pays."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.weights = {}

    # ------------------------------------------------------------------------------------------- a step

    def prepare(self, batches: list[Any]) -> list[Any]:
        """What has to be known of all micro-batches before the first one's loss, written into them."""
        return batches

    @abstractmethod
    def losses(self, batch: Any) -> Losses:
        """One micro-batch's share of the global loss."""

    def idle(self, batch: Any) -> list[nn.Module]:
        """Modules that no sample of the global batch has used: a gradient of zero must not decay them."""
        return []

    @abstractmethod
    def probe(self, samples: list[Sample], path: Path) -> None:
        """Write pictures (``.png``) and answers (``.txt``) about held-out samples, to judge the run by looking."""

    # -------------------------------------------------------------------------------- without weights or data

    @classmethod
    @abstractmethod
    def skeleton(cls, config: RunConfig) -> nn.Module:
        """What it trains, on the meta device: shapes, and what learns. Nothing is read or fetched."""

    @staticmethod
    @abstractmethod
    def costs(module: Any, config: RunConfig) -> Iterator[Cost]:
        """FLOPs of each part of ``module``: real, sharded, or on the meta device. What learns is read from it."""

    @staticmethod
    @abstractmethod
    def rehearsal(module: Any, config: RunConfig, shape: Shape) -> Callable[[], Tensor]:
        """The loss of one micro-batch of a shape with nothing in it, for `measure_activations`."""

    @staticmethod
    @abstractmethod
    def picture_bytes(module: Any, counts: Counts, samples: int) -> float:
        """Bytes of the pictures that come with an average sample of a batch; features from a cache are small."""


def get_parts(names: Iterable[str], config: RunConfig, world: World, vocabulary: int | None = None) -> dict[str, Any]:
    """Parts from the start folder, or new ones.

    Of several ranks only rank 0 reads weights, in the dtype they are stored in: they are upcast block by block as
    `shard` sends them, so its host never holds a float32 copy of half-precision files. The others get the structure.
    """
    parts: dict[str, Any] = {}
    if world.is_first:
        dtype = torch.float32 if world.ranks == 1 else None
        half = kept_in_half(config, world.ranks)
        for name in names:
            quantized = name == "llm" and config.train.lora is not None and config.train.lora.bits == 4
            how = {"quantization_config": nf4()} if quantized else {}
            kind = torch.bfloat16 if name in half else dtype
            parts[name] = get_part(name, config.model, vocabulary, kind, **how)
            if quantized:
                keep_trainable(parts[name])
    if world.ranks == 1:
        return parts
    structures = world.broadcast_object({name: structure_of(part) for name, part in parts.items()})
    return parts if world.is_first else structures


def kept_in_half(config: RunConfig, ranks: int) -> tuple[str, ...]:
    """Parts that LoRA on one GPU keeps in bfloat16: both are frozen, and most of the memory.

    The encoders stay float32: their vectors are what is learnt.
    """
    alone = config.train.lora is not None and config.train.precision == "bf16" and ranks == 1
    return ("llm", "decoder") if alone else ()


def get_features(config: RunConfig, mixture: Mixture, world: World) -> list[FeatureStore]:
    """The feature store of each source, or an empty list where a recipe reads pixels.

    Rank 0 alone loads and hashes the encoders; an expected error of it is raised on all ranks.

    Raises:
        ConfigError: if the recipe's encoders cannot be cached.
        FeatureError: for a store that is missing, or of other weights, pictures or settings.
    """
    if not config.data.features:
        return []
    found: Any = None
    if world.is_first:
        try:
            found = fingerprints(config)
        except (PiscesError, OSError) as error:
            found = error
    found = world.broadcast_object(found)
    if isinstance(found, Exception):
        raise found
    return [FeatureStore(reader, store_keys(config, reader, found)) for reader in mixture.readers]


def draw(config: RunConfig, drawn: tuple[int, str], purpose: str) -> np.random.Generator:
    """The stream of one sample for one purpose in one epoch."""
    return stream(config.seed, purpose, *drawn)


def stack_pixels(samples: list[Sample], size: int, like: nn.Module) -> Tensor:
    """The first picture of each sample as the generation encoder sees it, on the device of a module."""
    stacked = torch.stack([torch.from_numpy(generation_bytes(sample.images[0], size)) for sample in samples])
    return stacked.to(next(like.parameters()).device)


# ------------------------------------------------------------------------------------------------------ tokenizers


def get_tokenizer(config: RunConfig) -> Any:
    """The start folder's tokenizer, or the one the settings describe."""
    model = config.model
    if in_start(model, "tokenizer"):
        return load_tokenizer(Path(model.start or "") / "tokenizer", model.template)
    if model.tokenizer == "bytes":
        return byte_tokenizer(model.template)
    if model.tokenizer == "bpe":
        return train_tokenizer(_texts(config), model.vocab_size, model.template)
    return load_tokenizer(model.tokenizer, model.template)


def _texts(config: RunConfig, most: int = 20_000) -> Iterator[str]:
    """Captions, questions and answers of the run's datasets, at most so many samples of each."""
    for source in config.data.sources:
        reader = open_dataset(source.path)
        for index in range(min(most, len(reader))):
            try:
                words = reader.words(index)
            except DamagedSample:
                continue  # met again, and counted, when it is drawn
            yield from (*words.short_captions, words.detailed)
            for asked in words.questions:
                yield from (asked.question, asked.answer)


def vocabulary(config: RunConfig) -> int:
    """Tokens of the tokenizer, which is not at hand where it would have to be fetched."""
    special = special_tokens(config.model.template)
    if config.model.tokenizer == "bytes":
        return 256 + len(special)
    if config.model.tokenizer == "bpe":
        return config.model.vocab_size
    if config.model.tokenizer == "folder" and "llm" not in config.model.fresh:
        return llm_config(config.model).vocab_size  # of an LLM that is in a Pisces already
    return llm_config(config.model).vocab_size + 3  # a pretrained one has its template's tokens, not those of pictures
