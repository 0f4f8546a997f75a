"""The frozen encoders of a recipe as functions of pixels, and what names their outputs in the feature cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from open_pisces.config import ConfigError, RunConfig
from open_pisces.data.features import FeatureStore, Kind, feature_key
from open_pisces.data.mixture import Mixture
from open_pisces.data.shards import ShardReader
from open_pisces.model.bridge import VisualTokenPooler
from open_pisces.model.folder import get_part, in_start, weights_digest


class FrozenEncoder(nn.Module):
    """Pixels to what the cache holds: N x width of the understanding tower, or gen-CLIP's M x E after pooling."""

    def __init__(self, kind: Kind, encoder: Any, pool: int) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = encoder
        self.pooler = VisualTokenPooler(pool)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.encoder.image_size

    def architecture(self) -> dict[str, Any]:
        """What its outputs depend on besides weights: heads, activations, norms."""
        if self.kind == "generation":
            return self.encoder.config.model_dump(exclude={"source"})
        asked = ("num_attention_heads", "num_hidden_layers", "hidden_act", "layer_norm_eps", "patch_size")
        return {name: getattr(self.encoder.tower.config, name) for name in asked}

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to ``(B, vectors, width)``."""
        if self.kind == "understanding":
            return self.encoder(pixels_BCHW)
        return self.pooler(self.encoder.features(pixels_BCHW))


def cached_kinds(config: RunConfig) -> list[Kind]:
    """The encoders whose outputs a recipe reads from the cache: those it needs and does not train."""
    kinds: list[Kind] = ["generation"]
    if config.objective == "pisces" and "understanding" in config.data.feature_kinds:
        kinds.append("understanding")
    trained = [kind for kind in kinds if config.objective == "pisces" and f"{kind}_encoder" not in config.train.freeze]
    if config.objective == "contrastive" or trained:
        raise ConfigError(
            f"{config.name}: data.features is for frozen encoders, this recipe trains one: leave it empty"
        )
    return [kind for kind in kinds if kind in config.data.feature_kinds]


def load_encoders(config: RunConfig) -> dict[Kind, FrozenEncoder]:
    """The encoders of a recipe, from the folder it starts from or their pretrained source.

    Raises:
        ConfigError: for a recipe whose encoders are neither: features of random weights would fit no other run.
    """
    encoders: dict[Kind, FrozenEncoder] = {}
    for kind in cached_kinds(config):
        name = f"{kind}_encoder"
        part = config.model.generation if kind == "generation" else config.model.understanding
        if not in_start(config.model, name) and not part.source:
            raise ConfigError(f"{config.name}: model.start holds no {name}: train it first, or set its source")
        encoders[kind] = FrozenEncoder(kind, get_part(name, config.model), config.model.generation.pool)
    return {kind: encoder.requires_grad_(False).eval() for kind, encoder in encoders.items()}


def encoder_keys(
    config: RunConfig, reader: ShardReader, encoders: dict[Kind, FrozenEncoder]
) -> dict[Kind, dict[str, Any]]:
    """The cache's key of each encoder for one dataset."""
    keys: dict[Kind, dict[str, Any]] = {}
    for kind, encoder in encoders.items():
        preprocessing: dict[str, Any] = {"size": encoder.image_size, "resample": "bicubic", "colors": "srgb"}
        preprocessing |= {"architecture": encoder.architecture()}
        if kind == "understanding":
            preprocessing |= {"shape": "stretched to a square"}
            preprocessing |= {"mean": config.model.understanding_mean, "std": config.model.understanding_std}
        else:
            preprocessing |= {"shape": "short side, centre crop", "pool": config.model.generation.pool}
            preprocessing |= {"mean": config.model.generation_mean, "std": config.model.generation_std}
        keys[kind] = feature_key(reader, kind, weights_digest(encoder.encoder), preprocessing, config.data.features)
    return keys


def open_features(config: RunConfig, mixture: Mixture) -> list[FeatureStore]:
    """The feature store of each source, or an empty list where a recipe reads pixels.

    Raises:
        FeatureError: for a store that is missing, or of other weights, pictures or settings.
    """
    if not config.data.features:
        return []
    with torch.random.fork_rng():  # building an encoder draws numbers; a run with the cache draws as one without
        encoders = load_encoders(config)
    return [FeatureStore(reader, encoder_keys(config, reader, encoders)) for reader in mixture.readers]
