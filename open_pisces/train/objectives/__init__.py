"""The objectives behind all trainings, by the name that a recipe gives: a new one is a file here and a row below."""

from __future__ import annotations

import torch
from torch import nn

from open_pisces.config import RunConfig
from open_pisces.settings import ConfigError
from open_pisces.train.flops import Costs, take_weights
from open_pisces.train.objectives.base import Objective
from open_pisces.train.objectives.contrastive import ContrastiveObjective
from open_pisces.train.objectives.decoder import DecoderObjective
from open_pisces.train.objectives.pisces import PiscesObjective
from open_pisces.train.world import World

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": ContrastiveObjective,
    "decoder": DecoderObjective,
    "pisces": PiscesObjective,
}


def build_training(config: RunConfig, world: World | None = None) -> Objective:
    """Read data, build or load the parts, freeze what is frozen.

    With several ranks only rank 0 holds weights, in `Objective.weights`; `shard` sends them.
    """
    torch.manual_seed(config.seed)
    if not config.data.sources:
        raise ConfigError(f"{config.name}: data.sources is empty: name at least one dataset")
    world = world or World(torch.device("cpu"))
    objective = OBJECTIVES[config.objective](config, world)
    if world.ranks > 1:
        weights = take_weights(objective.module)
        objective.weights = weights if world.is_first else {}
    return objective


def skeleton(config: RunConfig) -> nn.Module:
    """What an objective trains, on the meta device: shapes, and what learns. No weights are read or fetched."""
    return OBJECTIVES[config.objective].skeleton(config)


def costs_of(module: nn.Module, config: RunConfig) -> Costs:
    """What the module that an objective trains costs in FLOPs: real, sharded, or on the meta device."""
    return Costs(tuple(OBJECTIVES[config.objective].costs(module, config)))
