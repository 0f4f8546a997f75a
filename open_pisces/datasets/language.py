"""Words of captions: how they are counted, how much they repeat themselves, which language they are in."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

from open_pisces.errors import PiscesError

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PIECE = re.compile(f"[{_IDEOGRAPHS}]|[^\\s{_IDEOGRAPHS}]+")
_EDGES = string.punctuation + "“”‘’«»…—–·¡¿。、，．！？：；（）「」『』"

_SCRIPT_SHARE = 0.8  # of the letters: names and signs in a picture may be in another script
# "a cat" is 9 % Galician for the model and 2 % English: only a language that is ten times as likely rules others out.
_LEAST_RATIO = 0.1
_LATIN = ("LATIN", "FULLWIDTH LATIN")
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "latin"), _LATIN),
    "zh": ("CJK", "IDEOGRAPHIC"),
    "ja": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}
"""For each language code, how the Unicode names of its letters begin; ``latin`` is the script alone."""


class LanguageError(PiscesError):
    """Languages cannot be told apart: the library is missing."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, split at spaces, without punctuation; Han characters and kana one by one."""
    pieces = (piece.strip(_EDGES) for piece in _PIECE.findall(text.casefold()))
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


def repeated_share(text: str) -> float:
    """How much a text repeats itself, 0 to 1.

    The larger of two shares: of its runs of three words, those that occurred before; and of its words after the first,
    those equal to the word before them (which finds "red red" in a text too short for the other).
    """
    words = words_of(text)
    runs = list(zip(words, words[1:], words[2:], strict=False))
    echoes = sum(one == other for one, other in pairwise(words))
    return max((len(runs) - len(set(runs))) / max(1, len(runs)), echoes / max(1, len(words) - 1))


def in_language(text: str, code: str) -> bool:
    """Whether a text may be in the language ``code`` of `SCRIPTS`.

    At least 80 % of the letters must be of the language's script, and no language that py3langid knows may be more than
    ten times as likely. ``latin`` asks for the script only. A text without letters passes.

    One or two words are often likely in several languages ("Golden Gate Bridge" is English and German): they pass for
    each of them.

    Raises:
        LanguageError: if py3langid is not installed.
    """
    names = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    if sum(name.startswith(SCRIPTS[code]) for name in names) < _SCRIPT_SHARE * len(names):
        return False
    if not names or code == "latin":
        return True
    found = _probabilities(text)
    return found[code] >= _LEAST_RATIO * max(found.values())


@cache
def load_identifier() -> Any:
    """py3langid's model of 139 languages (2 s the first time).

    Raises:
        LanguageError: if py3langid is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise LanguageError(
            "py3langid is not installed, and tells languages apart: pip install 'open-pisces[data]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=16)  # a caption is asked about once for each language of the rule
def _probabilities(text: str) -> dict[str, float]:
    return dict(load_identifier().rank(text))
