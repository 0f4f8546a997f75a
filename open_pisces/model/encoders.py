"""The two visual encoders: one to understand with, one whose features are what the LLM learns to predict.

`UnderstandingEncoder` is SigLIP as transformers has it. `GenerationEncoder` is gen-CLIP's vision tower, an own ViT
because its patches can be dropped for the MAE pass; it equals transformers' CLIP and SigLIP (tested), or EVA-CLIP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel

from open_pisces.batch import unit_pixels
from open_pisces.config import GenerationEncoderConfig
from open_pisces.device import FloatBuffers
from open_pisces.errors import PiscesError
from open_pisces.settings import ConfigError


class PixelNorm(FloatBuffers):
    """Moves pixels from [0, 1] to the range an encoder was trained in: ``(x - mean) / std`` per channel.

    Computed in float32, also in a bfloat16 model: what it returns is cast by the encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalise ``(B, 3, H, W)``, uint8 or floats in [0, 1]."""
        return (unit_pixels(pixels_BCHW) - self.mean) / self.std


class UnderstandingEncoder(nn.Module):
    """SigLIP's vision tower: every patch becomes one vector for the LLM, none is pooled (paper: architecture)."""

    def __init__(self, tower: SiglipVisionModel, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower = tower
        self.normalize = PixelNorm(mean, std)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.tower.config.image_size

    @property
    def width(self) -> int:
        """Channels of one vector."""
        return self.tower.config.hidden_size

    @property
    def vectors(self) -> int:
        """N: vectors of one picture."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to the tower's last layer, ``(B, N, width)``."""
        return self._tower(pixels_BCHW).last_hidden_state

    def summary(self, pixels_BCHW: Tensor) -> Tensor:
        """One vector a picture, ``(B, width)``, from SigLIP's pooling head: what contrastive training compares."""
        pooled = self._tower(pixels_BCHW).pooler_output
        if pooled is None:
            raise ConfigError("this SigLIP tower was built without its pooling head: set vision_use_head to true")
        return pooled

    def _tower(self, pixels_BCHW: Tensor) -> Any:
        dtype = self.tower.get_input_embeddings().weight.dtype
        return self.tower(self.normalize(pixels_BCHW).to(dtype))


class SharedEncoder(nn.Module):
    """gen-CLIP as the understanding encoder: one encoder for both tasks, against which the paper compares its two.

    Every patch becomes one vector for the LLM, none is averaged (paper: Table 4, 1,024 to understand, 64 to draw).
    """

    def __init__(self, tower: GenerationEncoder) -> None:
        super().__init__()
        self.tower = tower

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.tower.image_size

    @property
    def width(self) -> int:
        """Channels of one vector."""
        return self.tower.width

    @property
    def vectors(self) -> int:
        """N: vectors of one picture."""
        return self.tower.config.grid**2

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to the tower's last layer, ``(B, N, width)``."""
        return self.tower.features(pixels_BCHW)

    def summary(self, pixels_BCHW: Tensor) -> Tensor:
        """One vector a picture, ``(B, width)``."""
        return self.tower.summary(pixels_BCHW)


def layer_norm(width: int, norm: str, eps: float | None = None) -> nn.LayerNorm:
    """CLIP adds 1e-5 to the variance, EVA-CLIP-E (``post``) 1e-6."""
    return nn.LayerNorm(width, eps=eps or (1e-5 if norm == "pre" else 1e-6))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """``(B, S, E)`` to the same shape; every position sees every other."""
        B, S, E = x_BSE.shape
        # The fused projection is laid out as q, k, v, each with its heads: published towers are read into this order.
        q, k, v = self.qkv(x_BSE).view(B, S, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, E))


class Block(nn.Module):
    """A transformer block: CLIP's and SigLIP's (norm before each branch) or EVA-CLIP-E's (norm after it)."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, norm: str, activation: str, eps: float | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.attention = Attention(width, heads)
        self.norm1 = layer_norm(width, norm, eps)
        self.norm2 = layer_norm(width, norm, eps)
        self.expand = nn.Linear(width, mlp_width)
        self.contract = nn.Linear(mlp_width, width)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """``(B, S, E)`` to the same shape."""
        if self.norm == "pre":
            x_BSE = x_BSE + self.attention(self.norm1(x_BSE))
            return x_BSE + self._mlp(self.norm2(x_BSE))
        x_BSE = x_BSE + self.norm1(self.attention(x_BSE))
        return x_BSE + self.norm2(self._mlp(x_BSE))

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        # x * sigmoid(1.702 x) is the quick GELU of OpenAI's CLIP; OpenCLIP and EVA use the exact one, SigLIP tanh's.
        if self.activation == "quick_gelu":
            return self.contract(x * torch.sigmoid(1.702 * x))
        return self.contract(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class GenerationEncoder(nn.Module):
    """gen-CLIP's vision tower: the LLM's generation targets are its last layer, class token dropped (Emu2, emu.py).

    Settings turn it into SigLIP's: no class token, and targets after the last norm (paper: Table 4 compares the two).
    """

    def __init__(self, config: GenerationEncoderConfig, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config = config
        self.normalize = PixelNorm(mean, std)
        self.patches = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=config.patch_bias)
        # 0.02: the deviation that BERT, ViT and MAE start from.
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02) if config.class_token else None
        self.positions = nn.Parameter(torch.randn(config.class_token + config.grid**2, config.width) * 0.02)
        norm = (config.width, config.norm, config.norm_eps)
        self.entry_norm = layer_norm(*norm) if config.entry_norm else nn.Identity()
        block = (config.width, config.heads, config.mlp_width, config.norm, config.activation, config.norm_eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.layers))
        self.exit_norm = layer_norm(*norm)
        """Of what the contrastive term compares; of targets only where they are ``normalized``, Emu2's are raw."""

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.config.image_size

    @property
    def width(self) -> int:
        """E: channels of one vector."""
        return self.config.width

    def forward(self, pixels_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Encode a picture, or only some of its patches.

        Args:
            pixels_BCHW: ``(B, 3, H, W)`` in [0, 1].
            keep_BK: int64 indices of the K visible patches of each picture; None keeps all.

        Returns:
            ``(B, 1 + K, E)``: the last block's output without a final norm, class token first if there is one.
        """
        if pixels_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise PiscesError(f"pictures of {tuple(pixels_BCHW.shape[-2:])}; this encoder takes {self.image_size} px")
        pixels_BCHW = self.normalize(pixels_BCHW).to(self.patches.weight.dtype)
        # Positions are added before patches are dropped: each visible patch keeps its own place.
        places = self.positions[self.config.class_token :]
        x = self.patches(pixels_BCHW).flatten(2).transpose(1, 2) + places
        if keep_BK is not None:
            x = x.gather(1, keep_BK[..., None].expand(-1, -1, x.shape[-1]))
        if self.class_token is not None:
            # Never dropped: the contrastive term reads it, in both passes the same way.
            first = (self.class_token + self.positions[0]).expand(x.shape[0], 1, -1)
            x = torch.cat([first.to(x.dtype), x], 1)
        x = self.entry_norm(x)
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """The last layer without its class token: ``(B, grid * grid, E)``, row by row."""
        x = self(pixels_BCHW)[:, self.config.class_token :]
        return self.exit_norm(x) if self.config.features == "normalized" else x

    def summary(self, pixels_BCHW: Tensor) -> Tensor:
        """One vector a picture, ``(B, E)``: the normalised class token; without one, the mean of normalised patches."""
        x = self(pixels_BCHW)
        return self.exit_norm(x[:, 0]) if self.config.class_token else self.exit_norm(x).mean(1)
