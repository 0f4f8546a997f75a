"""Builds the parts of a Pisces from settings: random, from a pretrained source, or on the meta device."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

from open_pisces.config import ConfigError, LossConfig, ModelConfig
from open_pisces.model.bridge import Bridge
from open_pisces.model.decoder import ImageDecoder, PixelUnshuffleVAE
from open_pisces.model.encoders import GenerationEncoder, UnderstandingEncoder
from open_pisces.model.keymaps import read_tower
from open_pisces.model.pisces import Pisces

PARTS = ("llm", "understanding_encoder", "generation_encoder", "bridge", "decoder")


def build_part(name: str, config: ModelConfig, vocabulary: int | None = None) -> nn.Module:
    """A part with fresh weights, or with those of its ``source``.

    Args:
        name: one of `PARTS`.
        config: settings of the whole model; parts take their neighbours' widths from it.
        vocabulary: tokens of the tokenizer, for the LLM's embeddings; None keeps the LLM's own.
    """
    if name == "llm":
        return _llm(config, vocabulary)
    if name == "understanding_encoder":
        return UnderstandingEncoder(_siglip(config), config.understanding_mean, config.understanding_std)
    if name == "generation_encoder":
        encoder = GenerationEncoder(config.generation, config.generation_mean, config.generation_std)
        if config.generation.source:
            encoder.load_state_dict(read_tower(config.generation.source))
        return encoder
    if name == "bridge":
        llm_width = llm_config(config).hidden_size
        return Bridge(config, siglip_config(config).hidden_size, llm_width)
    return build_decoder(config)


def build_pisces(config: ModelConfig, vocabulary: int | None = None, decoder: bool = True) -> Pisces:
    """A whole model from settings alone."""
    parts: dict[str, Any] = {n: build_part(n, config, vocabulary) for n in PARTS if decoder or n != "decoder"}
    return Pisces(config, **parts)


def assemble(config: ModelConfig, parts: dict[str, Any], weights: LossConfig | None = None) -> Pisces:
    """A Pisces from parts that were built or loaded one by one."""
    return Pisces(config, **parts, weights=weights)


# --------------------------------------------------------------------------------------------------- the parts


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


def _llm(config: ModelConfig, vocabulary: int | None) -> nn.Module:
    if config.llm.source:
        llm = AutoModelForCausalLM.from_pretrained(config.llm.source, dtype=torch.float32)
        if vocabulary and vocabulary > llm.config.vocab_size:
            llm.resize_token_embeddings(vocabulary)
        return llm
    values = llm_config(config)
    if vocabulary:
        values.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(values)


def _siglip(config: ModelConfig) -> SiglipVisionModel:
    values = siglip_config(config)
    if config.understanding.source:
        return SiglipVisionModel.from_pretrained(
            config.understanding.source, vision_use_head=getattr(values, "vision_use_head", True), dtype=torch.float32
        )
    return SiglipVisionModel(values)


def build_decoder(config: ModelConfig) -> ImageDecoder:
    """The decoder; U-Net widths that follow from gen-CLIP are filled in here, so recipes cannot contradict them."""
    settings, width = config.decoder, config.generation.width
    if "unshuffle" in settings.vae:
        vae: Any = PixelUnshuffleVAE(**settings.vae)
    elif settings.source:
        vae = AutoencoderKL.from_pretrained(settings.source, subfolder="vae").requires_grad_(False)
    else:
        vae = AutoencoderKL(**settings.vae).requires_grad_(False)
    unet = _unet(config, vae.config.latent_channels, width)
    arguments = dict(settings.scheduler)
    scheduler = _scheduler(arguments.pop("class", "EulerDiscreteScheduler"), arguments)
    return assemble_decoder(config, unet, vae, scheduler)


def assemble_decoder(config: ModelConfig, unet: Any, vae: Any, scheduler: Any) -> ImageDecoder:
    """A decoder from parts that were built or loaded."""
    settings = config.decoder
    return ImageDecoder(
        unet,
        vae,
        scheduler,
        config.generation.vectors,
        settings.image_size,
        settings.spatial_condition,
        settings.predicts == "clean",
    )


def _unet(config: ModelConfig, latent_channels: int, width: int) -> UNet2DConditionModel:
    settings = config.decoder
    _refuse_unknown(settings.unet, inspect.signature(UNet2DConditionModel.__init__).parameters, "model.decoder.unet")
    time_width = settings.unet.get("addition_time_embed_dim", 256)
    values = {
        **settings.unet,
        "in_channels": latent_channels + (width if settings.spatial_condition else 0),
        "out_channels": latent_channels,
        "cross_attention_dim": width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": width + 6 * time_width,
    }
    if not settings.source:
        return UNet2DConditionModel(**values)
    # SDXL's own cross-attention is 2048 wide; what does not fit is left uninitialised by the loader, so draw it anew.
    unet, info = UNet2DConditionModel.from_pretrained(
        settings.source,
        subfolder="unet",
        ignore_mismatched_sizes=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        **{key: values[key] for key in ("cross_attention_dim", "projection_class_embeddings_input_dim")},
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and {f"{name}.weight", f"{name}.bias"} & mismatched:
            module.reset_parameters()
    return unet


def _scheduler(name: str, arguments: dict[str, Any]) -> Any:
    kind = getattr(diffusers, name, None)
    if kind is None or not name.endswith("Scheduler"):
        raise ConfigError(f"model.decoder.scheduler.class = {name!r}: diffusers has no scheduler of that name")
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
