"""Published causal LLMs: any that transformers has, whole or in shards, or one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from open_pisces.model.importers.files import ImportSourceError


def load_llm(source: str, vocabulary: int | None = None) -> Any:
    """A published causal LLM in float32; its embeddings grow to ``vocabulary`` tokens where the tokenizer has more.

    Args:
        source: a folder or hub name, or a ``.gguf`` file (which needs ``pip install gguf``), whose quantized weights
            become floats, with the errors that their quantization made.
        vocabulary: tokens of the tokenizer with ours among them; None keeps the LLM's own.

    Raises:
        ImportSourceError: if it cannot be fetched, is no causal LLM, or a tensor is missing, left over or of another
            shape than its configuration says.
    """
    path = Path(source)
    where: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        llm, info = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise ImportSourceError(
            f"model.llm.source = {source}: {str(error).splitlines()[0]}: name a folder with a causal LLM, or, for one "
            "on a hub, accept its licence there and log in with `hf auth login`"
        ) from None
    refuse_incomplete(f"model.llm.source = {source}", info)
    if path.suffix == ".gguf":
        _forget_quantization(llm)
    if vocabulary and vocabulary > llm.config.vocab_size:
        llm.resize_token_embeddings(vocabulary)
    return llm


def _forget_quantization(llm: Any) -> None:
    """Its weights are floats by now, but transformers would still refuse to save them."""
    llm.hf_quantizer = None
    llm.quantization_method = None
    if hasattr(llm.config, "quantization_config"):
        del llm.config.quantization_config


def refuse_incomplete(source: str, info: dict[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Refuse weights that do not fill a model exactly; transformers would draw what is missing at random.

    Args:
        source: for the message.
        info: transformers' ``output_loading_info``.
        left_out: beginnings of names that the file may hold besides.

    Raises:
        ImportSourceError: naming the first tensor.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    kinds = {
        "is missing": info["missing_keys"],
        "has another shape than its configuration says": mismatched,
        "is left over": [key for key in info["unexpected_keys"] if not key.startswith(left_out)],
    }
    for what, names in kinds.items():
        for name in sorted(names):
            raise ImportSourceError(f"{source}: {name} {what}: the weights and the config.json do not belong together")
