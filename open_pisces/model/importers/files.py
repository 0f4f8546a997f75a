"""Weights of a published model as it lies on disk: one file, shards with their index, or a variant such as fp16."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from open_pisces.errors import PiscesError

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")
"""What transformers, diffusers and OpenCLIP call their weights."""


class ImportSourceError(PiscesError):
    """A source that cannot be imported; the message names it and the remedy."""


def located(source: str | Path) -> Path:
    """Where a source lies on disk; a hub name (``owner/name``) is downloaded first, its safetensors only.

    Raises:
        ImportSourceError: if there is no such path, and no such model that can be fetched from here.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ImportSourceError(f"{path}: no such file or folder: download the model, and name where it lies")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))
    except GatedRepoError:
        raise ImportSourceError(
            f"{source} is gated: accept its licence on its page, log in with `hf auth login`, and try again"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ImportSourceError(
            f"{source}: no such folder here, and not to be fetched ({str(error).splitlines()[0]}): download the "
            "model elsewhere, and name the folder where it lies"
        ) from None


def weight_files(source: str | Path) -> list[Path]:
    """The files that hold a model's weights, each tensor once.

    A folder may hold the same weights several times: whole and as ``.fp16`` variant (diffusers). The plain ones are
    taken, or else the only variant there is.

    Args:
        source: a ``.safetensors`` file, or a folder with one, or with shards and their index.

    Raises:
        ImportSourceError: if there is no such set, shards are missing, or the choice is not clear. ``.bin`` and
            ``.pt`` are pickle and never read.
    """
    path = located(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ImportSourceError(f"{path}: no .safetensors file; .bin and .pt are pickle: convert it first")
        return [path]
    sets = _sets(path)
    if not sets:
        raise ImportSourceError(f"{path}: no .safetensors file there (convert .bin or .pt first)")
    if "" not in sets and len(sets) > 1:
        raise ImportSourceError(
            f"{path}: holds the variants {', '.join(sorted(sets))}: name the file of one as the source"
        )
    return sets[""] if "" in sets else next(iter(sets.values()))


def _sets(folder: Path) -> dict[str, list[Path]]:
    """Files by variant, the plain ones under ""."""
    found: dict[str, list[Path]] = {}
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        # model.safetensors.index.json, diffusion_pytorch_model.safetensors.index.fp16.json
        variant = index.name.split(".safetensors.index")[1].removesuffix("json").strip(".")
        shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ImportSourceError(f"{folder}: {index.name} names {missing[0]}, which is missing: fetch it again")
        found[variant] = shards
    loose: list[Path] = []
    for file in sorted(folder.glob("*.safetensors")):
        stem, _, variant = file.name.removesuffix(".safetensors").partition(".")
        if "-of-" in file.name:
            continue  # a shard, which its index names
        if stem in STEMS:
            found.setdefault(variant, [file])
        else:
            loose.append(file)
    # A folder of files that no library named, such as our own exports of a tower in pieces.
    return found or ({"": loose} if loose else {})


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a source by name, in the dtype they are stored in.

    Raises:
        ImportSourceError: as `weight_files`, and for a damaged file or a tensor that comes twice.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(source):
        try:
            held = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ImportSourceError(f"{file}: damaged ({str(error).splitlines()[0]}): fetch it again") from None
        twice = sorted(weights.keys() & held.keys())
        if twice:
            raise ImportSourceError(f"{file}: holds {twice[0]}, which another file of {source} holds too: keep one")
        weights |= held
    return weights
