"""The families that can be imported, and what their own configuration says of the settings a recipe needs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoConfig

from open_pisces.model.importers.files import ImportSourceError, located, read_weights

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
EVA_HEAD = {1408: 88, 1792: 112}
"""Channels of one head of EVA-CLIP-g and -E by their width; their weights do not tell. 64 in all others."""
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names, and ours."""


@dataclass(frozen=True)
class Family:
    """One family of published weights (`families.yaml`)."""

    name: str
    part: str
    """The block of `ModelConfig` that it fills: llm, understanding, generation, decoder or bridge."""
    example: str
    licence: str
    template: str = ""
    """Of an LLM: the chat template it was tuned with."""


@cache
def families() -> dict[str, Family]:
    """All of them by name."""
    table = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())
    return {name: Family(name, **row) for name, row in table.items()}


def settings_of(family: Family, source: str) -> dict[str, Any]:
    """The part of a recipe's ``model`` that describes a source, read from the source's own configuration.

    Raises:
        ImportSourceError: if the source has no such configuration, or is of another family.
    """
    readers: dict[str, Callable[[str], dict[str, Any]]] = {
        "siglip": _siglip,
        "siglip-generation": _siglip_generation,
        "clip": _clip,
        "openclip": _openclip,
        "eva-clip": _eva,
    }
    if family.part == "bridge":
        return {}  # its sizes are those of its neighbors
    if family.part == "llm":
        return _llm(family, source)
    if family.part == "decoder":
        return _pipeline(source)
    return readers[family.name](source)


def _config(source: str, kinds: tuple[str, ...], family: str) -> Any:
    """transformers' configuration of a source, of one of the kinds of model."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ImportSourceError(
            f"{source}: {str(error).splitlines()[0]}: download the model, and name the folder where it lies"
        ) from None
    if config.model_type not in kinds:
        raise ImportSourceError(
            f"{source}: its config.json says {config.model_type}, and {family} is {' or '.join(kinds)}: name its family"
        )
    return config


def _llm(family: Family, source: str) -> dict[str, Any]:
    kinds = {"qwen2": ("qwen2",), "qwen3": ("qwen3",)}.get(family.name, ("llama",))
    values: dict[str, Any] = {"model_type": kinds[0]}
    where = source
    if source.endswith(".gguf"):
        config = _gguf_config(Path(source))
    else:
        config = _config(source, kinds, family.name)
    # What differs from the library's defaults is all a recipe has to say.
    values |= {key: value for key, value in config.to_diff_dict().items() if key in _shape_keys(config)}
    return {"template": family.template, "tokenizer": where, "llm": {"source": source, "config": values}}


def _gguf_config(file: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, ImportError) as error:
        raise ImportSourceError(f"{file}: {str(error).splitlines()[0]}: a GGUF file needs `pip install gguf`") from None


def _shape_keys(config: Any) -> set[str]:
    """The settings of an LLM that its class knows, without notes about files."""
    notes = {"architectures", "dtype", "transformers_version", "model_type", "_name_or_path", "torch_dtype"}
    return set(type(config)().to_dict()) - notes


def _vision(config: Any) -> Any:
    """The vision tower's part of a configuration of two towers, or that of one."""
    return getattr(config, "vision_config", config)


def _siglip(source: str) -> dict[str, Any]:
    tower = _vision(_config(source, ("siglip", "siglip_vision_model"), "siglip"))
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: getattr(tower, name) for name in names} | {"vision_use_head": False}
    half = [0.5, 0.5, 0.5]
    return {
        "understanding": {"source": source, "config": config},
        "understanding_mean": half,
        "understanding_std": half,
    }


def _tower(config: Any, source: str) -> dict[str, Any]:
    """The settings that CLIP's and SigLIP's configurations share."""
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ImportSourceError(f"{source}: hidden_act = {config.hidden_act!r}, and the encoder knows {known}")
    return {
        "source": source,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "norm_eps": config.layer_norm_eps,
        "activation": ACTIVATIONS[config.hidden_act],
        "pool": pool_of(config.image_size // config.patch_size),
    }


def pool_of(grid: int) -> int:
    """A kernel that divides a grid: the paper's 4, or else 3 (its compromise for SigLIP), 2, or none."""
    return next(kernel for kernel in (4, 3, 2, 1) if grid % kernel == 0)


def _siglip_generation(source: str) -> dict[str, Any]:
    tower = _vision(_config(source, ("siglip", "siglip_vision_model"), "siglip-generation"))
    other = {"entry_norm": False, "class_token": False, "features": "normalized", "patch_bias": True}
    half = [0.5, 0.5, 0.5]
    return {"generation": _tower(tower, source) | other, "generation_mean": half, "generation_std": half}


def _clip(source: str) -> dict[str, Any]:
    tower = _vision(_config(source, ("clip", "clip_vision_model"), "clip"))
    return {"generation": _tower(tower, source), "generation_mean": CLIP_MEAN, "generation_std": CLIP_STD}


def _openclip(source: str) -> dict[str, Any]:
    path = located(source)
    file = (path.parent if path.is_file() else path) / "open_clip_config.json"
    if not file.is_file():
        raise ImportSourceError(
            f"{source}: OpenCLIP's open_clip_config.json is missing beside the weights: fetch it too"
        )
    values = json.loads(file.read_text())
    model = values["model_cfg"]
    tower = model["vision_cfg"]
    if not isinstance(tower.get("layers"), int) or tower.get("timm_model_name"):
        raise ImportSourceError(
            f"{source}: its vision tower is none of OpenCLIP's own ViT: take a ViT of LAION's or OpenAI's"
        )
    width = tower["width"]
    colors = values.get("preprocess_cfg", {})
    generation = {
        "source": source,
        "image_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "width": width,
        "layers": tower["layers"],
        "heads": width // tower.get("head_width", 64),
        "mlp_width": int(width * tower.get("mlp_ratio", 4.0)),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "pool": pool_of(tower["image_size"] // tower["patch_size"]),
    }
    return {
        "generation": generation,
        "generation_mean": colors.get("mean", CLIP_MEAN),
        "generation_std": colors.get("std", CLIP_STD),
    }


def _eva(source: str) -> dict[str, Any]:
    """Read off the tensors: EVA-CLIP has no configuration of one form."""
    every = read_weights(source)
    weights = {name.removeprefix("model.").removeprefix("visual."): value for name, value in every.items()}
    lacking = [
        name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight") if name not in weights
    ]
    if lacking:
        raise ImportSourceError(f"{source}: lacks {lacking[0]}: no EVA-CLIP tower (EVA-02's has other blocks)")
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    grid = int((weights["pos_embed"].shape[-2] - 1) ** 0.5)
    generation = {
        "source": source,
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "heads": width // EVA_HEAD.get(width, 64),
        "mlp_width": weights["blocks.0.mlp.fc1.weight"].shape[0],
        "norm": "post" if width == 1792 else "pre",  # of the towers of one form only E norms its branches' outputs
        "norm_eps": 1e-6,
        "entry_norm": False,
        "patch_bias": "patch_embed.proj.bias" in weights,
        "pool": pool_of(grid),
    }
    return {"generation": generation, "generation_mean": CLIP_MEAN, "generation_std": CLIP_STD}


def _pipeline(source: str) -> dict[str, Any]:
    """A diffusers pipeline: its U-Net's, autoencoder's and scheduler's settings."""
    unet = _known(UNet2DConditionModel, _load(UNet2DConditionModel, source, "unet"))
    vae = _known(AutoencoderKL, _load(AutoencoderKL, source, "vae"))
    unet.setdefault("addition_embed_type", None)  # a recipe's default is SDXL's
    # These follow from the generation encoder's width, which the recipe knows.
    for name in ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        unet.pop(name, None)
    table = _load(diffusers.DDPMScheduler, source, "scheduler")
    kind = getattr(diffusers, table["_class_name"])
    scheduler = {"class": table["_class_name"], **_known(kind, table)}
    side = _load(UNet2DConditionModel, source, "unet")["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "decoder": {"source": source, "unet": unet, "vae": vae, "scheduler": scheduler, "image_size": side},
    }


def _load(kind: Any, source: str, folder: str) -> dict[str, Any]:
    try:
        return dict(kind.load_config(source, subfolder=folder))
    except (OSError, ValueError) as error:
        raise ImportSourceError(
            f"{source}: {folder}/: {str(error).splitlines()[0]}: download the pipeline, and name the folder with its "
            "unet/, vae/ and scheduler/"
        ) from None


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a class whose values differ from its defaults."""
    parameters = inspect.signature(kind.__init__).parameters
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in parameters and _plain(parameters[name].default) != value:
            kept[name] = value
    # The sizes say how large the parts are: kept also where they are the defaults.
    if "block_out_channels" in values:
        kept["block_out_channels"] = values["block_out_channels"]
    return kept


def _plain(value: Any) -> Any:
    """As JSON gives it."""
    return list(value) if isinstance(value, tuple) else value
