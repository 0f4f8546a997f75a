"""A model folder's LLM for text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from open_pisces.data.tokenizer import load_tokenizer
from open_pisces.device import pick_device
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import load_part, read_config
from open_pisces.model.parts import build_part
from open_pisces.model.pisces import Pisces


def load_language(folder: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> Generator:
    """A generator that writes text, and can neither see nor draw: no decoder, and a bridge of random weights.

    The folder's own bridge need not fit: a language model that was just put into a folder, around another's encoders
    (`pisces weights import`), can be asked before its first training.

    Args:
        folder: the model folder.
        device: ``auto`` is the best there is.
        dtype: None is float32 on a CPU, bfloat16 on an accelerator.

    Raises:
        ModelFolderError: naming what is missing or damaged.
    """
    where = pick_device(device)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    config = read_config(folder)
    names = ("llm", "understanding_encoder", "generation_encoder")
    parts: dict[str, Any] = {name: load_part(folder, name, config, dtype) for name in names}
    parts["bridge"] = build_part("bridge", config).to(dtype)
    pisces = Pisces(config, **parts).eval()
    return Generator(pisces, load_tokenizer(Path(folder) / "tokenizer", config.template), str(where))
