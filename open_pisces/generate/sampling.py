"""From hidden states and logits to what comes next, and from tokens to pieces of text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def guided(hidden_RD: Tensor, conditioned: int, scale: float) -> Tensor:
    """Hidden states moved away from those of the empty caption, ``empty + scale * (hidden - empty)``.

    The first ``conditioned`` rows are of captions, the others, if there are any, of the empty one.
    """
    hidden_BD = hidden_RD[:conditioned]
    if len(hidden_RD) == conditioned:
        return hidden_BD
    empty_BD = hidden_RD[conditioned:]
    return empty_BD + scale * (hidden_BD - empty_BD)


def draw_token(logits_V: Tensor, temperature: float, draw: torch.Generator, top_p: float = 1.0) -> int:
    """The next token: the likeliest at temperature 0, otherwise drawn from a row's own stream.

    Args:
        logits_V: of the vocabulary.
        temperature: divides them.
        draw: the stream.
        top_p: below 1 the likeliest tokens alone are drawn from, as many as hold this share (nucleus sampling).
    """
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest first becomes 0: divided by a tiny temperature the others are -inf, and none is NaN.
    chances = ((logits_V - logits_V.max()) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = chances.sort(descending=True)
        # A token stays if those before it hold less than the share: the likeliest always stays.
        chances[order[ordered.cumsum(0) - ordered >= top_p]] = 0
    # One number and the sums of chances: `torch.multinomial` draws a number for every token of the vocabulary.
    sums = chances.double().cumsum(0)
    place = torch.rand(1, generator=draw, dtype=torch.double) * sums[-1]
    return min(int(torch.searchsorted(sums, place, right=True)), len(chances) - 1)


class TextPieces:
    """Tokens of an answer, one at a time, to pieces of text; the pieces joined are the answer without outer blanks."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        """What was written so far."""
        self.told = ""

    def add(self, token: int) -> str:
        """The text that a token completes; "" while a character or a blank waits for what follows."""
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        # Half a character: wait for its other bytes.
        return "" if self.text.endswith("\N{REPLACEMENT CHARACTER}") else self.rest()

    def rest(self) -> str:
        """What was not told yet: at the end, a character that is damaged and not unfinished."""
        piece = self.text[len(self.told) :]
        self.told = self.text
        return piece
