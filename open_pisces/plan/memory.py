"""The memory that one micro-batch takes, measured without weights.

Modules are built on the meta device from settings alone (`Objective.skeleton`). The objective's own forward and
backward pass then run on fake tensors, which have shapes and dtypes but no bytes, while `LiveBytes` adds up every
storage that is alive. So autocast, masks, activation checkpointing and the chunks of the vocabulary are counted, not
estimated. Memory that a kernel takes and gives back inside one operation is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import masking_utils

from open_pisces.config import RunConfig
from open_pisces.plan.live_bytes import LiveBytes
from open_pisces.train.flops import copy_with
from open_pisces.train.shapes import Shape
from open_pisces.train.sharding import checkpoint_activations

RunOf = Callable[[Any, RunConfig, Shape], Callable[[], Tensor]]
"""From a module, the settings and a shape to the loss of one micro-batch (`Objective.rehearsal`)."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch takes on top of weights, gradients, optimizer and the batch itself."""

    kept: int
    """From the forward to the backward pass."""
    transient: int
    """More at the peak: encoders at work, a chunk of logits, a block that is computed again."""


def measure_activations(
    module: nn.Module, run_of: RunOf, config: RunConfig, shape: Shape, sharded: bool, accelerator: bool = True
) -> Activations:
    """Run one micro-batch forward and backward on fake tensors, and count bytes.

    Args:
        module: an objective's skeleton.
        run_of: its `Objective.rehearsal`.
        config: the run's settings.
        shape: of the micro-batch.
        sharded: whether ranks share the weights. FSDP gathers them in the compute dtype; one process alone lets
            autocast cast them, and keeps the copies for the backward pass.
        accelerator: compute norms in float32, as autocast does on CUDA.
    """
    bf16 = config.train.precision == "bf16"
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(tensor: Tensor) -> Tensor:
        gathered_in_bf16 = bf16 and sharded and tensor.requires_grad
        with mode:
            return torch.empty(tensor.shape, dtype=torch.bfloat16 if gathered_in_bf16 else tensor.dtype, device="cpu")

    def drop_gradient(parameter: Tensor) -> None:
        parameter.grad = None  # the plan counts gradients apart, and FSDP reduces each as soon as it is there

    fake: Any = copy_with(module, make).train()
    if bf16 and accelerator:
        upcast_norms(fake)
    checkpoint_activations(fake, config.train.checkpointing)
    for p in fake.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(drop_gradient)
    with ExitStack() as stack:
        stack.enter_context(_no_mask_for_packed_samples())
        stack.enter_context(mode)
        run = run_of(fake, config, shape)
        live = stack.enter_context(LiveBytes())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run()
        kept = live.now
        loss.backward()
    return Activations(kept, live.peak() - kept)


@contextmanager
def _no_mask_for_packed_samples() -> Iterator[None]:
    """Stop transformers from building its own mask for packed samples.

    It builds one whenever it cannot look at the positions, so for fake tensors. In a real run it looks, finds no packed
    samples and keeps nothing: our packed rows bring their own mask.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def upcast_norms(module: nn.Module) -> None:
    """Compute norms in float32, as CUDA's autocast does; the CPU's, which fake tensors follow, does not."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
            norm.forward = partial(_upcast_norm, norm)  # type: ignore[method-assign]


def _upcast_norm(norm: Any, x: Tensor) -> Tensor:
    weight = None if norm.weight is None else norm.weight.float()
    bias = None if norm.bias is None else norm.bias.float()
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)
