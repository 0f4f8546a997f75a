"""The five parts of a Pisces, one row each: how it is built from settings, loaded from a model folder, and saved.

A part is built random, from a pretrained source, or on the meta device; each is saved as its own library saves it.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

from open_pisces.config import GenerationEncoderConfig, ModelConfig
from open_pisces.errors import PiscesError
from open_pisces.model import adapters
from open_pisces.model.bridge import Bridge
from open_pisces.model.decoder import ImageDecoder, PixelUnshuffleVAE, latent_shape
from open_pisces.model.encoders import GenerationEncoder, SharedEncoder, UnderstandingEncoder
from open_pisces.model.importers.language import load_llm
from open_pisces.model.importers.siglip import load_siglip
from open_pisces.model.importers.towers import fill_tower, read_tower
from open_pisces.model.importers.unets import load_unet, load_vae
from open_pisces.model.patch_transformer import PatchTransformer
from open_pisces.settings import ConfigError, validate

LARGEST_FILE = "14MB"
"""Of a patch transformer's weights, which are cut into several files: what is shipped has at most 15 MiB a file."""


class ModelFolderError(PiscesError):
    """A model folder with a missing, damaged or mismatching part."""


@dataclass(frozen=True)
class Part:
    """One part of a Pisces."""

    build: Callable[[ModelConfig, int | None], nn.Module]
    """From the settings of the whole model, and the tokens of the tokenizer (None keeps the LLM's own embeddings)."""
    load: Callable[..., nn.Module]
    """From its folder, the settings, and the dtype of its weights; None keeps the one they are stored in."""
    save: Callable[[Any, Path], None]
    """Into its folder."""
    source: Callable[[ModelConfig], str | None]
    """Where its weights come from; None for fresh ones."""


def build_part(name: str, config: ModelConfig, vocabulary: int | None = None) -> Any:
    """A part of `PARTS` with fresh weights, or with those of its ``source``.

    Args:
        name: of the part.
        config: settings of the whole model; parts take their neighbors' widths from it.
        vocabulary: tokens of the tokenizer, for the LLM's embeddings; None keeps the LLM's own.
    """
    return PARTS[name].build(config, vocabulary)


# --------------------------------------------------------------------------------------------------- building


def llm_config(config: ModelConfig) -> Any:
    """The transformers configuration of the LLM, from settings."""
    values = dict(config.llm.config)
    kind = values.pop("model_type", "llama")
    fresh = AutoConfig.for_model(kind)
    _refuse_unknown(values, fresh.to_dict(), f"model.llm.config ({kind})")
    return AutoConfig.for_model(kind, **values)


def siglip_config(config: ModelConfig) -> SiglipVisionConfig:
    """The transformers configuration of the understanding tower, from settings."""
    known = set(SiglipVisionConfig().to_dict()) | {"vision_use_head"}
    _refuse_unknown(config.understanding.config, known, "model.understanding.config")
    return SiglipVisionConfig(**config.understanding.config)


def is_shared(config: ModelConfig) -> bool:
    """Whether gen-CLIP is the understanding encoder too."""
    return config.understanding.tower == "generation"


def understanding_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Of the understanding encoder, from settings: side of its pictures, vectors of one, their width."""
    if is_shared(config):
        generation = config.generation
        return generation.image_size, generation.grid**2, generation.width
    tower = siglip_config(config)
    return tower.image_size, (tower.image_size // tower.patch_size) ** 2, tower.hidden_size


def _build_llm(config: ModelConfig, vocabulary: int | None) -> nn.Module:
    if config.llm.source:
        return load_llm(config.llm.source, vocabulary)
    values = llm_config(config)
    if vocabulary:
        values.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(values)


def _build_understanding(config: ModelConfig, vocabulary: int | None) -> nn.Module:
    if is_shared(config):
        return SharedEncoder(_build_generation(config, vocabulary))
    values = siglip_config(config)
    source = config.understanding.source
    if source:
        head = getattr(values, "vision_use_head", True)
        tower = load_siglip(source, head)
    else:
        tower = SiglipVisionModel(values)
    return UnderstandingEncoder(tower, config.understanding_mean, config.understanding_std)


def _build_generation(config: ModelConfig, vocabulary: int | None) -> GenerationEncoder:
    encoder = GenerationEncoder(config.generation, config.generation_mean, config.generation_std)
    if config.generation.source:
        fill_tower(encoder, read_tower(config.generation.source), config.generation.source)
    return encoder


def _build_bridge(config: ModelConfig, vocabulary: int | None) -> nn.Module:
    return Bridge(config, understanding_shape(config)[2], llm_config(config).hidden_size)


def build_decoder(config: ModelConfig, vocabulary: int | None = None) -> ImageDecoder:
    """The decoder; U-Net widths that follow from gen-CLIP are filled in here, so recipes cannot contradict them."""
    settings = config.decoder
    width = config.generation.width
    if "unshuffle" in settings.vae:
        vae: Any = PixelUnshuffleVAE(**settings.vae)
    elif settings.source:
        vae = load_vae(settings.source, settings.variant).requires_grad_(False)
    else:
        vae = AutoencoderKL(**settings.vae).requires_grad_(False)
    # The VAE decides how many channels are denoised.
    channels, side, _ = latent_shape(vae, settings.image_size)
    network = _transformer(config, channels, side) if settings.transformer else _unet(config, channels, width)
    arguments = dict(settings.scheduler)
    scheduler = _scheduler(arguments.pop("class", "EulerDiscreteScheduler"), arguments)
    return _decoder_of(config, network, vae, scheduler)


def _decoder_of(config: ModelConfig, network: Any, vae: Any, scheduler: Any) -> ImageDecoder:
    settings = config.decoder
    return ImageDecoder(
        network,
        vae,
        scheduler,
        config.generation.vectors,
        settings.image_size,
        settings.spatial_condition,
        settings.predicts == "clean",
    )


def _transformer(config: ModelConfig, channels: int, side: int) -> PatchTransformer:
    settings: Any = config.decoder.transformer
    if config.decoder.unet or config.decoder.source:
        raise ConfigError("model.decoder.transformer takes the place of unet and source: set one of them")
    if side % settings.patch:
        raise ConfigError(f"model.decoder.transformer.patch = {settings.patch} does not divide latents of side {side}")
    generation = config.generation
    return PatchTransformer(channels, side, generation.vectors, generation.width, **settings.model_dump())


def _unet(config: ModelConfig, latent_channels: int, width: int) -> UNet2DConditionModel:
    settings = config.decoder
    _refuse_unknown(settings.unet, inspect.signature(UNet2DConditionModel.__init__).parameters, "model.decoder.unet")
    if settings.source:
        if settings.spatial_condition:
            raise ConfigError("model.decoder.spatial_condition: a published U-Net has no inputs for it: set false")
        unet = load_unet(settings.source, width, settings.variant)
        if unet.config.in_channels != latent_channels:
            raise ConfigError(
                f"model.decoder.source = {settings.source}: its U-Net takes {unet.config.in_channels} channels, the "
                f"autoencoder gives {latent_channels}"
            )
        return unet
    values = {
        **settings.unet,
        "in_channels": latent_channels + (width if settings.spatial_condition else 0),
        "out_channels": latent_channels,
        "cross_attention_dim": width,
    }
    # SDXL's condition unless the recipe says otherwise; Stable Diffusion 1.5 and 2.1 have none (null).
    if values.setdefault("addition_embed_type", "text_time") == "text_time":
        time_width = values.setdefault("addition_time_embed_dim", 256)
        values["projection_class_embeddings_input_dim"] = width + 6 * time_width
    return UNet2DConditionModel(**values)


def _scheduler(name: str, arguments: dict[str, Any]) -> Any:
    kind = getattr(diffusers, name, None)
    if kind is None or not name.endswith("Scheduler"):
        raise ConfigError(f"model.decoder.scheduler.class = {name!r}: diffusers has no scheduler of that name")
    # Also inside `torch.device("meta")`.
    with torch.device("cpu"):  # a scheduler computes with its tables even where parameters are on the meta device
        return kind(**arguments)


def _refuse_unknown(values: dict[str, Any], known: Iterable[str], where: str) -> None:
    """The libraries accept any key in silence; a misspelt one must not train a different model."""
    known = set(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "the library has no such setting"
            raise ConfigError(f"{where}: unknown key {key} (value {values[key]!r}): {hint}")


# ---------------------------------------------------------------------------------------------------- loading


def _load_llm(path: Path, config: ModelConfig, dtype: torch.dtype | None, quantization_config: Any = None) -> nn.Module:
    dtype = dtype or _stored_dtype(path, path.parent / "adapter")
    more = {"quantization_config": quantization_config} if quantization_config else {}
    llm, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **more)
    _complete(path, info)
    if (path.parent / "adapter").is_dir():
        adapters.load_adapter(llm, path.parent / "adapter")
    return llm


def _load_understanding(path: Path, config: ModelConfig, dtype: torch.dtype | None) -> nn.Module:
    tower, info = SiglipVisionModel.from_pretrained(path, dtype=dtype or _stored_dtype(path), output_loading_info=True)
    _complete(path, info)
    return UnderstandingEncoder(tower, config.understanding_mean, config.understanding_std)


def _load_generation(path: Path, config: ModelConfig, dtype: torch.dtype | None) -> nn.Module:
    settings = validate(GenerationEncoderConfig, json.loads((path / "config.json").read_text()), {"": str(path)})
    with init_empty_weights(include_buffers=False):
        encoder = GenerationEncoder(settings, config.generation_mean, config.generation_std)
    _assign(encoder, load_file(path / "model.safetensors"), dtype)
    return encoder


def _load_bridge(path: Path, config: ModelConfig, dtype: torch.dtype | None) -> nn.Module:
    weights = load_file(path / "model.safetensors")
    understanding_width = weights["understanding_projector.first.weight"].shape[1]
    llm_width = weights["generation_projector.second.weight"].shape[0]
    with init_empty_weights(include_buffers=False):
        bridge = Bridge(config, understanding_width, llm_width)
    _assign(bridge, weights, dtype)
    return bridge


def _load_decoder(path: Path, config: ModelConfig, dtype: torch.dtype | None) -> nn.Module:
    network = _load_transformer(path, dtype) if (path / "transformer").is_dir() else _load_unet(path, dtype)
    values = json.loads((path / "vae" / "config.json").read_text())
    if "unshuffle" in values:
        vae: Any = PixelUnshuffleVAE(**values)
    else:
        vae_dtype = dtype or _stored_dtype(path / "vae")
        vae = AutoencoderKL.from_pretrained(path / "vae", torch_dtype=vae_dtype).requires_grad_(False)
    scheduler_class = json.loads((path / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, scheduler_class).from_pretrained(path / "scheduler")
    decoder = _decoder_of(config, network, vae, scheduler)
    weights = load_file(path / "condition.safetensors")
    if "level_E" not in weights:
        # Folders from before there was a noise level: a decoder that takes all vectors for true ones.
        weights["level_E"] = torch.zeros_like(weights["positions_ME"][0])
    _assign(decoder.condition, weights, dtype)
    return decoder


def _load_unet(path: Path, dtype: torch.dtype | None) -> UNet2DConditionModel:
    unet_dtype = dtype or _stored_dtype(path / "unet")
    unet, info = UNet2DConditionModel.from_pretrained(path / "unet", torch_dtype=unet_dtype, output_loading_info=True)
    _complete(path / "unet", info)
    return unet


def _load_transformer(path: Path, dtype: torch.dtype | None) -> PatchTransformer:
    values = json.loads((path / "transformer" / "config.json").read_text())
    with init_empty_weights(include_buffers=False):
        transformer = PatchTransformer(**values)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((path / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    _assign(transformer, weights, dtype)
    return transformer


def _assign(module: nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Give a module weights in ``dtype`` (None: as they are), without ever holding them twice; buffers stay float32."""
    # One tensor at a time: the file's copy of each is let go of as soon as it is cast.
    buffers = dict(module.named_buffers())
    for name, value in weights.items():
        weights[name] = value.to(torch.float32 if name in buffers else dtype or value.dtype)
    module.load_state_dict(weights, assign=True)


def _stored_dtype(*folders: Path) -> torch.dtype:
    """The half precision that all weights in these folders have, or else float32, in which none of them is rounded.

    Read from the headers of the files: the config.json beside them may say another dtype, or none.
    """
    found: set[str] = set()
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _complete(path: Path, info: dict[str, Any]) -> None:
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ModelFolderError(f"{path}: weights do not fit its config.json, for example {wrong[0]}")


# ----------------------------------------------------------------------------------------------------- saving


def _save_generation(encoder: Any, path: Path) -> None:
    _save_module(encoder, path)
    (path / "config.json").write_text(encoder.config.model_copy(update={"source": None}).model_dump_json(indent=1))


def _save_module(module: nn.Module, path: Path) -> None:
    path.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path / "model.safetensors")


def _save_decoder(decoder: Any, path: Path) -> None:
    if decoder.is_transformer:
        (path / "transformer").mkdir(parents=True)
        state = {name: value.contiguous() for name, value in decoder.network.state_dict().items()}
        save_torch_state_dict(state, path / "transformer", max_shard_size=LARGEST_FILE)
        (path / "transformer" / "config.json").write_text(json.dumps(decoder.network.config, indent=1))
    else:
        decoder.network.save_pretrained(path / "unet")
    if isinstance(decoder.vae, PixelUnshuffleVAE):
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text(json.dumps({"unshuffle": decoder.vae.factor}))
    else:
        decoder.vae.save_pretrained(path / "vae")
    decoder.scheduler.save_pretrained(path / "scheduler")
    save_file(decoder.condition.state_dict(), path / "condition.safetensors")


def _save_understanding(encoder: Any, path: Path) -> None:
    if isinstance(encoder, SharedEncoder):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"tower": "generation"}, indent=1))  # its weights lie there
    else:
        encoder.tower.save_pretrained(path)


def _save_llm(llm: Any, path: Path) -> None:
    if adapters.adapter_layers(llm):
        adapters.save_base(llm, path)
        adapters.save_adapter(llm, path.with_name("adapter"))
    else:
        llm.save_pretrained(path)


# ------------------------------------------------------------------------------------------------------ the table

PARTS = {
    "llm": Part(_build_llm, _load_llm, _save_llm, lambda config: config.llm.source),
    "understanding_encoder": Part(
        _build_understanding, _load_understanding, _save_understanding, lambda config: config.understanding.source
    ),
    "generation_encoder": Part(
        _build_generation, _load_generation, _save_generation, lambda config: config.generation.source
    ),
    "bridge": Part(_build_bridge, _load_bridge, _save_module, lambda config: None),
    "decoder": Part(build_decoder, _load_decoder, _save_decoder, lambda config: config.decoder.source),
}
"""By the names of their folders and of `Pisces`'s attributes; trainings, folders and plans go through this table."""
