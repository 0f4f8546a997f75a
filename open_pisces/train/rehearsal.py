"""A training step without weights: the memory that a micro-batch takes.

Modules are built on the meta device from settings alone (`Objective.skeleton`). To count memory, the objective's own
forward and backward pass run on fake tensors, which have shapes and dtypes but no bytes, while every storage that is
alive is added up. So autocast, masks, activation checkpointing and the chunks of the vocabulary are counted as they
are, not estimated. What a kernel takes and gives back inside one operation is in no tensor, and so in no count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from open_pisces.batch import PairBatch, SequenceBatch
from open_pisces.config import RunConfig
from open_pisces.train.flops import copy_with
from open_pisces.train.sharding import checkpoint_activations

# -------------------------------------------------------------------------------------------------- the micro-batch


@dataclass(frozen=True)
class Shape:
    """How large a micro-batch is: rows of the LLM with what is in them, or pictures with captions."""

    rows: int = 0
    length: int = 0
    packed: bool = False
    supervised: int = 0
    """Tokens with a label."""
    seen: int = 0
    """Pictures to understand."""
    drawn: int = 0
    """Pictures to draw."""
    pictures: int = 0
    """Pairs of a picture and a caption."""
    caption: int = 0
    """Tokens of the captions, padding included."""
    own: int = 0
    """Pairs of all this process's micro-batches, which a contrastive loss compares ..."""
    everywhere: int = 0
    """... with those of all processes."""


def shape_of(batch: SequenceBatch | PairBatch, understanding: int = 1, generation: int = 1) -> Shape:
    """The shape of a real micro-batch; ``understanding`` and ``generation`` are the vectors of a picture."""
    if isinstance(batch, PairBatch):
        pictures, caption = batch.ids_BS.shape
        return Shape(pictures=pictures, caption=caption, own=batch.total, everywhere=batch.total)
    rows, length = batch.ids_BS.shape
    return Shape(
        rows,
        length,
        batch.samples_BS is not None,
        len(batch.labels_K),
        len(batch.understanding_at_K) // understanding,
        len(batch.generation_at_K) // generation,
    )


def empty_sequences(module: Any, config: RunConfig, shape: Shape) -> SequenceBatch:
    """A micro-batch of the LLM stages, with nothing in it."""
    encoders, kinds = (module.understanding_encoder, module.generation_encoder), ("understanding", "generation")
    counts, vectors = (shape.seen, shape.drawn), (module.understanding_encoder.vectors, config.model.generation.vectors)
    cached = [bool(config.data.features) and kind in config.data.feature_kinds for kind in kinds]
    sides = [encoder.image_size for encoder in encoders]
    pixels = [torch.empty(n, 3, side, side, dtype=torch.uint8) for n, side in zip(counts, sides, strict=True)]
    features = [torch.empty(n, v, e.width) for n, v, e in zip(counts, vectors, encoders, strict=True)]
    places = [torch.zeros(n * v, dtype=torch.long) for n, v in zip(counts, vectors, strict=True)]
    labels = torch.zeros(shape.supervised, dtype=torch.long)
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    return SequenceBatch(
        ids_BS=ids,
        understanding_at_K=places[0],
        generation_at_K=places[1],
        text_at_K=labels,
        labels_K=labels.clone(),
        understanding_pixels_BCHW=torch.empty(0, 3, 0, 0) if cached[0] else pixels[0],
        generation_pixels_BCHW=torch.empty(0, 3, 0, 0) if cached[1] else pixels[1],
        understanding_features_BNE=features[0] if cached[0] else None,
        generation_features_BME=features[1] if cached[1] else None,
        samples_BS=ids.clone() if shape.packed else None,
        positions_BS=ids.clone() if shape.packed else None,
    )


def empty_pairs(sizes: tuple[int, int], config: RunConfig, shape: Shape) -> PairBatch:
    """A micro-batch of gen-CLIP's or the decoder's training, with nothing in it."""
    cached = bool(config.data.features) and config.objective == "decoder"
    ids, settings = torch.zeros(shape.pictures, shape.caption, dtype=torch.long), config.model.generation
    pixels, targets = (torch.empty(shape.pictures, 3, side, side, dtype=torch.uint8) for side in sizes)
    return PairBatch(
        pixels_BCHW=pixels,
        targets_BCHW=pixels if sizes[0] == sizes[1] else targets,
        ids_BS=ids,
        mask_BS=ids.bool(),
        draws=((0, ""),) * shape.pictures,
        captions_B=torch.zeros(shape.pictures, dtype=torch.long),
        total=shape.everywhere,
        features_BME=torch.empty(shape.pictures, settings.vectors, settings.width) if cached else None,
    )


# ------------------------------------------------------------------------------------------------- what it needs


RunOf = Callable[[Any, RunConfig, Shape], Callable[[], Tensor]]
"""From a module, the settings and a shape to the loss of one micro-batch."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a micro-batch takes beside weights, gradients and optimizer."""

    kept: int
    """From the forward to the backward pass, the batch itself left out."""
    on_top: int
    """More for a moment: encoders at work, a chunk of logits, a block that is computed again."""


def measure_memory(
    module: nn.Module, run_of: RunOf, config: RunConfig, shape: Shape, sharded: bool, accelerator: bool = True
) -> Needs:
    """Run one micro-batch forward and backward on fake tensors, and count.

    Args:
        module: an objective's skeleton.
        run_of: its `Objective.rehearsal`.
        config: the run's settings.
        shape: of the micro-batch.
        sharded: whether processes share the weights. Then those that are gathered have the precision of computing;
            a process alone lets autocast copy them, and keeps the copies for the backward pass.
        accelerator: compute norms as autocast does there.
    """
    half, mode = config.train.precision == "bf16", FakeTensorMode(allow_non_fake_inputs=True)

    def make(tensor: Tensor) -> Tensor:
        small = half and sharded and tensor.requires_grad
        with mode:
            return torch.empty(tensor.shape, dtype=torch.bfloat16 if small else tensor.dtype, device="cpu")

    fake: Any = copy_with(module, make).train()
    if half and accelerator:
        widen_norms(fake)
    checkpoint_activations(fake, config.train.checkpointing)
    for p in fake.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_drop)
    with ExitStack() as stack:
        stack.enter_context(_no_guess())
        stack.enter_context(mode)
        run = run_of(fake, config, shape)
        live = stack.enter_context(LiveBytes())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = run()
        kept = live.now
        loss.backward()
    return Needs(kept, live.peak - kept)


@contextmanager
def _no_guess() -> Iterator[None]:
    """transformers takes fake tensors for a compilation, and there keeps a mask for samples that may be packed.

    A real run looks, finds none, and keeps nothing; our packed rows bring their own mask.
    """
    guess = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = guess


def _drop(parameter: Tensor) -> None:
    """Sharding takes each gradient away as it comes; the plan counts them apart."""
    parameter.grad = None


def widen_norms(module: nn.Module) -> None:
    """Compute norms in float32, as CUDA's autocast does; the processor's, which fake tensors follow, does not."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
            norm.forward = partial(_wide_norm, norm)  # type: ignore[method-assign]


def _wide_norm(norm: Any, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


class LiveBytes(TorchDispatchMode):
    """While it is entered: bytes of all storages that operations have made and that are not freed.

    What was there before is not counted, and views of it are not either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._meet((args, kwargs), new=False)
        found = func(*args, **kwargs)
        self._meet(found, new=True)
        return found

    def _meet(self, tree: Any, new: bool) -> None:
        """Follow the storages that are not known yet until they are freed, when their address may be used again."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                key, size = storage._cdata, storage.nbytes() if new else 0
                self._known[key] = weakref.ref(storage, partial(self._lose, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _lose(self, key: int, size: int, freed: Any) -> None:
        self._known.pop(key, None)
        self.now -= size
