"""What passes between the rooms: samples, captions, batches, losses. Plain data, no behavior beyond moving to a device.

Shape legend, used as suffixes throughout the package:

======  ==========================================================================
``B``   batch (sequences or pictures)
``S``   sequence positions
``N``   understanding vectors of one picture (729 at ``8b``)
``M``   generation vectors of one picture (64 at ``8b``)
``D``   LLM width
``E``   gen-CLIP width
``V``   vocabulary
``K``   a list of places, flattened over the batch
``C H W``  channels, height, width of pictures or latents
======  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from torch import Tensor

from open_pisces.errors import PiscesError

LIST_FIELDS = ("captions", "sentences", "sentences_raw")
"""Usual names of fields that hold several captions."""
_KEYS = ("caption", "raw", "text")


class CaptionError(PiscesError):
    """A field that holds something else than captions; the message shows what."""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions of a field's value, in their order; none for what is missing or no text, empty texts left out.

    Known forms: ``"a cat"``; ``["a cat", "an animal"]`` (Flickr30k, captions of several models); ``[{"raw": "a cat"}]``
    (Karpathy's splits); ``[{"caption": "a cat"}]`` (COCO as tables).

    Raises:
        CaptionError: for a list or an object of another form.
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


@dataclass(frozen=True)
class Turn:
    """One message; ``content`` mixes strings and indices of pictures."""

    role: str
    content: tuple[str | int, ...]


@dataclass(frozen=True)
class Question:
    """A question about a picture, its answer, and the kind of question it is (for balanced scores)."""

    question: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """One entry of a dataset: pictures and what is known about them in words.

    ``short`` and ``detailed`` describe ``images[0]``; ``conversation`` is a list of turns
    ``{"role": "user" | "assistant", "content": [str | {"image": index}]}``, before them at most one of ``"system"``,
    which holds text only.
    """

    key: str
    images: tuple[Image, ...]
    short: str = ""
    detailed: str = ""
    questions: tuple[Question, ...] = ()
    conversation: tuple[dict[str, Any], ...] = ()
    source: str = ""
    facts: dict[str, Any] | None = None
    more_captions: tuple[str, ...] = ()
    """Further short captions of ``images[0]``; trainings draw one of all."""

    @property
    def short_captions(self) -> tuple[str, ...]:
        """Every short caption: ``short``, then the others."""
        return tuple(text for text in (self.short, *self.more_captions) if text)


def unit_pixels(pixels: Tensor) -> Tensor:
    """Pixels as floats in [0, 1]: bytes are divided by 255 in float32, floats pass as they are.

    Batches carry bytes to the device, a quarter of the memory; each encoder converts its micro-batch.
    """
    import torch

    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


class _Movable:
    """Moves every tensor field of a frozen dataclass."""

    def to(self, device: str | torch.device, floats: torch.dtype | None = None) -> Any:
        """A copy whose tensors live on ``device``; pixels and other fractions in ``floats`` if it is given."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {name: value.to(device) for name, value in found.items() if hasattr(value, "to")}
        if floats:
            moved = {name: unit_pixels(value) for name, value in moved.items()}
            moved |= {name: value.to(floats) for name, value in moved.items() if value.is_floating_point()}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class SequenceBatch(_Movable):
    """Sequences for the LLM, padded on the right (training) or on the left (generation).

    Places are flat indices into ``B * S``; masks say where, so that ``forward`` never asks which task a sample is.
    Understanding and generation pictures come in the order in which their places appear.
    """

    ids_BS: Tensor
    """int64; image places hold the placeholder's id."""
    understanding_at_K: Tensor
    """int64, places that take the N vectors of each understanding picture, in order."""
    generation_at_K: Tensor
    """int64, places that hold the M vectors of each generated picture, in order."""
    text_at_K: Tensor
    """int64, places whose hidden state predicts a supervised token (one left of the token)."""
    labels_K: Tensor
    """int64, the tokens predicted at ``text_at_K``."""
    understanding_pixels_BCHW: Tensor
    """uint8, or floats in [0, 1], normalised by the model; may hold no picture."""
    generation_pixels_BCHW: Tensor
    """Likewise, for the generation encoder."""
    total_text: int = 0
    """Supervised tokens of the *global* batch: what the text loss is divided by."""
    total_vectors: int = 0
    """Generation vectors of the *global* batch: what the vector loss is divided by."""
    total_seen: int = 0
    """Understanding vectors of the *global* batch."""
    generation_vectors_BME: Tensor | None = None
    """Vectors to use instead of encoding ``generation_pixels_BCHW``, in the LLM's space: pictures the model drew."""
    generation_features_BME: Tensor | None = None
    """Pooled features of gen-CLIP from the feature cache, in its own space, instead of ``generation_pixels_BCHW``."""
    understanding_features_BNE: Tensor | None = None
    """Features of the understanding encoder from the cache, instead of ``understanding_pixels_BCHW``."""
    samples_BS: Tensor | None = None
    """int64, packed rows only: which sample of its row a place belongs to, 0 where there is none."""
    positions_BS: Tensor | None = None
    """int64, packed rows only: place inside the sample."""
    draws: tuple[tuple[int, str], ...] = ()
    """(epoch, name) of each generated picture, in the order of their places: what every random choice about it is
    derived from. Empty at inference."""


class EmbeddingGradients(NamedTuple):
    """The gradient of the global contrastive loss at a micro-batch's embeddings, with its share of what is logged."""

    images_BE: Tensor
    texts_BE: Tensor
    scale: Tensor
    """Of the temperature, ``(1,)``."""
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class PairBatch(_Movable):
    """Pictures with captions, for gen-CLIP and the decoder."""

    pixels_BCHW: Tensor
    """uint8, or floats in [0, 1], at the encoder's input size."""
    targets_BCHW: Tensor
    """Likewise, at the decoder's output size."""
    ids_BS: Tensor
    """int64 caption tokens, padded on the right."""
    mask_BS: Tensor
    """bool, True at caption tokens."""
    draws: tuple[tuple[int, str], ...]
    """(epoch, sample key) of each picture: what every random choice about it is derived from."""
    captions_B: Tensor
    """int64, a digest of each caption: pairs whose captions are the same do not tell each other apart."""
    total: int = 0
    """Pictures of the *global* batch."""
    blank: bool = False
    """A stand-in for a rank that has no picture: it weighs nothing."""
    features_BME: Tensor | None = None
    """Pooled features of gen-CLIP from the feature cache, instead of encoding ``pixels_BCHW``."""
    predicted_BME: Tensor | None = None
    """What an LLM predicts for each caption, in gen-CLIP's space, from the feature cache."""
    gradients: EmbeddingGradients | None = None
    """Of several micro-batches of a contrastive step, compared before the first one's backward pass."""


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used, and why in a short word for counting and in a sentence."""

    source: str
    key: str
    cause: str
    message: str


@dataclass(frozen=True)
class StepBatches:
    """What a rank trains on in one step."""

    batches: list[Any]
    """Its micro-batches."""
    read: int
    """Samples drawn for it, those skipped included."""
    skipped: tuple[Skip, ...] = ()
    totals: dict[str, int] = field(default_factory=dict)
    """What this rank adds to the ``total`` fields of the global batch, by name; batches do not hold it yet."""
    real_tokens: int = 0
    """Tokens that are not padding, LLM stages only."""
    all_tokens: int = 0

    def with_totals(self, totals: dict[str, int] | None = None) -> list[Any]:
        """The micro-batches with the totals of the global batch in them, which their losses are divided by.

        Args:
            totals: of all ranks (`World.equalize_micro_batches` sums them); None for a rank that is alone.
        """
        return [replace(batch, **(self.totals if totals is None else totals)) for batch in self.batches]


class Losses(NamedTuple):
    """What a training step minimizes, with its parts for the log. A tuple, because sharding looks into those."""

    loss: Tensor
    """Scalar with gradient."""
    parts: dict[str, Tensor]
    """Detached scalars, already divided by the global counts, so that micro-batches and ranks add up."""
