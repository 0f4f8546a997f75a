"""From samples to batches of tokens: the chat template, the places of pictures, what is supervised, padding or packing.

Layouts (paper: objective), both inside the chat template, in all stages:

* understanding: user ``[IMG]`` N vectors ``[/IMG]`` prompt; assistant: answer
* generation:    user: prompt and caption; assistant ``[IMG]`` M vectors ``[/IMG]``

Supervised are the assistant's text, its own ``[IMG]`` and ``[/IMG]``, and its end of turn. A picture the assistant
drew re-enters as understanding vectors at the head of the user's next turn, so that it can be asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL.Image import Image
from torch import Tensor

from open_pisces.batch import Sample, SequenceBatch, Turn, draw_caption
from open_pisces.data.images import generation_bytes, understanding_bytes
from open_pisces.data.tokenizer import BEGIN_IMAGE, END_IMAGE, PLACEHOLDER, read_template, special_tokens
from open_pisces.errors import PiscesError

MULTIPLE = 64
"""Sequences are padded to a multiple of this, so that a compiled model meets few shapes."""


def collate(
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    renderer: Renderer,
    understanding_size: int,
    generation_size: int,
    left: bool = False,
    multiple: int = MULTIPLE,
) -> SequenceBatch:
    """Sequences and their pictures to one padded batch, a sequence a row.

    Args:
        rendered: B sequences.
        images: the pictures of each, which its places refer to.
        renderer: knows the padding token.
        understanding_size: side of the understanding encoder's input in pixels.
        generation_size: side of the generation encoder's input in pixels.
        left: pad on the left (generation) instead of on the right (training, where causality hides the padding).
        multiple: the padded length is a multiple of this.
    """
    longest = max(len(r.ids) for r in rendered)
    S = -(-longest // multiple) * multiple
    starts = [S - len(r.ids) for r in rendered] if left else [0] * len(rendered)
    laid = _lay_out(rendered, list(enumerate(starts)), (len(rendered), S), renderer.pad)
    return _batch(laid, rendered, images, understanding_size, generation_size)


def collate_packed(
    rows: list[list[int]],
    length: int,
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    renderer: Renderer,
    understanding_size: int,
    generation_size: int,
) -> SequenceBatch:
    """Packed rows: the sequences of a row one after another, each with positions of its own from 0.

    Args:
        rows: the sequences of each row, by their place in ``rendered``; an empty row is all padding and weighs nothing.
        length: S.
        rendered: all sequences.
        images: the pictures of each.
        renderer: knows the padding token.
        understanding_size: side of the understanding encoder's input in pixels.
        generation_size: side of the generation encoder's input in pixels.
    """
    chosen: list[Rendered] = []
    shown: list[tuple[Image, ...]] = []
    places: list[tuple[int, int]] = []
    samples_BS, positions_BS = np.zeros((2, len(rows), length), np.int64)
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(rendered[i].ids)
            chosen.append(rendered[i])
            shown.append(images[i])
            places.append((number, start))
            samples_BS[number, start:end] = len(chosen)  # from 1 on: 0 is padding
            positions_BS[number, start:end] = np.arange(end - start)
            start = end
    laid = _lay_out(chosen, places, (len(rows), length), renderer.pad)
    batch = _batch(laid, chosen, shown, understanding_size, generation_size)
    return replace(batch, samples_BS=torch.from_numpy(samples_BS), positions_BS=torch.from_numpy(positions_BS))


def _lay_out(
    rendered: list[Rendered], places: list[tuple[int, int]], shape: tuple[int, int], pad: int
) -> tuple[np.ndarray, ...]:
    """ids, labels and the two kinds of places, (B, S) each; sequence i begins at ``places[i]``, (row, column)."""
    ids_BS = np.full(shape, pad, np.int64)
    labels_BS = np.full(shape, IGNORED, np.int64)
    understanding_BS, generation_BS = np.zeros((2, *shape), bool)
    for r, (row, start) in zip(rendered, places, strict=True):
        at = slice(start, start + len(r.ids))
        ids_BS[row, at] = r.ids
        labels_BS[row, at] = r.labels
        understanding_BS[row, at] = r.understanding
        generation_BS[row, at] = r.generation
    return ids_BS, labels_BS, understanding_BS, generation_BS


def _batch(
    laid: tuple[np.ndarray, ...],
    rendered: list[Rendered],
    images: list[tuple[Image, ...]],
    understanding_size: int,
    generation_size: int,
) -> SequenceBatch:
    ids_BS, labels_BS, understanding_BS, generation_BS = laid
    supervised = np.flatnonzero(labels_BS != IGNORED)
    seen: list[Image] = []
    drawn: list[Image] = []
    for r, pictures in zip(rendered, images, strict=True):
        seen += [pictures[i] for i in r.understanding_images]
        drawn += [pictures[i] for i in r.generation_images]
    return SequenceBatch(
        ids_BS=torch.from_numpy(ids_BS),
        understanding_at_K=torch.from_numpy(np.flatnonzero(understanding_BS)),
        generation_at_K=torch.from_numpy(np.flatnonzero(generation_BS)),
        text_at_K=torch.from_numpy(supervised - 1),
        labels_K=torch.from_numpy(labels_BS.reshape(-1)[supervised]),
        understanding_pixels_BCHW=_stack(seen if understanding_size else [], understanding_bytes, understanding_size),
        generation_pixels_BCHW=_stack(drawn if generation_size else [], generation_bytes, generation_size),
    )


def _stack(images: list[Image], cut: Callable[[Image, int], np.ndarray], size: int) -> Tensor:
    if not images:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([cut(image, size) for image in images]))


IGNORED = -100


class SampleError(PiscesError):
    """A sample that cannot serve the task drawn for it; the message names both and the remedy."""

    cause = "no text"
    """A short word for counting."""


class LengthError(PiscesError):
    """A sequence longer than the settings allow; the message names the sample, its length and the limit."""


class SystemTurnError(SampleError):
    """A conversation with a system turn, for a template that has none."""

    cause = "system turn"


class TurnsError(SampleError):
    """A conversation whose turns are not of the form of `Sample.conversation`."""

    cause = "turns"


@dataclass
class Rendered:
    """One sequence. All lists are S long, but for the picture lists.

    ``understanding`` and ``generation`` are True at the places of vectors, ``labels`` holds the token at supervised
    places and `IGNORED` elsewhere (not shifted).
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    understanding: list[bool] = field(default_factory=list)
    generation: list[bool] = field(default_factory=list)
    understanding_images: list[int] = field(default_factory=list)
    """Indices of the sample's pictures, in the order of their places."""
    generation_images: list[int] = field(default_factory=list)

    def add(self, ids: list[int], supervised: bool = False, place: str = "") -> None:
        """Append tokens of one kind."""
        self.ids += ids
        self.labels += ids if supervised else [IGNORED] * len(ids)
        self.understanding += [place == "understanding"] * len(ids)
        self.generation += [place == "generation"] * len(ids)


SHORT = 80
"""Characters of a text whose tokens are remembered."""
REMEMBERED = 50_000
"""Texts whose tokens a renderer remembers, some 30 MB at most."""


class Renderer:
    """Turns conversations into sequences for one tokenizer, template and pair of vector counts."""

    def __init__(self, tokenizer: Any, template: str, understanding_vectors: int, generation_vectors: int) -> None:
        self.tokenizer = tokenizer
        self.frame = read_template(template)
        self.N = understanding_vectors
        self.M = generation_vectors
        self._pieces: dict[str, list[int]] = {}  # the template's own few pieces, which come in every sample
        self._texts: dict[str, list[int]] = {}
        self.begin_image, self.end_image, self.placeholder = (
            tokenizer.convert_tokens_to_ids(token) for token in (BEGIN_IMAGE, END_IMAGE, PLACEHOLDER)
        )
        self.special_ids: list[int] = tokenizer.convert_tokens_to_ids(special_tokens(template))
        self.pad = tokenizer.convert_tokens_to_ids(self.frame["pad"])
        self.end_of_turn = tokenizer.convert_tokens_to_ids(self.frame["close"])
        self.after: str = self.frame.get("after", "")
        """What follows the end of a turn; the model never writes it."""

    def text_ids(self, text: str) -> list[int]:
        """A user's text: a special token typed in it stays the characters it is made of."""
        found = self._texts.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            # Questions and their short answers come again and again, and a call takes a quarter of a millisecond.
            if len(text) <= SHORT and len(self._texts) < REMEMBERED:
                self._texts[text] = found
        return list(found)

    def frame_ids(self, piece: str) -> list[int]:
        """A piece of the template itself, the only text that may hold special tokens."""
        if piece not in self._pieces:
            self._pieces[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return self._pieces[piece]

    def render(self, turns: tuple[Turn, ...], answer_next: bool = False) -> Rendered:
        """Lay out a conversation.

        Args:
            turns: alternating user and assistant turns, user first; a system turn before them takes the place of the
                template's own system text.
            answer_next: end with an open assistant turn, for inference.

        Raises:
            SystemTurnError: for a system turn, if the template has no place for one.
        """
        out = Rendered()
        out.add(self.frame_ids(self.frame["begin"]))
        system = self.frame["system"]
        if turns and turns[0].role == "system":
            if "system" not in self.frame["open"]:
                raise SystemTurnError("the chat template has no system turn: set data.system=drop to leave it out")
            system = "".join(str(part) for part in turns[0].content)
            turns = turns[1:]
        if system:
            frame = self.frame["open"]["system"], self.frame["close"]
            out.add(self.frame_ids(frame[0]) + self.text_ids(system) + self.frame_ids(frame[1] + self.after))
        drawn: list[int] = []
        for turn in turns:
            out.add(self.frame_ids(self.frame["open"][turn.role]))
            if turn.role == "assistant":
                drawn = self._assistant(out, turn)
            else:
                self._user(out, turn, drawn)
            out.add([self.end_of_turn], supervised=turn.role == "assistant")
            out.add(self.frame_ids(self.after))
        if answer_next:
            out.add(self.frame_ids(self.frame["open"]["assistant"]))
        return out

    def _user(self, out: Rendered, turn: Turn, drawn: list[int]) -> None:
        for part in (*drawn, *turn.content):
            if isinstance(part, int):
                self._picture(out, "understanding", self.N, supervised=False)
                out.understanding_images.append(part)
            else:
                out.add(self.text_ids(part))

    def _assistant(self, out: Rendered, turn: Turn) -> list[int]:
        for part in turn.content:
            if isinstance(part, int):
                self._picture(out, "generation", self.M, supervised=True)
                out.generation_images.append(part)
            else:
                out.add(self.text_ids(part), supervised=True)
        return [part for part in turn.content if isinstance(part, int)]

    def _picture(self, out: Rendered, place: str, length: int, supervised: bool) -> None:
        out.add([self.begin_image], supervised)
        out.add([self.placeholder] * length, place=place)
        out.add([self.end_image], supervised)


# ------------------------------------------------------------------------------------------- samples to turns


@lru_cache
def wordings() -> dict[str, Any]:
    """The prompts of ``data/prompts.yaml``."""
    return yaml.safe_load((Path(__file__).parent / "prompts.yaml").read_text())


def generation_turns(caption: str, wording: int = 0) -> tuple[Turn, ...]:
    """The user's side of a generation; the empty caption has a wording of its own (null-caption guidance)."""
    if not caption:
        return (Turn("user", (wordings()["generate_null"],)),)
    return (Turn("user", (wordings()["generate"][wording].format(caption=caption),)),)


def sample_turns(
    sample: Sample,
    task: str,
    draw: np.random.Generator,
    drop_caption: float,
    questions: int,
    keep_system: bool = True,
) -> tuple[Turn, ...]:
    """What a sample becomes when a task is drawn for it.

    Args:
        sample: pictures and words.
        task: one of ``config.Task``.
        draw: the stream of this sample in this epoch; the choice among several captions, wording, dropping and the
            choice of questions come from it.
        drop_caption: chance of the empty caption in a generation.
        questions: question-answer turns that share the picture.
        keep_system: whether a conversation's system turn stays.

    Raises:
        SampleError: if the sample has no text for the task, or a conversation that is none.
    """
    if task == "conversation":
        turns = _conversation(sample)
        return turns if keep_system or turns[0].role != "system" else turns[1:]
    if task.startswith("generate"):
        text = draw_caption(sample, draw) if task == "generate_short" else sample.detailed
        caption = _words(sample, text, task)
        caption = "" if draw.random() < drop_caption else caption
        wording = int(draw.integers(len(wordings()["generate"])))
        return (*generation_turns(caption, wording), Turn("assistant", (0,)))
    if task == "reconstruct":
        # The same picture through both encoders: understanding vectors in, generation vectors out.
        prompt = wordings()[task][int(draw.integers(len(wordings()[task])))]
        return (Turn("user", (0, prompt)), Turn("assistant", (0,)))
    if task.startswith("caption"):
        text = draw_caption(sample, draw) if task == "caption_short" else sample.detailed
        answer = _words(sample, text, task)
        prompt = wordings()[task][int(draw.integers(len(wordings()[task])))]
        return (Turn("user", (0, prompt)), Turn("assistant", (answer,)))
    if not sample.questions:
        raise SampleError(f"sample {sample.key!r} of {sample.source!r} has no questions: drop the task from its source")
    asking: list[Turn] = []
    shown = (0,) if sample.images else ()  # a question may be about no picture at all
    for index in draw.permutation(len(sample.questions))[:questions]:
        asked = sample.questions[int(index)]
        asking += [Turn("user", (*shown, asked.question)), Turn("assistant", (asked.answer,))]
        shown = ()
    return tuple(asking)


def _words(sample: Sample, text: str, task: str) -> str:
    if not text:
        raise SampleError(f"sample {sample.key!r} of {sample.source!r} has no text for {task}: drop the task")
    return text


def _conversation(sample: Sample) -> tuple[Turn, ...]:
    if not sample.conversation:
        raise SampleError(f"sample {sample.key!r} of {sample.source!r} holds no conversation: drop the task")
    turns: list[Turn] = []
    for message in sample.conversation:
        role, content = _turn(message, sample.key)
        if role == "system" and turns:
            raise TurnsError(f"sample {sample.key!r}: a system turn that is not the first: import the dataset again")
        beyond = [part for part in content if isinstance(part, int) and part >= len(sample.images)]
        if beyond:
            raise SampleError(f"sample {sample.key!r}: picture {beyond[0]} is named, but it has {len(sample.images)}")
        turns.append(Turn(role, content))
    return tuple(turns)


def _turn(message: Any, key: str) -> tuple[str, tuple[str | int, ...]]:
    """Role and content of a turn as it is stored."""
    try:
        role = str(message["role"])
        content = tuple(part if isinstance(part, str) else int(part["image"]) for part in message["content"])
    except (TypeError, KeyError, ValueError) as error:
        raise TurnsError(f"sample {key!r}: a turn without {error}: import the dataset again") from None
    is_picture = [isinstance(part, int) for part in content]
    if role not in ("system", "user", "assistant") or (role == "system" and any(is_picture)):
        raise TurnsError(f"sample {key!r}: a turn of {role!r} with {content}: import the dataset again")
    return role, content


def repeated(batch: SequenceBatch, n: int, N: int) -> SequenceBatch:
    """Every row of a batch of prompts ``n`` times, with its understanding pictures of ``N`` vectors each."""
    seen_BS = torch.zeros_like(batch.ids_BS, dtype=torch.bool)
    seen_BS.view(-1)[batch.understanding_at_K] = True
    pictures = (seen_BS.sum(1) // N).tolist()
    of_row = torch.arange(sum(pictures)).split(pictures)
    order = [number for row in of_row for number in row.tolist() * n]
    return replace(
        batch,
        ids_BS=batch.ids_BS.repeat_interleave(n, 0),
        understanding_at_K=seen_BS.repeat_interleave(n, 0).flatten().nonzero()[:, 0],
        understanding_pixels_BCHW=batch.understanding_pixels_BCHW[order],
    )
