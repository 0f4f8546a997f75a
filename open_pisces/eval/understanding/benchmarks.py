"""The table of understanding benchmarks: the paper's 24 columns and ChartQA, one row each, in ``benchmarks.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import digest
from open_pisces.eval.understanding.scoring import RULES
from open_pisces.eval.understanding.totals import TOTALS

PAPER = "paper"
"""The suite of all rows."""
JUDGE = ("no", "optional", "required")
OPTION_FORMS = ("", "columns", "list", "literal", "lettered", "inline")
GOLD_FORMS = ("text", "texts", "letter", "index", "bracket", "yes_no", "truth")


@dataclass(frozen=True)
class Benchmark:
    """One row: what is asked, how it is asked, and by which rule answers are scored."""

    name: str
    title: str
    group: str
    """Of the table: ``general``, ``text and charts``, ``knowledge``, ``vision``."""
    hub: str
    """The dataset's name on the Hugging Face hub, whose columns a local copy has too."""
    split: str
    size: int
    """Rows of the split that are asked."""
    licence: str
    """Of the data, as far as its card or paper says; read it before use."""
    prompt: str
    """``str.format`` template over columns, ``{options}``, ``{lead}`` and ``{suffix}``."""
    tokens: int
    """The longest answer."""
    answer: str
    """The form asked for, in words."""
    gold: dict[str, str]
    """``column`` and ``form``: one of `GOLD_FORMS`."""
    rule: str
    """What one answer is worth: one of `scoring.RULES`."""
    source: str
    """The code whose rule and prompt this row follows."""
    column: int | None = None
    """Number in the paper's tables; None for a row that is not in them."""
    subset: str = ""
    """The hub's configuration; a folder of that name in local copies."""
    folder: str = ""
    """Folder of a local copy; the row's name if empty."""
    join: dict[str, str] = field(default_factory=dict)
    """Pictures in another ``subset``: the row's column ``key`` holds that one's ``id``."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Only rows with one of these values are asked."""
    question: str = "question"
    """Column that ``edit`` changes."""
    edit: dict[str, Any] = field(default_factory=dict)
    """``strip``, ``capitalize`` (both true) and ``drop`` (a text that is taken out)."""
    lead: dict[str, str] = field(default_factory=dict)
    """``text``, a template, if ``column`` is not empty."""
    suffix: dict[str, Any] = field(default_factory=dict)
    """``cases``: a text for each beginning of the values of the columns ``by``, joined by "/"."""
    options: dict[str, Any] = field(default_factory=dict)
    """``form``, one of `OPTION_FORMS`, and the ``columns`` they are in."""
    picture: list[str] = field(default_factory=lambda: ["image"])
    """Columns with pictures, or lists of them."""
    interleaved: bool = False
    """``<image 1>`` in the prompt stands for the first picture column, and so on; others are not shown."""
    facts: list[str] = field(default_factory=list)
    """Columns that the rule or the judge needs."""
    unit: dict[str, Any] = field(default_factory=dict)
    """What the rule counts: equal values of ``column`` (``within`` another), ``modulo`` a number, or ``pairs``."""
    total: str = "mean"
    """From answers to the score: one of `totals.TOTALS`, or ``ratio`` (judged)."""
    judge: str = "no"
    """Whether a language model has to judge: one of `JUDGE`."""
    guesses: bool = False
    """Whether the published code guesses where it reads nothing."""
    maximum: float = 100.0
    """The best score."""
    notes: str = ""

    @property
    def place(self) -> str:
        """Folder of a local copy."""
        return self.folder or self.name

    @property
    def hash(self) -> str:
        """`digest` of the row: runs of equal hashes ask and score alike."""
        return digest(asdict(self))


@lru_cache
def benchmarks() -> dict[str, Benchmark]:
    """All rows by name, in the paper's order.

    Raises:
        EvaluationError: if the table has a field, rule or form that does not exist.
    """
    rows = yaml.safe_load((Path(__file__).parent / "benchmarks.yaml").read_text(encoding="utf-8"))
    return {name: read_row({"name": name, **row}) for name, row in rows.items()}


def read_row(row: dict[str, Any]) -> Benchmark:
    """A row from its fields.

    Raises:
        EvaluationError: for one that is missing, unknown or out of its list.
    """
    name = row.get("name", "?")
    known = {f.name for f in fields(Benchmark)}
    if unknown := sorted(set(row) - known):
        raise EvaluationError(f"benchmark {name}: no field is called {', '.join(unknown)}; there are {sorted(known)}")
    try:
        found = Benchmark(**row)
    except TypeError as error:
        raise EvaluationError(f"benchmark {name}: {error}") from None
    for what, value, allowed in (
        ("rule", found.rule, RULES),
        ("total", found.total, (*TOTALS, "ratio")),
        ("judge", found.judge, JUDGE),
        ("gold.form", found.gold.get("form"), GOLD_FORMS),
        ("options.form", found.options.get("form", ""), OPTION_FORMS),
    ):
        if value not in allowed:
            raise EvaluationError(f"benchmark {name}: {what} = {value!r}; it is one of {', '.join(allowed)}")
    return found


def choose(names: str | Sequence[str]) -> list[Benchmark]:
    """Rows by name, or all for the suite ``paper``.

    Raises:
        EvaluationError: for a name that is no row.
    """
    table = benchmarks()
    asked: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        asked += table if name == PAPER else [name]
    if unknown := [name for name in asked if name not in table]:
        raise EvaluationError(
            f"no benchmark is called {', '.join(unknown)}: give {PAPER}, or some of {', '.join(table)}"
        )
    return [table[name] for name in dict.fromkeys(asked)]
