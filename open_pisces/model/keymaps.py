"""Published vision towers for `GenerationEncoder`: the names their weights carry, and ours."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from open_pisces.settings import ConfigError

_CLIP = {
    r"(?:vision_model\.)?embeddings\.class_embedding": "class_token",
    r"(?:vision_model\.)?embeddings\.patch_embedding\.(weight|bias)": r"patches.\1",
    r"(?:vision_model\.)?embeddings\.position_embedding\.weight": "positions",
    r"(?:vision_model\.)?pre_layrnorm\.(weight|bias)": r"entry_norm.\1",
    r"(?:vision_model\.)?post_layernorm\.(weight|bias)": r"exit_norm.\1",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)": r"blocks.\1.attention.\2.\3",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)": r"blocks.\1.attention.out.\2",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)": r"blocks.\1.expand.\2",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)": r"blocks.\1.contract.\2",
}
# EVA-CLIP as Emu2 ships it (emu/eva_vit.py): fused qkv without a key bias.
_EVA = {
    r"(?:visual\.)?cls_token": "class_token",
    r"(?:visual\.)?pos_embed": "positions",
    r"(?:visual\.)?patch_embed\.proj\.(weight|bias)": r"patches.\1",
    r"(?:visual\.)?norm\.(weight|bias)": r"exit_norm.\1",
    r"(?:visual\.)?blocks\.(\d+)\.attn\.qkv\.weight": r"blocks.\1.attention.qkv.weight",
    r"(?:visual\.)?blocks\.(\d+)\.attn\.([qv])_bias": r"blocks.\1.attention.\2.bias",
    r"(?:visual\.)?blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"blocks.\1.attention.out.\2",
    r"(?:visual\.)?blocks\.(\d+)\.norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"(?:visual\.)?blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"blocks.\1.expand.\2",
    r"(?:visual\.)?blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"blocks.\1.contract.\2",
}


def translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP or EVA-CLIP vision tower's weights to ours; weights of other towers and heads are left out.

    Raises:
        ConfigError: if the names are neither CLIP's nor EVA-CLIP's.
    """
    if "class_token" in weights:
        return weights
    table = _EVA if any("cls_token" in key for key in weights) else _CLIP
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, new in table.items():
            if re.fullmatch(pattern, name):
                ours[re.sub(pattern, new, name)] = value
    if "class_token" not in ours or "positions" not in ours:
        example = next(iter(weights), "nothing at all")
        raise ConfigError(f"model.generation.source: neither CLIP's nor EVA-CLIP's names, for example {example}")
    ours["class_token"] = ours["class_token"].flatten()
    ours["positions"] = ours["positions"].flatten(0, -2)
    for block in sorted({int(key.split(".")[1]) for key in ours if key.startswith("blocks.")}):
        _fuse(ours, f"blocks.{block}.attention.")
    return ours


def _fuse(ours: dict[str, Tensor], prefix: str) -> None:
    """Join q, k and v; a missing key bias is zero."""
    if f"{prefix}q.weight" in ours:
        ours[f"{prefix}qkv.weight"] = torch.cat([ours.pop(f"{prefix}{n}.weight") for n in "qkv"])
    if f"{prefix}q.bias" in ours:
        ours.setdefault(f"{prefix}k.bias", torch.zeros_like(ours[f"{prefix}q.bias"]))
        ours[f"{prefix}qkv.bias"] = torch.cat([ours.pop(f"{prefix}{n}.bias") for n in "qkv"])


def read_tower(source: str) -> dict[str, Tensor]:
    """The weights of a local tower: a ``.safetensors`` file or a folder of them; ``.bin`` is pickle and never read."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files or any(f.suffix != ".safetensors" for f in files):
        raise ConfigError(
            f"model.generation.source = {source!r}: no .safetensors file there (convert .bin or .pt first)"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return translate(weights)
