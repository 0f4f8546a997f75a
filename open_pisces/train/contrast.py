"""The contrastive loss over all processes and micro-batches, in two passes (gradient caching, arXiv 2101.06983).

First every picture and caption of the global batch becomes a vector. The loss compares all with all and gives the
gradient at each vector. Then every micro-batch goes through the towers with that gradient at its end. The result is
the gradient of one big batch on one device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_pisces.batch import EmbeddingGradients, Losses, PairBatch
from open_pisces.model.gen_clip import Embedded, contrast
from open_pisces.train.world import World


def embedding_gradients(embedded: list[Embedded], batches: list[PairBatch], world: World) -> list[EmbeddingGradients]:
    """Compare everything with everything.

    Args:
        embedded: this process's micro-batches, as the towers embed them.
        batches: what they were.
        world: gives the embeddings of the other processes.
    """
    counts = [0 if batch.blank else len(batch.captions_B) for batch in batches]
    own = [torch.cat([rows[:n] for rows, n in zip(part, counts, strict=True)]).detach() for part in _columns(embedded)]
    captions_K, first = world.gather_rows(torch.cat([b.captions_B[:n] for b, n in zip(batches, counts, strict=True)]))
    images_KE, texts_KE = (world.gather_rows(rows)[0].requires_grad_() for rows in own)
    scale = embedded[0].scale.detach().requires_grad_()
    with torch.enable_grad():
        loss, found = contrast(images_KE, texts_KE, scale, captions_K, first, sum(counts))
        images, texts, scales = torch.autograd.grad(loss, [images_KE, texts_KE, scale])
    # Each process has compared its own pairs with all; what that does to the others' vectors they learn here.
    images, texts = world.sum(images), world.sum(texts)
    cuts = [slice(first + sum(counts[:i]), first + sum(counts[: i + 1])) for i in range(len(counts))]
    shares = [1.0] + [0.0] * (len(cuts) - 1)  # of what belongs to no pair alone
    parts = {"contrastive": loss.detach(), "retrieval": found}
    return [
        EmbeddingGradients(images[cut], texts[cut], scales * share, {n: v * share for n, v in parts.items()})
        for cut, share in zip(cuts, shares, strict=True)
    ]


def _columns(embedded: list[Embedded]) -> tuple[list[Tensor], list[Tensor]]:
    return [e.images_BE for e in embedded], [e.texts_BE for e in embedded]


def surrogate_loss(embedded: Embedded, gradients: EmbeddingGradients, batch: PairBatch, mae_weight: float) -> Losses:
    """A micro-batch's share: a scalar whose gradient is that of the global loss, and its parts for the log."""
    count = 0 if batch.blank else len(batch.captions_B)
    loss = (embedded.scale * gradients.scale).sum() + 0 * (embedded.images_BE.sum() + embedded.texts_BE.sum())
    loss = loss + (embedded.images_BE[:count] * gradients.images_BE).sum()
    loss = loss + (embedded.texts_BE[:count] * gradients.texts_BE).sum()
    parts = gradients.parts
    if embedded.masked_B is not None:
        masked = embedded.masked_B[:count].sum() / max(batch.total, 1) + 0 * embedded.masked_B.sum()
        loss, parts = loss + mae_weight * masked, {**parts, "mae": masked.detach()}
    return Losses(loss, parts)
