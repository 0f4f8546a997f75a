"""The optimizer, its schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from open_pisces.config import TrainConfig
from open_pisces.train.world import local_shard


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns; biases, norms and tables of one dimension are not decayed."""
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    # fused: one kernel for all tensors, on the CPU as well.
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for p in learning:  # as AdamW would at its first step; a checkpoint then always holds the same tensors
        zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    return optimizer


def drop_gradients(modules: list[nn.Module]) -> None:
    """Take away the gradients of modules that nothing has used: AdamW would decay their weights for a zero."""
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
