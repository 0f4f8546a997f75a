"""The ranks of a training: rendezvous, all-gathers and all-reduces, and errors that name missing ranks.

The model knows nothing of this. One process runs the same code with nothing to gather.
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
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from open_pisces.batch import StepBatches
from open_pisces.config import RunConfig
from open_pisces.device import pick_device
from open_pisces.errors import PiscesError
from open_pisces.settings import ConfigError

PATIENCE = 5.0
"""Seconds between a failed collective and naming the missing ranks: the others may have failed as well."""


WAITING = ("gloo", "nccl", "processgroup", "c10d", "connection", "socket", "timed out")
"""Substrings that identify gloo and NCCL errors, which are plain RuntimeErrors."""


class WorldError(PiscesError, RuntimeError):
    """A rank that did not take part; the message names it."""


@dataclass(frozen=True)
class World:
    """The ranks of a training.

    ``host`` is a gloo group for small CPU tensors and objects, ``saving`` one for the threads that write checkpoints.
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
        """Whether this rank writes the log and the model folder."""
        return self.rank == 0

    def gather(self, values: list[float]) -> list[list[float]]:
        """All-gather a list of numbers of the same length on each rank; one list a rank.

        Raises:
            WorldError: naming ranks that did not take part within the timeout.
        """
        if self.ranks == 1:
            return [values]
        # float64: counts of tokens pass 2 ** 24, where float32 stops counting.
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        with self.name_missing_ranks():
            dist.all_gather(found, mine, group=self.host)
        return [row.tolist() for row in found]

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        """All-gather any object that pickles; one a rank."""
        found: list[Any] = [value]
        if self.ranks > 1:
            found = [None] * self.ranks
            with self.name_missing_ranks():
                dist.all_gather_object(found, value, group=group or self.host)
        return found

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's object, on all ranks; it has to pickle."""
        found = [value]
        if self.ranks > 1:
            with self.name_missing_ranks():
                dist.broadcast_object_list(found, 0, group=self.host)
        return found[0]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on all ranks, in place."""
        if self.ranks > 1:
            with self.name_missing_ranks():
                dist.broadcast(tensor, 0)
        return tensor

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, int]:
        """All-gather tensors of different lengths along dimension 0, without gradient.

        Returns:
            The rows of all ranks, concatenated; the index of this rank's first row.
        """
        if self.ranks == 1:
            return rows, 0
        counts = [int(count) for (count,) in self.gather([len(rows)])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        with self.name_missing_ranks():
            dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)]), sum(counts[: self.rank])

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce (sum), in place."""
        if self.ranks > 1:
            with self.name_missing_ranks():
                dist.all_reduce(values)
        return values

    @contextmanager
    def name_missing_ranks(self) -> Iterator[None]:
        """Re-raise communication errors as `WorldError` naming the ranks that did not arrive."""
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
            return f"rank {self.rank} lost the other ranks and the rendezvous store ({cause})"
        named = ", ".join(map(str, absent)) or "unknown"
        return (
            f"rank {self.rank} waited in vain: rank {named} of {self.ranks} did not take part within "
            f"{self.timeout:g} s (train.timeout): it hangs or is gone, see its log ({cause})"
        )

    def equalize_micro_batches(
        self, given: StepBatches, load: Any, stop: bool = False
    ) -> tuple[list[Any], StepBatches, bool]:
        """Pad each rank's step to the same number of micro-batches, and write the global totals into them.

        Args:
            given: this rank's part of a step.
            load: the loader it comes from, which makes blank micro-batches.
            stop: whether this rank was told to stop.

        Returns:
            The micro-batches; counts and skipped samples of the global step; whether any rank was told to stop.
        """
        counts = [given.read, len(given.skipped), given.real_tokens, given.all_tokens, *given.totals.values()]
        sizes, stops, *columns = zip(*self.gather([len(given.batches), stop, *counts]), strict=True)
        most = int(max(sizes))
        read, skipped, real, places, *sums = (int(sum(column)) for column in columns)
        totals = dict(zip(given.totals, sums, strict=True))
        # At least one: a rank without samples still has to run every collective.
        blanks = [load.blank() for _ in range(max(most, 1) - len(given.batches))]
        batches = replace(given, batches=[*given.batches, *blanks]).with_totals(totals)
        named = self.gather_objects(given.skipped) if skipped else []
        whole = StepBatches([], read, tuple(itertools.chain.from_iterable(named)), totals, real, places)
        return batches, whole, any(stops)


# ------------------------------------------------------------------------------------------- sharded tensors


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks: once a step is enough."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself where nothing is sharded; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor, all-gathered: a collective, so every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor that all ranks hold, sharded as another one is; no communication."""
    if not isinstance(like, DTensor):
        return full
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(full, like.device_mesh, everywhere).redistribute(placements=like.placements)


# ---------------------------------------------------------------------------------------------- begin and end


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Initialize the process group that torchrun's variables describe, and destroy it at the end.

    Without those variables, or with a world size of 1, no group is made.

    Raises:
        ConfigError: for a world size that the recipe cannot be sharded over.
        WorldError: if the other ranks do not arrive.
    """
    ranks = _environment("WORLD_SIZE", 1)
    if ranks == 1:
        yield World(pick_device(config.device))
        return
    _check_ranks(config, ranks)
    device = _own_device(config.device)
    # gloo beside NCCL: small host tensors, objects and the checkpoint's threads must not wait for the device's stream.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=config.train.timeout)
    meeting, rank = _meet(ranks, config.train.timeout)
    # torchrun keeps the store when it restarts the ranks: a prefix keeps old keys apart.
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
"""Prefix of the rendezvous store: one per training in this process."""


@cache
def _meet(ranks: int, timeout: float) -> tuple[Any, int]:
    """The rendezvous store of all ranks, and this one's rank; says whom it waits for.

    Raises:
        WorldError: if the others do not come in time, or torchrun's variables are incomplete.
    """
    rank = _environment("RANK", None)
    host = os.environ.get("MASTER_ADDR", "")
    port = _environment("MASTER_PORT", None)
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
        found = f"{name}={text!r} is no whole number" if text else f"{name} is not set, but others of its kind are"
        raise WorldError(f"{found}: unset {' '.join(VARIABLES)} to train in one process")
    return int(text)


def _own_device(name: str) -> torch.device:
    """The accelerator with this process's LOCAL_RANK, or the CPU."""
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
