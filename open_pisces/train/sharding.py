"""How a model is spread over ranks: FSDP2 (HSDP with replicas), activation checkpointing, compilation, gathering.

The model knows nothing of this. One rank runs the same code, with nothing sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from open_pisces.config import TrainConfig
from open_pisces.device import Float32Attention
from open_pisces.train.world import World


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, inner ones first: the units of sharding, compilation and checkpointing.

    transformers and diffusers name them (``_no_split_modules``); our own encoder's are called ``Block``.
    """
    # Our own encoder and text tower blocks; the libraries' are named by themselves.
    names = {"Block"}
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            found |= {block for block in part if type(block).__name__ in names}
    return [part for part in module.modules() if part in found][::-1]


def checkpoint_activations(module: nn.Module, kind: str) -> None:
    """Apply activation checkpointing to the innermost blocks that learn.

    Args:
        module: the model.
        kind: ``full`` keeps a block's inputs only, ``selective`` also the outputs of matrix products and attention.
    """
    if kind == "none":
        return
    # Only where a block runs twice: without the cache every micro-batch holds cast weights of its own.
    twice = getattr(module, "runs_twice", False)
    contexts = {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}
    every = blocks(module)
    for block in every:
        inner = any(part is not block and part in block.modules() for part in every)
        if not inner and any(p.requires_grad for p in block.parameters()):
            block.forward = partial(_recomputed, block.forward, contexts, twice)


def _recomputed(forward: Any, contexts: dict[str, Any], twice: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    cached = torch.is_autocast_cache_enabled()
    # A block that runs twice in a step (gen-CLIP's two passes) would find its weights cast already the second time, and
    # not when it is recomputed: the operations would not be the same, and selective checkpointing counts them.
    torch.set_autocast_cache_enabled(cached and not twice)
    try:
        # Autocast is restored when a block is recomputed, what `device.autocast` adds to it on a CPU is not.
        if Float32Attention.entered:
            forward = partial(_in_float32_attention, forward)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _in_float32_attention(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with Float32Attention():
        return forward(*args, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    kept = any(word in name for word in ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution", "scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_parts(module: nn.Module, world: World, dynamic: bool | None) -> None:
    """Compile a model: as a whole on one rank, block by block where each block all-gathers its weights first."""
    if world.mesh is None:
        module.compile(dynamic=dynamic)
        return
    for block in blocks(module):
        block.forward = torch.compile(block.forward, dynamic=dynamic)


def shard(
    module: nn.Module, world: World, config: TrainConfig, weights: dict[nn.Parameter, Tensor] | None = None
) -> None:
    """Shard a model's parameters block by block (FSDP2); does nothing on one rank.

    Weights, gradients and optimizer are float32 shards; with ``precision: bf16`` parameters are all-gathered in
    bfloat16 and gradients reduced in float32. Frozen parts up to ``shard_frozen_above`` stay whole.

    Args:
        module: the model. Parameters on the meta device are received from rank 0 just before their block is sharded,
            so that neither a host nor a device ever holds the model once for each rank.
        world: the ranks.
        config: the training's settings.
        weights: on rank 0 the weights that meta parameters stand for; they are let go of as they are sent.
    """
    if world.mesh is None:
        return
    mesh = world.mesh if config.replicas > 1 else world.mesh["shard"]
    policy = root_policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        # Blocks get hidden states, which may be cast. What enters the model as a whole (pixels, targets, noise, times)
        # may not: casting it would round noise levels and diffusion times. Autocast casts where it is computed with.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        root_policy = replace(policy, cast_forward_inputs=False)
    # Rank 0 sends each block just before it is sharded: at most one block is whole on a device at a time.
    receive = partial(receive_weights, _owners(module), weights or {}, world)
    whole, spread = split_frozen(module, config.shard_frozen_above)
    for part in whole:
        receive(part)
    # Small frozen parts stay whole on each rank: gathering them every step would cost more than the memory they take.
    kept = {p for part in whole for p in part.to(world.device).parameters()}
    for part in module.modules():
        if getattr(part, "keep_float32", False):
            receive(part)
            fully_shard(part, mesh=mesh)
    # Inner blocks first: FSDP2 gives each group the parameters that no inner group has taken.
    inner = blocks(module)
    for part in [*inner, *spread, module]:
        receive(part)
        if any(p not in kept for p in part.parameters()) and not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh, mp_policy=policy if part in inner else root_policy, ignored_params=kept)


def _owners(module: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Where each parameter on the meta device stands in the model: tied weights stand in several places."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                owners.setdefault(parameter, []).append((part, name))
    return owners


@torch.no_grad()
def receive_weights(
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]],
    weights: dict[nn.Parameter, Tensor],
    world: World,
    part: nn.Module,
) -> None:
    """Give the meta parameters of a part rank 0's weights, on the device of each rank; a collective."""
    for parameter in list(part.parameters()):
        if parameter not in owners:
            continue
        if world.is_first:
            # Moved, then cast: half-precision weights cross the bus as they are stored.
            whole = weights.pop(parameter).to(world.device).to(parameter.dtype)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        arrived = nn.Parameter(world.broadcast(whole.contiguous()), parameter.requires_grad)
        for owner, name in owners.pop(parameter):
            owner._parameters[name] = arrived


def split_frozen(module: nn.Module, most: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The largest parts that do not learn: those that stay whole (at most ``most`` parameters), and those to shard."""
    parameters = list(module.parameters())
    if not parameters:
        return [], []
    if not any(p.requires_grad for p in parameters):
        # What is spread gathers its weights when it is called; those of a table are looked at without a call.
        if sum(p.numel() for p in parameters) <= most or not list(module.children()):
            return [module], []
        if hasattr(module, "_no_split_modules") or hasattr(module, "features"):
            return [], [module]
    whole: list[nn.Module] = []
    spread: list[nn.Module] = []
    for child in module.children():
        found = split_frozen(child, most)
        whole = whole + found[0]
        spread = spread + found[1]
    return whole, spread


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Unshard the root's parameters inside this context; blocks gather theirs when they run."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
