"""What connects the encoders and the LLM: pooling, projections, the head, and the statistics of the targets."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from open_pisces.batch import wide
from open_pisces.config import ModelConfig
from open_pisces.errors import PiscesError
from open_pisces.model.precision import FloatBuffers


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
        grid = rearrange(features_BGE, "b (h w) e -> b h w e", h=side)
        pooled = reduce(grid, "b (h k) (w l) e -> b h w e", "mean", k=self.kernel, l=self.kernel)
        return rearrange(pooled, "b h w e -> b (h w) e")


class VisualProjector(nn.Module):
    """Two-layer MLP with GELU from an encoder's width to the LLM's (LLaVA's ``mlp2x_gelu``); one per task."""

    def __init__(self, width: int, llm_width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, llm_width), nn.Linear(llm_width, llm_width)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., D)``."""
        return self.second(nn.functional.gelu(self.first(vectors)))


class GenerationHead(nn.Module):
    """Two-layer MLP with GELU from the LLM's hidden state back to gen-CLIP space (paper: architecture)."""

    def __init__(self, llm_width: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(llm_width, llm_width), nn.Linear(llm_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., E)``."""
        return self.second(nn.functional.gelu(self.first(hidden)))


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
    def take(self, raw_KME: Tensor, standardise: bool) -> None:
        """Set the statistics from raw pooled features ``(pictures, M, E)``."""
        raw = raw_KME.double()
        if standardise:
            self.mean_E.copy_(raw.mean((0, 1)))
            self.std_E.copy_(raw.std((0, 1)).clamp_min(1e-6))
        self.null_ME.copy_(((raw - self.mean_E) / self.std_E).mean(0))
        self.taken.fill_(raw.shape[0])

    def enter(self, raw: Tensor) -> Tensor:
        """From gen-CLIP's space to the LLM's."""
        return (raw - self.mean_E) / self.std_E

    def leave(self, vectors: Tensor) -> Tensor:
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
        self.head = GenerationHead(llm_width, width)
        self.statistics = TargetStatistics(config.generation.vectors, width)

    def targets(self, features_BGE: Tensor) -> Tensor:
        """gen-CLIP's last layer ``(B, grid * grid, E)`` to the vectors the LLM learns to write, ``(B, M, E)``."""
        return self.statistics.enter(wide(self.pooler(features_BGE)))
