"""Language models as judges, over any endpoint that speaks OpenAI's chat completions.

A reply that cannot be understood is asked for again, a little less greedily each time, and so is one that does not
come; after that the answer is *unjudged*: it is left out of the score and counted, never taken for wrong. Replies are
kept in the run folder with the judge's name and the day, so that scores can be made again without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from open_pisces.eval.run import Row, RunFolder, digest
from open_pisces.generate.chat_model import ChatModel, NoReply

FILE = "judged"
"""Rows of this name hold the replies."""
AT_ONCE = 8
"""Requests under way together; their replies are written together."""


# ------------------------------------------------------------------------------------------------ replies' meaning


def read_tenths(reply: str) -> float | None:
    """MM-Vet's grade: the first word as a number from 0 to 1."""
    try:
        value = float(reply.split()[0])
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= 1 else None


def read_marks(reply: str) -> list[float] | None:
    """LLaVA-W's two marks, of the reference and of the model, from 1 to 10 on the first line."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    try:
        marks = [float(word) for word in words]
    except ValueError:
        return None
    return marks if len(marks) == 2 and all(1 <= mark <= 10 for mark in marks) else None


def read_verdict(reply: str) -> str | None:
    """HallusionBench's ``correct``, ``incorrect`` or ``unclear``."""
    words = re.findall(r"\b(correct|incorrect|unclear)\b", reply.lower())
    return words[0] if len(set(words)) == 1 else None


def read_extraction(reply: str) -> str | None:
    """MathVista's extracted answer: the first line of the reply."""
    return reply.strip().split("\n")[0].strip() or None


def read_letter(reply: str) -> str | None:
    """MMBench's letter of an option, or E for none."""
    found = set(re.findall(r"(?<![A-Za-z])([A-E])(?![A-Za-z])", reply))
    return found.pop() if len(found) == 1 else None


READS: dict[str, Callable[[str], Any]] = {
    "tenths": read_tenths,
    "marks": read_marks,
    "verdict": read_verdict,
    "extraction": read_extraction,
    "letter": read_letter,
}


@lru_cache
def kinds() -> dict[str, dict[str, Any]]:
    """The judgements of ``graders.yaml`` by benchmark."""
    return yaml.safe_load((Path(__file__).parent / "graders.yaml").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- a run


def judge_answers(run: RunFolder, judge: ChatModel, kind: str, asked: Sequence[tuple[Row, str]]) -> None:
    """Have answers judged; what is kept of this judge under this prompt is not asked again, but for what is unjudged.

    Args:
        run: its folder gets a row for each reply.
        judge: who.
        kind: one of `kinds`: the benchmark's name.
        asked: questions with the answers to them.
    """
    task = kinds()[kind]
    kept = [row for row in run.written(FILE) if row["judge"] == judge.model and row["value"] is not None]
    known = {row["key"]: row["prompt"] for row in kept}
    prompts = [(question["key"], prompt_of(task["prompt"], question, answer)) for question, answer in asked]
    todo = [(key, prompt) for key, prompt in prompts if known.get(key) != digest(prompt)]
    for start in range(0, len(todo), AT_ONCE):  # kept part by part: a stop loses one part at most
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(lambda one: _judge(judge, task, *one), todo[start : start + AT_ONCE]))
        run.append(FILE, rows)


def prompt_of(template: str, question: Row, answer: str) -> str:
    """What a judge is shown of one answer: a template of `kinds` with the question's facts filled in."""
    facts = dict(question["facts"])
    for name, value in facts.items():
        if isinstance(value, list):
            facts[name] = "\n".join(value)
    facts = {"question": question["prompt"], "prompt": question["prompt"], **facts}
    gold = str(question["gold"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return template.format(**facts, gold=gold, answer=answer)


def _judge(judge: ChatModel, task: dict[str, Any], key: str, prompt: str) -> Row:
    """One judgement, with as many tries as there are temperatures; ``value`` is None if none of them can be read."""
    messages = [{"role": "user", "content": prompt}]
    if "system" in task:
        messages.insert(0, {"role": "system", "content": task["system"]})
    said = ""
    value = None
    for tries, temperature in enumerate(task["temperatures"], 1):  # noqa: B007  the row says how many it took
        try:
            said = judge.reply(messages, temperature, task["tokens"])
        except NoReply as error:
            said = str(error)
            break  # the client has tried often enough: no further temperature
        value = READS[task["reads"]](said)
        if value is not None:
            break
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    row = {"key": key, "judge": judge.model, "date": day, "prompt": digest(prompt)}
    return {**row, "reply": said, "value": value, "tries": tries}


def verdicts(run: RunFolder, judge: str | None = None) -> tuple[str | None, dict[str, Row]]:
    """Whose judgements a run holds, and the last one of each key; without a name, those of the last judge asked."""
    rows = run.written(FILE)
    name = judge or (rows[-1]["judge"] if rows else None)
    return name, {row["key"]: row for row in rows if row["judge"] == name}
