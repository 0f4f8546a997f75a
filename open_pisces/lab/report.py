"""The page of the experiments: a table, a plot and a verdict each, from their results alone."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from open_pisces.eval.intervals import mean_interval
from open_pisces.files import whole_file, write_whole
from open_pisces.lab.experiment import HIGHER, LabError

METRICS = {
    "questions": "questions answered",
    "answer_loss": "loss of true answers (nats)",
    "drawing": "scene score",
    "things": "judge's confidence in what was asked",
    "vector_error": "error of own vectors",
}
INK = ("#1f6feb", "#e8710a", "#1a7f37", "#b3261e", "#8250df", "#57606a")
SHARES = ("questions", "drawing")
TASKS = (("questions", "answer_loss"), ("drawing", "things", "vector_error"))
"""The metrics of understanding, and of generation."""
HEAD = """# The paper's claims in miniature

Claims of the paper, and one of ours, each tried at a scale where a training takes minutes: `tiny`'s encoders and
decoder, LLMs of random weights, scenes of clip-art. What holds here need not hold at 8 billion parameters, nor the
other way round; what this page shows is that the claims can be tried, how large the differences are against the spread
of seeds, and where the miniature cannot tell.

Every variant is trained with the same seeds, so that comparisons are paired; p is of the paired t-test, the effect is
the mean difference in its own standard deviations, and a claim is said to agree only if all of its comparisons do
(those with samples matched and those with compute matched apart, where they differ).
"Matched" says what two variants have the same of; brackets are 95 % intervals over the seeds. Written by
`pisces lab report`; the figures of every run are in `docs/lab/*.json`.
"""


def write_report(folders: list[Path], out: Path) -> list[str]:
    """Write the page, the plots and the raw results beside it; the names of the experiments.

    Args:
        folders: of experiments, or of folders of them.
        out: the page, such as ``docs/lab.md``; its plots and results go into a folder of its name.

    Raises:
        LabError: if there are no results.
    """
    found = {}
    for folder in folders:
        for path in sorted([*folder.glob("results.json"), *folder.glob("*/results.json")]):
            results = json.loads(path.read_text())
            found[results["name"]] = results
    if not found:
        raise LabError(f"no results below {', '.join(map(str, folders))}: `pisces lab NAME` makes them")
    beside = out.with_suffix("")
    beside.mkdir(parents=True, exist_ok=True)
    pages = [HEAD, _overview(list(found.values()))]
    for name, results in found.items():
        write_whole(beside / f"{name}.json", json.dumps(results, indent=1) + "\n")
        plot(results, beside / f"{name}.png")
        pages.append(page(results, beside.name))
    write_whole(out, "\n".join(pages))
    return list(found)


def _overview(found: list[dict[str, Any]]) -> str:
    rows = [
        f"| [{one['name']}](#{one['name']}) | {one['exhibit']} | {one['claim']} | **{one['verdict']}** |"
        for one in found
    ]
    return "\n".join(["| experiment | paper | claim | verdict |", "|---|---|---|---|", *rows, ""])


def page(results: dict[str, Any], pictures: str) -> str:
    """One experiment's section, in Markdown."""
    name = results["name"]
    minutes = results["seconds"] / 60
    seeds = len({row["seed"] for row in results["runs"]})
    lines = [
        f"## {name}",
        "",
        " ".join(
            [
                f"**{results['exhibit']}.** {results['claim']} Verdict: **{results['verdict']}**.",
                results.get("note", ""),
            ]
        ).strip(),
        "",
        f"![{name}]({pictures}/{name}.png)",
        "",
        *_variants(results),
        "",
        "| claim | matched | difference | effect | p | |",
        "|---|---|---|---|---|---|",
    ]
    for one in results["comparisons"]:
        effect = "" if one["effect"] is None else f"{one['effect']:.2f}"
        claim = f"{METRICS[one['metric']]}: {one['better']} better than {one['worse']}"
        gap = f"{_signed(one['difference'])} [{_signed(one['low'])}, {_signed(one['high'])}]"
        lines.append(f"| {claim} | {one['matched']} | {gap} | {effect} | {_chance(one['p'])} | {one['verdict']} |")
    again = f"`pisces lab {name} --budget {results['budget']}`"
    lines += [
        "",
        f"{seeds} seeds, {len(results['runs'])} trainings, {minutes:.0f} minutes ({results['about']}): {again}.",
        "",
    ]
    return "\n".join(lines)


def _variants(results: dict[str, Any]) -> list[str]:
    compared = {one["metric"] for one in results["comparisons"]}
    # An LLM that learnt to draw alone answers nothing: a task that is not compared is not shown.
    wanted = [metric for task in TASKS if compared & set(task) for metric in task]
    shown = [metric for metric in wanted if all(metric in row for row in results["runs"])]
    lines = [
        f"| variant | samples | tokens | {' | '.join(METRICS[m] for m in shown)} |",
        f"|---|---|---|{'---|' * len(shown)}",
    ]
    for variant, about in results["variants"].items():
        rows = [row for row in results["runs"] if row["variant"] == variant]
        cells = []
        for metric in shown:
            values = [row[metric] for row in rows]
            interval = mean_interval(values)
            digits = ".1%" if metric in SHARES else ".3f"
            cells.append(f"{interval.score:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]")
        seen = f"{rows[0]['samples']:,} | {rows[0]['tokens']:,}"
        lines.append(f"| **{variant}**: {about} | {seen} | {' | '.join(cells)} |")
    return lines


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the plot: a panel for each metric that is compared, a mark for each run, the mean as a bar or a line."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(one["metric"] for one in results["comparisons"]))
    figure = Figure(figsize=(1.5 + 4.2 * len(metrics), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axis, metric in zip(panels, metrics, strict=True):
        _panel(axis, results, metric)
    figure.suptitle(f"{results['name']} ({results['exhibit']}): {results['verdict']}", fontsize=11)
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _panel(axis: Any, results: dict[str, Any], metric: str) -> None:
    # One that learnt another task alone would press the others into a line.
    compared = {one[side] for one in results["comparisons"] if one["metric"] == metric for side in ("better", "worse")}
    variants = [variant for variant in results["variants"] if variant in compared]
    inks = dict(zip(results["variants"], cycle(INK), strict=False))
    means = []
    for at, variant in enumerate(variants):
        values = [row[metric] for row in results["runs"] if row["variant"] == variant]
        means.append(float(np.mean(values)))
        if results["plot"] == "bars":
            axis.bar(at, means[-1], color=inks[variant], alpha=0.35, width=0.7)
        spread = np.linspace(-0.15, 0.15, len(values))
        axis.plot(at + spread, values, "o", color=inks[variant], markersize=4)
    if results["plot"] == "curve":
        axis.plot(range(len(variants)), means, "-", color="#57606a", linewidth=1, zorder=0)
    axis.set_xticks(range(len(variants)), [variant.replace("_", "\n") for variant in variants], fontsize=8)
    better = "more is better" if HIGHER[metric] else "less is better"
    axis.set_title(f"{METRICS[metric]} ({better})", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
