"""``pisces eval report``: the paper's tables with published figures (``baselines.yaml``), and what was measured here.

A run stands beside published figures only if it asked the same: GenEval's official prompts by the official rules, all
questions of a benchmark's split, the COCO-30K protocol. Everything else stands in a table of its own, with the reason.
A cell is what a source printed or a run measured; any other is empty, or "not run" for a model that was measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import yaml

from open_pisces.eval.drawing.gallery import TASK as GALLERY
from open_pisces.eval.drawing.gallery import model_names
from open_pisces.eval.drawing.rules import Rules
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.report.markdown import HERE, NOT_RUN, to_markdown
from open_pisces.eval.run import Row, RunError, RunFolder, digest
from open_pisces.eval.understanding.benchmarks import benchmarks
from open_pisces.eval.understanding.questions import FIXTURES
from open_pisces.files import write_whole

PICTURES = 4
"""GenEval's pictures of each prompt."""
_TOLD = (
    *("n", "of", "n_real", "prompts", "questions", "maximum", "baseline", "baselines", "margin", "strict", "lenient"),
    *("unparsed", "unparsed_lenient", "refused", "biased", "protocol", "scenes", "split", "data", "rule", "rules"),
    *("detector", "judge", "judges", "others", "agreement", "spread", "details", "by_source", "losses", "retrieval"),
    *("null_distance", "sentence", "interval", "why", "command"),
)
"""What is told of scores below a table, where they have it."""


@cache
def baselines() -> dict[str, Any]:
    """``baselines.yaml``, whose comments say what it holds. Shared: it may not be changed."""
    table: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "baselines.yaml").read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True)
class Result:
    """A run with its scores."""

    run: RunFolder
    scores: Row
    name: str
    """What its model is called."""

    @property
    def kind(self) -> str:
        """The first part of its task."""
        return self.run.manifest.task.partition("/")[0]

    @property
    def subject(self) -> str:
        """The rest of its task."""
        return self.run.manifest.task.partition("/")[2]


# --------------------------------------------------------------------------------------------------------- collecting


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Collect scores into tables, and write them as Markdown and JSON.

    Args:
        runs: run folders, or folders in which run folders lie.
        out: the Markdown file; the JSON lies beside it. None writes nothing.

    Returns:
        ``models`` (name -> hash), ``own`` (measures that compare with nothing published), ``tables`` (by the keys of
        ``baselines.yaml``: ``title``, ``columns``, ``rows``, ``runs``, ``notes``), ``unfinished`` (folders of runs
        without scores), ``sources``, ``certainty``. A row has ``model``, ``figures`` and either its ``source`` and
        ``marks`` or ``here``; unknown cells are absent, those of models measured here are `NOT_RUN`.

    Raises:
        RunError: if a folder holds no run, scores are of something else, or two models have one name.
        EvaluationError: if two runs would fill one cell.
    """
    results, unfinished = collect(runs)
    found = build(results)
    found["unfinished"] = unfinished
    if out is not None:
        path = Path(out)
        write_whole(path, to_markdown(found))
        write_whole(path.with_suffix(".json"), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def collect(paths: Sequence[str | Path]) -> tuple[list[Result], list[str]]:
    """The runs of some folders that have scores, and the folders of those that have none yet. Galleries have none.

    Raises:
        RunError: see `report`.
    """
    named = {Path(path).resolve() for path in paths}
    folders: dict[Path, Path] = {}
    for path in paths:
        folders |= {folder.resolve(): folder for folder in run_folders(Path(path))}
    loaded = [run for run in map(RunFolder.load, folders.values()) if run.manifest.task != GALLERY]
    # A run that was named has to have scores; one that was only found in a folder may be under way.
    done = [run for run in loaded if run.folder.resolve() in named or (run.folder / "scores.json").is_file()]
    names = _names(done)
    results = [Result(run, run.scores(run.manifest.model_hash), names[run.manifest.model_hash]) for run in done]
    return results, [str(run.folder) for run in loaded if run not in done]


def run_folders(path: Path) -> Iterator[Path]:
    """``path`` itself if it is a run folder, else those that lie somewhere in it, in the order of their names.

    Raises:
        RunError: if there is none.
    """
    files = [path / "manifest.json"] if (path / "manifest.json").is_file() else sorted(path.rglob("manifest.json"))
    folders = [file.parent for file in files if (file.parent / "items.jsonl").is_file()]
    if not folders:
        raise RunError(f"{path}: no run folder, and none in it: give the folders that `pisces eval` wrote")
    yield from folders


def _names(runs: Sequence[RunFolder]) -> dict[str, str]:
    """A name for each model, by hash.

    Raises:
        RunError: if two models have one name: other weights lay at the same place.
    """
    first: dict[str, RunFolder] = {}
    for run in runs:
        first.setdefault(run.manifest.model_hash, run)
    places = {key: str(PurePath(run.manifest.model)) for key, run in first.items()}
    names = model_names(list(places.values()))
    taken: dict[str, RunFolder] = {}
    for key, run in first.items():
        other = taken.setdefault(names[places[key]], run)
        if other is not run:
            raise RunError(
                f"{other.folder} and {run.folder} are of other weights under one name, {names[places[key]]} "
                f"({other.manifest.model_hash[:12]} and {key[:12]}): evaluate one of them anew, or report them apart"
            )
    return {key: names[place] for key, place in places.items()}


# ------------------------------------------------------------------------------------- what stands beside published


def aside(result: Result) -> str:
    """Why a run's scores do not compare with published figures; "" if they do."""
    if result.kind == "geneval":
        return _geneval_aside(result)
    if result.kind == "understanding":
        return _understanding_aside(result)
    if result.kind != "fid":
        return "nothing like it is published"
    return "" if result.scores.get("protocol") == "COCO-30K" else "not the COCO-30K protocol with Inception's features"


def prompts_digest(items: Sequence[Row]) -> str:
    """`digest` of GenEval's rows, without their keys and in an order of their own."""
    rows = [dict(item) for item in items]
    for row in rows:
        row.pop("key", None)
    return digest(sorted(rows, key=lambda row: json.dumps(row, sort_keys=True)))


def _geneval_aside(result: Result) -> str:
    run = result.run
    if prompts_digest(run.items) != baselines()["official"]["geneval"]:
        return f"{len(run.items)} prompts that are not the 553 official ones"
    if run.manifest.settings.get("n") != PICTURES:
        return f"{run.manifest.settings.get('n')} pictures of each prompt, not {PICTURES}"
    return "" if result.scores.get("rules") == asdict(Rules()) else "rules that are not the official ones"


def _understanding_aside(result: Result) -> str:
    row = benchmarks().get(result.subject)
    n = len(result.run.items)
    if row is None or row.column is None:
        return "no column of the paper"
    if result.scores.get("data") == FIXTURES:
        return f"{n:,} made-up questions, none of the benchmark's"
    return "" if n == row.size else f"{n:,} questions, the whole split has {row.size:,}"


def figures(result: Result) -> dict[str, Row]:
    """What a run puts into the columns of its table: ``score``, and ``low`` and ``high`` where it has them."""
    parts = {result.subject or result.kind: result.scores}
    if "categories" in result.scores or result.kind == "geneval":
        parts = {**result.scores.get("categories", {}), "overall": result.scores}
    return {column: _figure(part) for column, part in parts.items() if part.get("score") is not None}


def _figure(scores: Mapping[str, Any]) -> Row:
    return {name: scores[name] for name in ("score", "low", "high") if scores.get(name) is not None}


# ------------------------------------------------------------------------------------------------------------ tables


def build(results: Sequence[Result]) -> dict[str, Any]:
    """The tables as data; see `report`.

    Raises:
        EvaluationError: if two runs would fill one cell.
    """
    table = baselines()
    reasons = [aside(result) for result in results]
    beside = [result for result, why in zip(results, reasons, strict=True) if not why]
    models = {result.name: result.run.manifest.model_hash for result in results}
    return {
        "models": models,
        "own": [{**measured(r), "aside": why} for r, why in zip(results, reasons, strict=True) if why],
        "tables": {key: _table(table, key, beside, list(models)) for key in table["tables"]},
        "sources": table["sources"],
        "certainty": table["certainty"],
    }


def _table(table: dict[str, Any], key: str, results: Sequence[Result], models: Sequence[str]) -> dict[str, Any]:
    """One table: published rows by group, then a row for each model measured here."""
    form = table["tables"][key]
    columns = form["columns"]
    kind = form.get("from")
    rows = [_published(table, row, columns) for row in table["rows"][form["rows"]]]
    rows = [row for row in rows if row["figures"]]
    missing = set(form.get("always", [])) - {row["key"] for row in rows}  # such as the paper's own, whatever is known
    rows += [_published(table, {"model": model}, columns) for model in form.get("always", []) if model in missing]
    order = list(table["groups"].values())
    rows.sort(key=lambda row: order.index(row["group"]))  # stable
    alike = [result for result in results if result.kind == kind]
    own = [result for result in alike if set(figures(result)) & set(columns)]
    # Benchmarks whose judge was missing have no figure, but a run that says so.
    own += [result for result in alike if not figures(result) and result.subject in columns]
    return {
        **{name: form[name] for name in ("title", "digits", "notes")},
        "columns": {column: table["columns"][column] for column in columns},
        "rows": [*rows, *(_here(name, own, columns) for name in models or ["open_pisces"] if kind)],
        "runs": [measured(result) for result in own],
    }


def _published(table: dict[str, Any], row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """A row of ``baselines.yaml`` with its figures in ``columns``."""
    model = table["models"][row["model"]]
    known = {column: row["figures"][column] for column in columns if column in row.get("figures", {})}
    return {
        "key": row["model"],
        "model": model["name"],
        "params": model["params"],
        "group": table["groups"][model["group"]],
        **{name: row.get(name, "") for name in ("variant", "note")},
        "source": row.get("source"),
        "figures": known,
        "marks": {column: row.get("marks", {}).get(column, row["mark"]) for column in known},
    }


def _here(name: str, results: Sequence[Result], columns: Sequence[str]) -> dict[str, Any]:
    """The row of a model that was measured here."""
    cells: dict[str, Any] = {}
    filled: dict[str, Result] = {}
    mine = [result for result in results if result.name == name]
    for result in mine:
        for column, figure in figures(result).items():
            if column in filled:
                raise EvaluationError(
                    f"{filled[column].run.folder} and {result.run.folder} both give {column} of {name}: report one of "
                    f"them, for a table has one figure in a cell"
                )
            filled[column] = result
            cells[column] = figure
    known = {column: cells.get(column, NOT_RUN) for column in columns}
    return {"model": name, "params": "", "group": HERE, "here": True, "figures": known}


def measured(result: Result) -> Row:
    """A run's figures, and what they depend on as far as the run and its scores say it."""
    scores = result.scores
    found = figures(result)
    manifest = result.run.manifest
    told = {name: scores[name] for name in _TOLD if _says_something(scores.get(name))}
    if told.get("rules") == asdict(Rules()):
        told["rules"] = "official"
    return {
        "model": result.name,
        "measure": _measure(result),
        **_figure(scores),
        "figures": found if len(found) > 1 else {},
        "told": _public(told),
        "settings": {key: _public(value) for key, value in manifest.settings.items() if not isinstance(value, Mapping)},
        **{name: getattr(manifest, name) for name in ("task", "device", "threads", "versions", "model_hash")},
        "run": result.run.hash,
    }


def _measure(result: Result) -> str:
    """What a run measured, with the held-out split if it was one."""
    split = result.scores.get("split")
    name = result.scores.get("name") or result.run.manifest.task
    return f"{name}, {split}" if result.kind == "scenes" and split not in (None, "train") else str(name)


def _says_something(value: Any) -> bool:
    """Whether a value is worth a word: numbers are, 0 too; what is empty or false is not."""
    return bool(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def _public(value: Any) -> Any:
    """A value without the places of this machine: a report is read elsewhere."""
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return f".../{PurePath(value).name}" if isinstance(value, str) and PurePath(value).is_absolute() else value
