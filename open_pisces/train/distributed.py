"""Many processes as one: who is here, what they add up, and how a model is spread over them (FSDP2, HSDP).

The model knows nothing of this. One process runs the same code, with nothing to add up and nothing sharded.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from open_pisces.batch import StepBatches
from open_pisces.config import ConfigError, RunConfig, TrainConfig
from open_pisces.errors import PiscesError
from open_pisces.paint import pick_device

PATIENCE = 5.0
"""Seconds that a process whose wait has failed gives the others to say that theirs has, too."""


WAITING = ("gloo", "nccl", "processgroup", "c10d", "connection", "socket", "timed out")
"""Words by which the libraries' errors of communication are known: they have no class of their own."""


class WorldError(PiscesError, RuntimeError):
    """A process that did not take part; the message names it."""


@dataclass(frozen=True)
class World:
    """The processes of a training.

    ``host`` carries small numbers between processors, ``saving`` what the threads that write checkpoints agree on.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None
    host: Any = None
    saving: Any = None
    store: Any = None
    timeout: float = 600.0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the log and the model folder."""
        return self.rank == 0

    def gather(self, values: list[float]) -> list[list[float]]:
        """Numbers of every process, by rank; each gives as many.

        Raises:
            WorldError: if one does not take part in time; it is named.
        """
        if self.ranks == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        with self.naming():
            dist.all_gather(found, mine, group=self.host)
        return [row.tolist() for row in found]

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        """Anything that pickles, of every process, by rank."""
        found: list[Any] = [value]
        if self.ranks > 1:
            found = [None] * self.ranks
            with self.naming():
                dist.all_gather_object(found, value, group=group or self.host)
        return found

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes one after another, without gradient, and where this one's begin."""
        if self.ranks == 1:
            return rows, 0
        counts = [int(count) for (count,) in self.gather([len(rows)])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        with self.naming():
            dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)]), sum(counts[: self.rank])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.ranks > 1:
            with self.naming():
                dist.all_reduce(values)
        return values

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors of waiting for others say which process it was that did not come; all other errors pass."""
        try:
            yield
        except RuntimeError as error:
            told = str(error).splitlines()[0] if str(error) else ""
            if isinstance(error, WorldError) or not any(word in told.lower() for word in WAITING):
                raise
            raise WorldError(self._absent(told)) from error

    def _absent(self, cause: str) -> str:
        try:
            self.store.set(f"waited/{self.rank}", "1")
            time.sleep(PATIENCE)
            absent = [rank for rank in range(self.ranks) if not self.store.check([f"waited/{rank}"])]
        except RuntimeError:
            return f"process {self.rank} lost the others, and with them the place where all meet ({cause})"
        named = ", ".join(map(str, absent)) or "unknown"
        return (
            f"process {self.rank} waited in vain: rank {named} of {self.ranks} did not take part within "
            f"{self.timeout:g} s (train.timeout): it hangs or is gone, see its log ({cause})"
        )

    def even(self, given: StepBatches, load: Any, stop: bool = False) -> tuple[list[Any], StepBatches, bool]:
        """The same number of micro-batches for every process, with the totals of the global batch in them.

        Args:
            given: this process's part of a step.
            load: the loader it comes from, which makes micro-batches that weigh nothing.
            stop: whether this process was told to stop.

        Returns:
            The micro-batches; the counts and skipped samples of the whole step; whether any was told to stop.
        """
        counts = [given.read, len(given.skipped), given.real_tokens, given.all_tokens, *given.totals.values()]
        columns = list(zip(*self.gather([len(given.batches), stop, *counts]), strict=True))
        most, stops = (int(max(column)) for column in columns[:2])
        read, skipped, real, places, *sums = (int(sum(column)) for column in columns[2:])
        totals = dict(zip(given.totals, sums, strict=True))
        batches = given.batches + [load.blank() for _ in range(max(most, 1) - len(given.batches))]
        named = self.gather_objects(given.skipped) if skipped else []
        whole = StepBatches([], read, tuple(skip for part in named for skip in part), totals, real, places)
        return [replace(batch, **totals) for batch in batches], whole, bool(stops)


# ---------------------------------------------------------------------------------------------- begin and end


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Meet the other processes that torchrun has started, if it has; leave them at the end.

    Raises:
        ConfigError: for a number of processes that the recipe cannot be spread over.
    """
    ranks = _environment("WORLD_SIZE", 1)
    if ranks == 1:
        yield World(pick_device(config.device))
        return
    _check_ranks(config, ranks)
    device = _own_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=config.train.timeout)
    meeting, rank = _meet(ranks, config.train.timeout)
    # The place may outlive those who met there: torchrun keeps it when it starts them again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}, training {next(_trainings)}", meeting)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
    try:
        replicas = config.train.replicas
        mesh = init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
        host, saving = (dist.new_group(backend="gloo", timeout=wait) for _ in range(2))
        yield World(device, rank, ranks, mesh, host, saving, store, config.train.timeout)
    finally:
        dist.destroy_process_group()


_trainings = itertools.count()
"""A process may run several trainings one after another; each has its own corner of the place where all meet."""


@cache
def _meet(ranks: int, timeout: float) -> tuple[Any, int]:
    """The rendezvous store of all ranks, and this one's rank; says whom it waits for.

    Raises:
        WorldError: if the others do not come in time, or torchrun's variables are incomplete.
    """
    rank = _environment("RANK", None)
    host, port = os.environ.get("MASTER_ADDR", ""), _environment("MASTER_PORT", None)
    others = f"{ranks - 1} other rank{'s' if ranks > 2 else ''} at {host}:{port}"
    remedy = f"start them (torchrun, or pisces train --nproc), or unset {' '.join(VARIABLES)} to train in one process"
    if not host:
        raise WorldError(f"WORLD_SIZE={ranks}, but MASTER_ADDR is not set: {remedy}")
    print(f"pisces: rank {rank} waits for {others} (WORLD_SIZE={ranks})", file=sys.stderr, flush=True)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        return store, rank
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise WorldError(
            f"rank {rank} waited {timeout:g} s (train.timeout) for {others} in vain: {remedy} ({cause})"
        ) from error


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process."""


def _environment(name: str, default: int | None) -> int:
    """A whole number that torchrun sets.

    Raises:
        WorldError: if it is none.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise WorldError(f"{name}={text!r} is no whole number: unset {' '.join(VARIABLES)} to train in one process")
    return int(text)


def _own_device(name: str) -> torch.device:
    """The accelerator with this process's number on its machine, or the CPU."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def _check_ranks(config: RunConfig, ranks: int) -> None:
    if ranks % config.train.replicas:
        raise ConfigError(
            f"train.replicas = {config.train.replicas} does not divide {ranks} processes: set 1 or a divisor"
        )
    if config.train.batch_size < ranks:
        most = config.train.batch_size
        raise ConfigError(
            f"train.batch_size = {most} is less than {ranks} processes: start at most {most}, or raise it"
        )


# ------------------------------------------------------------------------------------------------- spreading


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, inner ones first: what is sharded, compiled and recomputed one by one.

    transformers and diffusers name them (``_no_split_modules``); our own encoder's are called ``Block``.
    """
    names = {"Block"}
    for part in module.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    found = {block for part in lists for block in part if type(block).__name__ in names}
    return [part for part in module.modules() if part in found][::-1]


def recompute(module: nn.Module, kind: str) -> None:
    """Let the innermost blocks that learn compute their activations again in the backward pass.

    Args:
        module: the model.
        kind: ``full`` keeps a block's inputs only, ``selective`` also what matrix products and attention put out.
    """
    if kind == "none":
        return
    contexts = {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}
    every = blocks(module)
    for block in every:
        inner = any(part is not block and part in block.modules() for part in every)
        if not inner and any(p.requires_grad for p in block.parameters()):
            block.forward = partial(_recomputed, block.forward, contexts)


def _recomputed(forward: Any, contexts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    kept = any(word in name for word in ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution", "scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_parts(module: nn.Module, world: World, dynamic: bool | None) -> None:
    """Compile a model: as a whole in one process, block by block where each block gathers its weights first."""
    if world.mesh is None:
        module.compile(dynamic=dynamic)
        return
    for block in blocks(module):
        block.forward = torch.compile(block.forward, dynamic=dynamic)


def shard(module: nn.Module, world: World, config: TrainConfig) -> None:
    """Spread a model's parameters over the processes, block by block (FSDP2); nothing for one process.

    Weights, gradients and optimizer are float32 shards; with ``precision: bf16`` what is gathered for computing is
    bfloat16 and gradients are added up in float32. Frozen parts up to ``shard_frozen_above`` stay whole.
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
    whole, spread = split_frozen(module, config.shard_frozen_above)
    kept = {p for part in whole for p in part.to(world.device).parameters()}
    for part in module.modules():
        if getattr(part, "keep_float32", False):
            fully_shard(part, mesh=mesh)
    inner = blocks(module)
    for part in [*inner, *spread, module]:
        if any(p not in kept for p in part.parameters()) and not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh, mp_policy=policy if part in inner else root_policy, ignored_params=kept)


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
        whole, spread = whole + found[0], spread + found[1]
    return whole, spread


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The parameters that belong to no block are whole inside this block; the others are gathered as they are used."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass adds up gradients over processes: once a step is enough."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor where nothing is sharded; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A whole tensor, gathered from all processes; every one has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
