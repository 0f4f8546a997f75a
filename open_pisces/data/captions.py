"""Captions as the forms that datasets give them in: one text, or a list of several for the same picture.

Known forms: ``"a cat"``; ``["a cat", "an animal"]`` (Flickr30k, captions of several models); ``[{"raw": "a cat"}]``
(Karpathy's splits); ``[{"caption": "a cat"}]`` (COCO as tables). A list keeps its order; empty texts are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from open_pisces.batch import Sample
from open_pisces.errors import PiscesError

LIST_FIELDS = ("captions", "sentences", "sentences_raw")
"""Usual names of fields that hold several captions."""
_KEYS = ("caption", "raw", "text")


class CaptionError(PiscesError):
    """A field that holds something else than captions; the message shows what."""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions of a field's value; none for what is missing or no text.

    Raises:
        CaptionError: for a list or an object of another form than those above.
    """
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, dict):
        value = _from_object(value)
    elif not isinstance(value, list | tuple):
        return ()
    found = [_caption(one) for one in value]
    return tuple(text for text in found if text)


def one_text(value: Any) -> str:
    """The only caption of a field's value; "" for what is missing or no text.

    Raises:
        CaptionError: for several: only the short caption may be one of many.
    """
    found = captions_of(value)
    if len(found) > 1:
        raise CaptionError(f"{len(found)} texts where one is read; a list may be the short caption")
    return found[0] if found else ""


def _from_object(value: dict[str, Any]) -> list[Any]:
    """One object with a caption, or a table's column of them that is kept as an object of columns."""
    for key in _KEYS:
        if isinstance(column := value.get(key), list):
            return column
    return [value]


def _caption(one: Any) -> str:
    if isinstance(one, dict):
        one = next((one[key] for key in _KEYS if isinstance(one.get(key), str)), one)
    if one is None:
        return ""
    if not isinstance(one, str):
        raise CaptionError(f"a list of captions holds {str(one)[:40]!r}")
    return one.strip()


def draw_caption(sample: Sample, draw: np.random.Generator) -> str:
    """One of a sample's short captions, all alike likely; "" without any.

    With one there is nothing to draw: the stream stays where it is, so that orders of older datasets stay.
    """
    captions = sample.short_captions
    if len(captions) < 2:
        return captions[0] if captions else ""
    return captions[int(draw.integers(len(captions)))]
