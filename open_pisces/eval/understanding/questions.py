"""Questions of a benchmark, from the hub, a local copy or a folder in the same schema.

A local folder holds one folder for each benchmark (`Benchmark.place`), with a folder for its subset if it has one:

* a dataset saved by ``datasets`` (``save_to_disk``), with its splits or without, or
* parquet files whose names begin with the split's, as the hub stores them, or
* ``SPLIT.jsonl`` and pictures: one JSON object a line, with the hub's columns; a picture is the name of a file.

Only text columns are read at the start, pictures when they are asked about: a set may be larger than memory.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
from PIL.Image import Image

from open_pisces.data.images import ImageError, open_image
from open_pisces.errors import PiscesError
from open_pisces.eval.run import Row
from open_pisces.eval.understanding.benchmarks import Benchmark

FIXTURES = "fixtures"
"""Name of the few made-up questions of each benchmark that come with the package."""
HUB = "hub"
MARKER = re.compile(r"<image (\d+)>")
"""Where a picture stands in an interleaved prompt."""
_COMPUTED = ("options", "lead", "suffix")
_LETTERS = "ABCDEFGHIJ"


class QuestionsError(PiscesError):
    """Questions that cannot be had; the message names the dataset, what is missing and the remedy."""


@dataclass(frozen=True)
class Table:
    """Rows of one split, wherever they lie."""

    where: str
    """What messages call it."""
    columns: list[str]
    rows: Any
    """A list of dicts, or a ``datasets.Dataset`` whose pictures are not decoded."""
    base: Path | None = None
    """Folder of pictures that are only named."""

    def texts(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows with only these columns."""
        if isinstance(self.rows, list):
            for row in self.rows:
                yield {name: row.get(name) for name in names}
        else:
            yield from self.rows.select_columns(list(names))

    def pictures(self, row: int, column: str) -> list[Image]:
        """The pictures of one cell, none if it is empty.

        Raises:
            QuestionsError: if one is missing or damaged.
        """
        cell = self.rows[row].get(column)
        cells = cell if isinstance(cell, list) else [cell]
        try:
            return [self._open(one) for one in cells if one is not None]
        except ImageError as error:
            raise QuestionsError(f"{self.where}, row {row}, column {column}: {error}") from None

    def _open(self, cell: Any) -> Image:
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and self.base is not None:
            cell = self.base / cell
        return open_image(cell)


@dataclass(frozen=True)
class Asked:
    """Questions to ask, shortest prompts first, so that a batch wastes little."""

    items: list[Row]
    """``key``, ``row``, ``prompt`` (as sent; in interleaved ones markers stand for pictures), ``pictures`` (how
    many markers; 0 stands for those of the row), ``gold``, ``options``, ``unit``, ``facts``."""
    pictures: Callable[[Row], list[Image]]
    """The pictures of an item, in the order of the prompt's markers."""
    where: str
    units: int
    """How many units the set has; fewer are asked under a limit."""


def read_questions(benchmark: Benchmark, data: str | Path = HUB, limit: int | None = None) -> Asked:
    """The questions of a benchmark.

    Args:
        benchmark: its row of the table.
        data: ``hub``, ``fixtures``, a folder, or the name of a dataset on the hub in the same schema.
        limit: ask only so many units (images of MME, pairs of MMVP, questions with all their rotations, ...), evenly
            spread over the set.

    Raises:
        QuestionsError: for a dataset, split, column, picture or value that is missing.
    """
    table = open_table(benchmark, data, benchmark.subset)
    columns = _columns(benchmark)
    _need(table, columns if benchmark.join else [*columns, *benchmark.picture])
    where = {column: set(map(str, values)) for column, values in benchmark.where.items()}
    items = []
    for number, row in enumerate(table.texts(columns)):
        if all(str(row[column]) in values for column, values in where.items()):
            items.append(_item(benchmark, number, row, table))
    if not items:
        raise QuestionsError(f"{table.where}: no row has {benchmark.where or 'anything to ask'}")
    units = list(dict.fromkeys(item["unit"] for item in items))
    if limit is not None and limit < len(units):
        # Evenly spread, because many sets are sorted by category.
        kept = {units[i * len(units) // limit] for i in range(limit)}
        items = [item for item in items if item["unit"] in kept]
    # A picture takes more room than any prompt, so their number counts first.
    items.sort(key=lambda item: (item["pictures"] or 1, len(item["prompt"]), item["key"]))
    return Asked(items, _loader(benchmark, table, data), table.where, len(units))


def _columns(benchmark: Benchmark) -> list[str]:
    """The text columns that a benchmark's rows are made of."""
    fields = Formatter().parse(benchmark.prompt + benchmark.lead.get("text", ""))
    named = [name for _, name, _, _ in fields if name and name not in _COMPUTED]
    unit = [benchmark.unit[part] for part in ("column", "within") if part in benchmark.unit]
    named += [benchmark.question, *benchmark.options.get("columns", []), benchmark.gold["column"], *unit]
    named += [*benchmark.facts, *benchmark.where, *benchmark.suffix.get("by", [])]
    return list(dict.fromkeys(named + ([benchmark.join["key"]] if benchmark.join else [])))


def _need(table: Table, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise QuestionsError(
            f"{table.where}: has no column {', '.join(missing)}; it has {', '.join(table.columns)}: give a copy of the "
            f"dataset that the table names"
        )


# ------------------------------------------------------------------------------------------------------- one row


def _item(benchmark: Benchmark, number: int, row: dict[str, Any], table: Table) -> Row:
    """A question from a row."""
    where = f"{table.where}, row {number}"
    try:
        options = _options(benchmark, row)
        prompt = _prompt(benchmark, row, options)
        item = {"key": f"{number:06d}", "row": number, "prompt": prompt, "pictures": 0}
        if benchmark.interleaved:
            item["pictures"] = len(MARKER.findall(prompt))
        item |= {"gold": _gold(benchmark, row), "options": options, "unit": _unit(benchmark, row, number)}
        return {**item, "facts": {name: _json(row[name]) for name in benchmark.facts}}
    except (ValueError, KeyError, TypeError, IndexError, SyntaxError) as error:
        raise QuestionsError(
            f"{where}: not in the schema of {benchmark.hub} ({type(error).__name__}: {error})"
        ) from None


def _prompt(benchmark: Benchmark, row: dict[str, Any], options: dict[str, str]) -> str:
    edit = benchmark.edit
    text = str(row[benchmark.question])
    text = text.strip() if edit.get("strip") else text
    text = text.replace(edit["drop"], "") if "drop" in edit else text
    text = text.capitalize() if edit.get("capitalize") else text
    lead = benchmark.lead["text"].format(**row) if benchmark.lead and not _empty(row[benchmark.lead["column"]]) else ""
    lines = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    values = {**row, benchmark.question: text, "options": lines, "lead": lead, "suffix": _suffix(benchmark, row)}
    return benchmark.prompt.format(**values)


def _suffix(benchmark: Benchmark, row: dict[str, Any]) -> str:
    if not benchmark.suffix:
        return ""
    kind = "/".join(str(row[column]) for column in benchmark.suffix["by"])
    for beginning, text in benchmark.suffix["cases"].items():
        if f"{kind}/".startswith(f"{beginning}/"):
            return str(text)
    raise ValueError(f"no prompt for questions of the kind {kind}; there are {', '.join(benchmark.suffix['cases'])}")


def _options(benchmark: Benchmark, row: dict[str, Any]) -> dict[str, str]:
    """Letter to text."""
    form = benchmark.options.get("form", "")
    columns = benchmark.options.get("columns", [])
    if not form:
        return {}
    if form == "columns":
        return {letter: str(row[c]) for letter, c in zip(_LETTERS, columns, strict=False) if not _empty(row[c])}
    cell = row[columns[0]]
    if form == "inline":  # "A. text" on lines of their own (RealWorldQA), or "A: text, B: text" (MMStar)
        found = re.findall(r"(?:^|\n)\s*([A-J])\.\s+([^\n]*)", cell)
        found = found or re.findall(r"\b([A-J]): (.*?)(?=,? \b[A-J]: |,?\s*$)", cell)
        return {letter: option.strip() for letter, option in found}
    if form == "lettered":  # "(a) Open (b) Closed"
        return {letter.upper(): text.strip() for letter, text in re.findall(r"\(([a-j])\)\s*([^(]+)", cell)}
    # MMMU stores its list of options as the text of a Python list.
    listed = ast.literal_eval(cell) if isinstance(cell, str) else cell
    return dict(zip(_LETTERS, map(str, listed if listed is not None else []), strict=False))


def _gold(benchmark: Benchmark, row: dict[str, Any]) -> Any:
    """The right answer in the form that the rule takes."""
    cell = row[benchmark.gold["column"]]
    form = benchmark.gold["form"]
    if form == "texts":
        texts = []
        for one in cell if isinstance(cell, list) else [cell]:
            texts.append(str(one["answer"] if isinstance(one, dict) else one))
        return texts
    if form == "index":
        return _LETTERS[int(cell)]
    if form == "yes_no":
        return _one_of(str(cell).strip().lower().rstrip("."), ("yes", "no"))
    if form == "truth":
        return ("no", "yes")[int(cell)]
    if form in ("letter", "bracket"):
        return _one_of(str(cell).strip().strip("()").upper(), tuple(_LETTERS))
    return str(cell)


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"gold answer {value!r} is none of {', '.join(allowed)}")
    return value


def _unit(benchmark: Benchmark, row: dict[str, Any], number: int) -> str:
    unit = benchmark.unit
    if not unit:
        return str(number)
    value = row[unit["column"]]
    if "modulo" in unit:
        value = int(value) % int(unit["modulo"])
    if unit.get("pairs"):  # MMVP counts its rows from 1
        value = (int(value) - 1) // 2
    return f"{row[unit['within']]}/{value}" if "within" in unit else str(value)


def _empty(cell: Any) -> bool:
    # Tables that went through pandas hold NaN, which differs from itself, or its text, for an empty cell.
    return cell is None or cell != cell or str(cell).strip() in ("", "nan")


def _json(cell: Any) -> Any:
    """A cell as JSON can hold it."""
    if isinstance(cell, np.generic):
        return cell.item()
    return cell if isinstance(cell, str | int | float | bool | list | dict) or cell is None else str(cell)


def _loader(benchmark: Benchmark, table: Table, data: str | Path) -> Callable[[Row], list[Image]]:
    """How an item's pictures are read."""
    if benchmark.join:
        other = open_table(benchmark, data, benchmark.join["subset"])
        _need(other, [benchmark.join["id"], *benchmark.picture])
        # GQA: one picture has many questions, so its pictures are a subset of their own.
        places = {row[benchmark.join["id"]]: n for n, row in enumerate(other.texts([benchmark.join["id"]]))}
        keys = [row[benchmark.join["key"]] for row in table.texts([benchmark.join["key"]])]

        def joined(item: Row) -> list[Image]:
            key = keys[item["row"]]
            if key not in places:
                raise QuestionsError(f"{other.where}: no picture has {benchmark.join['id']} = {key}")
            return other.pictures(places[key], benchmark.picture[0])

        return joined

    def of_row(item: Row) -> list[Image]:
        columns = benchmark.picture
        if benchmark.interleaved:
            columns = [benchmark.picture[int(number) - 1] for number in MARKER.findall(item["prompt"])]
        pictures = []
        for column in columns:
            pictures += table.pictures(item["row"], column)
        return pictures

    return of_row


# --------------------------------------------------------------------------------------------------------- tables


def open_table(benchmark: Benchmark, data: str | Path, subset: str) -> Table:
    """One subset's split of a benchmark's dataset.

    Raises:
        QuestionsError: if it cannot be had.
    """
    if str(data) == FIXTURES:
        return _local(Path(__file__).parent / "fixtures", benchmark, subset)
    if str(data) != HUB and (Path(data).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data))):
        return _local(Path(data), benchmark, subset)
    return _from_hub(benchmark.hub if str(data) == HUB else str(data), subset, benchmark.split)


def _from_hub(name: str, subset: str, split: str) -> Table:
    datasets = _datasets(name)
    try:
        found = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the library raises anything from OSError to its own kinds
        reason = str(error).partition("\n")[0]
        raise QuestionsError(
            f"{name}{f' ({subset})' if subset else ''}, split {split}: {reason}; copy it to a folder of your own and "
            f"name that as data, or use the made-up questions: data = {FIXTURES}"
        ) from None
    return _table(found, f"{name}/{subset}".rstrip("/"))


def _local(root: Path, benchmark: Benchmark, subset: str) -> Table:
    folder = root / benchmark.place
    if not folder.is_dir():
        raise QuestionsError(f"{root}: has no folder {benchmark.place} for {benchmark.title} ({benchmark.hub})")
    folder = folder / subset if subset and (folder / subset).is_dir() else folder
    split = benchmark.split
    if (folder / f"{split}.jsonl").is_file():
        return _from_lines(folder / f"{split}.jsonl")
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_disk(folder, split)
    files = sorted(folder.rglob("*.parquet"))
    # The hub writes SPLIT-00000-of-00003.parquet; a copy may also be a single file of any name.
    named = [str(file) for file in files if re.match(rf"{re.escape(split)}([-_.]|$)", file.name)]
    named = named or [str(file) for file in files if len(files) == 1]
    if not named:
        there = sorted({path.name for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl")})
        raise QuestionsError(
            f"{folder}: has no split {split}: neither {split}.jsonl nor {split}*.parquet nor a saved dataset; it has "
            f"{', '.join(there) or 'no such files'}"
        )
    datasets = _datasets(str(folder))
    try:
        return _table(datasets.load_dataset("parquet", data_files=named, split="train"), str(folder))
    except Exception as error:  # as above
        raise QuestionsError(f"{folder}: cannot be read ({str(error).partition(chr(10))[0]}); copy it anew") from None


def _from_lines(path: Path) -> Table:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise QuestionsError(f"{path}, line {number}: not valid JSON ({error})") from None
    columns: dict[str, None] = {}  # a set in the order of the file
    for row in rows:
        columns |= dict.fromkeys(row)
    return Table(str(path), list(columns), rows, path.parent)


def _from_disk(folder: Path, split: str) -> Table:
    found = _datasets(str(folder)).load_from_disk(str(folder))
    if hasattr(found, "keys"):
        if split not in found:
            raise QuestionsError(f"{folder}: has no split {split}; it has {', '.join(found)}")
        found = found[split]
    return _table(found, str(folder))


def _table(dataset: Any, where: str) -> Table:
    """A table of a dataset, its pictures as the files they are."""
    import datasets

    # Decoded only when asked about: reading a table of texts should not open 200,000 pictures.
    undecoded = datasets.Image(decode=False)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, undecoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(undecoded))
    return Table(where, list(dataset.column_names), dataset)


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise QuestionsError(f"{where}: needs the datasets library: pip install 'open-pisces[eval]'") from None
    return datasets
