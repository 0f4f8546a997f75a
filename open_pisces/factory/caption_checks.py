"""What is asked of a captioner, and which of its captions are none: templates and filters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from open_pisces.datasets.language import SCRIPTS, in_language, load_identifier, repeated_share, words_of
from open_pisces.errors import PiscesError

HERE = Path(__file__).parent
PLACE = "{caption}"
COPIED = 8
"""So many of the prompt's words in a row are a copy of it."""
REFUSED = 12
"""Words at the begin of a caption among which a refusal is looked for."""


class CaptioningError(PiscesError):
    """A captioning that cannot be done as asked; the message names what is wrong and the remedy."""


# --------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """What is asked about each picture.

    Args:
        name: for people.
        prompt: the request.
        prompt_with_caption: the request where the picture has a short caption, which takes the place of ``{caption}``.
    """

    name: str
    prompt: str
    prompt_with_caption: str = ""

    def ask(self, caption: str) -> str:
        """The request for a picture with this short caption, or none."""
        if caption.strip() and self.prompt_with_caption:
            return self.prompt_with_caption.replace(PLACE, caption.strip())
        return self.prompt


def find_template(name: str, field: str = "detailed") -> Template:
    """A template by its name in the package, or its file.

    ``trained`` is what our own models were trained to answer.

    Raises:
        CaptioningError: for one that is not there, or a file that is none.
    """
    if name == "trained":
        from open_pisces.data.prompts import wordings

        return Template(name, wordings()[f"caption_{field}"][0])
    known = sorted(path.stem for path in (HERE / "templates").glob("*.yaml"))
    path = HERE / "templates" / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise CaptioningError(f"no template {name!r}: choose {', '.join([*known, 'trained'])}, or give a YAML file")
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CaptioningError(f"the template {path} cannot be read: {error}") from None
    return _checked(path, fields)


def _checked(path: Path, fields: Any) -> Template:
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str) or not fields["prompt"].strip():
        raise CaptioningError(f"the template {path} has no text under 'prompt'")
    if unknown := set(fields) - {"prompt", "prompt_with_caption"}:
        raise CaptioningError(f"the template {path}: {min(unknown)!r} is none of prompt, prompt_with_caption")
    with_caption = str(fields.get("prompt_with_caption") or "")
    if PLACE in fields["prompt"] or (with_caption and PLACE not in with_caption):
        raise CaptioningError(f"the template {path}: {PLACE} belongs into prompt_with_caption, and nowhere else")
    return Template(path.stem, fields["prompt"].strip(), with_caption.strip())


# ----------------------------------------------------------------------------------------------------------- filters


@dataclass(frozen=True)
class Filters:
    """Which captions are kept.

    Args:
        words: least and most words (`words_of`).
        repetition: most of itself that a caption may repeat (`repeated_share`).
        language: it has to be in this one (`in_language`), or None for any.
    """

    words: tuple[int, int] = (5, 400)
    repetition: float = 0.3
    language: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.words[0] <= self.words[1]:
            raise CaptioningError(f"{self.words[0]} to {self.words[1]} words: give the least first")
        if not 0 <= self.repetition <= 1:
            raise CaptioningError(f"repetition {self.repetition}: give a share from 0 to 1")
        if self.language is not None and self.language not in SCRIPTS:
            raise CaptioningError(f"no language {self.language!r}: choose {', '.join(SCRIPTS)}")
        if self.language not in (None, "latin"):
            load_identifier()  # a library that is missing is told before anything is asked

    def cause(self, caption: str, finished: bool, prompt: str) -> str:
        """Why a caption is dropped, in one of `CAUSES`; "" keeps it.

        Args:
            caption: what the captioner wrote.
            finished: whether it came to an end of its own.
            prompt: what it was asked.
        """
        return next((name for name, drops in CAUSES.items() if drops(self, caption, finished, prompt)), "")

    def as_settings(self) -> dict[str, Any]:
        """For comparing runs."""
        return asdict(self)


def _length(filters: Filters, caption: str, finished: bool, prompt: str) -> bool:
    return not filters.words[0] <= len(words_of(caption)) <= filters.words[1]


def _copied(filters: Filters, caption: str, finished: bool, prompt: str) -> bool:
    asked = _plain(prompt).split()
    most = min(COPIED, len(asked))
    said = f" {' '.join(_plain(caption).split())} "
    return most > 0 and any(f" {' '.join(asked[at : at + most])} " in said for at in range(len(asked) - most + 1))


def _refused(filters: Filters, caption: str, finished: bool, prompt: str) -> bool:
    # At its begin: a sign in a picture may say "I can't" too.
    said = f" {' '.join(_plain(caption).split()[:REFUSED])} "
    return any(f" {phrase} " in said for phrase in _refusals())


def _foreign(filters: Filters, caption: str, finished: bool, prompt: str) -> bool:
    return filters.language is not None and not in_language(caption, filters.language)


CAUSES: dict[str, Callable[[Filters, str, bool, str], bool]] = {
    "empty": lambda filters, caption, finished, prompt: not caption.strip(),
    "cut off": lambda filters, caption, finished, prompt: not finished,
    "refusal": _refused,
    "copied prompt": _copied,
    "length": _length,
    "repetition": lambda filters, caption, finished, prompt: repeated_share(caption) > filters.repetition,
    "language": _foreign,
}
"""Causes in the order in which they are looked for; the first one is counted."""


def _plain(text: str) -> str:
    """Small letters, straight quotes, and no signs but the apostrophe."""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join(re.sub(r"[^\w']+", " ", text).split())


@cache
def _refusals() -> tuple[str, ...]:
    lines = (HERE / "refusals.txt").read_text().splitlines()
    return tuple(_plain(line) for line in lines if line.strip() and not line.startswith("#"))
