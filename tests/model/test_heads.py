"""The head's interface: the paper's squared error, and a head that draws, added without touching `Pisces`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_pisces.config import RunConfig, load_config
from open_pisces.model.heads import GenerationHead, HeadLoss, VectorHead
from open_pisces.model.pisces import Pisces
from open_pisces.train.objectives import build_training


def test_squared_error_is_the_mean_over_channels_of_each_vector() -> None:
    head = GenerationHead(6, 3)
    hidden, target = torch.randn(5, 6), torch.randn(5, 3)
    error, predicted = head.loss(hidden, target)
    assert torch.equal(predicted, head(hidden)) and torch.equal(head.sample(hidden), predicted)
    torch.testing.assert_close(error, ((predicted - target) ** 2).sum(-1) / 3)
    assert (head.llm_width, head.width, head.loss_draws, head.sample_draws) == (6, 3, 0, 0)


def test_the_error_is_taken_in_float32_under_autocast() -> None:
    head = GenerationHead(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        error, predicted = head.loss(torch.randn(5, 6), torch.randn(5, 3))
    assert predicted.dtype == torch.bfloat16 and error.dtype == torch.float32


class Noisy(VectorHead):
    """A head whose loss and samples take two numbers a vector."""

    loss_draws = 2
    sample_draws = 2

    def __init__(self, llm_width: int, width: int) -> None:
        super().__init__(llm_width, width)
        self.linear = torch.nn.Linear(llm_width, width)
        self.seen: list[Tensor] = []

    def loss(self, hidden_KD: Tensor, target_KE: Tensor, draws_KR: Tensor | None = None) -> HeadLoss:
        assert draws_KR is not None and draws_KR.shape == (len(hidden_KD), 2)
        self.seen.append(draws_KR)
        predicted = self.linear(hidden_KD) + draws_KR.sum(1, keepdim=True)
        return HeadLoss((predicted - target_KE).pow(2).mean(-1), predicted)

    def sample(self, hidden_BD: Tensor, draws_BR: Tensor | None = None) -> Tensor:
        assert draws_BR is not None
        return self.linear(hidden_BD) + draws_BR.sum(1, keepdim=True)


def run(runs: Path, *overrides: str) -> RunConfig:
    start = f"model.start={runs / 'stage2' / 'model'}"
    return load_config("nano/stage3", [start, "train.batch_size=8", *overrides])


def trained(config: RunConfig, step: int) -> tuple[dict[tuple[int, str], Tensor], float]:
    """The numbers that each picture of a step was given, and the step's loss, with a `Noisy` head."""
    training = build_training(config)
    pisces: Any = training.module
    head = Noisy(pisces.bridge.head.llm_width, pisces.bridge.head.width)
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    pisces.bridge.head = head
    pisces.eval()
    given: dict[tuple[int, str], Tensor] = {}
    total = 0.0
    vectors = pisces.settings.generation.vectors
    for batch in training.load(step).with_totals():
        assert len(batch.draws) * vectors == len(batch.generation_at_K)
        total += float(training.losses(batch).parts["vectors"])
        given |= dict(zip(batch.draws, head.seen.pop().split(vectors), strict=True)) if batch.draws else {}
    return given, total


def test_a_pictures_numbers_depend_on_nothing_but_seed_epoch_and_sample(runs: Path) -> None:
    whole, loss = trained(run(runs), 3)
    assert len(whole) >= 2 and len({tuple(value.flatten().tolist()) for value in whole.values()}) == len(whole)
    for other in (run(runs, "train.accumulate=4"), run(runs, "data.row_length=512")):
        cut, same = trained(other, 3)
        assert cut.keys() == whole.keys() and all(torch.equal(cut[draw], whole[draw]) for draw in whole)
        assert same == pytest.approx(loss, rel=1e-5)


def test_the_papers_head_draws_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = build_training(run(runs))
    given: list[Any] = []
    honest = Pisces.forward

    def watched(self: Pisces, batch: Any, draws: Any) -> Any:
        given.append(draws)
        return honest(self, batch, draws)

    monkeypatch.setattr(Pisces, "forward", watched)
    training.losses(training.load(0).with_totals()[0])
    assert given == [None]


def test_a_head_that_samples_gets_its_numbers_from_outside(nano_pisces: Pisces) -> None:
    pisces = copy.deepcopy(nano_pisces)
    width = pisces.bridge.head.llm_width
    pisces.bridge.head = Noisy(width, pisces.bridge.head.width)
    hidden, draws = torch.randn(3, width), torch.randn(3, 2)
    one, embedded = pisces.next_vector(hidden, draws)
    assert torch.equal(pisces.next_vector(hidden, draws)[0], one) and embedded.shape == (3, width)
    assert not torch.allclose(pisces.next_vector(hidden, draws + 1)[0], one)


def test_a_batch_names_its_generated_pictures_in_order(runs: Path) -> None:
    training = build_training(run(runs))
    names = [name for batch in training.load(0).batches for _, name in batch.draws]
    assert len(set(names)) == len(names) > 0
    assert all(name.startswith("0/") and name.endswith("/0") for name in names)
    assert training.load.blank().draws == ()
