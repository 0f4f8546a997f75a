"""Packing: several samples share a row, so that almost no place of a batch is padding.

It happens inside one rank's part of one global batch, from the lengths alone. There is nothing to resume.
"""

from __future__ import annotations

from collections.abc import Sequence

from open_pisces.errors import PiscesError

TRIES = 32
"""Row lengths tried for a batch."""


class PackingError(PiscesError):
    """A sample that fits in no row; the message names its length and the remedy."""


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most ``capacity``: the longest sample first, each into the first row with room.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Returns:
        The samples of each row, by their place in ``lengths``.

    Raises:
        PackingError: for a sample longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[sample] > capacity:
            raise PackingError(f"a sample of {lengths[sample]} tokens, rows have {capacity}: raise data.row_length")
        row = next((r for r, left in enumerate(room) if left >= lengths[sample]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows


def pack(lengths: Sequence[int], row_length: int, multiple: int = 8) -> tuple[list[list[int]], int]:
    """Rows by first fit, of the length up to ``row_length`` that leaves the fewest places empty.

    Few samples seldom fill rows of a given length; rows a little shorter, or one more of them, often do.

    Args:
        lengths: tokens of each sample.
        row_length: the longest row.
        multiple: the length of the rows is a multiple of this, or ``row_length``.

    Returns:
        The samples of each row, and the rows' length.
    """
    if not lengths:
        return [], min(multiple, row_length)
    shortest = max(*lengths, row_length // 2) if len(lengths) > 1 else lengths[0]
    choices = [row_length, *range(row_length // multiple * multiple, shortest - 1, -multiple)]
    tried = choices[:: -(-len(choices) // TRIES)]
    rows = {length: first_fit_decreasing(lengths, length) for length in tried}
    best = min(tried, key=lambda length: (len(rows[length]) * length, length))
    return rows[best], best
