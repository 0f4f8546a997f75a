"""What a training step costs in FLOPs, counted on a model without weights, and how many a device can do.

Every part is run forward and backward once, on the meta device, while PyTorch counts its matrix products, convolutions
and attention. Nothing is computed, so it takes seconds at most for a model of any size. It comes to

* 3 x forward where weights learn (forward, gradient of the inputs, gradient of the weights; a first layer spares one),
* 2 x forward where gradients only pass through frozen weights,
* 1 x forward for frozen encoders.

Two conventions of model FLOPs utilisation (MFU): what activation checkpointing computes again is not counted, and
attention is counted over the full square of a row, although half of it, in packed rows more, is masked.
"""

from __future__ import annotations

import copy
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from open_pisces.batch import PairBatch, SequenceBatch, StepBatches

# ------------------------------------------------------------------------------------------ a model without weights

HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)


def meta_copy(module: nn.Module) -> nn.Module:
    """The same structure with every parameter and buffer an empty tensor on the meta device; copies no weight.

    Tensors and modules that are shared stay shared, what is frozen stays frozen. Of sharded modules come the whole
    shapes; neither the sharding nor any hook comes along. So a copy can be run for its shapes, or filled with
    gathered weights and saved.
    """
    return copy_with(module, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def copy_with(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """`meta_copy` with tensors of another kind: ``make`` gives the one that stands for a parameter or buffer."""
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        made = make(tensor)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    parts = list(module.modules())
    for part in parts:
        # Sharding puts a class of its own in front of the one a module had.
        kind = next(kind for kind in type(part).__mro__ if not issubclass(kind, FSDPModule))
        memo[id(part)] = kind.__new__(kind)
    for part in parts:
        memo[id(part)].__dict__.update(copy.deepcopy(dict(_kept(part)), memo))
    return memo[id(module)]


def _kept(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes, without hooks, compiled code and what sharding keeps there."""
    for name, value in part.__dict__.items():
        if name in HOOKS:
            yield name, type(value)()
        elif isinstance(part, FSDPModule) and isinstance(value, types.MethodType):
            continue  # a method that gathers before it runs
        elif name != "_compiled_call_impl" and not name.startswith("__composable_api"):
            yield name, value


def structure_of(module: nn.Module) -> nn.Module:
    """The same structure with its buffers, and with parameters that are `stand_in`s."""
    return copy_with(module, lambda tensor: stand_in(tensor) if isinstance(tensor, nn.Parameter) else tensor)


def stand_in(weight: Tensor) -> Tensor:
    """An empty tensor on the meta device for a weight that is still to come.

    Weights that lie in half precision, as published ones do, are trained in float32: they are upcast as they arrive.
    """
    dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
    return torch.empty(weight.shape, dtype=dtype, device="meta")


def take_weights(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Take a module's weights out of it: what stays are `stand_in`s, shared as the weights were.

    Returns:
        The weights, in their own dtype, by the parameter that stands for them.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in stand_ins:
                stand_ins[parameter] = nn.Parameter(stand_in(parameter), parameter.requires_grad)
            part._parameters[name] = stand_ins[parameter]
    return {empty: real.detach() for real, empty in stand_ins.items()}


def flops_of(run: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs of everything that ``run`` does to meta tensors: forward, and with the gradients of what it returns."""
    with FlopCounterMode(display=False) as counter:
        found = run()
        forward = counter.get_total_flops()
        if found.requires_grad:
            found.sum().backward()
    return forward, counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Counts:
    """How much there is to do, in the units in which costs are counted. Sums over any number of batches."""

    tokens: float = 0
    """Places of the LLM's rows, padding included, for they are computed like any other."""
    token_pairs: float = 0
    """Rows times the square of their length."""
    supervised: float = 0
    """Tokens with a label: there is a product with the vocabulary for no other."""
    seen_pictures: float = 0
    """Pictures through the understanding encoder; none where features come from a cache."""
    drawn_pictures: float = 0
    """Pictures through gen-CLIP, likewise."""
    seen_vectors: float = 0
    drawn_vectors: float = 0
    pictures: float = 0
    """Pictures that the objective is about: gen-CLIP's pairs, the decoder's targets."""
    caption_tokens: float = 0
    """Places of padded captions."""
    caption_pairs: float = 0
    """Captions times the square of their padded length."""
    compared: float = 0
    """Pairs of a picture and a caption whose similarity the contrastive loss takes."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def counts_of(batch: SequenceBatch | PairBatch) -> Counts:
    """What there is to do in a micro-batch; nothing in a blank one, whose work serves no sample."""
    if isinstance(batch, PairBatch):
        if batch.blank:
            return Counts()
        captions, length = batch.ids_BS.shape
        return Counts(
            pictures=len(batch.draws),
            drawn_pictures=len(batch.pixels_BCHW) if batch.features_BME is None else 0,
            caption_tokens=captions * length,
            caption_pairs=captions * length**2,
            compared=len(batch.draws) * batch.total,
        )
    rows, length = batch.ids_BS.shape
    encoded = batch.generation_features_BME is None and batch.generation_vectors_BME is None
    return Counts(
        tokens=rows * length,
        token_pairs=rows * length**2,
        supervised=len(batch.labels_K),
        seen_pictures=len(batch.understanding_pixels_BCHW) if batch.understanding_features_BNE is None else 0,
        drawn_pictures=len(batch.generation_pixels_BCHW) if encoded else 0,
        seen_vectors=len(batch.understanding_at_K),
        drawn_vectors=len(batch.generation_at_K),
    )


# ---------------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Cost:
    """FLOPs of a part for one unit: of its forward pass, and of a training step."""

    part: str
    unit: str
    """A field of `Counts`."""
    forward: float
    training: float


@dataclass(frozen=True)
class Costs:
    """What every part of an objective costs."""

    costs: tuple[Cost, ...]

    def training(self, counts: Counts) -> float:
        """FLOPs of training on that much."""
        return sum(c.training * getattr(counts, c.unit) for c in self.costs)

    def by_part(self, counts: Counts) -> dict[str, float]:
        """The same, part by part; those that cost nothing are left out."""
        found: dict[str, float] = {}
        for c in self.costs:
            found[c.part] = found.get(c.part, 0) + c.training * getattr(counts, c.unit)
        return {part: flops for part, flops in found.items() if flops}

    def step(self, given: StepBatches) -> float:
        """FLOPs of training on a rank's part of a step."""
        return sum(self.training(counts_of(batch)) for batch in given.batches)


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """A tensor without contents."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def meta_part(module: nn.Module, name: str) -> Any:
    """`meta_copy` of a part, in evaluation mode: nothing drops out."""
    return meta_copy(getattr(module, name)).float().eval()


def learns(*parts: nn.Module) -> bool:
    """Whether any parameter of these parts needs a gradient."""
    return any(p.requires_grad for part in parts for p in part.parameters())


def unit_cost(part: str, unit: str, run: Callable[[], Tensor], again: int = 0) -> Cost:
    """The cost of ``run``, which does one unit; ``again`` passes come on top that are forward only."""
    forward, training = flops_of(run)
    return Cost(part, unit, forward, training + again * forward)


def length_costs(part: str, units: tuple[str, str], run: Callable[[int], Tensor], again: int = 0) -> Iterator[Cost]:
    """The costs of a transformer for each token and for each pair of tokens, from two lengths."""
    short = 8
    # Two short lengths are enough: the cost of a transformer is exactly linear plus quadratic in its length.
    one = unit_cost(part, units[0], lambda: run(short), again)
    two = unit_cost(part, units[0], lambda: run(2 * short), again)
    # cost(length) = token * length + pair * length ** 2, at two lengths of which one is twice the other
    forward_pair = (two.forward - 2 * one.forward) / (2 * short**2)
    training_pair = (two.training - 2 * one.training) / (2 * short**2)
    yield Cost(part, units[0], one.forward / short - forward_pair * short, one.training / short - training_pair * short)
    yield Cost(part, units[1], forward_pair, training_pair)


def frozen_generation_encoder(module: nn.Module) -> Cost:
    """gen-CLIP as a frozen encoder."""
    encoder = meta_part(module, "generation_encoder").requires_grad_(False)
    picture = meta(1, 3, encoder.image_size, encoder.image_size)
    return unit_cost("generation_encoder", "drawn_pictures", lambda: encoder.features(picture))


# -------------------------------------------------------------------------------------------- what a device can do


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of a large matrix product on this device, the best of several: what utilization is measured against.

    Args:
        device: where to measure; others that use it at the same time spoil the figure.
        dtype: what to compute in.
        seconds: how long to go on, after a product to warm up.
    """
    size = 8192
    if device.type == "cpu":
        # 1024 fills a processor. Where bfloat16 is emulated one such product takes seconds, at every start of a run:
        # there the side is doubled only while the larger product (8 times the work) fits into the time.
        size = 256
        while size < 1024 and 8 * _product_seconds(device, dtype, size, 0.0) < seconds:
            size *= 2
    return 2 * size**3 / _product_seconds(device, dtype, size, seconds)


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """The least time that a product of two square matrices took, in ``seconds`` of trying, once at least."""
    numbers = torch.Generator().manual_seed(0)  # zeros would draw less power, and run faster, than any model
    left, right = (torch.randn(size, size, generator=numbers).to(device, dtype) for _ in range(2))
    out = left @ right  # warms up
    least = float("inf")
    end = float("inf")
    while (start := time.perf_counter()) < end:
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        least = min(least, time.perf_counter() - start)
        end = min(end, start + seconds)
    return least


def _wait(device: torch.device) -> None:
    """Accelerators work on after a call has returned."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
