"""gen-CLIP's two losses, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from open_pisces.batch import PairBatch
from open_pisces.config import ContrastiveConfig, GenerationEncoderConfig
from open_pisces.model.encoders import GenerationEncoder
from open_pisces.model.gen_clip import GenCLIP, contrast
from open_pisces.model.parts import build_part
from open_pisces.recipe import load_config
from open_pisces.train.contrast import embedding_gradients, surrogate_loss
from open_pisces.train.objectives import build_training
from open_pisces.train.world import World

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "pool": 2}


@pytest.fixture
def model() -> GenCLIP:
    torch.manual_seed(0)
    config = ContrastiveConfig(text=TEXT, width=8, mae_weight=0.5, mae_width=16)
    vision = GenerationEncoder(GenerationEncoderConfig(**SHAPE), [0.5] * 3, [0.5] * 3)
    return GenCLIP(vision, config, 30).eval()


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pairs(ids: list[list[int]]) -> PairBatch:
    longest = max(map(len, ids))
    pixels = torch.rand(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return PairBatch(
        pixels_BCHW=pixels,
        targets_BCHW=pixels,
        ids_BS=torch.tensor([row + [29] * (longest - len(row)) for row in ids]),
        mask_BS=torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids]),
        draws=tuple((0, str(i)) for i in range(len(ids))),
        captions_B=torch.tensor([hash(tuple(row)) for row in ids]),
        total=len(ids),
    )


def keep(rows: int) -> Tensor:
    return torch.tensor([[0, 5, 6, 11]]).expand(rows, -1)


# ------------------------------------------------------------------------------------------------- contrastive


@torch.no_grad()
def test_the_contrastive_loss_is_clips_formula(model: GenCLIP) -> None:
    images, texts = unit(5, 1), unit(5, 2)
    loss, retrieval = contrast(images, texts, model.temperature(), torch.arange(5))
    scale = 1 / 0.07
    total, found = 0.0, 0
    for i in range(5):
        row = [scale * float(images[i] @ texts[j]) for j in range(5)]
        column = [scale * float(images[j] @ texts[i]) for j in range(5)]
        total -= row[i] - math.log(sum(map(math.exp, row)))
        total -= column[i] - math.log(sum(map(math.exp, column)))
        found += column[i] == max(column)
    assert loss.item() == pytest.approx(total / 10, rel=1e-5)
    assert retrieval.item() == pytest.approx(found / 5)


@torch.no_grad()
def test_the_scale_is_held_at_100(model: GenCLIP) -> None:
    assert model.temperature().item() == pytest.approx(1 / 0.07)
    model.temperature.log_scale.fill_(50.0)
    assert model.temperature().item() == pytest.approx(100, rel=1e-5)


@torch.no_grad()
def test_pairs_with_the_same_caption_leave_the_comparison() -> None:
    images, texts = unit(4, 1), unit(4, 2)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    loss, _ = contrast(images, texts, torch.tensor([1 / 0.07]), torch.tensor([7, 8, 7, 9]))
    scores = images @ texts.T / 0.07
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or not same[i, j]]
        expected -= float(scores[i, others].log_softmax(0)[others.index(i)]) / 8
        expected -= float(scores[others, i].log_softmax(0)[others.index(i)]) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_shares_of_the_comparison_add_up_to_the_whole() -> None:
    images, texts = unit(6, 1).double().requires_grad_(), unit(6, 2).double().requires_grad_()
    scale, captions = (
        torch.tensor([1 / 0.07], dtype=torch.float64, requires_grad=True),
        torch.tensor([1, 2, 3, 2, 5, 6]),
    )
    whole, found = contrast(images, texts, scale, captions)
    wanted = torch.autograd.grad(whole, [images, texts, scale])
    shares = [contrast(images, texts, scale, captions, first, count) for first, count in ((0, 1), (1, 3), (4, 2))]
    assert sum(loss.item() for loss, _ in shares) == pytest.approx(whole.item(), rel=1e-12)
    assert sum(share.item() for _, share in shares) == pytest.approx(found.item(), rel=1e-6)
    given = torch.autograd.grad(sum(loss for loss, _ in shares), [images, texts, scale])  # type: ignore[arg-type]
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_twins_are_known_by_their_tokens(tmp_path: Path) -> None:
    config = load_config("nano/gen_clip", ["model.start=null"])
    batch = build_training(config).load(0).batches[0]
    same = batch.ids_BS.masked_fill(~batch.mask_BS, -1)
    assert torch.equal((same[:, None] == same[None]).all(-1), batch.captions_B[:, None] == batch.captions_B[None])


@torch.no_grad()
def test_a_captions_embedding_is_its_last_tokens_and_ignores_padding(model: GenCLIP) -> None:
    alone = pairs([[4, 5, 6]])
    padded = pairs([[4, 5, 6], [1, 2, 3, 4, 5, 6, 7]])
    first = model.embed_texts(alone.ids_BS, alone.mask_BS)[0]
    torch.testing.assert_close(model.embed_texts(padded.ids_BS, padded.mask_BS)[0], first, rtol=1e-5, atol=1e-6)
    other = pairs([[9, 5, 6]])
    assert not torch.allclose(model.embed_texts(other.ids_BS, other.mask_BS)[0], first, atol=1e-3)


# --------------------------------------------------------------------------------------------------------- MAE


@torch.no_grad()
def test_the_mae_loss_counts_hidden_patches_only(model: GenCLIP) -> None:
    pixels = pairs([[1], [2]]).pixels_BCHW
    assert model.mae is not None
    predicted = model.mae(model.vision(pixels, keep(2)), keep(2))
    errors = []
    for row in range(2):
        for patch in set(range(16)) - set(keep(2)[row].tolist()):
            y, x = divmod(patch, 4)
            true = pixels[row, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten()
            true = (true - true.mean()) / (true.var() + 1e-4).sqrt()  # MAE's normalised targets
            errors.append((predicted[row, patch] - true).pow(2).mean())
    assert len(errors) == 24
    expected = torch.stack(errors).view(2, 12).mean(1)
    torch.testing.assert_close(model.reconstruct(pixels, keep(2)), expected, rtol=1e-5, atol=0)


def test_the_step_has_the_gradient_of_the_contrastive_term_plus_the_weighted_mae_term(model: GenCLIP) -> None:
    model, batch = model.double(), pairs([[1, 2], [3, 4], [5]]).to("cpu", torch.float64)
    embedded = model(batch, keep(3))
    (pull,) = embedding_gradients([embedded], [batch], World(torch.device("cpu")))
    losses = surrogate_loss(embedded, pull, batch, 0.5)
    embedded = model(batch, keep(3))
    contrastive, _ = contrast(embedded.images_BE, embedded.texts_BE, embedded.scale, batch.captions_B)
    wanted = contrastive + 0.5 * embedded.masked_B.mean()
    assert losses.parts["contrastive"].item() == pytest.approx(contrastive.item(), rel=1e-12)
    assert (
        losses.parts["mae"].item() == pytest.approx(embedded.masked_B.mean().item(), rel=1e-12)
        and losses.parts["mae"] > 0
    )
    learning = [p for p in model.parameters() if p.requires_grad]
    given, expected = (torch.autograd.grad(loss, learning, allow_unused=True) for loss in (losses.loss, wanted))
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_blank_micro_batch_weighs_nothing(model: GenCLIP) -> None:
    batch = pairs([[1, 2], [3, 4]])
    blank = replace(pairs([[9]]), blank=True, total=2)
    batches = [batch, blank]
    world, embedded = World(torch.device("cpu")), [model(each, keep(len(each.draws))) for each in batches]
    pulling = embedding_gradients(embedded, batches, world)
    both = [surrogate_loss(e, p, b, 0.5) for e, p, b in zip(embedded, pulling, batches, strict=True)]
    (alone,) = embedding_gradients(embedded[:1], batches[:1], world)
    wanted = surrogate_loss(embedded[0], alone, batch, 0.5).parts["contrastive"].item()
    assert sum(losses.parts["contrastive"].item() for losses in both) == pytest.approx(wanted)
    gradients = torch.autograd.grad(both[1].loss, list(model.vision.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


def test_the_mae_term_is_refused_on_a_siglip_tower() -> None:
    config = load_config("nano/understanding_clip")
    tower = build_part("understanding_encoder", config.model)
    with pytest.raises(ValueError, match="contrastive.mae_weight to 0"):
        GenCLIP(tower, config.contrastive.model_copy(update={"mae_weight": 1.0}), 30)  # type: ignore[arg-type]
    assert GenCLIP(tower, config.contrastive, 30).mae is None  # type: ignore[arg-type]
