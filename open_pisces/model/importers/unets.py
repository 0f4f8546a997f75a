"""Published U-Nets for `ImageDecoder`: Stable Diffusion 1.5, 2.1 and XL, or Emu2's, with another width of condition."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from open_pisces.model.importers.files import ImportSourceError

CONDITION = ("attn2.to_k.weight", "attn2.to_v.weight", "add_embedding.linear_1.weight")
"""What reads the condition, and so has its width: keys, values, and SDXL's pooled embedding."""


def load_unet(source: str, width: int, variant: str | None = None) -> UNet2DConditionModel:
    """A published U-Net that takes vectors of ``width`` channels as its condition, in float32.

    Where the widths are equal (Emu2's) the weights are the published ones to the bit. Elsewhere the matrices that read
    the condition are drawn anew, and nothing else is.

    Args:
        source: a pipeline's folder or hub name, whose ``unet`` it is.
        width: E.
        variant: such as ``fp16``; None takes the plain weights.

    Raises:
        ImportSourceError: if it cannot be fetched, is conditioned in another way, or holds other tensors than its
            configuration says.
    """
    try:
        values: dict[str, Any] = UNet2DConditionModel.load_config(source, subfolder="unet")
    except (OSError, ValueError) as error:
        raise ImportSourceError(
            f"{source}: no U-Net to be had ({str(error).splitlines()[0]}): download the pipeline, and set "
            "model.decoder.source to the folder that holds its unet/ and vae/"
        ) from None
    changed: dict[str, Any] = {"cross_attention_dim": width}
    pooled = values.get("addition_embed_type")
    if pooled == "text_time":
        changed["projection_class_embeddings_input_dim"] = width + 6 * values["addition_time_embed_dim"]
    others = {"addition_embed_type": pooled not in (None, "text_time")}
    others |= {key: values.get(key) is not None for key in ("encoder_hid_dim_type", "class_embed_type")}
    for key, is_set in others.items():
        if is_set:
            raise ImportSourceError(
                f"{source}: its U-Net has {key} = {values[key]!r}, a condition that Pisces has nothing for: take one "
                "of Stable Diffusion 1.5, 2.1 or XL, or Emu2's"
            )
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            source,
            subfolder="unet",
            variant=variant,
            use_safetensors=True,  # the other format is pickle
            ignore_mismatched_sizes=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            **changed,
        )
    except (OSError, ValueError) as error:
        raise ImportSourceError(f"{source}: its U-Net cannot be read: {str(error).splitlines()[0]}") from None
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    # diffusers leaves all of these at random values and says so in a warning.
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    wrong += sorted(key for key in mismatched if not key.endswith(CONDITION))
    if wrong:
        raise ImportSourceError(
            f"{source}: {wrong[0]} is missing, left over or of another shape than unet/config.json says"
        )
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in mismatched:
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)  # as nn.Linear draws it; a bias fits and stays
    return unet.float()


def load_vae(source: str, variant: str | None = None) -> AutoencoderKL:
    """A published pipeline's autoencoder, in float32.

    Raises:
        ImportSourceError: if it cannot be fetched, or its weights do not fit its configuration.
    """
    try:
        vae, info = AutoencoderKL.from_pretrained(
            source, subfolder="vae", variant=variant, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ImportSourceError(
            f"{source}: no autoencoder to be had ({str(error).splitlines()[0]}): download the pipeline, and set "
            "model.decoder.source to the folder that holds its unet/ and vae/"
        ) from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ImportSourceError(
            f"{source}: {wrong[0]} is missing, left over or of another shape than vae/config.json says"
        )
    return vae.float()
