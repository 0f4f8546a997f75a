"""Language models as judges, over any endpoint that speaks OpenAI's chat completions.

A reply that cannot be understood is asked for again, a little less greedily each time, and so is one that does not
come; after that the answer is *unjudged*: it is left out of the score and counted, never taken for wrong. Replies are
kept in the run folder with the judge's name and the day, so that scores can be made again without it.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from open_pisces.errors import PiscesError
from open_pisces.eval.run import Row, RunFolder, digest

FILE = "judged"
"""Rows of this name hold the replies."""
AT_ONCE = 8
"""Requests under way together; their replies are written together."""
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class GraderError(PiscesError):
    """A judge that cannot be used; the message names it and the remedy."""


class NoReply(Exception):
    """A request without a usable reply, after all tries."""


@dataclass(frozen=True)
class Judge:
    """A model behind an address.

    Its key is read from the environment when it is needed, and written nowhere.
    """

    model: str
    """Its name at the endpoint, with its version; scores carry it."""
    url: str = "https://api.openai.com/v1"
    """Up to, not with, ``/chat/completions``."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; local servers need none."""
    timeout: float = 60.0
    """Seconds until a request is given up."""
    tries: int = 4
    """Requests for one reply before it counts as missing."""
    pause: float = 2.0
    """Seconds before the second try; each further one waits twice as long."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise GraderError(f"the judge's address {self.url!r} is no http address: give one as http://host:8000/v1")

    def reply(self, prompt: str, system: str = "", temperature: float = 0.0, tokens: int = 256) -> str:
        """What the model says.

        Raises:
            NoReply: if it says nothing usable in `tries` requests.
            GraderError: if the endpoint refuses the request for a reason that will not pass: key, name, address.
        """
        turns = [{"role": role, "content": text} for role, text in (("system", system), ("user", prompt)) if text]
        body = {"model": self.model, "messages": turns, "temperature": temperature, "max_tokens": tokens}
        why = ""
        for number in range(self.tries):
            if number:
                self.sleep(self.pause * 2 ** (number - 1))
            try:
                return self._request(body)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING:
                    raise GraderError(self._refusal(error)) from None
                why = f"HTTP {error.code}"
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # no connection; not such an answer
                why = f"{type(error).__name__}: {error}"
        raise NoReply(f"{self.model} at {self.url}: no reply in {self.tries} tries ({why})")

    def _request(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            said = json.loads(reply.read())["choices"][0]["message"]["content"].strip()
        if not said:
            raise ValueError("an empty reply")
        return str(said)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        reason = " ".join(error.read(300).decode(errors="replace").split())
        return (
            f"{self.model} at {self.url} refuses: HTTP {error.code} {error.reason}; {reason}. Check the model's name, "
            f"the address and the key in {self.key_variable}"
        )


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


def judge_answers(run: RunFolder, judge: Judge, kind: str, asked: Sequence[tuple[Row, str]]) -> None:
    """Have answers judged; what is kept of this judge under this prompt is not asked again, but for what is unjudged.

    Args:
        run: its folder gets a row for each reply.
        judge: who.
        kind: one of `kinds`: the benchmark's name.
        asked: questions with the answers to them.
    """
    task = kinds()[kind]
    known = {row["key"]: row for row in _rows(run) if row["judge"] == judge.model and row["value"] is not None}
    todo = []
    for question, answer in asked:
        prompt = _prompt(task["prompt"], question, answer)
        if known.get(question["key"], {}).get("prompt") != digest(prompt):
            todo.append((question["key"], prompt))
    for start in range(0, len(todo), AT_ONCE):
        part = todo[start : start + AT_ONCE]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(lambda one: _judge(judge, task, *one), part))
        run.append(FILE, rows)


def _prompt(template: str, question: Row, answer: str) -> str:
    facts = {name: "\n".join(value) if isinstance(value, list) else value for name, value in question["facts"].items()}
    gold = str(question["gold"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return template.format(
        **{"question": question["prompt"], "prompt": question["prompt"], **facts}, gold=gold, answer=answer
    )


def _judge(judge: Judge, task: dict[str, Any], key: str, prompt: str) -> Row:
    """One judgement, with as many tries as there are temperatures; ``value`` is None if none of them can be read."""
    read, said = READS[task["reads"]], ""
    value, tries = None, 0
    for temperature in task["temperatures"]:
        tries += 1
        try:
            said = judge.reply(prompt, task.get("system", ""), temperature, task["tokens"])
        except NoReply as error:
            said = str(error)
            break  # it has been tried often enough
        value = read(said)
        if value is not None:
            break
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"key": key, "judge": judge.model, "date": day, "prompt": digest(prompt), "reply": said, "value": value,
            "tries": tries}  # fmt: skip


def verdicts(run: RunFolder, judge: str | None = None) -> tuple[str | None, dict[str, Row]]:
    """Whose judgements a run holds, and the last one of each key; without a name, those of the last judge asked."""
    rows = list(_rows(run))
    name = judge or (rows[-1]["judge"] if rows else None)
    return name, {row["key"]: row for row in rows if row["judge"] == name}


def _rows(run: RunFolder) -> Iterator[Row]:
    """The replies of a run; a last line that was cut short was never written."""
    path = run.folder / f"{FILE}.jsonl"
    if path.is_file():
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        yield from (json.loads(line) for line in lines)
