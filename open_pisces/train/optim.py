"""The optimizer, its schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from open_pisces.config import TrainConfig
from open_pisces.device import multiplies_bfloat16
from open_pisces.train.world import gather_full, local_shard, shard_like


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over everything that learns, or Muon over its matrices and AdamW over the rest (``train.optimizer``).

    Biases, norms and tables of one dimension are not decayed. An adapter with a rate of its own (``train.lora.lr``)
    has groups of its own, whose ``share`` is that rate over ``train.lr``.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    betas = (config.betas[0], config.betas[1])
    adapter: set[int] = set()
    if config.lora is not None and config.lora.lr is not None:
        adapter = {id(p) for name, p in module.named_parameters() if "lora_" in name}
    if config.optimizer == "adamw":
        # fused: one kernel for all tensors, on the CPU as well.
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            _groups(learning, adapter, config), lr=config.lr, betas=betas, eps=config.eps, fused=True
        )
        start_adamw(optimizer, learning)
        return optimizer
    matrices = muon_matrices(module)
    chosen = {id(p) for p in matrices}
    others = [p for p in learning if id(p) not in chosen]
    optimizer = Muon(_groups(matrices, adapter, config), _groups(others, adapter, config), config.lr, betas, config.eps)
    start_adamw(optimizer, others)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate, times its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def _groups(learning: list[nn.Parameter], adapter: set[int], config: TrainConfig) -> list[dict[str, Any]]:
    found = []
    for own in (False, True) if adapter else (False,):
        share = config.lora.lr / config.lr if own and config.lora is not None and config.lora.lr is not None else 1.0
        for decayed in (True, False):
            params = [p for p in learning if (id(p) in adapter) == own and (p.dim() > 1) == decayed]
            weight_decay = config.weight_decay if decayed else 0.0
            found.append({"params": params, "weight_decay": weight_decay, "share": share})
    return found


def start_adamw(optimizer: torch.optim.Optimizer, learning: list[nn.Parameter]) -> None:
    """Make AdamW's moments as its first step would; a checkpoint then always holds the same tensors."""
    for p in learning:
        zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}


def muon_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon steps: those of linear layers and convolutions that learn.

    Not embeddings, tables, or an output layer that shares its weights with an embedding: their rows are single words
    or places, which an orthogonal step would tie together.
    """
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    found: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        weight: Any = layer.weight
        if weight.requires_grad and id(weight) not in tables:
            found[id(weight)] = weight
    return list(found.values())


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices (Jordan 2024, "Muon"), AdamW for everything else.

    The step of a matrix is its Nesterov momentum with all singular values near 1, times ``0.2 sqrt(max(rows,
    columns))``: it then moves as far as AdamW's would, so that one rate serves both (Liu et al. 2025, arXiv
    2502.16982). `torch.optim.Muon` always computes in bfloat16, which a CPU without that arithmetic emulates about a
    hundred times slower, and takes no convolutions. This one computes in float32 where it is slow, takes matrices of
    one shape together, and sees a convolution as the matrix ``(out, in * height * width)``.

    Of a sharded matrix every rank gathers the momentum, does the same product and keeps its shard: one all-gather of
    the gradient's size a step.

    Args:
        matrices: parameter groups of weights of two or more dimensions; decay is decoupled as in AdamW.
        others: parameter groups for AdamW.
        lr: the rate of both.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of the matrices (Muon: 0.95).
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr})
        self.momentum = momentum
        self.matrices = self.param_groups[: len(matrices)]
        for group in self.matrices:
            for p in group["params"]:
                self.state[p] = {"momentum": torch.zeros_like(p, memory_format=torch.preserve_format)}
        # It works on our groups and our state, so that a schedule and a checkpoint see one optimizer.
        self.adamw = torch.optim.AdamW(self.param_groups[len(matrices) :], lr=lr, betas=betas, eps=eps, fused=True)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, dict[str, Any]]]] = {}
        for p, group in ((p, rated) for rated in self.matrices for p in rated["params"]):
            if p.grad is None:
                continue
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - self.momentum)
            # Nesterov's look ahead.
            update = gather_full(p.grad.lerp(momentum, self.momentum)).flatten(1)
            rows, columns = update.shape
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append((p, update, group))
        for (_, longer), members in by_shape.items():
            wide = torch.stack([u if u.shape[0] <= u.shape[1] else u.mT for _, u, _ in members])
            steps = orthogonalized(wide) * (0.2 * longer**0.5)
            for (p, update, group), step in zip(members, steps, strict=True):
                turned = step if update.shape[0] <= update.shape[1] else step.mT
                own = shard_like(turned.reshape(p.shape).to(p.dtype), p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                local_shard(p.detach()).add_(local_shard(own), alpha=-group["lr"])
        self.adamw.step()


def orthogonalized(matrices_KRC: Tensor, rounds: int = 5) -> Tensor:
    """Matrices with their singular values moved near 1, by Newton-Schulz iteration (Jordan 2024).

    Args:
        matrices_KRC: ``(K, rows, columns)`` with no more rows than columns.
        rounds: of the iteration; five bring singular values from 0.001 of the norm and up to between 0.7 and 1.2.
    """
    # bfloat16 is enough for a direction, where it is fast; float64 is for proofs.
    is_half = matrices_KRC.dtype == torch.float32 and multiplies_bfloat16(matrices_KRC.device.type)
    x = matrices_KRC.bfloat16() if is_half else matrices_KRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.to(matrices_KRC.dtype)


def drop_gradients(modules: list[nn.Module]) -> None:
    """Take away the gradients of modules that nothing has used: they would be decayed, and moved by old momentum."""
    for module in modules:
        for p in module.parameters():
            p.grad = None


def lr_at(step: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): linear warm-up, then constant (the paper's) or cosine to zero (its ablation)."""
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


class AveragedWeights:
    """An exponential average of what learns, warmed up so that early steps do not linger (unwarmed it lags badly)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        learning = {n: p for n, p in module.named_parameters() if p.requires_grad} if decay else {}
        self.values = {n: p.detach().clone() for n, p in learning.items()}
        self._parameters = list(learning.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step ``step`` (from 0)."""
        if self.values:
            # The warm-up of TensorFlow's ExponentialMovingAverage: 0.1 at the first step, 0.91 at the hundredth.
            keep = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._averages(), self._now(), 1 - keep)

    def by_parameter(self) -> dict[int, Tensor]:
        """The averages by the identity of the parameter they are of."""
        return {id(p): value for p, value in zip(self._parameters, self.values.values(), strict=True)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside this block."""
        with torch.no_grad():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _averages(self) -> list[Tensor]:
        return [local_shard(value) for value in self.values.values()]

    def _now(self) -> list[Tensor]:
        return [local_shard(p.detach()) for p in self._parameters]

    def _swap(self) -> None:
        for ours, average in zip(self._now(), self._averages(), strict=True):
            kept: Tensor = ours.clone()
            ours.copy_(average)
            average.copy_(kept)
