"""One step of a Llama-like LLM on one new position a row, without the calls that transformers makes around it.

A step of a small model is spent on Python and on launching small operations, not on arithmetic: transformers' layers
take some 55 operations and 13 module calls, these take 25 and none. Small layers are copied into wider ones (`FUSED`),
so a step is made anew after the weights have changed. Other architectures and sharded weights take transformers' way
(`Slots.step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Of a layer: takes new queries, keys and values ``(N, heads, C)``, gives what the queries see, N first."""
Operation = Callable[[Tensor], Tensor]
FUSED = 2**18
"""Linear layers that read the same input become one if they have no more weights than this together: above it reading
them takes longer than launching, and a copy costs memory."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a step needs of a layer, looked up once: a module's attributes cost as much as a small operation."""

    attention_norm: Operation
    qkv: Operation
    """Queries, keys and values, one behind the other."""
    q_norm: Operation | None
    k_norm: Operation | None
    o: Operation
    scale: float
    mlp_norm: Operation
    gate_up: Operation
    """Gate and up, one behind the other."""
    down: Operation

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        """The layer of transformers."""
        attention, mlp = layer.self_attn, layer.mlp
        normed = hasattr(attention, "q_norm")
        return cls(
            attention_norm=_norm(layer.input_layernorm),
            qkv=_together(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=_norm(attention.q_norm) if normed else None,
            k_norm=_norm(attention.k_norm) if normed else None,
            o=_linear(attention.o_proj),
            scale=attention.scaling,
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate_up=_together(mlp.gate_proj, mlp.up_proj),
            down=_linear(mlp.down_proj),
        )


class LlamaStep:
    """The step of one LLM, as its weights are now: make another after they have changed.

    Args:
        decoder: the transformer inside it (`get_decoder`).
        length: positions that tables are made for.
    """

    def __init__(self, decoder: Any, length: int) -> None:
        config = decoder.config
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.layers = [_Layer.of(layer) for layer in decoder.layers]
        self.norm = _norm(decoder.norm)
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
        """The last hidden states ``(R, D)`` of new embeddings ``(R, D)`` at positions ``at_R``.

        ``mask_R11S`` is True where a row sees a position.
        """
        # Attention would turn booleans into numbers in every layer anew.
        bias_R11S = x_RD.new_zeros(mask_R11S.shape).masked_fill_(~mask_R11S, float("-inf"))
        groups = self.key_heads, self.heads // self.key_heads

        def attend(number: int, q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor) -> Tensor:
            keys_RHSC, values_RHSC = cached(number, k_RHC, v_RHC)
            # Heads that share keys stand in the place of queries, so that nothing is repeated.
            q_RHGC, scale = q_RHC.unflatten(1, groups), self.layers[number].scale
            return F.scaled_dot_product_attention(q_RHGC, keys_RHSC, values_RHSC, attn_mask=bias_R11S, scale=scale)

        return self._through(x_RD, at_R, attend)

    def read(self, x_SD: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Read S embeddings of one row from position 0 on.

        Returns:
            The last hidden states ``(S, D)``; keys and values of each layer, ``(H, S, C)``.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(number: int, q_SHC: Tensor, k_SHC: Tensor, v_SHC: Tensor) -> Tensor:
            q_HSC, k_HSC, v_HSC = q_SHC.transpose(0, 1), k_SHC.transpose(0, 1), v_SHC.transpose(0, 1)
            keys.append(k_HSC)
            values.append(v_HSC)
            how = {"is_causal": True, "scale": self.layers[number].scale, "enable_gqa": self.heads != self.key_heads}
            seen_1HSC = F.scaled_dot_product_attention(q_HSC[None], k_HSC[None], v_HSC[None], **how)
            return seen_1HSC[0].transpose(0, 1)

        hidden_SD = self._through(x_SD, torch.arange(len(x_SD), device=x_SD.device), attend)
        return hidden_SD, tuple(keys), tuple(values)

    def _through(self, x_ND: Tensor, at_N: Tensor, attend: Attend) -> Tensor:
        """The last hidden states of N embeddings at these positions."""
        cos_N1C = self.cos_LC[at_N][:, None]
        sin_N1C = self.sin_LC[at_N][:, None]
        N, H, K = len(x_ND), self.heads, self.key_heads
        for number, layer in enumerate(self.layers):
            qkv_NHC = layer.qkv(layer.attention_norm(x_ND)).view(N, H + 2 * K, -1)
            qk_NHC, v_NHC = qkv_NHC[:, : H + K], qkv_NHC[:, H + K :]
            if layer.q_norm is not None and layer.k_norm is not None:
                qk_NHC = torch.cat([layer.q_norm(qk_NHC[:, :H]), layer.k_norm(qk_NHC[:, H:])], 1)
            qk_NHC = torch.addcmul(qk_NHC * cos_N1C, qk_NHC.roll(self.half, -1), sin_N1C)
            x_ND = x_ND + layer.o(attend(number, qk_NHC[:, :H], qk_NHC[:, H:], v_NHC).reshape(N, -1))
            gate_NF, up_NF = layer.gate_up(layer.mlp_norm(x_ND)).chunk(2, -1)
            x_ND = x_ND + layer.down(F.silu(gate_NF) * up_NF)
        return self.norm(x_ND)


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


def _linear(module: Any) -> Operation:
    # An adapter or a quantized layer is called, a plain one spared the call.
    if type(module) is not nn.Linear:
        return module
    weight, bias = module.weight, module.bias
    return lambda x: F.linear(x, weight, bias)


def _together(*modules: Any) -> Operation:
    """The outputs of linear layers for the same input, one behind the other."""
    plain = all(type(module) is nn.Linear and (module.bias is None) == (modules[0].bias is None) for module in modules)
    if plain and sum(module.weight.numel() for module in modules) <= FUSED:
        with torch.no_grad():
            weight = torch.cat([module.weight for module in modules])
            bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
        return lambda x: F.linear(x, weight, bias)
    each = [_linear(module) for module in modules]
    return lambda x: torch.cat([linear(x) for linear in each], -1)


def _norm(module: Any) -> Operation:
    weight, eps = module.weight, module.variance_epsilon
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        # The CPU's own takes thirteen operations, this five.
        per = 1 / weight.numel()
        eps_1 = torch.full((1,), eps)

        def normed(x: Tensor) -> Tensor:
            x = x.float()
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return (x * torch.addcmul(eps_1, length, length, value=per).rsqrt_()).mul_(weight)

        return normed
    # Under autocast what comes is narrower than the weight.
    return lambda x: torch.rms_norm(x.to(weight.dtype), weight.shape, weight, eps)
