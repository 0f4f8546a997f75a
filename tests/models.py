"""Whole models from settings alone, for tests."""

from __future__ import annotations

from open_pisces.config import ModelConfig
from open_pisces.model.parts import PARTS, build_part
from open_pisces.model.pisces import Pisces


def build_pisces(config: ModelConfig, vocabulary: int | None = None, decoder: bool = True) -> Pisces:
    """A model with fresh weights."""
    parts = {name: build_part(name, config, vocabulary) for name in PARTS if decoder or name != "decoder"}
    return Pisces(config, **parts)
