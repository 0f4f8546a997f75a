"""The LLM's key-value cache while it writes: rows of one length in memory, each at a position of its own.

transformers' caches count one position for all rows, so rows that begin at different times, or with prompts of
different lengths, need padding. Here each row has its own: prompts stand at position 0, rows come and go at any step,
and nothing is copied when a row grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from open_pisces.batch import SequenceBatch
from open_pisces.generate.steps import LlamaStep, step_of
from open_pisces.model.pisces import Pisces

MULTIPLE = 64
"""Attention looks at a multiple of this many positions: kernels for odd lengths round differently, and a compiled step
meets few shapes."""


@dataclass(frozen=True)
class Prefix:
    """What a prompt of S tokens leaves in the LLM."""

    keys: tuple[Tensor, ...]
    """Of each layer, ``(H, S, d)``."""
    values: tuple[Tensor, ...]
    hidden_D: Tensor
    """The last hidden state: what comes next is read from it."""

    @property
    def length(self) -> int:
        """S."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of its keys and values."""
        return sum(kept.nbytes for kept in (*self.keys, *self.values))

    def __add__(self, more: Prefix) -> Prefix:
        """This prefix and what was read after it (`read_after`), in one."""
        keys = tuple(torch.cat(pair, 1) for pair in zip(self.keys, more.keys, strict=True))
        values = tuple(torch.cat(pair, 1) for pair in zip(self.values, more.values, strict=True))
        return Prefix(keys, values, more.hidden_D)


def room(config: Any) -> int:
    """Positions that a row may take in an LLM with this configuration.

    Layers with a sliding window see everything as long as nothing has left the window; this cache goes no further.
    """
    positions = int(config.max_position_embeddings)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        positions = min(positions, int(config.sliding_window))
    return positions


def read(pisces: Pisces, batch: SequenceBatch, pad: int, lean: LlamaStep | None = None) -> list[Prefix]:
    """Read prompts together: the prefix of each row, without its padding (on either side).

    A single prompt is read by the LLM's own step, if ``lean`` is given.
    """
    mask_BS = batch.ids_BS != pad
    inputs_BSD, _ = pisces.embed(batch)
    if lean is not None and len(mask_BS) == 1 and mask_BS.all():
        hidden_SD, keys, values = lean.read(inputs_BSD[0])
        return [Prefix(keys, values, hidden_SD[-1])]
    cache = DynamicCache(config=pisces.llm.config)
    # Real tokens count from 0 in every row, so padding changes no rotary angle.
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
    how = {"position_ids": positions_BS, "past_key_values": cache, "use_cache": True}
    if not mask_BS.all():  # without a mask attention takes its fast path
        how["attention_mask"] = mask_BS.long()
    hidden_BSD = pisces.hidden(inputs_BSD, **how)
    found = []
    for i, mask_S in enumerate(mask_BS):
        at = mask_S.nonzero()[:, 0]
        first, after = int(at[0]), int(at[-1]) + 1
        keys = tuple(layer.keys[i, :, first:after] for layer in cache.layers)
        values = tuple(layer.values[i, :, first:after] for layer in cache.layers)
        found.append(Prefix(keys, values, hidden_BSD[i, after - 1]))
    return found


def read_after(pisces: Pisces, inputs_SD: Tensor, before: Prefix | None) -> Prefix:
    """Read the embeddings of one row that follow a prefix; the result holds their own keys and values only."""
    cache = DynamicCache(config=pisces.llm.config)
    start = 0
    if before is not None:
        start = before.length
        for number, (key, value) in enumerate(zip(before.keys, before.values, strict=True)):
            cache.update(key[None], value[None], number)
    positions = torch.arange(start, start + len(inputs_SD), device=inputs_SD.device)[None]
    hidden_BSD = pisces.hidden(inputs_SD[None], position_ids=positions, past_key_values=cache, use_cache=True)
    # Copies: whoever keeps a slice of a tensor keeps all of it.
    keys = tuple(layer.keys[0, :, start:].clone() for layer in cache.layers)
    values = tuple(layer.values[0, :, start:].clone() for layer in cache.layers)
    return Prefix(keys, values, hidden_BSD[0, -1].clone())


class Slots(Cache):
    """R rows of up to ``length`` positions.

    The result of a row does not depend on the other rows, to the bit in float32 on a CPU: all rows are computed in
    step, whatever they hold, and what lies behind a row's position is hidden from it.

    Args:
        pisces: whose LLM reads.
        rows: R.
        length: positions of each row, rounded up to a multiple of `MULTIPLE`.
        lean: the LLM's step, if it was made already; its length is at least this.
    """

    def __init__(self, pisces: Pisces, rows: int, length: int, lean: LlamaStep | None = None) -> None:
        layers = [_Layer(self) for _ in range(pisces.llm.config.num_hidden_layers)]
        super().__init__(layers=layers)
        self.pisces = pisces
        self.lengths = [0] * rows
        """Positions that each row has taken."""
        self.length = -(-length // MULTIPLE) * MULTIPLE
        device = pisces.device
        self.first_R = torch.arange(rows, device=device) * self.length
        self.at_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.place_R = self.first_R
        """Where the step writes, counted over all positions of all rows."""
        self.columns_L = torch.arange(self.length, device=device)
        self.used = MULTIPLE
        self.lean = lean or step_of(pisces.llm, self.length)

    def put(self, row: int, prefix: Prefix) -> None:
        """Let a row go on from a prefix; what it held is forgotten."""
        layers = zip(self.layers, prefix.keys, prefix.values, strict=True)
        for layer, key, value in layers:
            if not layer.is_initialized:
                layer.lazy_initialization(key[None], value[None])
            layer.keys[row, :, : prefix.length] = key
            layer.values[row, :, : prefix.length] = value
        self.lengths[row] = prefix.length

    def free(self, row: int) -> None:
        """Forget what a row holds."""
        self.lengths[row] = 0

    @torch.inference_mode()
    def step(self, embedded_RD: Tensor, live: list[bool] | None = None) -> Tensor:
        """Feed one embedding to every row, and get their next hidden states, ``(R, D)``.

        Rows that are not ``live`` are computed too, but do not go on; their embedding may be anything finite.
        """
        self.at_R.copy_(torch.tensor(self.lengths))
        self.used = -(-(max(self.lengths) + 1) // MULTIPLE) * MULTIPLE
        self.place_R = self.first_R + self.at_R
        mask_R11S = (self.columns_L[: self.used] <= self.at_R[:, None])[:, None, None]
        if self.lean is not None:
            hidden_RD = self.lean(embedded_RD, self.at_R, mask_R11S, self._cached)
        else:
            how = {"attention_mask": mask_R11S, "position_ids": self.at_R[:, None], "past_key_values": self}
            hidden_RD = self.pisces.hidden(embedded_RD[:, None], use_cache=True, **how)[:, 0]
        for row in range(len(self.lengths)):
            self.lengths[row] += live is None or live[row]
        return hidden_RD

    def _cached(self, number: int, key_RHC: Tensor, value_RHC: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values; gives all that the rows may see."""
        return self.layers[number].take(key_RHC, value_RHC)


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, ``(R, H, L, d)``."""

    is_sliding = False

    def __init__(self, owner: Slots) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate them, in the shapes and dtype that the LLM makes."""
        # In memory a position holds all its heads: one index writes it.
        # Zeros and not what was there: a masked NaN would still poison the row.
        places = len(self.owner.lengths), self.owner.length
        H = key_states.shape[1]
        self.keys = key_states.new_zeros(*places, H, key_states.shape[-1]).transpose(1, 2)
        self.values = value_states.new_zeros(*places, H, value_states.shape[-1]).transpose(1, 2)
        self.flat_keys = self.keys.transpose(1, 2).flatten(0, 1)
        self.flat_values = self.values.transpose(1, 2).flatten(0, 1)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write each row's one new key and value at its position; returns all that any row may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.take(key_states[:, :, 0], value_states[:, :, 0])

    def take(self, key_RHC: Tensor, value_RHC: Tensor) -> tuple[Tensor, Tensor]:
        """`update` without the dimension of one position."""
        owner = self.owner
        # Under autocast what comes is narrower than the prompt's.
        self.flat_keys.index_copy_(0, owner.place_R, key_RHC.to(self.keys.dtype))
        self.flat_values.index_copy_(0, owner.place_R, value_RHC.to(self.values.dtype))
        return self.keys[:, :, : owner.used], self.values[:, :, : owner.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask."""
        return self.owner.used, 0

    def get_seq_length(self) -> int:
        """Positions before the current step, in the longest row."""
        return self.owner.used - 1

    def get_max_length(self) -> int:
        """Positions of a row."""
        return self.owner.length
