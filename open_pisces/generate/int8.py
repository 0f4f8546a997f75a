"""An LLM's matrices in eight bits, on a CPU: writing one token is spent on reading them from memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


def to_int8(llm: Any) -> None:
    """Replace the linear layers of an LLM, its output head among them, by int8 ones, in place; for inference only.

    Weights are rounded once, to 256 levels; activations in each call, to the range of all its rows, so an answer may
    depend on its neighbors. Embeddings stay, also where the head shares them.
    """
    with warnings.catch_warnings():
        # PyTorch moves its quantization to another library, whose int8 is fast on a CPU when it is compiled only.
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(llm, {nn.Linear}, dtype=torch.qint8, inplace=True)
