"""What a run needs to go on as if nothing had happened: weights, optimizer, averages, step; no pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_pisces.train.optim import AveragedWeights


class CheckpointError(ValueError):
    """A checkpoint that does not fit the run or cannot be read."""


def save_state(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedWeights,
    progress: dict[str, Any],
) -> None:
    """Write ``folder`` whole or not at all; the checkpoint before it stays as ``folder.old`` until then."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"weights/{name}": p.detach() for name, p in module.state_dict().items() if isinstance(p, Tensor)}
    tensors |= {f"average/{name}": value for name, value in average.values.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, fresh / "state.safetensors")
    (fresh / "progress.json").write_text(json.dumps(progress))
    for file in fresh.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The progress of the newest readable checkpoint, or None where there is none."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "progress.json").is_file():
            return {**json.loads((candidate / "progress.json").read_text()), "folder": str(candidate)}
    return None


def load_state(
    progress: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedWeights
) -> None:
    """Put a checkpoint back.

    Raises:
        CheckpointError: if it cannot be read, or belongs to another model.
    """
    path = Path(progress["folder"]) / "state.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove the folder to go on without it") from None
    weights = _under(tensors, "weights/")
    expected = module.state_dict()
    odd = set(weights) ^ set(expected) or {n for n in weights if weights[n].shape != expected[n].shape}
    if odd:
        raise CheckpointError(f"{path}: belongs to another model (see {sorted(odd)[0]}): choose another out=FOLDER")
    module.load_state_dict(weights)
    for name, value in _under(tensors, "average/").items():
        average.values[name].copy_(value)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer/").items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
