"""Muon beside AdamW: which weights it steps, how, and that a run with it goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import nano
from safetensors.torch import load_file
from torch import nn

from open_pisces.config import TrainConfig
from open_pisces.plan.plan import plan
from open_pisces.train import optim
from open_pisces.train.loop import start, train
from open_pisces.train.optim import Muon, build_optimizer, muon_matrices, orthogonalized
from open_pisces.train.world import World


class Mixed(nn.Module):
    """A weight of each kind; the last layer shares its weight with the embedding, as small LLMs do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.wide = nn.Linear(4, 10)
        self.tall = nn.Linear(10, 4)
        self.convolution = nn.Conv2d(4, 8, 3)
        self.logits = nn.Linear(4, 6, bias=False)
        self.logits.weight = self.words.weight


def filled(module: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(5, 5), (4, 30), (30, 31)])
def test_an_orthogonal_step_has_singular_values_near_1_and_the_matrixs_own_directions(
    shape: tuple[int, int], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda kind: half)
    apart = 0.1 if half else 1e-3
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    steps = orthogonalized(matrices)
    for matrix, step in zip(matrices, steps, strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = values > (0.1 if half else 0.02) * values.max()  # five rounds lift smaller ones only part of the way
        moved = torch.diagonal(left.mT @ step @ right.mT)[kept]
        assert 0.5 < moved.min() and moved.max() < 1.3
        torch.testing.assert_close(step, orthogonalized(matrix[None] * 1e-3)[0], rtol=1e-3, atol=apart)


def test_muon_takes_matrices_and_leaves_tables_biases_and_the_shared_layer_to_adamw() -> None:
    module = Mixed()
    chosen = {id(p) for p in muon_matrices(module)}
    names = {name for name, p in module.named_parameters() if id(p) in chosen}
    assert names == {"wide.weight", "tall.weight", "convolution.weight"}
    module.wide.weight.requires_grad_(False)
    assert len(muon_matrices(module)) == 2
    optimizer = build_optimizer(module, TrainConfig(optimizer="muon"))
    assert isinstance(optimizer, Muon)
    assert set(optimizer.state[module.tall.weight]) == {"momentum"}
    assert set(optimizer.state[module.tall.bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_step_is_the_orthogonal_momentum_at_adamws_size_and_adamw_elsewhere() -> None:
    module, plain = Mixed(), Mixed()
    plain.load_state_dict(module.state_dict())
    settings = TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.2)
    muon, adamw = build_optimizer(module, settings), build_optimizer(plain, TrainConfig(lr=0.1, weight_decay=0.2))
    expected = module.tall.weight.detach().clone()
    momentum = torch.zeros_like(expected)
    for seed, rate in ((0, 0.1), (1, 0.05)):  # the schedule sets the rate of every group
        filled(module, seed)
        filled(plain, seed)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        gradient = module.tall.weight.grad.clone()  # type: ignore[union-attr]
        momentum = 0.95 * momentum + 0.05 * gradient
        look_ahead = 0.05 * gradient + 0.95 * momentum
        expected = expected * (1 - rate * 0.2) - rate * 0.2 * 10**0.5 * orthogonalized(look_ahead[None])[0]
        muon.step()
        adamw.step()
    torch.testing.assert_close(module.tall.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    for name in ("words.weight", "places", "wide.bias", "convolution.bias"):
        assert torch.equal(module.get_parameter(name), plain.get_parameter(name)), name
    assert not torch.allclose(module.wide.weight, plain.wide.weight)


def test_it_does_what_torchs_own_does_which_rounds_to_bfloat16() -> None:
    ours, theirs = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    one = build_optimizer(ours, TrainConfig(optimizer="muon", lr=0.1))
    other = torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        filled(ours, seed)
        filled(theirs, seed)
        one.step()
        other.step()
    apart = (ours.weight - theirs.weight).norm() / (ours.weight - torch.zeros(1)).norm()
    assert apart < 0.03


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    module = Mixed()
    optimizer = build_optimizer(module, TrainConfig(optimizer="muon", weight_decay=0.5))
    filled(module)
    optimizer.step()
    filled(module)
    module.wide.weight.grad = None
    kept = module.wide.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.wide.weight, kept)


def test_a_run_with_muon_learns_and_goes_on_to_the_bit(runs: Path, tmp_path: Path) -> None:
    def config(name: str, steps: int):  # type: ignore[no-untyped-def]
        settings = ["train.optimizer=muon", f"train.steps={steps}", "train.schedule=constant", "train.warmup_ratio=0"]
        return nano(runs, "stage2", *settings, "train.lr=0.02", "train.save_every=3", out=tmp_path / name)

    train(config("whole", 6), probes=())
    train(config("parts", 3), probes=())
    train(config("parts", 6), probes=())
    one, other = (load_file(tmp_path / name / "model" / "llm" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    run = start(config("whole", 6), World(torch.device("cpu")))
    assert isinstance(run.optimizer, Muon)
    run.checkpoints.close()


def test_a_plan_counts_one_number_for_each_weight_that_muon_steps(runs: Path) -> None:
    kept = {}
    for name in ("adamw", "muon"):
        config = nano(runs, "stage2", f"train.optimizer={name}")
        kept[name] = plan(config, 1)["memory_gib"]["optimizer"]
    assert 0.5 < kept["muon"] / kept["adamw"] < 1
