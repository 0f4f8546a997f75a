"""Understanding benchmarks: ask a model, keep what it said, score it by the published rules.

A run folder for each benchmark: its row of the table in the manifest, the prompts as sent in ``items.jsonl``, the raw
answers in ``answers.jsonl``, a judge's replies in ``judged.jsonl``. `score_run` needs nothing else. ``strict`` is the
published reading without guesses, ``lenient`` ours (`parsing`); ``score`` is ``strict`` unless a judge decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.eval.evaluation import Evaluation, Score
from open_pisces.eval.run import Row, RunFolder, model_hash
from open_pisces.eval.understanding import graders, parsing, scoring, totals
from open_pisces.eval.understanding.benchmarks import PAPER, Benchmark, choose, read_row
from open_pisces.eval.understanding.questions import FIXTURES, MARKER, QuestionsError, read_questions
from open_pisces.eval.understanding.scoring import Grade
from open_pisces.eval.understanding.totals import Total
from open_pisces.generate.chat_model import ChatModel
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


@dataclass(frozen=True)
class BenchmarkScore(Score):
    """The score of one benchmark, in the unit of the paper's table; without a judge that it needs it has none."""

    title: str
    strict: float | None
    """By the published rules without a judge; None if only a judge can grade."""
    lenient: float | None
    baseline: float | None
    """The best fixed answer."""
    maximum: float
    questions: int
    of: int
    """Units that the set has."""
    unparsed: int
    """Answers that the published rules do not read."""
    unparsed_lenient: int
    unparsed_first: list[Row]
    refused: int
    """Questions that the model did not take, counted as wrong."""
    judge: Row | None
    """Who judged, when, and how many."""
    details: Row
    rule: str
    data: str
    split: str
    why: str
    """Whatever there is to say."""

    def row(self) -> Row:
        """The fields with all numbers rounded to four places."""
        rounded: Row = _rounded(super().row())
        return rounded


class Understanding(Evaluation):
    """One benchmark.

    Args:
        generator: the model.
        benchmark: a row of the table.
        data: where its questions come from (`read_questions`).
        limit: units asked.
        batch_size: prompts answered together.
        judge: for answers that need one.

    Raises:
        QuestionsError: if the questions cannot be had.
    """

    stages = (ANSWERS,)

    def __init__(
        self,
        generator: Answerer,
        benchmark: Benchmark,
        data: str | Path = FIXTURES,
        limit: int | None = None,
        batch_size: int = 16,
        judge: ChatModel | None = None,
    ) -> None:
        self.task = f"understanding/{benchmark.name}"  # type: ignore[misc]  # a task for each benchmark
        self.device = str(getattr(generator, "device", "cpu"))
        self.generator = generator
        self.benchmark = benchmark
        self.judge = judge
        self.asked = read_questions(benchmark, data, limit)
        self._settings: Row = {"benchmark": asdict(benchmark), "row": benchmark.hash, "data": str(data)}
        # The batch size belongs to a run: padding changes the last bits of what a model computes.
        self._settings |= {"units": self.asked.units, "limit": limit, "batch_size": batch_size}

    @property
    def settings(self) -> Row:
        """The row of the table, the place of the questions, how many there are and are asked."""
        return self._settings

    def items(self) -> list[Row]:
        """The questions with their prompts as sent."""
        return self.asked.items

    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Ask one batch; a question that the model refuses gets ``answer`` None and the reason.

        Raises:
            QuestionsError: if a picture is missing.
        """
        pictures = [self.asked.pictures(item) for item in batch]
        rows = []
        for item, shown, row in zip(batch, pictures, self._answers(batch, pictures), strict=True):
            # What was shown, should the copy of the dataset change; 64 bits tell its pictures apart.
            sums = [hashlib.sha256(picture.tobytes()).hexdigest()[:16] for picture in shown]
            rows.append({"key": item["key"], "answer": row["answer"], "pictures": sums, **row})
        run.append(ANSWERS, rows)

    def score(self, run: RunFolder) -> BenchmarkScore:
        """See `score_run`."""
        return score_run(run, self.judge)

    def _answers(self, items: Sequence[Row], pictures: list[list[Image]]) -> list[Row]:
        """``answer`` of each, or None and why it was ``refused``; a batch with a refused question is asked singly."""
        tokens = self.benchmark.tokens
        try:
            if any(item["pictures"] for item in items):
                turns: list[tuple[Turn, ...]] = [(Turn("user", interleaved(item["prompt"])),) for item in items]
                said = self.generator.answer(turns, [tuple(shown) for shown in pictures], max_new_tokens=tokens)
            else:
                said = self.generator.text(pictures, [item["prompt"] for item in items], max_new_tokens=tokens)
            return [{"answer": answer} for answer in said]
        except PromptError as error:
            if len(items) == 1:
                return [{"answer": None, "refused": str(error)}]
            return [self._answers([item], [shown])[0] for item, shown in zip(items, pictures, strict=True)]


def interleaved(prompt: str) -> tuple[str | int, ...]:
    """A prompt as the texts and picture numbers it is made of."""
    parts: list[str | int] = []
    for number, text in enumerate(MARKER.split(prompt)[::2]):  # the markers' own numbers stand between the texts
        if number:
            parts.append(number - 1)
        if text:
            parts.append(text)
    return tuple(parts)


def evaluate(
    generator: Answerer,
    names: str | Sequence[str] = PAPER,
    *,
    model: str | Path,
    data: str | Path | Mapping[str, str | Path] = FIXTURES,
    limit: int | None = None,
    batch_size: int = 16,
    folder: Path | None = None,
    judge: ChatModel | None = None,
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

    Returns:
        ``rows``: for each benchmark the fields of its `BenchmarkScore` as `RunFolder.write_scores` gives them;
        ``data``, ``limit``, ``model``, ``model_hash``, and under ``not_run`` how many have no score.

    Raises:
        EvaluationError: for a name that is no benchmark.
        RunError: for a folder that holds something else.
    """
    rows = {}
    for row in choose(names):
        where = data.get(row.name, FIXTURES) if isinstance(data, Mapping) else data
        try:
            one = Understanding(generator, row, where, limit, batch_size, judge)
            run = one.open(model, folder / row.name if folder else None)
            one.complete(run)
        except QuestionsError as error:  # a dataset, or one of its pictures, is missing
            rows[row.name] = not_run(row, str(error))
        else:
            rows[row.name] = run.write_scores(one.score(run).row())
    places = {name: str(place) for name, place in data.items()} if isinstance(data, Mapping) else str(data)
    without = sum(row["score"] is None for row in rows.values())
    whole = {"rows": rows, "not_run": without, "data": places, "limit": limit}
    return {**whole, "model": str(model), "model_hash": model_hash(model)}


def not_run(row: Benchmark, why: str) -> dict[str, Any]:
    """The result of a benchmark that could not be run."""
    empty = dict.fromkeys(("score", "low", "high", "strict", "lenient", "baseline"))
    return {**empty, "n": 0, "unparsed": 0, "title": row.title, "why": why}


# -------------------------------------------------------------------------------------------------------- scoring


def score_run(run: RunFolder, judge: ChatModel | None = None) -> BenchmarkScore:
    """The score of a run from what it holds.

    Args:
        run: with all its answers.
        judge: asked for what is not judged yet; without one, judgements that are kept count.

    Raises:
        RunError: if answers are missing.
    """
    settings = run.manifest.settings
    row = read_row(settings["benchmark"])
    answers = run.rows(ANSWERS)
    said = [answer["answer"] or "" for answer in answers]
    refused = [answer["refused"] for answer in answers if answer["answer"] is None]
    strict = _grades(row, run.items, said)
    lenient = _grades(row, run.items, said, lenient=True)
    plain = totals.total(row.total, run.items, strict) if strict else Total(None, n=len(run.items))
    by, found = _by_judge(run, row, said, strict, judge)
    if by is None:
        # The rules' reading would pass for the published score, which is a judge's.
        found = Total(None) if row.judge == "required" else plain
    unread = [place for place, one in enumerate(strict) if one.read is None]
    return BenchmarkScore(
        name=run.manifest.task,
        score=found.score,
        low=found.low,
        high=found.high,
        n=found.n or plain.n,
        title=row.title,
        strict=plain.score,
        lenient=totals.score_only(row.total, run.items, lenient) if lenient else None,
        baseline=_baseline(row, run.items) if strict else None,
        maximum=row.maximum,
        questions=len(run.items),
        of=settings["units"],
        unparsed=len(unread),
        unparsed_lenient=sum(one.read is None for one in lenient),
        unparsed_first=[{"key": run.items[i]["key"], "answer": said[i][:200]} for i in unread[:SHOWN]],
        refused=len(refused),
        judge=by,
        details={**plain.details, **found.details, **_further(row, run.items, said, strict)},
        rule=row.source,
        data=settings["data"],
        split=row.split,
        why="; ".join(_notes(run, row, by, found.why or plain.why, bool(unread), refused)),
    )


def _rounded(value: Any) -> Any:
    """Numbers to four places, wherever they stand."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _grades(row: Benchmark, items: Sequence[Row], said: Sequence[str], lenient: bool = False) -> list[Grade]:
    """Grades by the row's rule, none for a row that only a judge can grade."""
    if row.rule == "judged":
        return []
    return [scoring.grade(row.rule, item, answer, lenient) for item, answer in zip(items, said, strict=True)]


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
    golds: Counter[str] = Counter()
    for item in items:
        golds.update(item["gold"] if isinstance(item["gold"], list) else [item["gold"]])
    scores = []
    # Each constant takes a pass over all questions, and a rare answer could hardly win.
    for constant, _ in golds.most_common(CONSTANTS):
        scores.append(totals.score_only(row.total, items, _grades(row, items, [constant] * len(items))))
    return max((score for score in scores if score is not None), default=None)


def _notes(run: RunFolder, row: Benchmark, by: Row | None, why: str, unread: bool, refused: Sequence[str]) -> list[str]:
    """What has to be known of a score, or why there is none."""
    notes = []
    if row.judge == "required" and by is None:
        notes.append("not run: this score needs a language model as judge, and none was given")
    if row.judge == "optional" and by is None and unread:
        notes.append("no judge: answers that the rules cannot read count as wrong")
    if by and by["unjudged"]:
        notes.append(f"{by['unjudged']} answers are unjudged and left out")
    if why:
        notes.append(why)
    if refused:
        notes.append(f"{len(refused)} of {len(run.items)} questions refused and counted as wrong, first: {refused[0]}")
    limit = run.manifest.settings["limit"]
    units = run.manifest.settings["units"]
    if limit is not None and limit < units:
        notes.append(f"{limit} of {units} units asked")
    if run.manifest.settings["data"] == FIXTURES:
        notes.append("made-up questions, not the benchmark")
    return notes


# --------------------------------------------------------------------------------------------------------- judges


def _by_judge(
    run: RunFolder, row: Benchmark, said: Sequence[str], strict: Sequence[Grade], judge: ChatModel | None
) -> tuple[Row | None, Total]:
    """Who judged, when and how much (None if nothing was), and the score that the verdicts give."""
    asked = _to_judge(row, run.items, said, strict)
    if judge is not None and asked:
        graders.judge_answers(run, judge, row.name, asked)
    name, rows = graders.verdicts(run, judge.model if judge else None)
    keys = [question["key"] for question, _ in asked]
    judged = {key: rows[key] for key in keys if key in rows}
    if not judged:
        return None, Total(None)
    days = sorted(one["date"] for one in judged.values())
    date = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    verdicts = {key: one["value"] for key, one in judged.items() if one["value"] is not None}
    by = {"name": name, "date": date, "judged": len(verdicts), "unjudged": len(keys) - len(verdicts)}
    return by, _judged(row, run.items, strict, set(keys), verdicts)


def _to_judge(
    row: Benchmark, items: Sequence[Row], said: Sequence[str], strict: Sequence[Grade]
) -> list[tuple[Row, str]]:
    """What a judge has to see: all answers, or those that the published rules do not read without one."""
    if row.judge == "no":
        return []
    pairs = list(zip(items, said, strict=True))
    if graders.kinds()[row.name]["reads"] not in ("letter", "extraction"):
        return pairs
    # An answer of nothing is wrong without a judge.
    return [pair for pair, one in zip(pairs, strict, strict=True) if one.read is None and pair[1].strip()]


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
    # With half of a unit left out MMBench would be easier: all rotations have to be right.
    kept = _settled(items, grades) if row.total == "all_right" else [item for item in items if item["key"] in grades]
    if not kept:
        return Total(None, why="no answer could be judged")
    return totals.total(row.total, kept, [grades[item["key"]] for item in kept])


def _grade_of(reads: str, item: Row, verdict: Any) -> Grade:
    """What a verdict makes of an answer."""
    if reads == "tenths":
        return Grade(float(verdict), str(verdict))
    if reads == "verdict":  # as in the published code: who was shown no figure may say so
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
