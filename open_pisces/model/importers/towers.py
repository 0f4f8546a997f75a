"""Published vision towers for `GenerationEncoder`: the names their weights carry, and ours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from open_pisces.model.importers.files import ImportSourceError, read_weights


@dataclass(frozen=True)
class Names:
    """How one family calls the tensors of its vision tower."""

    family: str
    sign: str
    """A pattern that a name of this family matches and none of the others'."""
    table: dict[str, str]
    """Patterns of their names, and ours."""
    left_out: tuple[str, ...]
    """Patterns of what a file may hold besides: text towers, heads."""


_TRANSFORMERS = {
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
_POSITION_IDS = r"(?:\w+_model\.)?embeddings\.position_ids"
# transformers names both alike; only CLIP has a class token.
_CLIP = Names(
    "CLIP",
    r"(?:vision_model\.)?embeddings\.class_embedding",
    _TRANSFORMERS,
    (r"text_model\..*", r"(?:visual|text)_projection\.weight", "logit_scale", _POSITION_IDS),
)
_SIGLIP = Names(
    "SigLIP",
    r"(?:vision_model\.)?embeddings\.patch_embedding\.bias",
    _TRANSFORMERS,
    (r"text_model\..*", r"(?:vision_model\.)?head\..*", "logit_scale", "logit_bias", _POSITION_IDS),
)
# OpenCLIP keeps its text tower beside `visual`, without a prefix of its own.
_OPENCLIP = Names(
    "OpenCLIP",
    r"visual\.class_embedding",
    {
        r"visual\.class_embedding": "class_token",
        r"visual\.conv1\.weight": "patches.weight",
        r"visual\.positional_embedding": "positions",
        r"visual\.ln_pre\.(weight|bias)": r"entry_norm.\1",
        r"visual\.ln_post\.(weight|bias)": r"exit_norm.\1",
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)": r"blocks.\1.attention.qkv.\2",
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)": r"blocks.\1.attention.out.\2",
        r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)": r"blocks.\1.expand.\2",
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)": r"blocks.\1.contract.\2",
    },
    (
        r"visual\.proj",
        r"(?:text\.)?(?:transformer|token_embedding|ln_final)\..*",
        r"(?:text\.)?(?:positional_embedding|text_projection|attn_mask)",
        "logit_scale",
    ),
)
# EVA-CLIP as Emu2 ships it (emu/eva_vit.py): fused qkv without a key bias; alone, or beside Emu2's LLM.
_V = r"(?:model\.)?(?:visual\.)?"
_EVA = Names(
    "EVA-CLIP",
    rf"{_V}cls_token",
    {
        rf"{_V}cls_token": "class_token",
        rf"{_V}pos_embed": "positions",
        rf"{_V}patch_embed\.proj\.(weight|bias)": r"patches.\1",
        rf"{_V}norm\.(weight|bias)": r"exit_norm.\1",
        rf"{_V}blocks\.(\d+)\.attn\.qkv\.weight": r"blocks.\1.attention.qkv.weight",
        rf"{_V}blocks\.(\d+)\.attn\.([qv])_bias": r"blocks.\1.attention.\2.bias",
        rf"{_V}blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"blocks.\1.attention.out.\2",
        rf"{_V}blocks\.(\d+)\.norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
        rf"{_V}blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"blocks.\1.expand.\2",
        rf"{_V}blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"blocks.\1.contract.\2",
    },
    (
        r"text\..*",
        rf"{_V}head\.(?:weight|bias)",
        rf"{_V}mask_token",
        "logit_scale",
        r"(?:model\.)?(?:decoder|project_up|project_down)\..*",
    ),
)
FAMILIES = (_CLIP, _OPENCLIP, _EVA, _SIGLIP)
"""SigLIP last: its sign is a bias that other towers may have."""


def translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published vision tower's weights to ours; text towers and heads are left out.

    Raises:
        ImportSourceError: if the names are of no known family, or one of them has no place.
    """
    if "patches.weight" in weights:
        return weights
    names = _family(weights)
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = _renamed(name, names.table)
        if new is not None:
            ours[new] = value
        elif not any(re.fullmatch(pattern, name) for pattern in names.left_out):
            raise ImportSourceError(
                f"{name} {tuple(value.shape)}: {names.family} has no tensor of that name, so it is not this family's"
            )
    if "class_token" in ours:
        ours["class_token"] = ours["class_token"].flatten()
    if "positions" in ours:
        ours["positions"] = ours["positions"].flatten(0, -2)
    for block in sorted({int(key.split(".")[1]) for key in ours if key.startswith("blocks.")}):
        _fuse(ours, f"blocks.{block}.attention.")
    return ours


def _family(weights: dict[str, Tensor]) -> Names:
    for names in FAMILIES:
        if any(re.fullmatch(names.sign, name) for name in weights):
            return names
    known = ", ".join(names.family for names in FAMILIES)
    example = next(iter(weights), "nothing at all")
    raise ImportSourceError(f"names of no vision tower that is known ({known}), for example {example}")


def _renamed(name: str, table: dict[str, str]) -> str | None:
    for pattern, new in table.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return None


def _fuse(ours: dict[str, Tensor], prefix: str) -> None:
    """Join q, k and v where all are there; a missing key bias is zero."""
    if all(f"{prefix}{n}.weight" in ours for n in "qkv"):
        ours[f"{prefix}qkv.weight"] = torch.cat([ours.pop(f"{prefix}{n}.weight") for n in "qkv"])
    if all(f"{prefix}{n}.bias" in ours for n in "qv"):
        ours.setdefault(f"{prefix}k.bias", torch.zeros_like(ours[f"{prefix}q.bias"]))
        ours[f"{prefix}qkv.bias"] = torch.cat([ours.pop(f"{prefix}{n}.bias") for n in "qkv"])


def fill_tower(encoder: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Give an encoder weights of our names.

    Raises:
        ImportSourceError: naming the first tensor that is missing, left over, or of another shape.
    """
    own = encoder.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise ImportSourceError(f"{source}: lacks {name} {tuple(value.shape)}: see model.generation in the recipe")
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)}, the recipe's is {tuple(value.shape)}"
            raise ImportSourceError(f"{source}: {name} is {shapes}: set the source's sizes in model.generation")
    left = sorted(weights.keys() - own.keys())
    if left:
        raise ImportSourceError(f"{source}: holds {left[0]}, which the recipe's encoder lacks: see model.generation")
    encoder.load_state_dict(weights)


def read_tower(source: str | Path) -> dict[str, Tensor]:
    """The weights of a local tower, renamed.

    Raises:
        ImportSourceError: as `read_weights` and `translate`, with the source's name.
    """
    weights = read_weights(source)
    try:
        return translate(weights)
    except ImportSourceError as error:
        raise ImportSourceError(f"{source}: {error}") from None
