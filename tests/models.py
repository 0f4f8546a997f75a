"""Whole models from settings alone, and recipes that start from the shared trainings, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_pisces.config import ModelConfig, RunConfig
from open_pisces.model.parts import PARTS, build_part
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import TRAININGS, load_config


def build_pisces(config: ModelConfig, vocabulary: int | None = None, decoder: bool = True) -> Pisces:
    """A model with fresh weights."""
    parts = {name: build_part(name, config, vocabulary) for name in PARTS if decoder or name != "decoder"}
    return Pisces(config, **parts)


def start_of(runs: Path, name: str) -> list[str]:
    """The override by which nano's training ``name`` starts from the one before it in the fixture ``runs``."""
    place = TRAININGS.index(name)
    return [f"model.start={runs / TRAININGS[place - 1] / 'model'}"] if place else []


def nano(runs: Path, name: str, *overrides: str, out: Path | None = None) -> RunConfig:
    """A nano recipe that starts from the training before it; writes to its place in ``runs``, or to ``out``."""
    return load_config(f"nano/{name}", [f"out={out or runs / name}", *start_of(runs, name), *overrides])


@contextmanager
def costs_counted_once(module_of_use: Any) -> Iterator[None]:
    """Inside, the users of a module's ``costs_of`` share the FLOP counts of a model: half of a short run's time."""
    honest = module_of_use.costs_of
    known: dict[Any, Any] = {}

    def costs_of(module: Any, config: RunConfig) -> Any:
        shapes = tuple((name, p.shape, p.requires_grad) for name, p in module.named_parameters())
        key = config.objective, config.model.model_dump_json(exclude={"start"}), config.loss.own_passes, shapes
        if key not in known:
            known[key] = honest(module, config)
        return known[key]

    module_of_use.costs_of = costs_of
    try:
        yield
    finally:
        module_of_use.costs_of = honest
