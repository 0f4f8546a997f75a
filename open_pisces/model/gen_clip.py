"""How gen-CLIP is trained: a contrastive term and a masked-autoencoder term on one vision tower (paper: architecture).

The paper gives neither weights nor sizes. Ours: CLIP's symmetric softmax over whole pictures, plus MAE's squared
error on the hidden patches of a second pass that sees about a quarter of them. With a MAE weight of 0 the same
class trains ``tiny``'s understanding encoder.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from open_pisces.batch import Losses, PairBatch
from open_pisces.config import ConfigError, ContrastiveConfig
from open_pisces.model.encoders import Block, GenerationEncoder, UnderstandingEncoder


class MaskedAutoencoder(nn.Module):
    """The light decoder that guesses hidden patches from the encoder's visible ones (MAE, arXiv 2111.06377)."""

    def __init__(self, width: int, grid: int, patch: int, config: ContrastiveConfig) -> None:
        super().__init__()
        self.patch = patch
        self.enter = nn.Linear(width, config.mae_width)
        self.hidden_token = nn.Parameter(torch.randn(config.mae_width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1 + grid * grid, config.mae_width) * 0.02)
        block = (config.mae_width, config.mae_heads, 4 * config.mae_width, "pre", "gelu")
        self.blocks = nn.Sequential(*(Block(*block) for _ in range(config.mae_layers)))
        self.leave = nn.Sequential(nn.LayerNorm(config.mae_width), nn.Linear(config.mae_width, 3 * patch * patch))

    def forward(self, tokens_BSE: Tensor, keep_BK: Tensor) -> Tensor:
        """The encoder's ``(B, 1 + K, E)`` and the kept indices to normalised pixels ``(B, grid * grid, 3 p p)``."""
        x = self.enter(tokens_BSE)
        places = self.hidden_token.to(x.dtype).expand(x.shape[0], self.positions.shape[0] - 1, -1)
        places = places.scatter(1, keep_BK[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        return self.leave(self.blocks(torch.cat([x[:, :1], places], 1) + self.positions))[:, 1:]

    def targets(self, pixels_BCHW: Tensor) -> Tensor:
        """Each patch's pixels with their own mean and deviation taken out (MAE's normalised targets)."""
        patches = rearrange(pixels_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-4).sqrt()


class GenCLIP(nn.Module):
    """A vision tower, a text tower and the two losses that train them."""

    def __init__(
        self, vision: GenerationEncoder | UnderstandingEncoder, config: ContrastiveConfig, vocabulary: int
    ) -> None:
        super().__init__()
        self.config, self.vision = config, vision
        # The tower's own pooling looks for these ids; ours takes the last token and does not use it.
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        self.text = CLIPTextModel(CLIPTextConfig(**{**config.text, **ids, "vocab_size": vocabulary}))
        self.vision_projection = nn.Linear(vision.width, config.width, bias=False)
        self.text_projection = nn.Linear(self.text.config.hidden_size, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.mae = None
        if config.mae_weight > 0:
            if not isinstance(vision, GenerationEncoder):
                raise ConfigError("the MAE term needs a tower that can drop patches: set contrastive.mae_weight to 0")
            self.mae = MaskedAutoencoder(vision.width, vision.config.grid, vision.config.patch_size, config)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Pictures in [0, 1] to unit vectors ``(B, width)``."""
        return F.normalize(self.vision_projection(self.vision.summary(pixels_BCHW)).float(), dim=-1)

    def embed_texts(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Captions to unit vectors ``(B, width)``: the last token's, which has seen all others."""
        hidden_BSD = self.text(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state
        last = hidden_BSD[torch.arange(len(ids_BS), device=ids_BS.device), mask_BS.sum(1) - 1]
        return F.normalize(self.text_projection(last).float(), dim=-1)

    def contrast(self, images_BE: Tensor, texts_BE: Tensor, same_BB: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's loss and the share of captions that find their picture, both over this batch.

        Pairs with the same caption (``same_BB``) are neither right nor wrong: they leave the comparison.
        """
        scores_BB = self.log_scale.clamp(max=math.log(100)).exp() * images_BE @ texts_BE.T
        twins = same_BB & ~torch.eye(len(same_BB), dtype=torch.bool, device=same_BB.device)
        scores_BB = scores_BB.masked_fill(twins, float("-inf"))
        right_B = torch.arange(len(scores_BB), device=scores_BB.device)
        loss = (F.cross_entropy(scores_BB, right_B) + F.cross_entropy(scores_BB.T, right_B)) / 2
        return loss, (scores_BB.argmax(0) == right_B).float().mean()

    def reconstruct(self, pixels_BCHW: Tensor, keep_BK: Tensor) -> Tensor:
        """MAE's error on the patches that were hidden: a scalar."""
        assert self.mae is not None
        predicted = self.mae(self.vision(pixels_BCHW, keep_BK), keep_BK).float()
        error_BS = (predicted - self.mae.targets(pixels_BCHW)).pow(2).mean(-1)
        hidden_BS = torch.ones_like(error_BS).scatter(1, keep_BK, 0.0)
        return (error_BS * hidden_BS).sum() / hidden_BS.sum()

    def forward(self, batch: PairBatch, keep_BK: Tensor) -> Losses:
        """Both losses on a whole batch; ``keep_BK`` names the patches that the MAE pass sees."""
        ids = batch.ids_BS.masked_fill(~batch.mask_BS, -1)
        same_BB = (ids[:, None] == ids[None]).all(-1)
        images, texts = self.embed_images(batch.pixels_BCHW), self.embed_texts(batch.ids_BS, batch.mask_BS)
        loss, retrieval = self.contrast(images, texts, same_BB)
        parts = {"contrastive": loss.detach(), "retrieval": retrieval.detach()}
        if self.mae is not None:
            masked = self.reconstruct(batch.pixels_BCHW, keep_BK)
            parts["mae"] = masked.detach()
            loss = loss + self.config.mae_weight * masked
        return Losses(loss, parts)
