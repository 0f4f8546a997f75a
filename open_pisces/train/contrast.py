"""The contrastive loss over all ranks and micro-batches, in two passes (gradient caching, arXiv 2101.06983).

First every picture and caption of the global batch becomes a vector. The loss compares all with all and gives the
gradient at each vector. Then every micro-batch goes through the towers with that gradient at its end. The result is
the gradient of one big batch on one device.
"""

from __future__ import annotations

import torch

from open_pisces.batch import EmbeddingGradients, Losses, PairBatch
from open_pisces.model.gen_clip import Embedded, contrast
from open_pisces.train.world import World


def embedding_gradients(embedded: list[Embedded], batches: list[PairBatch], world: World) -> list[EmbeddingGradients]:
    """Compare everything with everything.

    Args:
        embedded: this rank's micro-batches, as the towers embed them.
        batches: what they were.
        world: gathers the embeddings of the other ranks.
    """
    counts = [pairs_in(batch) for batch in batches]
    own_images = torch.cat([e.images_BE[:n] for e, n in zip(embedded, counts, strict=True)]).detach()
    own_texts = torch.cat([e.texts_BE[:n] for e, n in zip(embedded, counts, strict=True)]).detach()
    own_captions = torch.cat([batch.captions_B[:n] for batch, n in zip(batches, counts, strict=True)])
    captions_K, first = world.gather_rows(own_captions)
    images_KE = world.gather_rows(own_images)[0].requires_grad_()
    texts_KE = world.gather_rows(own_texts)[0].requires_grad_()
    scale = embedded[0].scale.detach().requires_grad_()
    # `prepare` runs without gradient; here the embeddings are leaves.
    with torch.enable_grad():
        loss, found = contrast(images_KE, texts_KE, scale, captions_K, first, sum(counts))
        images, texts, scales = torch.autograd.grad(loss, [images_KE, texts_KE, scale])
    # Each rank has compared its own pairs with all; the sum is the gradient at everyone's embeddings.
    images = world.sum(images)
    texts = world.sum(texts)
    gradients = []
    for number, count in enumerate(counts):
        share = float(number == 0)  # what belongs to no pair alone is counted once
        parts = {"contrastive": loss.detach() * share, "retrieval": found * share}
        cut = slice(first, first + count)
        gradients.append(EmbeddingGradients(images[cut], texts[cut], scales * share, parts))
        first += count
    return gradients


def pairs_in(batch: PairBatch) -> int:
    """Pairs of a micro-batch that count: none of a blank one."""
    return 0 if batch.blank else len(batch.captions_B)


def surrogate_loss(embedded: Embedded, gradients: EmbeddingGradients, batch: PairBatch, mae_weight: float) -> Losses:
    """A micro-batch's share: a scalar whose gradient is that of the global loss, and its parts for the log."""
    count = pairs_in(batch)
    # The zero terms tie every module to the graph, also for a blank batch: all ranks must run the same collectives.
    loss = (embedded.scale * gradients.scale).sum() + 0 * (embedded.images_BE.sum() + embedded.texts_BE.sum())
    loss = loss + (embedded.images_BE[:count] * gradients.images_BE).sum()
    loss = loss + (embedded.texts_BE[:count] * gradients.texts_BE).sum()
    parts = gradients.parts
    if embedded.masked_B is not None:
        masked = embedded.masked_B[:count].sum() / max(batch.total, 1) + 0 * embedded.masked_B.sum()
        loss = loss + mae_weight * masked
        parts = {**parts, "mae": masked.detach()}
    return Losses(loss, parts)
