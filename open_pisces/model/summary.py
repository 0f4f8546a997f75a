"""What a model consists of, for `pisces info`: parameters, bytes, sources, training record, licences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_pisces.config import ModelConfig
from open_pisces.model.adapters import adapter_summary
from open_pisces.model.folder import ModelFolderError, read_card, without_sources
from open_pisces.model.parts import PARTS


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters and bf16 bytes of every part, built on the meta device: no weights, no memory."""
    parts = {}
    for name, part in PARTS.items():
        with torch.device("meta"):
            module = part.build(without_sources(config), None)
        count = _count(module)
        parts[name] = {"parameters": count, "bytes": 2 * count, "source": part.source(config) or "random"}
        if name == "decoder":
            parts[name]["network"] = _count(module.network)  # type: ignore[arg-type]
    return {"parts": parts, "total": sum(p["parameters"] for p in parts.values())}


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """What a model folder holds: parts, parameters, bytes on disk, training record, licences of the data.

    Parameters are counted from the headers of the files; no weight is read.
    """
    folder, card = Path(folder), read_card(folder)
    parts: dict[str, dict[str, Any]] = {}
    for name in (*PARTS, "adapter"):
        if (folder / name).is_dir():
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            count = sum(_count_file(path) for path in files if path.suffix == ".safetensors")
            size = sum(path.stat().st_size for path in files)
            source = adapter_summary(folder / name) if name == "adapter" else "trained here"
            parts[name] = {"parameters": count, "bytes": size, "source": source}
    licences: dict[str, dict[str, Any]] = {}
    for record in card["record"]:
        licences |= {entry["package"]: entry for entry in record.get("licences", [])}
    total = sum(p["parameters"] for p in parts.values())
    trainings = [{k: v for k, v in record.items() if k != "licences"} for record in card["record"]]
    return {"parts": parts, "total": total, "record": trainings, "licences": list(licences.values())}


def _count_file(path: Path) -> int:
    """Numbers in a safetensors file but for target statistics, which nothing learns; the header is its first bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ModelFolderError(f"{path}: damaged ({error}): fetch it again") from None
    total = 0
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith("statistics."):
            total += torch.Size(entry["shape"]).numel()
    return total


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
