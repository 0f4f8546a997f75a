"""The report of `open_pisces.eval.report.tables` for people: Markdown whose source is legible too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from open_pisces.eval.report.formatting import Table, bracketed, number, small_tables, told, words

NOT_RUN = "not run"
"""A cell without a figure of a model measured here."""
UNKNOWN = "–"
"""A cell without a figure of a published model."""
HERE = "measured here"
"""The group of models measured here."""
USUAL = "P"
"""The certainty that is not marked: read in the source named."""


def to_markdown(found: Mapping[str, Any]) -> str:
    """The report as `open_pisces.eval.report.tables.report` returns it, in Markdown."""
    parts = ["# Results", "Written by `pisces eval report`, together with the JSON file beside it: do not edit it."]
    models = ", ".join(f"**{name}** (model hash `{key[:12]}`)" for name, key in found["models"].items())
    parts += [f"Measured here: {models}." if models else "Nothing was measured here yet.", *_own(found["own"])]
    for table in found["tables"].values():
        parts += _table(table, found)
    if found.get("unfinished"):
        parts += ["## Without scores yet", _list(found["unfinished"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _own(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures that compare with nothing published."""
    if not rows:
        return []
    cells = []
    for row in rows:
        counts = [number(row["told"].get(key, "")) for key in ("baseline", "n")]
        cells.append([f"`{row['measure']}`", row["model"], *_with_interval(row), *counts])
        cells[-1] += [f"`{row['run'][:8]}`", row["aside"]]
    header = ["measure", "model", "score", "95 % interval", "baseline", "n", "run", "why it stands apart"]
    text = "These compare with no published figure, only with each other where measure and settings are the same."
    return ["## Measures of our own", text, grid(header, cells, "llrrrrll"), *_runs(rows)]


def _with_interval(row: Mapping[str, Any]) -> tuple[str, str]:
    """A score and its interval in words."""
    interval = f"{number(row['low'])} to {number(row['high'])}" if {"low", "high"} <= set(row) else ""
    best = f" of {number(row['told']['maximum'])}" if "maximum" in row["told"] else ""
    return f"{number(row['score'])}{best}" if "score" in row else NOT_RUN, interval


def _table(table: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A table of published figures with its notes, its sources and the runs in it."""
    columns = table["columns"]
    sources = list(dict.fromkeys(row["source"] for row in table["rows"] if row.get("source")))
    numbers = {key: f"[{place}]" for place, key in enumerate(sources, 1)}
    header = ["model", "params", *columns.values(), "source"]
    lines: list[list[str]] = []
    marks: dict[str, None] = {}  # a set in the order of the table
    group = None
    for row in table["rows"]:
        if row["group"] != group:  # rows come sorted by group
            group = row["group"]
            lines.append([f"**{group}**", *[""] * (len(header) - 1)])
        cells = [_cell(row, column, table["digits"]) for column in columns]
        source = "here" if row.get("here") else numbers.get(row["source"], "")
        lines.append([_named(row), row["params"], *cells, source])
        marks |= dict.fromkeys(row.get("marks", {}).values())
    marks.pop(USUAL, None)
    notes = [*table["notes"]]
    if any(UNKNOWN in line for line in lines):
        notes.append(f"{UNKNOWN}: not published, or not recovered.")
    notes += [f"({mark}): {found['certainty'][mark]}." for mark in marks]
    notes += [f"{_named(row)} {numbers[row['source']]}: {row['note']}." for row in table["rows"] if row.get("note")]
    cited = [f"{numbers[key]} {found['sources'][key]['cite']}: <{found['sources'][key]['url']}>" for key in sources]
    return [
        f"## {table['title']}",
        grid(header, lines, "ll" + "r" * len(columns) + "l"),
        _list(notes),
        "Sources:\n\n" + _list(cited),
        *_runs(table["runs"]),
    ]


def _named(row: Mapping[str, Any]) -> str:
    """A model's name, with what tells it from other rows of the same model."""
    return f"{row['model']} ({row['variant']})" if row.get("variant") else row["model"]


def _cell(row: Mapping[str, Any], column: str, digits: int) -> str:
    """A figure, with its mark unless it is the usual one."""
    figure = row["figures"].get(column, UNKNOWN)
    if isinstance(figure, str):
        return figure
    if isinstance(figure, Mapping):
        return f"{figure['score']:.{digits}f}"
    mark = row["marks"][column]
    return f"{figure:.{digits}f}" + (f" ({mark})" if mark != USUAL else "")


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What figures depend on: a paragraph for each run with its tables, then the versions, which most of them share."""
    if not rows:
        return []
    parts = ["Runs:"]
    for row in rows:
        line, tables = _run(row)
        parts.append(f"**{row['model']}**, `{row['measure']}`, run `{row['run'][:8]}`: {line}")
        parts += [grid(header, cells, "l" + "r" * (len(header) - 1)) for header, cells in tables]
    made: Counter[str] = Counter()
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        made[f"{versions}; device {row['device']}, threads {row['threads']}"] += 1
    lines = [f"{count} of these made under {text}." for text, count in made.items()]
    if len(made) == 1:
        lines = [f"All made under {text}." for text in made]
    return [*parts, _list(lines)]


def _run(row: Mapping[str, Any]) -> tuple[str, list[Table]]:
    """What is said of one run: its score, what was told of it and its settings in a line; nested figures in tables."""
    known = {key: value for key, value in row["told"].items() if key != "maximum"}
    notes = [told(known.pop(key)) for key in ("sentence", "why") if key in known]
    if "of" in known:
        known["n"] = f"{number(known.get('n', ''))} of {number(known.pop('of'))}"
    if row["figures"]:
        known = {"scores": row["figures"], **known}
    short, tables = small_tables(known)
    said = ", ".join(f"{words(key)} {told(value)}" for key, value in short.items())
    left = {key: value for key, value in row["settings"].items() if row["told"].get(key, ...) != value}
    for key in ("steps", "guidance_scale"):
        if key in left and left[key] is None:
            left[key] = "the model's own"
    settings = ", ".join(f"{words(key)} {told(value)}" for key, value in left.items())
    parts = [bracketed(row) if "score" in row else NOT_RUN, said, settings and f"Settings: {settings}", *notes]
    return f"{'. '.join(part for part in parts if part).removesuffix('.')}.", tables


def _list(entries: Sequence[str]) -> str:
    return "\n".join(f"- {entry}" for entry in entries)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table whose columns stand below each other in its source too.

    Args:
        header: the columns' headings.
        rows: their cells, as many in each as there are columns.
        align: "l" or "r" for each column.
    """
    lines = [[cell.replace("|", "\\|") for cell in header]]
    for row in rows:
        lines.append([cell.replace("|", "\\|") for cell in row])
    columns = []
    for way, *cells in zip(align, *lines, strict=True):
        width = max(3, *map(len, cells))  # a rule of fewer dashes is no table everywhere
        place = str.rjust if way == "r" else str.ljust
        rule = "-" * (width - 1) + (":" if way == "r" else "-")
        columns.append([place(cells[0], width), rule, *(place(cell, width) for cell in cells[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
