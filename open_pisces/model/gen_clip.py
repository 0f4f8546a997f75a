"""How gen-CLIP is trained: a contrastive term and a masked-autoencoder term on one vision tower (paper: architecture).

The paper gives neither weights nor sizes. Ours: CLIP's symmetric softmax over whole pictures, plus MAE's squared
error on the hidden patches of a second pass that sees about a quarter of them. With a MAE weight of 0 the same
class trains ``tiny``'s understanding encoder.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from open_pisces.batch import PairBatch, unit_pixels
from open_pisces.config import ContrastiveConfig, GenerationEncoderConfig
from open_pisces.device import upcast
from open_pisces.model.encoders import Block, GenerationEncoder, UnderstandingEncoder
from open_pisces.settings import ConfigError


class MaskedAutoencoder(nn.Module):
    """The light decoder that guesses hidden patches from the encoder's visible ones (MAE, arXiv 2111.06377)."""

    def __init__(self, encoder: GenerationEncoderConfig, config: ContrastiveConfig) -> None:
        super().__init__()
        width = encoder.width
        grid = encoder.grid
        patch = encoder.patch_size
        self.patch = patch
        self.first = int(encoder.class_token)
        """Tokens before the patches: the class token, if the encoder has one."""
        self.enter = nn.Linear(width, config.mae_width)
        self.hidden_token = nn.Parameter(torch.randn(config.mae_width) * 0.02)
        self.positions = nn.Parameter(torch.randn(self.first + grid * grid, config.mae_width) * 0.02)
        block = (config.mae_width, config.mae_heads, 4 * config.mae_width, "pre", "gelu")
        self.blocks = nn.Sequential(*(Block(*block) for _ in range(config.mae_layers)))
        self.leave = nn.Sequential(nn.LayerNorm(config.mae_width), nn.Linear(config.mae_width, 3 * patch * patch))

    def forward(self, tokens_BSE: Tensor, keep_BK: Tensor) -> Tensor:
        """The encoder's ``(B, 1 + K, E)`` and the kept indices to normalised pixels ``(B, grid * grid, 3 p p)``."""
        x = self.enter(tokens_BSE)
        # Every place starts as the hidden token; what the encoder saw is written over it (MAE, section 3).
        places = self.hidden_token.to(x.dtype).expand(x.shape[0], self.positions.shape[0] - self.first, -1)
        places = places.scatter(1, keep_BK[..., None].expand(-1, -1, x.shape[-1]), x[:, self.first :])
        # The class token goes along, as in MAE, and is dropped from the output.
        return self.leave(self.blocks(torch.cat([x[:, : self.first], places], 1) + self.positions))[:, self.first :]

    def targets(self, pixels_BCHW: Tensor) -> Tensor:
        """Each patch's pixels with their own mean and deviation taken out (MAE's normalised targets)."""
        seen = self.patch * (pixels_BCHW.shape[-1] // self.patch)  # SigLIP's 384 px hold a rest that no patch covers
        pixels = unit_pixels(pixels_BCHW)[..., :seen, :seen]
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        mean = patches.mean(-1, keepdim=True)
        variance = patches.var(-1, keepdim=True)
        # 1e-4 on pixels in [0, 1]: flat patches stay near 0 instead of amplifying rounding.
        return (patches - mean) / (variance + 1e-4).sqrt()


class Temperature(nn.Module):
    """What similarities are multiplied with before the softmax: learnt, starting at 1 / 0.07, at most 100 (CLIP)."""

    keep_float32 = True
    """Rounded to bfloat16 it would move in steps of a percent."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # sharding takes no scalars

    def forward(self) -> Tensor:
        """``(1,)``."""
        return self.log_scale.clamp(max=math.log(100)).exp()


class Embedded(NamedTuple):
    """What becomes of a micro-batch before anything is compared. A tuple, because sharding looks into those."""

    images_BE: Tensor
    """Unit vectors of pictures."""
    texts_BE: Tensor
    """Unit vectors of their captions."""
    scale: Tensor
    """The temperature's ``(1,)``."""
    masked_B: Tensor | None
    """MAE's error for each picture."""


class GenCLIP(nn.Module):
    """A vision tower, a text tower, and what both losses need of them (`contrast`, `GenCLIP.reconstruct`)."""

    runs_twice = True
    """Its vision tower, in one step: for whole pictures and for visible patches. Activation checkpointing must know."""

    def __init__(
        self, vision: GenerationEncoder | UnderstandingEncoder, config: ContrastiveConfig, vocabulary: int
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        # The tower's own pooling looks for these ids; ours takes the last token and does not use it.
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        self.text = CLIPTextModel(CLIPTextConfig(**{**config.text, **ids, "vocab_size": vocabulary}))
        # Without bias, as CLIP: both land on one sphere.
        self.vision_projection = nn.Linear(vision.width, config.width, bias=False)
        self.text_projection = nn.Linear(self.text.config.hidden_size, config.width, bias=False)
        self.temperature = Temperature()
        self.mae = None
        if config.mae_weight > 0:
            if not isinstance(vision, GenerationEncoder):
                raise ConfigError("the MAE term needs a tower that can drop patches: set contrastive.mae_weight to 0")
            self.mae = MaskedAutoencoder(vision.config, config)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Pictures in [0, 1] to unit vectors ``(B, width)``."""
        return F.normalize(upcast(self.vision_projection(self.vision.summary(pixels_BCHW))), dim=-1)

    def embed_texts(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Captions to unit vectors ``(B, width)``: the last token's, which has seen all others."""
        hidden_BSD = self.text(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state
        last = hidden_BSD[torch.arange(len(ids_BS), device=ids_BS.device), mask_BS.sum(1) - 1]
        return F.normalize(upcast(self.text_projection(last)), dim=-1)

    def reconstruct(self, pixels_BCHW: Tensor, keep_BK: Tensor) -> Tensor:
        """MAE's mean error on the patches that were hidden, per picture: ``(B,)``."""
        assert self.mae is not None
        predicted = upcast(self.mae(self.vision(pixels_BCHW, keep_BK), keep_BK))
        error_BS = (predicted - self.mae.targets(pixels_BCHW)).pow(2).mean(-1)
        hidden_BS = torch.ones_like(error_BS).scatter(1, keep_BK, 0.0)
        # Only hidden patches count: guessing what was seen is copying (MAE, section 3).
        return (error_BS * hidden_BS).sum(1) / hidden_BS.sum(1)

    def forward(self, batch: PairBatch, keep_BK: Tensor) -> Embedded:
        """Everything the losses need of a micro-batch; ``keep_BK`` names the patches that the MAE pass sees."""
        images = self.embed_images(batch.pixels_BCHW)
        texts = self.embed_texts(batch.ids_BS, batch.mask_BS)
        masked = self.reconstruct(batch.pixels_BCHW, keep_BK) if self.mae is not None else None
        return Embedded(images, texts, self.temperature(), masked)


def contrast(
    images_KE: Tensor, texts_KE: Tensor, scale: Tensor, captions_K: Tensor, first: int = 0, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """CLIP's loss and the share of captions that find their picture.

    Pairs with the same caption are neither right nor wrong: they leave the comparison. Similarities times a scale of up
    to 100 are computed in float32 also under autocast: bfloat16 would round them to steps of 0.5.

    Args:
        images_KE: unit vectors of all pictures of the global batch.
        texts_KE: of their captions.
        scale: what similarities are multiplied with, ``(1,)``.
        captions_K: digests of the captions.
        first: the first pair whose share of the loss is wanted.
        count: how many pairs from there; None takes all that follow.

    Returns:
        Two scalars, both divided by the number of *all* pairs, so that shares add up.
    """
    mine_R = torch.arange(len(images_KE), device=images_KE.device)[first:][:count]
    twins_RK = captions_K[mine_R][:, None] == captions_K[None]
    twins_RK = twins_RK.scatter(1, mine_R[:, None], False)
    loss = scale.new_zeros(())
    found = scale.new_zeros(())
    with torch.autocast(images_KE.device.type, enabled=False):
        # Both directions weigh the same, as in CLIP.
        for ours, others in ((images_KE, texts_KE), (texts_KE, images_KE)):
            scores_RK = (scale * ours[mine_R] @ others.T).masked_fill(twins_RK, float("-inf"))
            loss = loss + F.cross_entropy(scores_RK, mine_R, reduction="sum")
            found = (scores_RK.argmax(1) == mine_R).sum()
    return loss / (2 * len(images_KE)), found.detach() / len(images_KE)
