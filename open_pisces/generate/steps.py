"""One step of a Llama-like LLM on one new position a row, without the calls that transformers makes around it.

A step of a small model is spent on Python and on launching small operations, not on arithmetic: transformers' layers
take some 55 operations and 13 module calls, these take 25 and none. The weights are the LLM's own tensors, read anew in
every step, so nothing is copied and nothing goes stale. Other architectures and sharded weights take transformers' way
(`Slots.step`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""transformers' classes of this layout: RMS norms, rotary positions, a gated MLP of SiLU; biases and norms of heads may
be there."""
ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies do not depend on the length."""
Cached = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a layer: takes its new keys and values ``(R, H, d)``, gives all that the rows may see ``(R, H, S, d)``."""


class LlamaStep:
    """The step of one LLM.

    Args:
        decoder: the transformer inside it (`get_decoder`).
        length: positions that tables are made for.
    """

    def __init__(self, decoder: Any, length: int) -> None:
        self.decoder = decoder
        config = decoder.config
        self.heads = config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        device = next(decoder.parameters()).device
        with torch.no_grad():
            like = torch.zeros(1, 1, config.hidden_size, device=device, dtype=next(decoder.parameters()).dtype)
            cos_1LC, sin_1LC = decoder.rotary_emb(like, torch.arange(length, device=device)[None])
        self.cos_LC = cos_1LC[0]
        half = self.cos_LC.shape[-1] // 2
        # Rotating halves is rolling by one half, the first one negated: the sign goes into the table.
        self.sin_LC = torch.cat([-sin_1LC[0, :, :half], sin_1LC[0, :, half:]], -1)
        self.half = half

    def __call__(self, x_RD: Tensor, at_R: Tensor, mask_R11S: Tensor, cached: Cached) -> Tensor:
        """The last hidden states ``(R, D)`` of new embeddings ``(R, D)`` at positions ``at_R``."""
        cos_R1C = self.cos_LC[at_R][:, None]
        sin_R1C = self.sin_LC[at_R][:, None]
        R = len(x_RD)
        for number, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            normed_RD = _norm(x_RD, layer.input_layernorm)
            q_RHC = _linear(normed_RD, attention.q_proj).view(R, self.heads, -1)
            k_RHC = _linear(normed_RD, attention.k_proj).view(R, self.heads // self.groups, -1)
            v_RHC = _linear(normed_RD, attention.v_proj).view_as(k_RHC)
            if hasattr(attention, "q_norm"):
                q_RHC = _norm(q_RHC, attention.q_norm)
                k_RHC = _norm(k_RHC, attention.k_norm)
            keys_RHSC, values_RHSC = cached(number, self._rotated(k_RHC, cos_R1C, sin_R1C), v_RHC)
            # Heads that share keys stand in the place of queries, so that nothing is repeated.
            q_RHGC = self._rotated(q_RHC, cos_R1C, sin_R1C).unflatten(1, (-1, self.groups))
            seen_RHGC = F.scaled_dot_product_attention(
                q_RHGC, keys_RHSC, values_RHSC, attn_mask=mask_R11S, scale=attention.scaling
            )
            x_RD = x_RD + _linear(seen_RHGC.reshape(R, -1), attention.o_proj)
            normed_RD = _norm(x_RD, layer.post_attention_layernorm)
            mlp = layer.mlp
            x_RD = x_RD + _linear(
                F.silu(_linear(normed_RD, mlp.gate_proj)).mul_(_linear(normed_RD, mlp.up_proj)), mlp.down_proj
            )
        return _norm(x_RD, self.decoder.norm)

    def _rotated(self, x_RHC: Tensor, cos_R1C: Tensor, sin_R1C: Tensor) -> Tensor:
        return torch.addcmul(x_RHC * cos_R1C, x_RHC.roll(self.half, -1), sin_R1C)


def step_of(llm: Any, length: int) -> LlamaStep | None:
    """The step of an LLM, or None where transformers' way has to be taken."""
    decoder = llm.get_decoder()
    config = decoder.config
    if type(decoder).__name__ not in KNOWN or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return None
    if getattr(decoder.rotary_emb, "rope_type", "") not in ROPES or config._attn_implementation != "sdpa":
        return None
    layer = decoder.layers[0]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    holders = layer.self_attn, layer.mlp
    known = all(hasattr(holder, name) for holder, names in zip(holders, parts, strict=True) for name in names)
    # Sharded weights are gathered by the layer's own call.
    whole = not any(isinstance(parameter, DTensor) for parameter in decoder.parameters())
    silu = layer.mlp.act_fn.__class__.__name__ in ("SiLU", "SiLUActivation")
    return LlamaStep(decoder, length) if known and whole and silu else None


def _linear(x: Tensor, module: Any) -> Tensor:
    # An adapter or a quantized layer is called, a plain one spared the call.
    return F.linear(x, module.weight, module.bias) if type(module) is nn.Linear else module(x)


def _norm(x: Tensor, module: Any) -> Tensor:
    # Under autocast what comes is narrower than the weight.
    return F.rms_norm(x.to(module.weight.dtype), x.shape[-1:], module.weight, module.variance_epsilon)
