"""gen-CLIP's two losses, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from open_pisces.batch import PairBatch
from open_pisces.config import ConfigError, ContrastiveConfig, GenerationEncoderConfig, load_config
from open_pisces.model.build import build_part
from open_pisces.model.encoders import GenerationEncoder
from open_pisces.model.gen_clip import GenCLIP
from open_pisces.train.objectives import build_training

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
        total=len(ids),
    )


def keep(rows: int) -> Tensor:
    return torch.tensor([[0, 5, 6, 11]]).expand(rows, -1)


# ------------------------------------------------------------------------------------------------- contrastive


@torch.no_grad()
def test_the_contrastive_loss_is_clips_formula(model: GenCLIP) -> None:
    images, texts = unit(5, 1), unit(5, 2)
    loss, retrieval = model.contrast(images, texts, torch.eye(5, dtype=torch.bool))
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
    model.log_scale.fill_(50.0)
    loss, _ = model.contrast(unit(3, 1), unit(3, 2), torch.eye(3, dtype=torch.bool))
    model.log_scale.fill_(math.log(100))
    expected, _ = model.contrast(unit(3, 1), unit(3, 2), torch.eye(3, dtype=torch.bool))
    assert loss.isfinite() and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_pairs_with_the_same_caption_leave_the_comparison(model: GenCLIP) -> None:
    images, texts = unit(4, 1), unit(4, 2)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    loss, _ = model.contrast(images, texts, same)
    scores = images @ texts.T / 0.07
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or not same[i, j]]
        expected -= float(scores[i, others].log_softmax(0)[others.index(i)]) / 8
        expected -= float(scores[others, i].log_softmax(0)[others.index(i)]) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_twins_are_known_by_their_tokens_and_not_by_their_padding(model: GenCLIP) -> None:
    seen: list[Tensor] = []
    original = model.contrast
    model.contrast = lambda i, t, same: seen.append(same) or original(i, t, same)  # type: ignore[method-assign, func-returns-value]
    model(pairs([[1, 2], [1, 2, 29], [1, 2], [3]]), keep(4))  # 29 pads: the second caption ends in that very token
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(seen[0], expected)


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
    torch.testing.assert_close(model.reconstruct(pixels, keep(2)), torch.stack(errors).mean(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_loss_is_the_contrastive_term_plus_the_weighted_mae_term(model: GenCLIP) -> None:
    losses = model(pairs([[1, 2], [3, 4], [5]]), keep(3))
    expected = losses.parts["contrastive"] + 0.5 * losses.parts["mae"]
    torch.testing.assert_close(losses.loss, expected)
    assert losses.parts["mae"] > 0


def test_the_mae_term_is_refused_on_a_siglip_tower() -> None:
    config = load_config("nano/understanding_clip")
    tower = build_part("understanding_encoder", config.model)
    with pytest.raises(ValueError, match="contrastive.mae_weight to 0"):
        GenCLIP(tower, config.contrastive.model_copy(update={"mae_weight": 1.0}), 30)  # type: ignore[arg-type]
    assert GenCLIP(tower, config.contrastive, 30).mae is None  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["nano/understanding_clip", "nano/gen_clip"])
def test_a_contrastive_training_refuses_accumulation(recipe: str) -> None:
    with pytest.raises(ConfigError, match="train.accumulate must be 1"):
        build_training(load_config(recipe, ["train.accumulate=2", "model.start=null"]))
