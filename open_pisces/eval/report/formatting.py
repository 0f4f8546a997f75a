"""Scores and what came with them as text: numbers, nested values, and small tables. For the report and the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

BRIEF = 700
"""Characters of one value."""
INLINE = 80
"""Characters up to which nested values stay in the line; longer ones get a table."""
SCORE = ("score", "low", "high")
Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def words(key: str) -> str:
    """A key as people read it."""
    return key.replace("_", " ")


def number(value: Any) -> str:
    """A number as people read it; anything else as it is, on one line and with its hashes shortened."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", " ".join(str(value).split()))


def bracketed(figure: Mapping[str, Any]) -> str:
    """A score with its interval, if it has one: ``0.61 [0.59, 0.64]``."""
    if figure.get("low") is None or figure.get("high") is None:
        return number(figure["score"])
    return f"{number(figure['score'])} [{number(figure['low'])}, {number(figure['high'])}]"


def is_score(value: Any) -> bool:
    """Whether a value is a score with or without its interval, and nothing else."""
    return isinstance(value, Mapping) and "score" in value and set(value) <= set(SCORE)


def told(value: Any) -> str:
    """A value on one line, cut where it is very long."""
    if is_score(value):
        text = bracketed(value)
    elif isinstance(value, Mapping):
        text = "(" + ", ".join(f"{words(str(key))} {told(inner)}" for key, inner in value.items()) + ")"
    elif isinstance(value, list | tuple):
        text = "(" + ", ".join(map(told, value)) + ")"
    else:
        text = number(value)
    return text if len(text) <= BRIEF else f"{text[:BRIEF]}..."


def small_tables(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Table]]:
    """Parts long nested values from short ones.

    Returns:
        The values that fit into a line, and tables without empty cells for the others. A row is one mapping of figures,
        named by the keys that lead to it; rows with the same columns share a table.
    """
    short: dict[str, Any] = {}
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for key, value in values.items():
        if not isinstance(value, Mapping) or len(told(value)) <= INLINE:
            short[key] = value
            continue
        for name, cells in _rows(words(key), value):
            tables.setdefault(tuple(cells), []).append([name, *cells.values()])
    return short, [(["", *columns], rows) for columns, rows in tables.items()]


def _rows(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and cells of a mapping's own figures, then those of the mappings in it."""
    cells = {}
    if "score" in values:
        cells["score"] = bracketed(values)
        values = {key: value for key, value in values.items() if key not in SCORE}
    inner = {key: value for key, value in values.items() if isinstance(value, Mapping) and not is_score(value)}
    cells |= {words(str(key)): told(value) for key, value in values.items() if key not in inner}
    if cells:
        yield name, cells
    for key, value in inner.items():
        yield from _rows(f"{name}: {words(str(key))}", value)
