"""Words that a model never saw: a small one that was trained from scratch knows those of its data and no others."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from open_pisces.data.tokenizer import words_of

NEAR = 0.7
"""Likeness (difflib's ratio) from which a known word is named for an unknown one."""


@dataclass(frozen=True)
class UnknownWord:
    """A word of a prompt that no training text held."""

    word: str
    near: tuple[str, ...]
    """At most three known words that are spelt like it, the likest first."""

    def __str__(self) -> str:
        known = f"known words like it: {', '.join(self.near)}" if self.near else "no known word is spelt like it"
        return f"the model never saw the word {self.word!r} ({known})"


def known_words(tokenizer: Any) -> tuple[str, ...]:
    """All words of the texts that a tokenizer of our own was trained on, sorted; none for any other tokenizer.

    A pretrained LLM has seen more words than anyone can list.
    """
    return tuple(tokenizer.init_kwargs.get("known_words", ()))


def unknown_words(tokenizer: Any, prompt: str) -> list[UnknownWord]:
    """The words of a prompt that the model never saw, each once; none where it is not known what it saw."""
    known = known_words(tokenizer)
    if not known:
        return []
    lists = set(known)
    found = []
    for word in dict.fromkeys(words_of(prompt)):
        if word not in lists:
            found.append(UnknownWord(word, tuple(difflib.get_close_matches(word, known, 3, NEAR))))
    return found
