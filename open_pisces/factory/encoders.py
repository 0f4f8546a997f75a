"""What a recipe does not train as functions of pixels or captions, and the keys of the outputs in the feature cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_pisces.batch import Sample
from open_pisces.config import RunConfig
from open_pisces.data.features import Kind, feature_key
from open_pisces.data.shards import ShardReader
from open_pisces.generate.generator import Generator
from open_pisces.model.bridge import VisualTokenPooler
from open_pisces.model.encoders import SharedEncoder
from open_pisces.model.folder import get_part, in_start, weights_digest
from open_pisces.settings import ConfigError


class FrozenEncoder(nn.Module):
    """Pixels to what the cache holds: N x width of the understanding tower, or M x E of gen-CLIP after pooling."""

    def __init__(self, kind: Kind, encoder: Any, pool: int) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = encoder
        self.pooler = VisualTokenPooler(pool)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.encoder.image_size

    def output_shape(self) -> tuple[int, ...]:
        """``(vectors, width)`` of a picture."""
        side = self.image_size
        return tuple(self(torch.zeros(1, 3, side, side, device=next(self.parameters()).device)).shape[1:])

    def architecture(self) -> dict[str, Any]:
        """What its outputs depend on beside the weights: heads, activations, norms."""
        # Two encoders may have equal weights and differ here alone: an activation has no tensor.
        if self.kind == "generation" or isinstance(self.encoder, SharedEncoder):
            settings = self.encoder.config if self.kind == "generation" else self.encoder.tower.config
            # Settings that came later count where they are set: stores from before stay valid.
            unset = {name for name in LATER if getattr(settings, name) == type(settings).model_fields[name].default}
            return settings.model_dump(exclude={"source", *unset})
        names = ("num_attention_heads", "num_hidden_layers", "hidden_act", "layer_norm_eps", "patch_size")
        return {name: getattr(self.encoder.tower.config, name) for name in names}

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to ``(B, vectors, width)``."""
        if self.kind == "understanding":
            return self.encoder(pixels_BCHW)
        return self.pooler(self.encoder.features(pixels_BCHW))


LATER = ("norm_eps", "class_token", "features")
"""Settings of the generation encoder that the first stores did not have."""


class CaptionPredictor:
    """The start folder's LLM as a function of captions: what a decoder is trained on besides true vectors.

    Args:
        folder: a model folder with an LLM.
    """

    kind: Kind = "predicted"

    def __init__(self, folder: str) -> None:
        self.generator = Generator.from_pretrained(folder, "cpu")

    def to(self, device: torch.device) -> CaptionPredictor:
        """Move it."""
        self.generator = Generator(self.generator.pisces, self.generator.tokenizer, str(device))
        return self

    def output_shape(self) -> tuple[int, ...]:
        """``(M, E)``."""
        return tuple(self.generator.pisces.bridge.statistics.null_ME.shape)

    def digest(self) -> str:
        """Of all weights that its vectors depend on."""
        pisces = self.generator.pisces
        return weights_digest(nn.ModuleDict({"llm": pisces.llm, "bridge": pisces.bridge}))

    def guidance(self) -> dict[str, float]:
        """The scale that its vectors are written with; nothing without, as in the first stores."""
        scale = self.generator.pisces.settings.bridge.vector_guidance
        return {} if scale == 1.0 else {"vector_guidance": scale}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Captions to vectors ``(B, M, E)`` in gen-CLIP's space; of a head that samples at temperature 0."""
        return self.generator.pisces.bridge.statistics.destandardize(self.generator.vectors(list(captions)))


def caption_of(sample: Sample, row: int) -> str:
    """The caption that row ``row`` of a store is predicted from: the sample's in turn, short and detailed ones."""
    texts = [text for text in (*sample.short_captions, sample.detailed) if text]
    return texts[row % len(texts)] if texts else ""


@dataclass(frozen=True)
class Fingerprint:
    """What an encoder's outputs depend on, apart from the pictures."""

    weights: str
    """`weights_digest` of the encoder in float32."""
    preprocessing: dict[str, Any]


def cached_kinds(config: RunConfig) -> list[Kind]:
    """The encoders whose outputs a recipe reads from the cache: those it needs and does not train.

    Raises:
        ConfigError: if the recipe trains one of its encoders, so that no output could be kept.
    """
    trains_llm = config.objective == "pisces"
    needed: list[Kind] = ["generation"]
    if trains_llm and "understanding" in config.data.feature_kinds:
        needed.append("understanding")
    is_trained = trains_llm and any(f"{kind}_encoder" not in config.train.freeze for kind in needed)
    if config.objective == "contrastive" or is_trained:
        raise ConfigError(
            f"{config.name}: data.features is for frozen encoders, this recipe trains one: leave it empty"
        )
    kinds: list[Kind] = [kind for kind in needed if kind in config.data.feature_kinds]
    return [*kinds, "predicted"] if config.diffusion.predicted else kinds


def load_encoders(config: RunConfig) -> dict[Kind, FrozenEncoder | CaptionPredictor]:
    """The encoders of a recipe, from the folder it starts from or their pretrained source.

    Raises:
        ConfigError: for a recipe whose encoders are neither: features of random weights would fit no other run; or
            with ``diffusion.predicted`` but no LLM to start from.
    """
    encoders: dict[Kind, FrozenEncoder | CaptionPredictor] = {}
    for kind in cached_kinds(config):
        if kind == "predicted":
            if not in_start(config.model, "llm"):
                raise ConfigError(f"{config.name}: diffusion.predicted: model.start = {config.model.start} has no LLM")
            encoders[kind] = CaptionPredictor(config.model.start or "")
            continue
        name = f"{kind}_encoder"
        part = config.model.generation if kind == "generation" else config.model.understanding
        if not in_start(config.model, name) and not part.source:
            raise ConfigError(f"{config.name}: model.start holds no {name}: train it first, or set its source")
        encoder = FrozenEncoder(kind, get_part(name, config.model), config.model.generation.pool)
        encoders[kind] = encoder.requires_grad_(False).eval()
    return encoders


def fingerprints(
    config: RunConfig, encoders: dict[Kind, FrozenEncoder | CaptionPredictor] | None = None
) -> dict[Kind, Fingerprint]:
    """The fingerprint of each encoder of a recipe; it hashes all weights.

    Args:
        config: the recipe.
        encoders: its encoders, if they are loaded already.

    Raises:
        ConfigError: as `load_encoders`.
    """
    if encoders is None:
        # Building an encoder draws random numbers; a run with the cache has to draw the same as one without.
        with torch.random.fork_rng():
            encoders = load_encoders(config)
    model = config.model
    found: dict[Kind, Fingerprint] = {}
    for kind, encoder in encoders.items():
        if isinstance(encoder, CaptionPredictor):
            found[kind] = Fingerprint(encoder.digest(), {"template": model.template, **encoder.guidance()})
            continue
        preprocessing: dict[str, Any] = {"size": encoder.image_size, "resample": "bicubic", "colors": "srgb"}
        preprocessing["architecture"] = encoder.architecture()
        if kind == "understanding":
            preprocessing |= {"shape": "stretched to a square"}
            preprocessing |= {"mean": model.understanding_mean, "std": model.understanding_std}
        else:
            preprocessing |= {"shape": "short side, centre crop", "pool": model.generation.pool}
            preprocessing |= {"mean": model.generation_mean, "std": model.generation_std}
        found[kind] = Fingerprint(weights_digest(encoder.encoder), preprocessing)
    return found


def store_keys(config: RunConfig, reader: ShardReader, found: dict[Kind, Fingerprint]) -> dict[Kind, dict[str, Any]]:
    """The cache's key of each encoder for one dataset."""
    return {
        kind: feature_key(reader, kind, one.weights, one.preprocessing, config.data.features)
        for kind, one in found.items()
    }
