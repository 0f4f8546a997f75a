"""Processes that save checkpoints and are killed at random moments: for `make test`, and longer for `make prove`."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_pisces.config import TrainConfig
from open_pisces.train.checkpoint import Checkpoints, faults, find, load_latest, state_of
from open_pisces.train.optim import AveragedWeights, build_optimizer
from open_pisces.train.world import World

WORLD = World(torch.device("cpu"))


def small(seed: int = 0) -> dict[str, Tensor]:
    """The state of a small model after a step."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(module, TrainConfig())
    module(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    return state_of(module, optimizer, AveragedWeights(module, 0.9))


def save_without_pause(state: Path, background: bool, tell: Any) -> None:
    """What is killed: resume, then save every number that follows, each in all tensors."""
    tensors = small()
    found = load_latest(state, tensors, WORLD)
    step = found["step"] if found else 0
    torn = [name for name, value in tensors.items() if found and not (value == step).all()]
    tell.send((step, torn))
    checkpoints = Checkpoints(state, WORLD, 2, background)
    while True:
        step += 1
        for value in tensors.values():
            value.fill_(float(step))
        checkpoints.save(step, tensors, {"step": step})


def kill_while_saving(state: Path, kills: int, seed: int, most: float = 0.25) -> dict[str, int]:
    """SIGKILL a process that saves without pause, again and again; every time the next one has to find a good one."""
    chance, reached, fewest, fork = random.Random(seed), 0, 2, multiprocessing.get_context("fork")
    for number in range(kills):
        hear, tell = fork.Pipe(duplex=False)
        process = fork.Process(target=save_without_pause, args=(state, number % 2 == 0, tell))
        process.start()
        begun, torn = hear.recv()
        assert not torn and begun >= reached - 2, f"kill {number}: went back from {reached} to {begun}, torn: {torn}"
        if number == 0:
            while not find(state):  # the first one is surely there
                time.sleep(0.01)
        time.sleep(chance.uniform(0, most))
        process.kill()
        process.join()
        good = [found for found in find(state) if not faults(found)]
        assert good, f"kill {number} left no good checkpoint"
        reached, fewest = max(int(found.progress["step"]) for found in good), min(fewest, len(good))
    return {"kills": kills, "resumed": kills, "steps": reached, "fewest_good": fewest}
