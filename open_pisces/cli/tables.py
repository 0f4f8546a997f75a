"""How results look in a terminal: tables for ``pisces info``, ``pisces eval`` and ``pisces plan``."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from open_pisces.eval.report.formatting import INLINE, SCORE, bracketed, small_tables, told, words


def print_info(name: str, described: dict[str, Any]) -> None:
    """Print what `model.summary.describe` or `describe_folder` found.

    Args:
        name: the folder or recipe.
        described: ``parts`` (name -> parameters, bytes, source), ``total``, and for a folder ``licences``, ``record``
            and single figures.
    """
    console = Console()
    console.print(_parts(name, described["parts"]))
    rest = {key: value for key, value in described.items() if key != "parts"}
    for title, value in rest.items():
        rows = _rows(value)
        if rows:
            console.print(f"\n[bold]{title}[/bold]")
            for row in rows:
                console.print(f"  {row}", highlight=False, markup=False)


def print_counts(result: dict[str, Any]) -> None:
    """Print what a command on datasets counted, a line for each figure."""
    console = Console()
    for key, value in result.items():
        for row in _rows(value) or ["none"]:
            console.print(f"{key}: {row}", highlight=False, markup=False)


def print_score(result: dict[str, Any]) -> None:
    """Print a score with its interval, what came with it a line each, and nested figures as tables."""
    console = Console()
    if "score" in result:
        console.print(f"score {bracketed(result)}", style="bold", highlight=False, markup=False)
    short, tables = small_tables({key: value for key, value in result.items() if key not in SCORE})
    for key, value in short.items():
        if value in ([], ()):
            continue
        if isinstance(value, list) and len(told(value)) > INLINE:
            console.print(f"  {words(key)}", highlight=False, markup=False)
            for entry in value:
                console.print(f"    {_example(entry)}", highlight=False, markup=False)
        else:
            console.print(f"  {words(key)}: {told(value)}", highlight=False, markup=False)
    for header, rows in tables:
        group, colon, _ = rows[0][0].partition(": ")
        if colon and all(row[0].startswith(f"{group}: ") for row in rows):  # said once, above the names
            header = [group, *header[1:]]
            rows = [[row[0].removeprefix(f"{group}: "), *row[1:]] for row in rows]
        if len(header) > len(rows) + 1:  # a terminal has more room downwards
            header, *rows = map(list, zip(header, *rows, strict=True))
        table = Table(*map(escape, header), box=SIMPLE_HEAD)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _example(entry: Any) -> str:
    """A line of examples; of a wrong picture its prompt and what was wrong."""
    if isinstance(entry, dict) and {"prompt", "reasons"} <= set(entry):
        return f"{entry['prompt']}: {'; '.join(entry['reasons'])}"
    return told(entry)


def print_benchmarks(found: dict[str, Any]) -> None:
    """Print a row for each benchmark: score and interval, both readings, questions; below, what there is to say."""
    console = Console()
    table = Table(title=f"{found['model']}, questions from {found['data']}", title_justify="left")
    for column in ("benchmark", "score", "interval", "strict", "lenient", "n", "unread"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    said: dict[str, list[str]] = {}
    for name, row in found["rows"].items():
        shown = {key: _figure(value) for key, value in row.items() if isinstance(value, float | int)}
        interval = f"{shown['low']} to {shown['high']}" if "low" in shown else ""
        figures = [shown.get(key, "") for key in ("strict", "lenient", "n", "unparsed")]
        table.add_row(name, shown.get("score", "not run"), interval, *figures)
        for why in filter(None, (row.get("why") or "").split("; ")):
            said.setdefault(why, []).append(name)
    console.print(table)
    for why, names in said.items():
        who = "all" if len(names) == len(found["rows"]) else ", ".join(names)
        console.print(f"{who}: {why}", markup=False)


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `plan.plan.plan` found: parts and memory as a table, the rest a line each."""
    console = Console()
    table = Table(title=f"{plan['recipe']} on {plan['gpus']} x {plan['gpu']}", title_justify="left")
    for column in ("part", "parameters", "learning", "on each GPU", "GiB"):
        table.add_column(column, justify="right" if column in ("parameters", "learning", "GiB") else "left")
    parts = [(name, f"{n['parameters']:,}", f"{n['learning']:,}") for name, n in plan["parts"].items()]
    memory = [(name, f"{size:.1f}") for name, size in plan["memory_gib"].items() if size and name != "total"]
    for left, right in zip_longest(parts, memory):
        table.add_row(*(left or ("", "", "")), *(right or ("", "")))
    table.add_section()
    total = sum(facts["parameters"] for facts in plan["parts"].values())
    learning = sum(facts["learning"] for facts in plan["parts"].values())
    table.add_row("all", f"{total:,}", f"{learning:,}", f"of {plan['gpu_gib']:g}", f"{plan['memory_gib']['total']:.1f}")
    console.print(table)
    for line in _plan_lines(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """Step, run, start and disk of a plan in words."""
    step = plan["step"]
    run = plan["run"]
    disk = plan["disk_gb"]
    tokens = f", {step['tokens']:,.0f} tokens" if "tokens" in step else ""
    work = f"{step['samples']:,} samples{tokens}, {step['flops'] / 1e15:,.3g} PFLOP"
    kept = f"{disk['checkpoint']:,.3g} GB a checkpoint, {disk['checkpoints_kept']:,.3g} GB all that are kept"
    return [
        f"a step: {work}, micro-batches of a GPU: {step['micro_batches']:,}; {step['seconds']:,.3g} s",
        f"the run: {run['steps']:,} steps: {run['days']:,.3g} days, {run['gpu_hours']:,.0f} GPU-hours",
        f"the first machine's memory: {plan['host_gib']:,.0f} GiB, where rank 0 reads the weights for all",
        f"on disk: {kept}, {disk['model']:,.3g} GB the model; {disk['data_read']:,.0f} GB of pictures are read",
        f"assumed: {', '.join(plan['assumed'])}",
    ]


def _parts(name: str, parts: dict[str, dict[str, Any]]) -> Table:
    """One row for each part, and their sum."""
    table = Table(title=name, title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("size", justify="right")
    table.add_column("source", overflow="fold")
    for part, facts in parts.items():
        table.add_row(part, f"{facts['parameters']:,}", _size(facts["bytes"]), str(facts.get("source") or ""))
    table.add_section()
    total = sum(facts["parameters"] for facts in parts.values())
    size = sum(facts["bytes"] for facts in parts.values())
    table.add_row("all", f"{total:,}", _size(size), "")
    return table


def _size(count: int) -> str:
    """Bytes in the unit that reads best."""
    if count < 1000:
        return f"{count} B"
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _rows(value: Any) -> list[str]:
    """A value as lines of text: mappings and lists one entry a line."""
    if isinstance(value, dict):
        return [f"{key}: {_flat(entry)}" for key, entry in value.items()]
    if isinstance(value, list):
        return [_flat(entry) for entry in value]
    return [_flat(value)]


def _flat(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(entry) for entry in value)
    return _figure(value)


def _figure(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
