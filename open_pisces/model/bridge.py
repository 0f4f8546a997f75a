"""What connects the encoders and the LLM: pooling, projections, and the statistics of the targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from open_pisces.config import ModelConfig
from open_pisces.device import FloatBuffers, upcast
from open_pisces.errors import PiscesError
from open_pisces.model.heads import HEADS, VectorHead


class VisualTokenPooler(nn.Module):
    """2-D average pooling of a square grid of features, ``kernel`` by ``kernel`` (paper: architecture).

    The order of operations is the paper's: reshape the sequence to its grid, pool, flatten again.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, features_BGE: Tensor) -> Tensor:
        """``(B, grid * grid, E)`` to ``(B, M, E)`` with ``M = (grid / kernel) ** 2``.

        Raises:
            PiscesError: if the sequence is no square grid that the kernel divides.
        """
        side = int(features_BGE.shape[1] ** 0.5)
        if side * side != features_BGE.shape[1] or side % self.kernel:
            raise PiscesError(f"{features_BGE.shape[1]} features are no square grid that {self.kernel} divides")
        # Patches come row by row, so the sequence is the grid flattened.
        grid = rearrange(features_BGE, "b (h w) e -> b h w e", h=side)
        pooled = reduce(grid, "b (h k) (w l) e -> b h w e", "mean", k=self.kernel, l=self.kernel)
        return rearrange(pooled, "b h w e -> b (h w) e")


class VisualProjector(nn.Module):
    """Two-layer MLP with GELU from an encoder's width to the LLM's (LLaVA's ``mlp2x_gelu``); one per task."""

    def __init__(self, width: int, llm_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, llm_width)
        self.second = nn.Linear(llm_width, llm_width)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., D)``."""
        return self.second(nn.functional.gelu(self.first(vectors)))


class TargetSums(NamedTuple):
    """What target statistics are made of: float64 sums, which add up over chunks of pictures and over ranks."""

    pictures: Tensor
    """Scalar."""
    vectors_ME: Tensor
    squares_E: Tensor

    @classmethod
    def of(cls, raw_KME: Tensor) -> TargetSums:
        """The sums over raw pooled features ``(pictures, M, E)``."""
        # float64: the variance below is a difference of large sums.
        raw = raw_KME.double()
        return cls(raw.new_tensor(len(raw)), raw.sum(0), raw.square().sum((0, 1)))

    def __add__(self, other: TargetSums) -> TargetSums:  # type: ignore[override]
        return TargetSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class TargetStatistics(FloatBuffers):
    """Where generation targets lie: the LLM works in standardised space, only the decoder leaves it.

    Always float32: rounded statistics would shift every target.

    ``mean_E`` and ``std_E`` are per channel (0 and 1 when targets stay raw). ``null_ME`` is the mean target at each
    position, in the LLM's space: squared error drives the empty caption's vectors there, so it is what the decoder
    sees in place of a dropped condition.
    """

    mean_E: Tensor
    std_E: Tensor
    null_ME: Tensor
    taken: Tensor

    def __init__(self, vectors: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(width))
        self.register_buffer("std_E", torch.ones(width))
        self.register_buffer("null_ME", torch.zeros(vectors, width))
        self.register_buffer("taken", torch.zeros(()))

    @torch.no_grad()
    def take(self, sums: TargetSums, standardise: bool) -> None:
        """Set the statistics from sums over raw pooled features; mean and deviation only with ``standardise``.

        Raises:
            PiscesError: for fewer than two vectors: they have no deviation.
        """
        vectors = float(sums.pictures) * len(sums.vectors_ME)
        if vectors < 2:
            raise PiscesError(f"target statistics need at least 2 vectors, found {vectors:.0f}: name more data")
        if standardise:
            mean_E = sums.vectors_ME.sum(0) / vectors
            variance_E = (sums.squares_E - vectors * mean_E.square()).clamp_min(0) / (vectors - 1)
            self.mean_E.copy_(mean_E)
            # A channel that never varies would be divided by 0.
            self.std_E.copy_(variance_E.sqrt().clamp_min(1e-6))
        # In the LLM's space, where squared error without a caption converges to the mean.
        self.null_ME.copy_((sums.vectors_ME / sums.pictures - self.mean_E) / self.std_E)
        self.taken.fill_(float(sums.pictures))

    def standardize(self, raw: Tensor) -> Tensor:
        """From gen-CLIP's space to the LLM's."""
        return (raw - self.mean_E) / self.std_E

    def destandardize(self, vectors: Tensor) -> Tensor:
        """From the LLM's space to gen-CLIP's."""
        return vectors * self.std_E + self.mean_E


class Bridge(nn.Module):
    """Everything between the encoders and the LLM; all that is trained besides the LLM in the three stages."""

    def __init__(self, config: ModelConfig, understanding_width: int, llm_width: int) -> None:
        super().__init__()
        width = config.generation.width
        self.pooler = VisualTokenPooler(config.generation.pool)
        self.understanding_projector = VisualProjector(understanding_width, llm_width)
        self.generation_projector = VisualProjector(width, llm_width)
        self.head: VectorHead = HEADS[config.bridge.head](llm_width, width, config.bridge)
        self.statistics = TargetStatistics(config.generation.vectors, width)

    def targets(self, features_BGE: Tensor) -> Tensor:
        """gen-CLIP's last layer ``(B, grid * grid, E)`` to the vectors the LLM learns to write, ``(B, M, E)``."""
        return self.statistics.standardize(upcast(self.pooler(features_BGE)))
