"""Understanding benchmarks: ask a model, keep what it said, score it by the published rules.

A run folder for each benchmark: its row of the table in the manifest, the prompts as sent in ``items.jsonl``, the raw
answers in ``answers.jsonl``, a judge's replies in ``judged.jsonl``. `score` needs nothing else. ``strict`` is the
published reading without guesses, ``lenient`` ours (`eval.parsing`); ``score`` is ``strict`` unless a judge decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from open_pisces.data.prompts import Turn
from open_pisces.eval.run import Manifest, Row, RunFolder, model_hash
from open_pisces.eval.understanding import graders, parsing, scoring, totals
from open_pisces.eval.understanding.benchmarks import PAPER, Benchmark, choose, read_row
from open_pisces.eval.understanding.graders import Judge
from open_pisces.eval.understanding.questions import FIXTURES, MARKER, Asked, QuestionsError, read_questions
from open_pisces.eval.understanding.scoring import Grade
from open_pisces.eval.understanding.totals import Total
from open_pisces.generate.generator import PromptError

ANSWERS = "answers"
SHOWN = 20
"""Unread answers that are listed."""
CONSTANTS = 10
"""Fixed answers that are tried for the baseline: the commonest gold ones."""


class Answerer(Protocol):
    """What is evaluated: `generate.Generator`, or anything that answers as it does."""

    def text(self, images: list[list[Image]], prompts: list[str], max_new_tokens: int) -> list[str]:
        """Answers to prompts about pictures; `PromptError` for one that is too long."""
        ...

    def answer(
        self, conversations: list[tuple[Turn, ...]], images: list[tuple[Image, ...]], max_new_tokens: int
    ) -> list[str]:
        """The same, for prompts with pictures inside."""
        ...


def evaluate(
    generator: Answerer,
    names: str | Sequence[str] = PAPER,
    *,
    model: str | Path,
    data: str | Path | Mapping[str, str | Path] = FIXTURES,
    limit: int | None = None,
    batch_size: int = 16,
    folder: Path | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask and score benchmarks; one that cannot be run says why, and the others are run.

    Args:
        generator: the model.
        names: benchmarks of the table, or ``paper`` for all.
        model: the model's folder, whose hash scores carry.
        data: where questions come from (`read_questions`), the same for all or by benchmark.
        limit: units asked of each benchmark.
        batch_size: prompts answered together.
        folder: of the runs, one folder in it for each benchmark; without one they lie where `RunFolder.open` puts them.
        judge: for the columns that need one.
        progress: show a bar on standard error.

    Returns:
        ``rows``: for each benchmark what `score` says; ``data``, ``limit``, ``model``, ``model_hash``, and under
        ``not_run`` how many have no score.

    Raises:
        EvaluationError: for a name that is no benchmark.
        RunError: for a folder that holds something else.
    """
    made, rows = model_hash(model), {}
    bar = _bar() if progress else nullcontext()
    with bar:
        for row in choose(names):
            where = data.get(row.name, FIXTURES) if isinstance(data, Mapping) else data
            try:
                asked = read_questions(row, where, limit)
            except QuestionsError as error:
                rows[row.name] = not_run(row, str(error))
                continue
            settings = {"benchmark": asdict(row), "row": row.hash, "data": str(where), "units": asked.units}
            settings |= {"limit": limit, "batch_size": batch_size}
            manifest = Manifest(f"understanding/{row.name}", str(model), made, settings, device=_device(generator))
            run = RunFolder.open(folder / row.name if folder else None, manifest, asked.items)
            try:
                ask(run, asked, generator, batch_size, bar if isinstance(bar, Progress) else None)
            except QuestionsError as error:  # a picture is missing
                rows[row.name] = not_run(row, str(error))
                continue
            rows[row.name] = score(run, judge)
    places = {name: str(place) for name, place in data.items()} if isinstance(data, Mapping) else str(data)
    without = sum(row["score"] is None for row in rows.values())
    return {"rows": rows, "not_run": without, "data": places, "limit": limit, "model": str(model), "model_hash": made}


def not_run(row: Benchmark, why: str) -> dict[str, Any]:
    """The result of a benchmark that could not be run."""
    empty = dict.fromkeys(("score", "low", "high", "strict", "lenient", "baseline"))
    return {**empty, "n": 0, "unparsed": 0, "title": row.title, "why": why}


def _device(generator: Answerer) -> str:
    return str(getattr(generator, "device", "cpu"))


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


# --------------------------------------------------------------------------------------------------------- asking


def ask(run: RunFolder, asked: Asked, generator: Answerer, batch_size: int, bar: Progress | None = None) -> None:
    """Get the answers that a run still lacks; a batch is a function of the items alone.

    A question that the model refuses (too long with its pictures) gets a row with ``answer`` None and the reason.
    """
    batches = list(run.batches(ANSWERS, batch_size))
    place = bar.add_task(run.manifest.task, total=len(run.items)) if bar else None
    if bar and place is not None:
        bar.advance(place, len(run.items) - sum(len(batch) for batch in batches))
    tokens = run.manifest.settings["benchmark"]["tokens"]
    for batch in batches:
        pictures = [asked.pictures(item) for item in batch]
        rows = []
        for item, shown, (said, why) in zip(batch, pictures, _answers(generator, batch, pictures, tokens), strict=True):
            sums = [hashlib.sha256(picture.tobytes()).hexdigest()[:16] for picture in shown]
            rows.append({"key": item["key"], "answer": said, "pictures": sums, **({"refused": why} if why else {})})
        run.append(ANSWERS, rows)
        if bar and place is not None:
            bar.advance(place, len(batch))


def _answers(
    generator: Answerer, items: list[Row], pictures: list[list[Image]], tokens: int
) -> list[tuple[str | None, str]]:
    """Answer, or None and why not, of each; a batch with a question that is refused is asked one by one."""
    try:
        if any(item["pictures"] for item in items):
            turns: list[tuple[Turn, ...]] = [(Turn("user", _interleaved(item["prompt"])),) for item in items]
            said = generator.answer(turns, [tuple(shown) for shown in pictures], max_new_tokens=tokens)
        else:
            said = generator.text(pictures, [item["prompt"] for item in items], max_new_tokens=tokens)
        return [(answer, "") for answer in said]
    except PromptError as error:
        if len(items) == 1:
            return [(None, str(error))]
        return [_answers(generator, [i], [p], tokens)[0] for i, p in zip(items, pictures, strict=True)]


def _interleaved(prompt: str) -> tuple[str | int, ...]:
    """A prompt as the texts and picture numbers it is made of."""
    texts = MARKER.split(prompt)[::2]  # the markers' own numbers stand between them
    parts = [part for number, text in enumerate(texts) for part in ([number - 1, text] if number else [text])]
    return tuple(part for part in parts if part != "")


# -------------------------------------------------------------------------------------------------------- scoring


def score(run: RunFolder, judge: Judge | None = None) -> dict[str, Any]:
    """Score a run from what it holds, and write it there.

    Args:
        run: with all its answers.
        judge: asked for what is not judged yet; without one, judgements that are kept count.

    Returns:
        ``score``, ``low``, ``high`` (None where a judge is missing), ``strict``, ``lenient``, ``baseline`` (the best
        fixed answer), ``n`` units and ``questions``, ``unparsed`` and ``unparsed_lenient``, the first of them,
        ``refused``, ``judge``, ``details``, and ``why`` for whatever there is to say.

    Raises:
        RunError: if answers are missing.
    """
    row, answers = read_row(run.manifest.settings["benchmark"]), run.rows(ANSWERS)
    said = [answer["answer"] or "" for answer in answers]
    refused = [answer["refused"] for answer in answers if answer["answer"] is None]
    strict, lenient = (_grades(row, run.items, said, how) for how in (False, True))
    asked = _to_judge(row, run.items, said, strict)
    if judge is not None:
        graders.judge_answers(run, judge, row.name, asked)
    keys = [question["key"] for question, _ in asked]
    by, verdicts = _judge_of(run, judge, keys)
    plain = totals.total(row.total, run.items, strict) if strict else Total(None, n=len(run.items))
    found = plain if row.judge != "required" else Total(None)
    if by:
        found = _judged(row, run.items, strict, set(keys), verdicts)
    unread = [one.read is None for one in strict]
    return run.write_scores(
        _rounded(
            {
                "title": row.title,
                **{"score": found.score, "low": found.low, "high": found.high, "strict": plain.score},
                "lenient": totals.score_only(row.total, run.items, lenient) if lenient else None,
                "baseline": _baseline(row, run.items) if strict else None,
                "maximum": row.maximum,
                **{"n": found.n or plain.n, "questions": len(run.items), "of": run.manifest.settings["units"]},
                **{"unparsed": sum(unread), "unparsed_lenient": sum(one.read is None for one in lenient)},
                "unparsed_first": _listed(run.items, said, unread),
                "refused": len(refused),
                "judge": by,
                "details": {**plain.details, **found.details, **_further(row, run.items, said, strict)},
                **{"rule": row.source, "data": run.manifest.settings["data"], "split": row.split},
                "why": "; ".join(_notes(run, row, by, found if found.why else plain, any(unread), refused)),
            }
        )
    )


def _rounded(value: Any) -> Any:
    """Numbers to four places, wherever they stand."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _grades(row: Benchmark, items: Sequence[Row], said: Sequence[str], lenient: bool) -> list[Grade]:
    """Grades by the row's rule, none for a row that only a judge can grade."""
    if row.rule == "judged":
        return []
    return [scoring.grade(row.rule, item, answer, lenient) for item, answer in zip(items, said, strict=True)]


def _listed(items: Sequence[Row], said: Sequence[str], unread: Sequence[bool]) -> list[Row]:
    pairs = [(item, answer) for item, answer, no in zip(items, said, unread, strict=False) if no]
    return [{"key": item["key"], "answer": answer[:200]} for item, answer in pairs[:SHOWN]]


def _further(row: Benchmark, items: Sequence[Row], said: Sequence[str], strict: list[Grade]) -> dict[str, Any]:
    """Scores under other published readings, and with guesses where the published code guesses."""
    found: dict[str, Any] = totals.guesses(items, strict) if row.guesses else {}
    for name, reading in parsing.OTHERS.get(row.rule, {}).items():
        read = [reading(answer) for answer in said]
        grades = [Grade(float(r == item["gold"]), r) for r, item in zip(read, items, strict=True)]
        found[f"score_{name}"] = totals.score_only(row.total, items, grades)
    return found


def _baseline(row: Benchmark, items: Sequence[Row]) -> float | None:
    """The score of the best fixed answer, one of the commonest right ones, chosen on the answers it is scored on."""
    golds = (gold for item in items for gold in (item["gold"] if isinstance(item["gold"], list) else [item["gold"]]))
    scores = []
    for constant, _ in Counter(golds).most_common(CONSTANTS):
        grades = [scoring.grade(row.rule, item, constant) for item in items]
        scores.append(totals.score_only(row.total, items, grades))
    return max((score for score in scores if score is not None), default=None)


def _notes(
    run: RunFolder, row: Benchmark, by: Row | None, found: Total, unread: bool, refused: Sequence[str]
) -> list[str]:
    """What has to be known of a score, or why there is none."""
    notes = []
    if row.judge == "required" and by is None:
        notes.append("not run: this score needs a language model as judge, and none was given")
    if row.judge == "optional" and by is None and unread:
        notes.append("no judge: answers that the rules cannot read count as wrong")
    if by and by["unjudged"]:
        notes.append(f"{by['unjudged']} answers are unjudged and left out")
    notes += [found.why] if found.why else []
    if refused:
        notes.append(f"{len(refused)} of {len(run.items)} questions refused and counted as wrong, first: {refused[0]}")
    limit, units = run.manifest.settings["limit"], run.manifest.settings["units"]
    if limit is not None and limit < units:
        notes.append(f"{limit} of {units} units asked")
    if run.manifest.settings["data"] == FIXTURES:
        notes.append("made-up questions, not the benchmark")
    return notes


# --------------------------------------------------------------------------------------------------------- judges


def _to_judge(
    row: Benchmark, items: Sequence[Row], said: Sequence[str], strict: Sequence[Grade]
) -> list[tuple[Row, str]]:
    """What a judge has to see: all answers, or those that the published rules do not read without one."""
    pairs = list(zip(items, said, strict=True))
    if row.judge == "no":
        return []
    if graders.kinds()[row.name]["reads"] in ("letter", "extraction"):
        return [pair for pair, one in zip(pairs, strict, strict=True) if one.read is None and pair[1].strip()]
    return pairs


def _judge_of(run: RunFolder, judge: Judge | None, keys: Sequence[str]) -> tuple[Row | None, dict[str, Any]]:
    """Who judged, when and how much, and the verdicts that could be read, by key."""
    name, rows = graders.verdicts(run, judge.model if judge else None)
    if name is None or not any(key in rows for key in keys):
        return None, {}
    days = sorted(rows[key]["date"] for key in keys if key in rows)
    values = {key: rows[key]["value"] for key in keys if key in rows and rows[key]["value"] is not None}
    date = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return {"name": name, "date": date, "judged": len(values), "unjudged": len(keys) - len(values)}, values


def _judged(
    row: Benchmark, items: Sequence[Row], strict: Sequence[Grade], asked: set[str], verdicts: Mapping[str, Any]
) -> Total:
    """The score that a judge's verdicts give; what was asked of it and is unjudged is left out."""
    reads = graders.kinds()[row.name]["reads"]
    if reads == "marks":
        marks = [tuple(verdicts[item["key"]]) for item in items if item["key"] in verdicts]
        return totals.ratio(marks) if marks else Total(None, why="no answer could be judged")
    grades: dict[str, Grade] = {}
    for number, item in enumerate(items):
        if item["key"] not in asked:
            grades[item["key"]] = strict[number]
        elif item["key"] in verdicts:
            grades[item["key"]] = _grade_of(reads, item, verdicts[item["key"]])
    kept = _settled(items, grades) if row.total == "all_right" else [item for item in items if item["key"] in grades]
    if not kept:
        return Total(None, why="no answer could be judged")
    return totals.total(row.total, kept, [grades[item["key"]] for item in kept])


def _grade_of(reads: str, item: Row, verdict: Any) -> Grade:
    """What a verdict makes of an answer."""
    if reads == "tenths":
        return Grade(float(verdict), str(verdict))
    if reads == "verdict":  # who was shown no figure may say so
        return Grade(float(verdict == "correct" or (verdict == "unclear" and totals.without_figure(item))), verdict)
    if reads == "letter":
        return Grade(float(verdict == item["gold"]), verdict)
    return scoring.mathvista_right(item, str(verdict), nearest=True)


def _settled(items: Sequence[Row], grades: Mapping[str, Grade]) -> list[Row]:
    """The graded items of the units that are decided: all of a unit is graded, or one of it is wrong."""
    units: dict[str, list[Row]] = {}
    for item in items:
        units.setdefault(item["unit"], []).append(item)
    kept = []
    for unit in units.values():
        graded = [item for item in unit if item["key"] in grades]
        if len(graded) == len(unit) or any(grades[item["key"]].value == 0 for item in graded):
            kept += graded
    return kept
