"""Drives a Pisces from lmms-eval, which finds it through the entry-point group ``lmms_eval.models``: no fork.

Checked against lmms-eval 0.7.3. Its chat tasks get `PiscesChat`; ``--force_simple`` gets `PiscesSimple`, which tasks
that compare likelihoods need, for there lmms-eval builds no chat requests. Both exist once they are asked for, because
their base class is lmms-eval's: without it this module still imports.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from open_pisces.data.images import ImageError
from open_pisces.generate.choose import describe_length, log_likelihoods
from open_pisces.generate.generator import Generator
from open_pisces.generate.messages import Conversation, HarnessError, read_messages
from open_pisces.model.folder import WEIGHTS

Messages = Sequence[Mapping[str, Any]]

PLACE = "<image>"
"""What a simple task writes into its text where a picture belongs; tasks without it get their pictures first."""
ROOM = 128
"""An answer limited by the model's positions is limited to a multiple of this, so that rows still share a batch."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is written: the part of a task's ``generation_kwargs`` that this model follows."""

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    until: tuple[str, ...]
    """The answer ends before the first of these."""


def read_decoding(kwargs: Mapping[str, Any], max_new_tokens: int) -> Decoding:
    """Settings of a task; what it leaves open comes from the model's arguments.

    Beams and cut-off sampling are not ours: a task that asks for them is told so in a warning.
    """
    sample = kwargs.get("do_sample")
    temperature = kwargs.get("temperature")
    if temperature is None:  # harnesses say do_sample without a temperature when they mean 1
        temperature = 1.0 if sample else 0.0
    temperature = 0.0 if sample is False else float(temperature)
    plain = {"num_beams": (None, 1)} | ({"top_p": (None, 0, 1), "top_k": (None, 0)} if temperature else {})
    for name, values in plain.items():
        if kwargs.get(name) not in values:
            warnings.warn(f"{name}={kwargs[name]} is not supported: answers are made without it", stacklevel=2)
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Decoding(int(kwargs.get("max_new_tokens") or max_new_tokens), temperature, tuple(filter(None, stops)))


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the strings that end it."""
    places = [place for place in map(answer.find, until) if place >= 0]
    return answer[: min(places, default=len(answer))].strip()


class Requests:
    """What both forms of requests share. `model_class` joins it with lmms-eval's base class.

    Args:
        pretrained: a model folder; the shipped weights if it is empty.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``; under several processes each takes the GPU of its number.
        batch_size: requests answered together.
        max_new_tokens: the longest answer where a task does not say.
        seed: of sampled answers; repetition k of a request takes ``seed + k``.
        choices: how the likelihood of a choice of a ``multiple_choice`` task is told. lmms-eval's base class asks for
            log-probabilities, but release 0.7.3 takes the choice with the *smallest* value, as most of its models
            return losses: ``loss`` is minus the log-probability. ``log_probability`` is for releases that differ.

    Raises:
        HarnessError: for a batch size or ``choices`` that cannot be used.
    """

    is_simple: bool
    settings_at: int
    """Where a generation request's arguments hold the task's ``generation_kwargs``."""
    task_dict: dict[str, Any]
    _rank: int

    def __init__(
        self,
        pretrained: str = "",
        device: str = "auto",
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        seed: int = 0,
        choices: Literal["loss", "log_probability"] = "loss",
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise HarnessError(f"batch_size={batch_size}: give a number of at least 1, such as --batch_size 8")
        if choices not in ("loss", "log_probability"):
            raise HarnessError(f"choices={choices}: give loss or log_probability")
        self.generator = Generator.from_pretrained(pretrained or WEIGHTS, own_device(device))
        self.device = self.generator.device
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.choices = choices
        self.max_new_tokens = int(max_new_tokens)

    def clean(self) -> None:
        """Let go of the model: lmms-eval calls this before it starts a judge on the same device."""
        self.__dict__.pop("generator", None)
        super().clean()  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------- the three methods

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests.

        A request that cannot be used (too long with its pictures, a damaged picture) gets the empty answer, and a
        warning names it: one bad row does not end a long run.
        """
        answers = [""] * len(requests)
        for decoding, seed, numbers in self._batches(requests):
            rows = {i: self._read(requests[i].args, self._messages(requests[i].args)) for i in numbers}
            for i, answer in self._answer(rows, decoding, seed).items():
                answers[i] = answer
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of every round. The task writes each round's messages from the answers before it."""
        answers: list[list[str]] = [[] for _ in requests]
        for decoding, seed, numbers in self._batches(requests):
            rows = {i: self._read(requests[i].args, self._messages(requests[i].args)) for i in numbers}
            notes: dict[int, Any] = {}
            while rows:
                for i, answer in self._answer(rows, decoding, seed).items():
                    answers[i].append(answer)
                for i in list(rows):
                    known = {"round_idx": len(answers[i]), "previous_output": list(answers[i])}
                    messages, told, notes[i] = self._round(requests[i].args, **known, previous_round_info=notes.get(i))
                    answers[i] = answers[i] if told is None else list(told)
                    if messages is None:
                        del rows[i]
                    else:
                        rows[i] = self._read(requests[i].args, messages)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The continuations' log-probabilities and whether they are what the model would write, in pairs.

        Continuations that are plain strings are the choices of a task; see ``choices`` of this class. A request that
        cannot be used is an error: a made-up likelihood would be taken for a choice.
        """
        found: list[Any] = []
        for numbers in self._bar(list(_slices(range(len(requests)), self.batch_size))):
            rows = []
            continuations = []
            for i in numbers:
                context, target, *where = requests[i].args
                continuations.append(str(target(self._doc(where))) if callable(target) else target)
                visuals = where[0](self._doc(where)) if where and where[0] else ()
                rows.append(read_messages(simple_messages(context, visuals)))
            for i, (value, greedy) in zip(numbers, log_likelihoods(self.generator, rows, continuations), strict=True):
                is_choice = not callable(requests[i].args[1])
                value = -value if is_choice and self.choices == "loss" else value
                found.append(carried((value, greedy)))
        return found

    # ------------------------------------------------------------------------------------------------- their parts

    def _messages(self, args: Sequence[Any]) -> Messages:
        """A request's first round."""
        raise NotImplementedError

    def _round(self, args: Sequence[Any], **known: Any) -> tuple[Messages | None, list[str] | None, Any]:
        """A later round: its messages (None if there is none), the answers as the task keeps them, its notes."""
        raise NotImplementedError

    def _doc(self, args: Sequence[Any]) -> Any:
        doc_id, task, split = args[-3:]
        return self.task_dict[task][split][doc_id]

    def _read(self, args: Sequence[Any], messages: Messages) -> Conversation | None:
        """A conversation that the model takes; a warning and None if it is not one."""
        try:
            row = read_messages(messages)
            length = self._length(row)
            if length <= self.generator.max_prompt_tokens:
                return row
            cause = f"{describe_length(length, self.generator)} {len(row.images)} pictures among them"
        except ImageError as error:
            cause = str(error)
        doc_id, task, _ = args[-3:]
        warnings.warn(f"{task}, document {doc_id}: {cause}; its answer is left empty", stacklevel=2)
        return None

    def _length(self, row: Conversation) -> int:
        return len(self.generator.renderer.render(row.turns, answer_next=True).ids)

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[Decoding, int, list[int]]]:
        """Requests that are decoded alike, in batches: settings, seed, numbers of the requests."""
        seen: Counter[int] = Counter()
        groups: dict[tuple[Decoding, int], list[int]] = {}
        for i, request in enumerate(requests):
            decoding = read_decoding(request.args[self.settings_at] or {}, self.max_new_tokens)
            groups.setdefault((decoding, seen[id(request)]), []).append(i)  # a repeated request is the same object
            seen[id(request)] += 1
        batches: list[tuple[Decoding, int, list[int]]] = []
        for key, group in groups.items():
            batches += [(*key, part) for part in _slices(group, self.batch_size)]
        for decoding, repetition, numbers in self._bar(batches):
            yield decoding, self.seed + repetition, numbers

    def _bar(self, batches: list[Any]) -> Iterator[Any]:
        yield from track(batches, "answering", console=Console(stderr=True), disable=self._rank != 0)

    def _answer(self, rows: Mapping[int, Conversation | None], decoding: Decoding, seed: int) -> dict[int, str]:
        """Answers by the numbers of their requests."""
        answers = dict.fromkeys(rows, "")
        alike: dict[Decoding, list[tuple[int, Conversation]]] = {}
        for i, row in rows.items():
            if row is not None:
                alike.setdefault(self._limited(decoding, self._length(row)), []).append((i, row))
        for limited, some in alike.items():
            turns = [row.turns for _, row in some]
            images = [row.images for _, row in some]
            found = self.generator.answer(turns, images, limited.max_new_tokens, limited.temperature, seed)
            answers |= {i: cut(answer, limited.until) for (i, _), answer in zip(some, found, strict=True)}
        return answers

    def _limited(self, decoding: Decoding, length: int) -> Decoding:
        """Tasks ask for up to 49,152 tokens: no more than the model has positions for."""
        room = self.generator.pisces.llm.config.max_position_embeddings - length
        limit = room if room < ROOM else room // ROOM * ROOM
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, limit))


class ChatRequests(Requests):
    """Requests ``(context, doc_to_messages, generation_kwargs, doc_id, task, split)``: messages written by the task."""

    is_simple = False
    settings_at = 2

    def _messages(self, args: Sequence[Any]) -> Messages:
        return args[1](self._doc(args))

    def _round(self, args: Sequence[Any], **known: Any) -> tuple[Messages | None, list[str] | None, Any]:
        told = args[1](self._doc(args), **known)
        if not isinstance(told, tuple) or len(told) != 4:
            return None, None, None
        messages, is_last, answers, notes = told
        return None if is_last else messages, answers, notes


class SimpleRequests(Requests):
    """Requests ``(context, generation_kwargs, doc_to_visual, doc_id, task, split)``: text and visuals apart.

    Those of several rounds hold ``doc_to_text`` after ``doc_to_visual``.
    """

    is_simple = True
    settings_at = 1

    def _messages(self, args: Sequence[Any]) -> Messages:
        return simple_messages(args[0], args[2](self._doc(args)) if args[2] else ())

    def _round(self, args: Sequence[Any], **known: Any) -> tuple[Messages | None, list[str] | None, Any]:
        told = args[3](self._doc(args), **known)
        if not isinstance(told, tuple) or len(told) != 5:
            return None, None, None
        visuals, context, is_last, answers, notes = told
        return None if is_last else simple_messages(context, visuals), answers, notes


def simple_messages(context: str, visuals: Sequence[Any] | None) -> Messages:
    """One user message: pictures at the context's `PLACE` marks if it has one for each, else before the words."""
    pictures = [{"type": "image", "url": visual} for visual in visuals or ()]
    texts = [{"type": "text", "text": text} for text in context.split(PLACE)]
    if len(texts) != len(pictures) + 1:
        texts = [{"type": "text", "text": ""} for _ in pictures] + [{"type": "text", "text": context}]
    content = texts[:1]
    for picture, text in zip(pictures, texts[1:], strict=True):
        content += [picture, text]
    return [{"role": "user", "content": content}]


def carried(pair: tuple[float, bool]) -> Any:
    """A pair as lmms-eval hands it on to its tasks.

    Release 0.7.3 makes a text of a pair ("(-1.5, True)"), at which ``multiple_choice`` tasks then fail; what stands in
    a `GenerationResult` it leaves as it is.
    """
    try:
        from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
    except ModuleNotFoundError:
        return pair
    return pair if unwrap_generation_output(pair)[0] == pair else GenerationResult(pair)


def own_device(device: str) -> str:
    """``auto`` and ``cuda`` become the GPU of this process's number where several processes share a machine."""
    if device in ("auto", "cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _slices(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])


# ------------------------------------------------------------------------------------------------- what lmms-eval asks


def manifest() -> Any:
    """The entry point of the group ``lmms_eval.models``: the name of the model and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "pisces",
        simple_class_path=f"{__name__}.PiscesSimple",
        chat_class_path=f"{__name__}.PiscesChat",
        aliases=("open_pisces",),
    )


@cache
def model_class(form: type[Requests], base: type) -> type:
    """A class that lmms-eval accepts: one form of requests on its base class ``lmms``."""
    name = "PiscesSimple" if form.is_simple else "PiscesChat"
    return type(base)(name, (form, base), {"__module__": __name__, "__doc__": form.__doc__})


def __getattr__(name: str) -> Any:
    """``PiscesChat`` and ``PiscesSimple``, made when they are asked for."""
    forms = {"PiscesChat": ChatRequests, "PiscesSimple": SimpleRequests}
    if name not in forms:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs lmms-eval ({error}): pip install 'open-pisces[lmms-eval]' into an environment of its own, "
            "because lmms-eval pins older releases of packages that this one uses as well"
        ) from error
    return model_class(forms[name], lmms)
