"""What turns a hidden state into a generation vector: the paper's squared error, behind an interface for other heads.

`Pisces` knows the interface only. A head that samples (a flow, a diffusion, a mixture) is one more class here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

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

    def __init__(self, llm_width: int, width: int) -> None:
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
