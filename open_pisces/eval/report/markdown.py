"""The report of `open_pisces.eval.report.tables` for people: Markdown whose source is legible too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NOT_RUN, UNKNOWN, HERE = "not run", "–", "measured here"
"""A cell of a model measured here that has no figure; of a published one; the group of models measured here."""
USUAL = "P"
"""The certainty that is not marked: read in the source named."""
_BRIEF = 700  # characters of one thing told


def to_markdown(found: Mapping[str, Any]) -> str:
    """The report as `open_pisces.eval.report.tables.report` returns it, in Markdown."""
    parts = ["# Results", "Written by `pisces eval report`, together with the JSON file beside it: do not edit it."]
    parts += [_models(found["models"]), *_own(found["own"])]
    for table in found["tables"].values():
        parts += _table(table, found)
    if found.get("unfinished"):
        parts += ["## Without scores yet", "\n".join(f"- {folder}" for folder in found["unfinished"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _models(models: Mapping[str, str]) -> str:
    """Which models were measured."""
    if not models:
        return "Nothing was measured here yet."
    return "Measured here: " + ", ".join(f"**{name}** (model hash `{key[:12]}`)" for name, key in models.items()) + "."


def _own(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures that compare with nothing published."""
    if not rows:
        return []
    cells = [
        [
            *(f"`{row['measure']}`", row["model"], *_with_interval(row)),
            *(_number(row["told"].get(key, "")) for key in ("baseline", "n")),
            *(f"`{row['run'][:8]}`", row["aside"]),
        ]
        for row in rows
    ]
    header = ["measure", "model", "score", "95 % interval", "baseline", "n", "run", "why it stands apart"]
    text = "These compare with no published figure, only with each other where measure and settings are the same."
    return ["## Measures of our own", text, grid(header, cells, "llrrrrll"), *_runs(rows)]


def _with_interval(row: Mapping[str, Any]) -> tuple[str, str]:
    """A score and its interval in words."""
    interval = f"{_number(row['low'])} to {_number(row['high'])}" if {"low", "high"} <= set(row) else ""
    best = f" of {_number(row['told']['maximum'])}" if "maximum" in row["told"] else ""
    return f"{_number(row['score'])}{best}" if "score" in row else NOT_RUN, interval


def _table(table: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A table of published figures with its notes, its sources and the runs in it."""
    columns, sources = (
        table["columns"],
        list(dict.fromkeys(row["source"] for row in table["rows"] if row.get("source"))),
    )
    numbers = {key: f"[{number}]" for number, key in enumerate(sources, 1)}
    header, lines = ["model", "params", *columns.values(), "source"], list[list[str]]()
    groups = [row["group"] for row in table["rows"]]
    for place, row in enumerate(table["rows"]):
        if groups[place] not in groups[:place]:
            lines.append([f"**{groups[place]}**", *[""] * (len(header) - 1)])
        cells = [_cell(row, column, table["digits"]) for column in columns]
        lines.append(
            [_named(row), row["params"], *cells, "here" if row.get("here") else numbers.get(row["source"], "")]
        )
    marks = dict.fromkeys(mark for row in table["rows"] for mark in row.get("marks", {}).values() if mark != USUAL)
    notes = [*table["notes"]]
    notes += [f"{UNKNOWN}: not published, or not recovered."] * any(UNKNOWN in line for line in lines)
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
    """What figures depend on: a line for each run, then the versions, which most of them share."""
    if not rows:
        return []
    lines = [
        f"**{row['model']}**, `{row['measure']}`, run `{row['run'][:8]}`: {'. '.join(_parts(row)).removesuffix('.')}."
        for row in rows
    ]
    made = Counter(_versions(row) for row in rows)
    lines += [f"{'All' if len(made) == 1 else f'{count} of these'} made under {text}." for text, count in made.items()]
    return ["Runs:\n\n" + _list(lines)]


def _parts(row: Mapping[str, Any]) -> list[str]:
    """What is said of one run: its figures, what was told of them, its settings."""
    every = row["figures"] or ({"": row} if "score" in row else {})
    scores = ", ".join(f"{_words(column)} {_bracketed(figure)}".strip() for column, figure in every.items())
    known = {key: _told(value) for key, value in row["told"].items() if key != "maximum"}
    if "of" in known:
        known["n"] = f"{known.get('n', '')} of {known.pop('of')}"
    notes = [known.pop(key) for key in ("sentence", "why") if key in known]
    told = ", ".join(f"{_words(key)} {value}" for key, value in known.items())
    left = {key: value for key, value in row["settings"].items() if row["told"].get(key, ...) != value}
    settings = ", ".join(f"{_words(key)} {_setting(key, value)}" for key, value in left.items())
    return [part for part in (scores or NOT_RUN, told, settings and f"Settings: {settings}", *notes) if part]


def _bracketed(figure: Mapping[str, Any]) -> str:
    """A score and its interval, short."""
    interval = f" [{_number(figure['low'])}, {_number(figure['high'])}]" if {"low", "high"} <= set(figure) else ""
    return _number(figure["score"]) + interval


def _setting(key: str, value: Any) -> str:
    """A setting; what was left to the model is said."""
    if value is None:
        return "the model's own" if key in ("steps", "guidance_scale") else "none"
    return _told(value)


def _versions(row: Mapping[str, Any]) -> str:
    """What a run was made with."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions}; device {row['device']}, threads {row['threads']}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _told(value: Any) -> str:
    """A value on one line, cut where it is very long."""
    if isinstance(value, Mapping):
        text = "(" + ", ".join(f"{_words(str(key))} {_told(inner)}" for key, inner in value.items()) + ")"
    elif isinstance(value, list | tuple):
        text = "(" + ", ".join(map(_told, value)) + ")"
    else:
        text = _number(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def _number(value: Any) -> str:
    """A number as people read it; anything else as it is, on one line and with its hashes shortened."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", " ".join(str(value).split()))


def _list(entries: Sequence[str]) -> str:
    return "\n".join(f"- {entry}" for entry in entries)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table whose columns stand below each other in its source too.

    Args:
        header: the columns' headings.
        rows: their cells, as many in each as there are columns.
        align: "l" or "r" for each column.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(header))]
    rule = ["-" * (width - 1) + (":" if way == "r" else "-") for width, way in zip(widths, align, strict=True)]
    ways = {"l": str.ljust, "r": str.rjust}
    placed = [[ways[way](cell, width) for cell, width, way in zip(row, widths, align, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in (placed[0], rule, *placed[1:]))
