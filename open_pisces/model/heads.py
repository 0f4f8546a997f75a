"""What turns a hidden state into a generation vector: the paper's squared error, or a flow that samples.

`Pisces` knows the interface only. Another head (a diffusion, a mixture) is one more class here and a name in `HEADS`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_pisces.config import BridgeConfig
from open_pisces.device import upcast


class HeadLoss(NamedTuple):
    """What a head makes of hidden states whose vectors are known. A tuple, because sharding looks into those."""

    error_K: Tensor
    """The error of each vector, float32."""
    predicted_KE: Tensor
    """The vectors it would have written, for the log."""


class VectorHead(nn.Module):
    """The interface.

    Whatever is random in it comes from outside, as standard normal numbers: in training they are drawn from (seed,
    epoch, sample), at inference from a picture's own seed, so neither depends on the batch.
    """

    loss_draws = 0
    """Standard normal numbers that the loss of one vector takes."""
    sample_draws = 0
    """Standard normal numbers that one sampled vector takes; 0: its vectors are a function of the prompt."""

    def __init__(self, llm_width: int, width: int) -> None:
        super().__init__()
        self.llm_width = llm_width
        self.width = width

    def loss(self, hidden_KD: Tensor, target_KE: Tensor, draws_KR: Tensor | None = None) -> HeadLoss:
        """The error of each vector, to be summed over the global batch and divided by its vectors.

        Args:
            hidden_KD: the hidden state left of each vector.
            target_KE: the true vectors, float32, in the LLM's space.
            draws_KR: ``(K, loss_draws)`` standard normal numbers; None for a head that takes none.
        """
        raise NotImplementedError

    def sample(self, hidden_BD: Tensor, draws_BR: Tensor | None = None) -> Tensor:
        """The next vector of each row, ``(B, E)``.

        Args:
            hidden_BD: the hidden state at ``[IMG]`` or at the vector before.
            draws_BR: ``(B, sample_draws)`` standard normal numbers; None for a head that takes none.
        """
        raise NotImplementedError


class GenerationHead(VectorHead):
    """Two-layer MLP with GELU from the hidden state back to gen-CLIP space, squared error (paper: architecture)."""

    def __init__(self, llm_width: int, width: int, config: BridgeConfig | None = None) -> None:
        super().__init__(llm_width, width)
        self.first = nn.Linear(llm_width, llm_width)
        self.second = nn.Linear(llm_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., E)``."""
        return self.second(nn.functional.gelu(self.first(hidden)))

    def loss(self, hidden_KD: Tensor, target_KE: Tensor, draws_KR: Tensor | None = None) -> HeadLoss:
        """Squared error, mean over channels."""
        predicted_KE = self(hidden_KD)
        # Mean over channels, so that the weight of the loss does not depend on gen-CLIP's width.
        return HeadLoss((upcast(predicted_KE) - target_KE).pow(2).mean(-1), predicted_KE)

    def sample(self, hidden_BD: Tensor, draws_BR: Tensor | None = None) -> Tensor:
        """The prediction itself: squared error has one answer to each prompt."""
        return self(hidden_BD)


class FlowBlock(nn.Module):
    """A residual MLP whose norm is scaled, shifted and gated by the condition (adaLN-zero, DiT; MAR's head)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        # Zero: every block starts as the identity.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_KW: Tensor, condition_KW: Tensor) -> Tensor:
        """``(K, width)`` to the same shape."""
        shift, scale, gate = self.modulation(nn.functional.silu(condition_KW)).chunk(3, -1)
        inner = self.first(self.norm(x_KW) * (1 + scale) + shift)
        return x_KW + gate * self.second(nn.functional.silu(inner))


class FlowHead(VectorHead):
    """A rectified flow on each vector, given the hidden state: it samples where squared error takes the mean.

    Our addition to the paper, after MAR (arXiv 2406.11838) and NextStep-1 (arXiv 2508.10711): a small MLP with adaptive
    norm learns the velocity from the true vector (time 0) to noise (time 1). Each hidden state is trained with
    ``flow_draws`` noises and times, without which the transition is hardly learnt; times are logit-normal. The noise of
    a sample is what it is given: zeros, temperature 0, give one deterministic vector.
    """

    def __init__(self, llm_width: int, width: int, config: BridgeConfig) -> None:
        super().__init__(llm_width, width)
        self.settings = config
        self.loss_draws = config.flow_draws * (width + 1)
        self.sample_draws = width
        inner = config.flow_width
        self.enter = nn.Linear(width, inner)
        self.hidden = nn.Linear(llm_width, inner)
        self.time_first = nn.Linear(TIME_CHANNELS, inner)
        self.time_second = nn.Linear(inner, inner)
        self.blocks = nn.ModuleList(FlowBlock(inner) for _ in range(config.flow_layers))
        self.norm = nn.LayerNorm(inner, elementwise_affine=False)
        self.leave = nn.Linear(inner, width)
        # Zero: it starts as the constant 0, the mean velocity of standardised targets.
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def velocity(self, x_KE: Tensor, times_K: Tensor, hidden_KD: Tensor) -> Tensor:
        """Noise minus vector, as the head believes, at vectors ``x_KE`` of times in [0, 1]; ``(K, E)``."""
        # Times stay float32 until their embedding: bfloat16 would round them (see ImageDecoder.denoise).
        embedded = time_embedding(upcast(times_K)).to(self.enter.weight.dtype)
        condition = self.time_second(nn.functional.silu(self.time_first(embedded))) + self.hidden(hidden_KD)
        x = self.enter(x_KE.to(self.enter.weight.dtype))
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(self.norm(x))

    def loss(self, hidden_KD: Tensor, target_KE: Tensor, draws_KR: Tensor | None = None) -> HeadLoss:
        """Squared error of the velocity, mean over channels and over the draws of a vector."""
        if draws_KR is None:  # plans and FLOP counts, which know shapes only
            draws_KR = target_KE.new_zeros(len(target_KE), self.loss_draws)
        repeat = self.settings.flow_draws
        # In float64 proofs times are float64 too: a processor rounds float32 sigmoids by their place in the tensor.
        drawn = draws_KR.to(upcast(target_KE).dtype).view(-1, self.width + 1)
        noise_KE = drawn[:, 1:]
        # Logit-normal (Stable Diffusion 3), its mean towards noise, where a head this small has most to learn.
        times_K = torch.sigmoid(drawn[:, 0] + self.settings.flow_time_mean)
        true_KE = target_KE.repeat_interleave(repeat, 0)
        at = times_K[:, None]
        noisy_KE = (1 - at) * true_KE + at * noise_KE
        velocity_KE = upcast(self.velocity(noisy_KE, times_K, hidden_KD.repeat_interleave(repeat, 0)))
        error_K = (velocity_KE - (noise_KE - true_KE)).pow(2).mean(-1).view(-1, repeat).mean(1)
        # What it believes the true vector to be, of the first draw: for the log.
        return HeadLoss(error_K, (noisy_KE - at * velocity_KE)[::repeat])

    def sample(self, hidden_BD: Tensor, draws_BR: Tensor | None = None) -> Tensor:
        """From noise to a vector in ``flow_steps`` Euler steps; without draws from zeros."""
        x_BE = hidden_BD.new_zeros(len(hidden_BD), self.width) if draws_BR is None else draws_BR
        x_BE = upcast(x_BE)
        steps = self.settings.flow_steps
        for step in range(steps):
            times_B = x_BE.new_full((len(x_BE),), 1 - step / steps)
            x_BE = x_BE - upcast(self.velocity(x_BE, times_B, hidden_BD)) / steps
        return x_BE.to(hidden_BD.dtype)


TIME_CHANNELS = 64
"""Sines and cosines of a time."""


def time_embedding(times_K: Tensor) -> Tensor:
    """Times in [0, 1] to ``(K, TIME_CHANNELS)`` sines and cosines of periods from 0.006 to 6."""
    half = TIME_CHANNELS // 2
    rates = torch.exp(-math.log(1000) * torch.arange(half, device=times_K.device) / half)
    angles = 1000 * times_K[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


HEADS: dict[str, type[GenerationHead] | type[FlowHead]] = {"squared_error": GenerationHead, "flow": FlowHead}
"""By their name in ``model.bridge.head``."""
