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

from open_pisces.config import RunConfig
from open_pisces.train.flops import copy_with
from open_pisces.train.shapes import Shape
from open_pisces.train.sharding import checkpoint_activations

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
