"""Random choices that depend on what they are for, never on what was drawn before.

Every rank, worker and restart draws the same numbers because a choice is named: ``stream(seed, "mask", epoch, key)``.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import numpy as np


def stream(seed: int, *purpose: object) -> np.random.Generator:
    """A generator that belongs to one purpose.

    Args:
        seed: the run's seed.
        purpose: words and whole numbers that name the choice, such as ``"order", source, epoch``.

    Raises:
        TypeError: for a part that is neither a word nor a whole number (its spelling could change between versions).
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *purpose):
        digest.update(_spell(part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _spell(part: object) -> bytes:
    """Bytes that differ for different parts, wherever one ends and the next begins."""
    if isinstance(part, Integral):  # numpy's integers count as Python's
        text = f"i{int(part)}"
    elif isinstance(part, str):
        text = f"s{part}"
    else:
        raise TypeError(f"a purpose is made of words and whole numbers, found {part!r} ({type(part).__name__})")
    raw = text.encode()
    return f"{len(raw)}:".encode() + raw
