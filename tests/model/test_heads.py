"""The head's interface: the paper's squared error, and a head that draws, added without touching `Pisces`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import nano
from safetensors.torch import load_file
from torch import Tensor

from open_pisces.config import BridgeConfig, RunConfig
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.model import heads
from open_pisces.model.heads import FlowHead, GenerationHead, HeadLoss, VectorHead
from open_pisces.model.pisces import HistoryNoise, Pisces
from open_pisces.recipe import load_config
from open_pisces.train.loop import train
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

    def watched(self: Pisces, batch: Any, *draws: Any) -> Any:
        given.append(draws)
        return honest(self, batch, *draws)

    monkeypatch.setattr(Pisces, "forward", watched)
    training.losses(training.load(0).with_totals()[0])
    assert given == [(None, None)]  # neither numbers for the head nor noise in what is fed


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


# ------------------------------------------------------------------------------------------------------- the flow


def flow(llm_width: int = 4, width: int = 2, **settings: Any) -> FlowHead:
    torch.manual_seed(0)
    return FlowHead(llm_width, width, BridgeConfig(head="flow", **{"flow_width": 64, **settings}))


@pytest.fixture(scope="module")
def two_answers() -> FlowHead:
    """A flow trained on one hidden state whose vector is (2, -1) as often as (-2, 1)."""
    head = flow()
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    hidden = torch.ones(64, 4)
    for _ in range(400):
        signs = torch.randint(0, 2, (64, 1), generator=draw) * 2.0 - 1
        error, _ = head.loss(
            hidden, signs * torch.tensor([2.0, -1.0]), torch.randn(64, head.loss_draws, generator=draw)
        )
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def test_a_flow_samples_each_answer_where_squared_error_would_take_the_mean(two_answers: FlowHead) -> None:
    draws = torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    sampled = two_answers.sample(torch.ones(500, 4), draws)
    right = (sampled[:, :1].sign() * torch.tensor([2.0, -1.0]) - sampled).abs().amax(1)
    assert right.quantile(0.9) < 0.6  # near one of the two, not between them
    assert 0.35 < (sampled[:, 0] > 0).float().mean() < 0.65


@torch.no_grad()
def test_without_noise_a_flow_gives_one_vector_and_less_noise_gives_less_variety(two_answers: FlowHead) -> None:
    hidden = torch.ones(200, 4)
    still = two_answers.sample(hidden)
    assert torch.equal(still, two_answers.sample(hidden, torch.zeros(200, 2))) and still.std(0).max() < 1e-5
    draws = torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    assert two_answers.sample(hidden, 0.2 * draws).std(0).mean() < two_answers.sample(hidden, draws).std(0).mean()
    alone = two_answers.sample(hidden[:1], draws[7:8])
    torch.testing.assert_close(two_answers.sample(hidden, draws)[7:8], alone)


def test_a_flows_loss_is_the_velocitys_over_its_draws() -> None:
    head = flow(flow_draws=2)
    torch.nn.init.normal_(head.leave.weight, std=0.1)
    hidden, target = torch.randn(3, 4), torch.randn(3, 2)
    draws = torch.randn(3, head.loss_draws)
    assert head.loss_draws == 2 * 3 and head.sample_draws == 2
    error, believed = head.loss(hidden, target, draws)
    for k in range(3):
        found = []
        for number, noise in ((draws[k, 0], draws[k, 1:3]), (draws[k, 3], draws[k, 4:6])):
            time = torch.sigmoid(number + 0.4)
            at = (1 - time) * target[k] + time * noise
            velocity = head.velocity(at[None], time[None], hidden[k : k + 1])[0]
            found.append((velocity - (noise - target[k])).pow(2).mean())
            if len(found) == 1:
                torch.testing.assert_close(believed[k], at - time * velocity)
        torch.testing.assert_close(error[k], torch.stack(found).mean())


def test_a_flows_times_are_not_rounded_in_bfloat16() -> None:
    head = flow(flow_width=64)
    seen: list[Tensor] = []
    honest = heads.time_embedding
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(heads, "time_embedding", lambda times: seen.append(times) or honest(times))
        draws = torch.randn(64, head.loss_draws)
        error, _ = head.loss(torch.randn(64, 4), torch.randn(64, 2), draws)
    expected = torch.sigmoid(draws.view(-1, 3)[:, 0] + 0.4)
    assert torch.equal(seen[0], expected) and seen[0].dtype == error.dtype == torch.float32


def test_a_stage_with_a_flow_starts_from_one_without_and_is_loaded_again(runs: Path, tmp_path: Path) -> None:
    settings = ["model.bridge.head=flow", "model.bridge.flow_width=32", "train.steps=2"]
    folder = train(nano(runs, "stage3", *settings, out=tmp_path / "flow"), probes=()) / "model"
    before, after = (load_file(place / "bridge" / "model.safetensors") for place in (runs / "stage2" / "model", folder))
    assert before["head.first.weight"].shape and "head.leave.weight" in after and "head.first.weight" not in after
    assert torch.equal(before["statistics.std_E"].float(), after["statistics.std_E"].float())
    generator = Generator.from_pretrained(folder, "cpu")
    assert generator.samples
    one, two = generator.image(["a cat"], n=2, steps=1, seed=5)[0]
    other = generator.image(["a dog", "a cat"], n=1, steps=1, seed=5)[1][0]
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1  # picture 0, whatever is beside it
    first, second = (generator.vectors(["a cat"], draws_BMR=generator.head_draws([j], 5, 1.0)) for j in (0, 1))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(generator.vectors(["a cat"], draws_BMR=0 * first), generator.vectors(["a cat"]))
    again = train(nano(runs, "stage3", *settings, f"model.start={folder}", out=tmp_path / "more"), probes=())
    assert "head.leave.weight" in load_file(again / "model" / "bridge" / "model.safetensors")
    with pytest.raises(PromptError, match="temperature -1"):
        generator.image(["a cat"], temperature=-1.0)


def test_a_fresh_llm_keeps_the_targets_and_nothing_else_of_the_bridge(runs: Path, tmp_path: Path) -> None:
    wider = ["model.fresh=[llm]", "model.llm.config.hidden_size=48", "train.steps=1"]
    folder = train(nano(runs, "stage3", *wider, out=tmp_path / "fresh"), probes=()) / "model"
    before, after = (load_file(place / "bridge" / "model.safetensors") for place in (runs / "stage2" / "model", folder))
    assert after["head.first.weight"].shape == (48, 48) != before["head.first.weight"].shape
    for name in before:
        if name.startswith("statistics."):
            assert torch.equal(before[name], after[name]), name
    assert Pisces.from_pretrained(folder).llm.config.hidden_size == 48


# ----------------------------------------------------------------------------------------- noise in what is fed


def test_history_noise_mixes_what_is_fed_and_leaves_the_targets(nano_pisces: Pisces, runs: Path) -> None:
    training = build_training(run(runs, "loss.history_noise=0.9"))
    batch = training.load(0).with_totals()[0]
    pisces: Any = training.module
    noise = training._history_noise(batch)  # type: ignore[attr-defined]
    assert noise.shares_B.max() <= 0.9 and len(noise.shares_B) == len(batch.draws) and len(set(noise.shares_B)) > 1
    plain, targets = pisces.embed(batch)
    mixed, same = pisces.embed(batch, noise)
    assert torch.equal(targets, same)
    at = torch.zeros(plain.flatten(0, 1).shape[0], dtype=torch.bool)
    at[batch.generation_at_K] = True
    apart = (plain != mixed).flatten(0, 1).any(-1)
    assert torch.equal(apart, at)
    vectors = torch.randn(2, 500, 8)
    whole = HistoryNoise(torch.tensor([0.0, 0.64]), torch.randn(2, 500, 8)).mixed_with(vectors)
    assert torch.equal(whole[0], vectors[0]) and 0.95 < whole[1].std() < 1.05
    assert 0.5 < torch.corrcoef(torch.stack([whole[1].flatten(), vectors[1].flatten()]))[0, 1] < 0.7


def test_history_noise_belongs_to_the_picture(runs: Path) -> None:
    found = []
    for other in ("train.accumulate=1", "train.accumulate=4"):
        training = build_training(run(runs, "loss.history_noise=0.9", other))
        numbers = {}
        for batch in training.load(2).with_totals():
            noise = training._history_noise(batch)  # type: ignore[attr-defined]
            numbers |= dict(zip(batch.draws, noise.shares_B.tolist(), strict=True))
        found.append(numbers)
    assert found[0] == found[1] and len(set(found[0].values())) == len(found[0])
