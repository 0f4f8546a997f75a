"""What an answer says: the published readings of yes and no, of letters and of words, and our own lenient one.

A *strict* reading is the published one and nothing else; what it cannot read is None ("unparsed"). No reading guesses:
where the published code draws a letter at random or takes the option that is nearest by edit distance, these give None.
A *lenient* reading is ours, the same for every benchmark: markup, lead-ins such as "The answer is" and what follows the
first line are set aside, then letters, options and yes or no are looked for as words. It may also read less than a
strict one: several published rules look at the first character only, so "Because ..." is the letter B to them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

Options = Mapping[str, str]
"""Letter to text; empty for questions without options."""
_LEAD = re.compile(r"(?:\banswer\s*(?:is\b|would be\b|:|：)|答案\s*(?:是|为|:|：))\s*:?\s*", re.IGNORECASE)
_MARKUP = re.compile(r"[*`#]+|\\boxed|</?[a-z]+>")


@lru_cache
def tables() -> dict[str, Any]:
    """The lists and maps of ``parsing.yaml``; ``contractions`` as a map from the wrong form to the right one."""
    found = yaml.safe_load((Path(__file__).parent / "parsing.yaml").read_text(encoding="utf-8"))
    repaired = {}
    for word in found["contractions"]:
        for match in re.finditer("'", word):
            repaired[word[: match.start()] + word[match.end() :]] = word
    return {**found, "contractions": {**repaired, **found["reversed"]}}


def plain(answer: str) -> str:
    """The answer without markup, lead-in, later lines, quotes around it and final punctuation (lenient reading)."""
    text = _MARKUP.sub("", answer).strip()
    # The last lead-in counts: a model that reasons aloud ends with its answer.
    lead = list(_LEAD.finditer(text))
    if lead and text[lead[-1].end() :].strip():
        text = text[lead[-1].end() :]
    line = next((line for line in text.splitlines() if line.strip()), "")
    return line.strip().strip("\"'“”‘’").rstrip(".,;:!。，；！").strip()


# ------------------------------------------------------------------------------------------------------ yes and no


def pope_exact(answer: str) -> str | None:
    """POPE in lmms-eval: the whole answer is yes or no, whatever its case; so "Yes." is neither."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def pope_official(answer: str) -> str:
    """POPE's own ``evaluate.py``: "no" if the first sentence holds No, no or not as a word; all else is "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_yes_no(answer: str) -> str | None:
    """MME (its own ``calculation.py``, and lmms-eval): yes, else no, within the first four characters; or y, or n."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def only_yes_no(answer: str) -> str | None:
    """VLMEvalKit's ``YOrN_Extraction``: one of the words yes and no, and not the other."""
    words = set(re.sub(r"[^\w\s]", " ", answer.lower()).split())
    return None if {"yes", "no"} <= words else next((word for word in ("yes", "no") if word in words), None)


def lenient_yes_no(answer: str) -> str | None:
    """The first word, if it is yes or no; else the only one of both that is said anywhere."""
    words = re.findall(r"[a-z]+", plain(answer).lower())
    return words[0] if words[:1] in (["yes"], ["no"]) else only_yes_no(answer)


# ---------------------------------------------------------------------------------------------------------- letters


def first_letter(answer: str, options: Options) -> str | None:
    """SEED-Bench in lmms-eval: the first character, whatever follows."""
    letter = answer.strip()[:1]
    return letter if letter in options else None


def whole_letter(answer: str, options: Options) -> str | None:
    """AI2D in lmms-eval: the whole answer is the letter, case and punctuation ignored."""
    letter = _unpunctuated(answer).upper()
    return letter if letter in options else None


def scienceqa_letter(answer: str, options: Options) -> str | None:
    """ScienceQA in lmms-eval, as LLaVA reads it: the whole answer is the letter, or it starts with letter and dot."""
    letter = answer if len(answer) == 1 else answer[:1] if answer[1:2] == "." else ""
    return letter if letter in options else None


def mmstar_letter(answer: str, options: Options) -> str | None:
    """MMStar's own rule: the character at the start, after "(", after "option " or after "the answer is "."""
    text = answer.lower().strip().replace("\n", " ")
    lead = next((lead for lead in ("(", "option ", "the answer is ") if text.startswith(lead)), "")
    letter = text[len(lead) : len(lead) + 1].upper()
    return letter if letter in options else None


def cambrian_letter(answer: str, options: Options) -> str | None:
    """CV-Bench in Cambrian's harness: behind the last "answer is" or "answer:", the first character."""
    letter = _cambrian(answer)[:1].upper()
    return letter if letter in options else None


def mmvp_letter(answer: str, options: Options) -> str | None:
    """MMVP in Cambrian's harness: behind the last "answer is" or "answer:", the whole rest is letter or option."""
    text = _cambrian(answer)
    return next((letter for letter, option in options.items() if text in (letter.lower(), option.lower())), None)


def _cambrian(answer: str) -> str:
    text = answer.lower().strip()
    for lead in ("answer is", "answer is:", "answer:"):
        text = text.split(lead)[-1]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")


def mmbench_letter(answer: str, options: Options) -> str | None:
    """MMBench's first pass, without a judge (lmms-eval ``can_infer``, VLMEvalKit's exact matching).

    One letter of A to E as a word, or with the usual marks around it; "A" counts as an article in answers of more
    than three words. Otherwise the one option whose text the answer holds.
    """
    words = answer.split()
    for before, after in (("", ""), *_MARKS):
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        article = not (before or after) and "A" in words and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    held = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


_MARKS = (
    *[("", after) for after in (".", ",", ":", ")", ").")],
    *[("(", after) for after in (")", ").")],
    *[(":", after) for after in ("", ",", ".", ")", ").")],
)


def lenient_letter(answer: str, options: Options) -> str | None:
    """The letter an answer points at.

    It is the letter, or an option's text; or else the first of these that leaves exactly one letter decides: named as
    the option, leading, in brackets, as a word, or by the text of an option that stands in the answer as whole words.
    """
    if not options:
        return None
    text = plain(answer)
    letters = f"[{''.join(options)}]"
    if match := re.fullmatch(rf"[(\[]?({letters})[)\].:]*", text, re.IGNORECASE):
        return match[1].upper()
    same = [letter for letter, option in options.items() if option.strip().lower() == text.lower()]
    if same:
        return same[0]
    own = rf"(?<![A-Za-z])({letters})(?![A-Za-z'’])"
    rest = letters.replace("A", "") if len(options) > 1 else letters
    word = rf"(?<![A-Za-z])({rest}|A(?!\s+(?!(?:is|or|and)\b)[a-z]))(?![A-Za-z'’])"  # "A cat" is no letter
    for pattern in (
        rf"(?i:\b(?:option|choice)|选项?|答案)\s*[(（]?{own}",
        rf"^[(（]?{own}[)）.:：、]",
        rf"[(（]({letters})[)）]",
        word if "A" in options else own,
    ):
        found = set(re.findall(pattern, text))
        if len(found) == 1:
            return str(found.pop())
    held = [
        letter
        for letter, option in options.items()
        if option.strip() and re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text, re.IGNORECASE)
    ]
    return held[0] if len(held) == 1 else None


def mmmu_letter(answer: str, options: Options) -> str | None:
    """MMMU's own parser (``parse_multi_choice_response``), without the random letter it ends in.

    Brackets, then a letter before a blank, then before a dot (no word boundary is asked for: "BANANA " holds "A "),
    then, in answers of more than five words, an option's text. Of several the one that stands last.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:  # MMMU's own limit
        return None
    low = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in low]
    return max(found, key=lambda letter: low.rfind(options[letter].lower())) if found else None


def lenient_mmmu_letter(answer: str, options: Options) -> str | None:
    """Our reading, and MMMU's own where ours finds none."""
    return lenient_letter(answer, options) or mmmu_letter(answer, options)


# ------------------------------------------------------------------------------------------------------------ words


def vqa_words(text: str) -> str:
    """An answer normalized as the VQA challenge does: punctuation, then number words, articles and contractions."""
    text = _vqa_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [tables()["numbers"].get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in tables()["articles"]]
    return " ".join(tables()["contractions"].get(word, word) for word in kept)


def _vqa_punctuation(text: str) -> str:
    """Punctuation beside a blank, or in a text with a comma between digits, goes; other punctuation becomes a blank."""
    number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in tables()["punctuation"]:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or number else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official code passes a flag, 32, where the count belongs


@lru_cache(1 << 16)
def vqa_gold(text: str) -> str:
    """What the VQA challenge does to its own answers, if people disagreed: punctuation only."""
    return _vqa_punctuation(text)


@lru_cache(1 << 16)
def m4c_words(text: str) -> str:
    """An answer normalized as TextVQA and VizWiz are scored (MMF's processor): a possessive 's is split off first."""
    return vqa_words(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _unpunctuated(text: str) -> str:
    """In lower case, without the punctuation of ASCII (the ``exact_match`` metric of the ``evaluate`` library)."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def exact_words(text: str) -> str:
    """GQA in lmms-eval: case and punctuation ignored, nothing else."""
    return _unpunctuated(text)


def realworld_words(answer: str, options: Options) -> str:
    """RealWorldQA in lmms-eval (``flexible-extract``): digits for number words, a letter for an option's text."""
    text = tables()["counts"].get(answer.lower(), answer)
    text = re.sub(r"[^\w\s]", "", text).strip()
    matches = [(text.find(option), letter) for letter, option in options.items() if option and option in text]
    return _unpunctuated(min(matches)[1] if matches else text)


def number_of(text: str) -> float | None:
    """ChartQA (pix2struct's metric): the whole text as a number; a percentage is divided by 100."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def lenient_number(text: str) -> str:
    """A number without thousands separators, currency and unit; other texts as they are."""
    match = re.fullmatch(r"[$€£]?\s*(-?\d[\d,]*(?:\.\d+)?)\s*(%?)[^\d]*", text)
    return match[1].replace(",", "") + match[2] if match else text


# ------------------------------------------------------------------------------------------------ MMMU, MathVista


def mmmu_values(text: str) -> list[str | float]:
    """MMMU ``normalize_str``: a number rounded to two places, or the text in lower case (one letter: with a blank)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


def mmmu_open(answer: str) -> list[str | float]:
    """MMMU ``parse_open_response``: the texts and numbers behind words such as "is", else the whole answer."""
    text = answer.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", text)
    keys = []
    for number, line in enumerate(lines):
        marks = [*tables()["indicators"], *(["="] if number == len(lines) - 1 else [])]
        tails = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        # An empty tail gives way to whatever comes next, as in the official loop.
        best = ""
        for tail in tails:
            best = tail if not best or len(tail) < len(best) else best
        if best and best not in set(":,.!?;'"):
            keys.append(best)
    keys = keys or [text]
    found = list(keys)
    for key in keys:
        found += _numbers(key)
    values = []
    for one in found:
        values += mmmu_values(one)
    return values


def _numbers(text: str) -> list[str]:
    """Numbers with thousands commas, in scientific notation, and plain ones (MMMU ``extract_numbers``)."""
    forms = (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
    found = []
    for form in forms:
        found += re.findall(form, text)
    return found


def mathvista_extract(answer: str, options: Options, kind: str) -> str | None:
    """MathVista's extraction as far as it goes without a model: an option, a bare number, or 'The answer is "x".'

    Args:
        answer: what the model wrote.
        options: the choices, by letter.
        kind: ``answer_type`` of the question: text, integer, float or list.
    """
    text = answer.strip()
    if text in options.values() or (options and re.fullmatch(r"\(?[A-Z]\)?", text)):
        return text
    for name, number in (("integer", int), ("float", float)):
        if kind == name:
            try:
                return str(number(text))
            except ValueError:
                pass
    match = re.search(r'The answer is "(.*)"\.', answer)
    return match[1] if match else text if kind == "list" and re.fullmatch(r"\[.*\]", text) else None


def mathvista_lenient(answer: str, options: Options, kind: str) -> str | None:
    """The letter found leniently, or the last number, or the last list in brackets."""
    if options:
        return lenient_letter(answer, options)
    text = plain(answer)
    found = re.findall(r"\[[^\]]*\]" if kind == "list" else r"-?\d[\d,]*\.?\d*|-?\.\d+", text)
    return found[-1].replace(",", "") if found and kind != "list" else found[-1] if found else None


def mathvista_normal(
    extraction: str, options: Options, kind: str, precision: float, nearest: bool = False
) -> str | None:
    """MathVista ``normalize_extracted_answer``: the option's text, or the number in the form of the answer.

    Args:
        extraction: what was taken from the answer.
        options: the choices, by letter.
        kind: ``answer_type`` of the question.
        precision: decimals of a float.
        nearest: take the option nearest by edit distance where none fits, as the official code does behind its model.
    """
    if options:
        letters = re.findall(r"\(([a-zA-Z])\)", extraction)
        letter = letters[0].upper() if letters else extraction.strip()
        text = options.get(letter, extraction.strip() if extraction.strip() in options.values() else None)
        return text if text or not nearest else min(options.values(), key=lambda o: edit_distance(letter, o))
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        return str(round(float(extraction), int(precision))) if kind == "float" else extraction
    except (ValueError, OverflowError):
        return None


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        above = row
        row = [number]
        for place, other in enumerate(second):
            row.append(min(above[place + 1] + 1, row[place] + 1, above[place] + (one != other)))
    return row[-1]


OTHERS: dict[str, dict[str, Callable[[str], str | None]]] = {"pope": {"official": pope_official}}
"""Further published readings, whose scores stand beside the strict one."""
YES_NO: dict[str, Callable[[str], str | None]] = {"pope": pope_exact, "mme": mme_yes_no, "hallusion": only_yes_no}
"""Strict readings of yes and no, by rule."""
LETTER: dict[str, Callable[[str, Options], str | None]] = {
    "first_letter": first_letter,
    "whole_letter": whole_letter,
    "scienceqa": scienceqa_letter,
    "mmstar": mmstar_letter,
    "cv_bench": cambrian_letter,
    "mmvp": mmvp_letter,
    "mmbench": mmbench_letter,
}
"""Strict readings of a letter, by rule."""
