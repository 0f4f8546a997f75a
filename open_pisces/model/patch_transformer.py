"""The decoder's network at `tiny`: a transformer over patches of the latents ("Back to Basics", arXiv 2511.13720).

On a CPU a step takes about a third of a U-Net's time; LOG.md has the figures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

TIME_WIDTH = 256
"""Sines and cosines that a time is embedded in."""


class PatchBlock(nn.Module):
    """Self-attention and a gated MLP; the time shifts, scales and gates both (adaLN-single, PixArt-alpha).

    Args:
        width: of the tokens.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = -(-8 * width // 3 // 64) * 64
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 2 * inner, bias=False)
        self.contract = nn.Linear(inner, width, bias=False)
        self.table_6W = nn.Parameter(torch.zeros(6, width))

    def forward(self, x_BSW: Tensor, time_B6W: Tensor) -> Tensor:
        """``(B, S, W)`` to the same shape."""
        scale1, shift1, gate1, scale2, shift2, gate2 = (time_B6W + self.table_6W).unsqueeze(2).unbind(1)
        q, k, v = self.qkv(_norm(x_BSW) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (_norm(q), _norm(k), v))
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        x_BSW = x_BSW + gate1 * self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.expand(_norm(x_BSW) * (1 + scale2) + shift2).chunk(2, -1)
        return x_BSW + gate2 * self.contract(F.silu(gate) * value)


class PatchTransformer(nn.Module):
    """Noisy latents, their time and the condition vectors to the clean latents.

    Each token is a patch of the latents, the condition vector that lies over it, and its place.

    Args:
        channels: of the latents.
        side: of the latents.
        vectors: M, a square number.
        vector_width: E.
        patch: side of a patch in latents.
        width: of the tokens.
        layers: blocks.
        heads: of attention.
    """

    _no_split_modules = ("PatchBlock",)

    def __init__(
        self,
        channels: int,
        side: int,
        vectors: int,
        vector_width: int,
        patch: int = 4,
        width: int = 320,
        layers: int = 6,
        heads: int = 5,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "side": side,
            "vectors": vectors,
            "vector_width": vector_width,
            "patch": patch,
            "width": width,
            "layers": layers,
            "heads": heads,
        }
        self.patch = patch
        self.grid = math.isqrt(vectors)
        self.tokens = side // patch
        self.enter = nn.Linear(channels * patch**2, width)
        self.condition = nn.Linear(vector_width, width)
        self.positions_SW = nn.Parameter(torch.randn(self.tokens**2, width) * 0.02)
        self.time_first = nn.Linear(TIME_WIDTH, width)
        self.time_second = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(PatchBlock(width, heads) for _ in range(layers))
        self.leave = nn.Linear(width, channels * patch**2)
        # At the start blocks are plain ones: no shift, no scale, open gates.
        nn.init.zeros_(self.time_second.weight)
        nn.init.zeros_(self.time_second.bias)
        with torch.no_grad():
            self.time_second.bias.view(6, width)[[2, 5]] = 1.0

    def forward(self, latents_BCHW: Tensor, times_B: Tensor, vectors_BME: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` at ``times_B`` in [0, 1000], with ``(B, M, E)``, to latents likewise."""
        embedded = get_timestep_embedding(times_B, TIME_WIDTH, downscale_freq_shift=0).to(self.enter.weight.dtype)
        time_B6W = self.time_second(F.silu(self.time_first(embedded))).unflatten(1, (6, -1))
        time_B6W = time_B6W.to(self.positions_SW.dtype)
        if self.grid != self.tokens:
            square = vectors_BME.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            square = F.interpolate(square, (self.tokens, self.tokens), mode="bilinear", align_corners=False)
            vectors_BME = square.flatten(2).transpose(1, 2)
        patches = F.pixel_unshuffle(latents_BCHW, self.patch).flatten(2).transpose(1, 2)
        x_BSW = self.enter(patches) + self.condition(vectors_BME) + self.positions_SW
        for block in self.blocks:
            x_BSW = block(x_BSW, time_B6W)
        out = self.leave(_norm(x_BSW)).transpose(1, 2).unflatten(2, (self.tokens, self.tokens))
        return F.pixel_shuffle(out, self.patch)


def _norm(x: Tensor) -> Tensor:
    """Over the last dimension, without weights: a scale or a linear layer follows."""
    return F.layer_norm(x, x.shape[-1:])
