"""gen-CLIP's training, contrastive plus MAE; with a MAE weight of 0 also that of ``tiny``'s understanding encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from open_pisces.batch import EmbeddingGradients, Losses, PairBatch, Sample
from open_pisces.config import RunConfig
from open_pisces.data.images import to_pil
from open_pisces.data.loader import PairLoader
from open_pisces.data.order import Mixture
from open_pisces.model.folder import without_sources
from open_pisces.model.gen_clip import Embedded, GenCLIP, contrast
from open_pisces.model.parts import build_part
from open_pisces.sheets import contact_sheet
from open_pisces.train.contrast import embedding_gradients, surrogate_loss
from open_pisces.train.flops import Cost, Counts, length_costs, meta, meta_copy, unit_cost
from open_pisces.train.objectives.base import Objective, draw, get_parts, get_tokenizer, stack_pixels, vocabulary
from open_pisces.train.shapes import Shape, empty_pairs
from open_pisces.train.world import World


class ContrastiveObjective(Objective):
    """A vision tower and a text tower; both losses compare the whole global batch."""

    module: GenCLIP

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        name = f"{config.contrastive.tower}_encoder"
        self.tokenizer = get_tokenizer(config)
        # The tower may come frozen from another training's folder; here it learns.
        vision = get_parts([name], config, world)[name].requires_grad_(True)
        self.module = self.compiled = GenCLIP(vision, config.contrastive, len(self.tokenizer))
        self.parts = {name: vision}
        side = vision.image_size
        settings = config.train
        self.load = PairLoader(
            Mixture(config.data, config.seed),
            self.tokenizer,
            config.seed,
            settings.batch_size,
            settings.accumulate,
            (side, side),
            rank=world.rank,
            ranks=world.ranks,
        )

    def embed(self, batch: PairBatch) -> Embedded:
        """Run both towers, with the patches that each picture's own draw leaves visible to MAE."""
        patches = self.config.model.generation.grid**2
        visible = visible_patches(self.config)
        keep = [draw(self.config, drawn, "mask").permutation(patches)[:visible] for drawn in batch.draws]
        return self.module(batch, torch.from_numpy(np.stack(keep)).to(batch.pixels_BCHW.device))

    def prepare(self, batches: list[PairBatch]) -> list[PairBatch]:
        """Several micro-batches: embed all without gradient, so that each can be compared with all."""
        if len(batches) < 2:
            return batches
        with torch.no_grad():
            embedded = [self.embed(batch) for batch in batches]
        gradients = embedding_gradients(embedded, batches, self.world)
        return [replace(batch, gradients=mine) for batch, mine in zip(batches, gradients, strict=True)]

    def losses(self, batch: PairBatch) -> Losses:
        """The micro-batch's share of both losses; alone it is compared with those of the other ranks at once."""
        embedded = self.embed(batch)
        gradients = batch.gradients or embedding_gradients([embedded], [batch], self.world)[0]
        return surrogate_loss(embedded, gradients, batch, self.config.contrastive.mae_weight)

    def probe(self, samples: list[Sample], path: Path) -> None:
        """Each picture with the caption it finds among those shown, and with MAE what it makes of a quarter of it."""
        module = self.module
        tokenizer = self.tokenizer
        pixels = stack_pixels(samples, module.vision.image_size, module)
        # Padded here: a tokenizer that is asked to pad remembers it, and would be saved with it.
        rows = [torch.tensor([*tokenizer(s.short)["input_ids"][:76], tokenizer.eos_token_id]) for s in samples]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
        texts = module.embed_texts(ids.to(pixels.device), mask.to(pixels.device))
        found = (module.embed_images(pixels) @ texts.T).argmax(1).tolist()
        images = [s.images[0] for s in samples]
        words = [samples[i].short for i in found]
        if module.mae is not None:
            keep = torch.arange(0, module.mae.positions.shape[0] - 1, 4, device=pixels.device).expand(len(samples), -1)
            patch = module.mae.patch
            side = module.vision.image_size // module.mae.patch
            guessed = module.mae(module.vision(pixels, keep), keep).float()
            guessed = guessed.unflatten(1, (side, side)).unflatten(-1, (3, patch, patch))
            drawn = guessed.permute(0, 3, 1, 4, 2, 5).reshape(len(samples), 3, side * patch, side * patch)
            images += [to_pil(picture) for picture in (drawn / 4 + 0.5).clamp(0, 1).cpu().numpy()]
            words += ["MAE, normalized"] * len(samples)
        contact_sheet(images, words, len(samples)).save(path.with_suffix(".png"))

    @classmethod
    def skeleton(cls, config: RunConfig) -> nn.Module:
        """Both towers on the meta device."""
        with torch.device("meta"):
            tower: Any = build_part(f"{config.contrastive.tower}_encoder", without_sources(config.model))
            return GenCLIP(tower, config.contrastive, vocabulary(config))

    @staticmethod
    def costs(module: Any, config: RunConfig) -> Iterator[Cost]:
        """The vision tower on whole pictures and on what MAE leaves of them, the text tower, all similarities."""
        towers: Any = meta_copy(module).float().eval()
        size = towers.vision.image_size
        width = config.contrastive.width
        picture = meta(1, 3, size, size)
        yield unit_cost("vision", "pictures", lambda: towers.embed_images(picture))
        if towers.mae is not None:
            kept = visible_patches(config)
            masked = meta(1, kept, dtype=torch.long)
            yield unit_cost("vision, masked", "pictures", lambda: towers.vision(picture, masked))
            tokens = meta(1, 1 + kept, towers.vision.width, grad=True)
            yield unit_cost("mae", "pictures", lambda: towers.mae(tokens, masked))

        def read(length: int) -> Tensor:
            ids = meta(1, length, dtype=torch.long)
            mask = meta(1, 1, length, length, dtype=torch.bool)
            return towers.text(input_ids=ids, attention_mask=mask).last_hidden_state

        yield from length_costs("text", ("caption_tokens", "caption_pairs"), read)
        last = towers.text_projection.in_features
        yield unit_cost("text", "pictures", lambda: towers.text_projection(meta(1, last, grad=True)))
        # Pictures with captions and captions with pictures are two products, each of things that both learn.
        yield Cost("similarities", "compared", 2 * 2 * width, 3 * 2 * 2 * width)

    @staticmethod
    def rehearsal(module: Any, config: RunConfig, shape: Shape) -> Callable[[], Tensor]:
        """Towers and loss. One micro-batch is compared while its activations wait, several before there are any."""
        batch = empty_pairs((module.vision.image_size,) * 2, config, shape)
        several = config.train.accumulate > 1
        keep = torch.zeros(shape.pictures, visible_patches(config), dtype=torch.long)
        alike = torch.zeros(shape.everywhere, dtype=torch.long)
        width = config.contrastive.width

        def compared() -> EmbeddingGradients:
            images, texts = (torch.empty(shape.everywhere, width, requires_grad=True) for _ in range(2))
            scale = torch.ones(1, requires_grad=True)
            loss, found = contrast(images, texts, scale, alike, 0, shape.own)
            gradients = torch.autograd.grad(loss, [images, texts, scale])
            mine = [gradient[: shape.pictures] for gradient in gradients]
            return EmbeddingGradients(mine[0], mine[1], mine[2], {"contrastive": loss.detach(), "retrieval": found})

        def run() -> Tensor:
            gradients = compared() if several else None
            embedded = module(batch, keep)
            return surrogate_loss(embedded, gradients or compared(), batch, config.contrastive.mae_weight).loss

        return run

    @staticmethod
    def picture_bytes(module: Any, counts: Counts, samples: int) -> float:
        """One picture at the tower's size."""
        return 3.0 * module.vision.image_size**2


def visible_patches(config: RunConfig) -> int:
    """Patches of a picture that the MAE pass sees."""
    return max(1, round(config.model.generation.grid**2 * config.contrastive.visible))
