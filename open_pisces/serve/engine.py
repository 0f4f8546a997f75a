"""Many requests at once on one model: rows of the LLM and pictures of the decoder come and go at any step.

The LLM computes all its rows in every step and the decoder treats pictures alike, so in float32 on a CPU an answer or
a picture has the same bits alone and among others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from open_pisces.data.prompts import Rendered
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.prefixes import PrefixStore
from open_pisces.generate.sampling import TextPieces, draw_token
from open_pisces.generate.slots import Slots, room
from open_pisces.serve.painting import PicturePool
from open_pisces.serve.requests import Event, Request

MAX_CONTEXT = 4096
"""Positions of a row unless more are asked for: memory of the cache grows with them."""


@dataclass
class _Sequence:
    """One sequence that the LLM writes: an answer, or the vectors of one or of all pictures of a request."""

    id: str
    request: Request
    rendered: Rendered
    numbers: list[int]
    """Of the pictures that its vectors are for."""
    drawing: bool
    undecided: bool
    pieces: TextPieces
    draw: torch.Generator
    rows: list[int] = field(default_factory=list)
    """Its row, and that of the empty caption if the hidden state is guided."""
    opened: bool = False
    """Whether ``[IMG]`` was fed."""
    written: list[Tensor] = field(default_factory=list)
    draws_MR: Tensor | None = None
    known: int = 0
    """Tokens of the prompt that were read for an earlier request."""
    tokens: int = 0
    text: str = ""
    """What was written, whole characters only."""
    told: int = 0
    """Characters of it that the client has."""

    def sayable(self, final: bool) -> tuple[str, bool]:
        """What may be told now, and whether a stop text was reached. What may be the begin of one waits."""
        found = [at for stop in self.request.stop if (at := self.text.find(stop)) >= 0]
        end = min(found) if found else len(self.text)
        if not found and not final:
            end -= max((_overlap(self.text, stop) for stop in self.request.stop), default=0)
        piece = self.text[self.told : end]
        self.told = max(self.told, end)
        return piece, bool(found)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text a stop text begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Engine:
    """Batches what several clients want; whoever owns it calls `step` until nothing is left to do.

    Args:
        generator: the model.
        slots: R, sequences that the LLM writes at once; a drawing with guidance on the hidden state takes two.
        context: positions of each; None takes the model's, at most `MAX_CONTEXT`.
        pictures: that the decoder works on at once.
        prefix_bytes: memory for what was read before.
    """

    def __init__(
        self,
        generator: Generator,
        slots: int = 8,
        context: int | None = None,
        pictures: int = 8,
        prefix_bytes: int = 256 << 20,
    ) -> None:
        limit = room(generator.pisces.llm.config)
        self.generator = generator
        self.context = min(limit, context or min(limit, MAX_CONTEXT))
        self.slots = Slots(generator.pisces, slots, self.context)
        self.prefixes = PrefixStore(generator, prefix_bytes)
        self.waiting: deque[_Sequence] = deque()
        self.sequences: list[_Sequence] = []
        self.pictures = PicturePool(generator, pictures)
        self.hidden_RD: Tensor | None = None
        self.left: dict[str, int] = {}
        """Of each request: pictures that are still to come."""
        self.usage: dict[str, dict[str, int]] = {}

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.sequences or self.pictures.pictures)

    def counts(self) -> dict[str, int]:
        """How much is going on."""
        return {
            "waiting": len(self.waiting),
            "sequences": len(self.sequences),
            "pictures": len(self.pictures.pictures),
            "prefix_bytes": self.prefixes.nbytes,
        }

    # --------------------------------------------------------------------------------------------- coming, going

    def submit(self, id: str, request: Request) -> None:
        """Take a request; its events carry ``id``.

        Raises:
            PromptError: for what cannot be done: too long, more rows than there are, settings out of range.
        """
        generator = self.generator
        request = self._with_preset(request)
        drawing = request.mode == "image"
        turns = request.to_draw or request.turns if drawing else request.turns
        rendered = generator.renderer.render(turns, answer_next=True)
        more = generator.renderer.M + 2 if drawing else 1
        if len(rendered.ids) + more > self.context:
            raise PromptError(
                f"the conversation takes {len(rendered.ids)} tokens with its pictures, and {more} must fit behind it: "
                f"this server takes {self.context}; leave out earlier turns"
            )
        if drawing and generator.pisces.decoder is None:
            raise PromptError("this model has no decoder, so it cannot draw")
        if request.variety < 0:
            raise PromptError(f"temperature {request.variety}: give 0 or more")
        if request.vector_guidance is not None and request.vector_guidance < 0:
            raise PromptError(f"vector_guidance {request.vector_guidance}: give 1 (none) or more")
        numbers = list(range(request.n))
        parts = [numbers]
        if drawing:
            self.left[id] = request.n
        if drawing and generator.samples and request.variety > 0:
            parts = [[number] for number in numbers]
        for part in parts:
            draw = torch.Generator().manual_seed(request.seed)
            undecided = request.mode == "auto" and generator.pisces.decoder is not None
            pieces = TextPieces(generator.tokenizer)
            self.waiting.append(_Sequence(id, request, rendered, part, drawing, undecided, pieces, draw))

    def _with_preset(self, request: Request) -> Request:
        """The request with the settings of its preset, where it has none of its own."""
        if request.preset is None:
            return request
        found = self.generator.pisces.settings.decoder.preset(request.preset).model_dump()
        lacking = {name: value for name, value in found.items() if getattr(request, name) is None}
        return replace(request, preset=None, **lacking)

    def cancel(self, id: str) -> None:
        """Forget a request; its places are free in the next step."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.id != id)
        for one in [sequence for sequence in self.sequences if sequence.id == id]:
            self._leave(one)
        self.pictures.cancel(id)
        self.left.pop(id, None)
        self.usage.pop(id, None)

    def _leave(self, sequence: _Sequence) -> None:
        for row in sequence.rows:
            self.slots.free(row)
        self.sequences.remove(sequence)

    # ------------------------------------------------------------------------------------------------- one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let whoever waits in, write one token or vector of each sequence, take one step of each picture."""
        return [*self._admit(), *self._write(), *self._painted()]

    def _vector_guidance(self, request: Request) -> float:
        asked = request.vector_guidance
        return self.generator.pisces.settings.bridge.vector_guidance if asked is None else asked

    def _admit(self) -> list[Event]:
        """Read prompts, oldest first, as long as there are rows for them."""
        events = []
        while self.waiting:
            sequence = self.waiting[0]
            taken = {row for other in self.sequences for row in other.rows}
            free = [row for row in range(len(self.slots.lengths)) if row not in taken]
            guided = sequence.drawing and self._vector_guidance(sequence.request) != 1.0
            if len(free) < 1 + guided:
                if not taken:
                    events += self._fail(sequence.id, f"a guided drawing takes 2 rows, the server has {len(free)}")
                    continue
                break
            self.waiting.popleft()
            try:
                self._begin(sequence, free[: 1 + guided])
            except PiscesError as error:
                events += self._fail(sequence.id, str(error))
        return events

    def _begin(self, sequence: _Sequence, rows: list[int]) -> None:
        prefix, sequence.known = self.prefixes.read(sequence.rendered, sequence.request.images)
        if self.hidden_RD is None:
            self.hidden_RD = prefix.hidden_D.new_zeros(len(self.slots.lengths), len(prefix.hidden_D))
        found = [prefix, self.generator.empty_prefix] if len(rows) == 2 else [prefix]
        for row, one in zip(rows, found, strict=True):
            self.slots.put(row, one)
            self.hidden_RD[row] = one.hidden_D
        sequence.rows = rows
        self.sequences.append(sequence)

    def _fail(self, id: str, message: str) -> list[Event]:
        self.cancel(id)
        return [Event(id, "error", {"message": message})]

    def _write(self) -> list[Event]:
        """One token or vector of every sequence."""
        if not self.sequences or self.hidden_RD is None:
            return []
        events: list[Event] = []
        inputs_RD = torch.zeros_like(self.hidden_RD)
        live = [False] * len(inputs_RD)
        # Heads work on all rows, whatever they hold: the same shapes in every step make the same bits.
        if any(not sequence.drawing for sequence in self.sequences):
            events += self._write_tokens(inputs_RD, live)
        if any(sequence.drawing and sequence.opened for sequence in self.sequences):
            events += self._write_vectors(inputs_RD, live)
        for sequence in self.sequences:
            if sequence.drawing and not sequence.opened:
                sequence.opened = True
                begin = torch.tensor([self.generator.renderer.begin_image], device=inputs_RD.device)
                inputs_RD[sequence.rows[0]] = self.generator.pisces.llm.get_input_embeddings()(begin)[0]
                live[sequence.rows[0]] = True
        if any(live):
            stepped_RD = self.slots.step(inputs_RD, live)
            for row, goes_on in enumerate(live):
                if goes_on:
                    self.hidden_RD[row] = stepped_RD[row]
        return events

    def _write_tokens(self, inputs_RD: Tensor, live: list[bool]) -> list[Event]:
        generator = self.generator
        renderer = generator.renderer
        assert self.hidden_RD is not None
        raw_RV = generator.pisces.llm.get_output_embeddings()(self.hidden_RD).float().cpu()
        logits_RV = generator.only_text(raw_RV.clone())
        events: list[Event] = []
        for sequence in [sequence for sequence in self.sequences if not sequence.drawing]:
            row = sequence.rows[0]
            if sequence.undecided:
                sequence.undecided = False
                if float(raw_RV[row, renderer.begin_image]) > float(logits_RV[row].max()):
                    self._leave(sequence)
                    events += self._draw_instead(sequence)
                    continue
            token = draw_token(logits_RV[row], sequence.request.temperature, sequence.draw, sequence.request.top_p)
            sequence.tokens += 1
            ended = token == renderer.end_of_turn
            full = sequence.tokens >= sequence.request.max_new_tokens or self.slots.lengths[row] + 1 >= self.context
            sequence.text += sequence.pieces.rest() if ended else sequence.pieces.add(token)
            if full and not ended:
                sequence.text += sequence.pieces.rest()
            piece, stopped = sequence.sayable(ended or full)
            events += [Event(sequence.id, "text", {"text": piece})] if piece else []
            if ended or stopped or full:
                self._leave(sequence)
                events += self._finish(sequence, "stop" if ended or stopped else "length")
                continue
            at = torch.tensor([token], device=inputs_RD.device)
            inputs_RD[row] = generator.pisces.llm.get_input_embeddings()(at)[0]
            live[row] = True
        return events

    def _draw_instead(self, sequence: _Sequence) -> list[Event]:
        """The model wants to draw: the same conversation as a drawing, before all who wait."""
        later = self.waiting
        self.waiting = deque()
        try:
            self.submit(sequence.id, replace(sequence.request, mode="image"))
        except PiscesError as error:
            return [Event(sequence.id, "error", {"message": str(error), "bad_input": True})]
        finally:
            self.waiting += later
        return []

    def _write_vectors(self, inputs_RD: Tensor, live: list[bool]) -> list[Event]:
        generator = self.generator
        assert self.hidden_RD is not None
        guided_RD = self.hidden_RD.clone()
        drawing = [sequence for sequence in self.sequences if sequence.drawing and sequence.opened]
        draws_RR = None
        if generator.samples:
            draws_RR = guided_RD.new_zeros(len(guided_RD), generator.pisces.bridge.head.sample_draws)
        for sequence in drawing:
            row = sequence.rows[0]
            if len(sequence.rows) == 2:
                empty_D = self.hidden_RD[sequence.rows[1]]
                guided_RD[row] = empty_D + self._vector_guidance(sequence.request) * (self.hidden_RD[row] - empty_D)
            if draws_RR is not None and sequence.request.variety > 0:
                if sequence.draws_MR is None:
                    sequence.draws_MR = generator.head_draws(
                        sequence.numbers, sequence.request.seed, sequence.request.variety
                    )[0]
                draws_RR[row] = sequence.draws_MR[len(sequence.written)]
        vectors_RE, embedded_RD = generator.pisces.next_vector(guided_RD, draws_RR)
        events = []
        for sequence in drawing:
            row = sequence.rows[0]
            sequence.written.append(vectors_RE[row].float())
            events.append(Event(sequence.id, "vectors", {"done": len(sequence.written), "of": generator.renderer.M}))
            if len(sequence.written) == generator.renderer.M:
                self._leave(sequence)
                used = self.usage.setdefault(
                    sequence.id, {"prompt": len(sequence.rendered.ids), "known": sequence.known, "new": 0}
                )
                used["new"] += len(sequence.written) + 1
                vectors_BME = torch.stack(sequence.written)[None]
                self.pictures.add(sequence.id, sequence.request, sequence.numbers, vectors_BME)
                continue
            for one in sequence.rows:
                inputs_RD[one] = embedded_RD[row]
                live[one] = True
        return events

    # ---------------------------------------------------------------------------------------------------- the end

    def _painted(self) -> list[Event]:
        """One step of the pictures; a request ends with its last one."""
        events = []
        for event in self.pictures.step():
            events.append(event)
            if event.kind == "error":
                self.cancel(event.id)
            elif event.kind == "picture":
                self.left[event.id] -= 1
                if self.left[event.id] == 0:
                    events += self._done(event.id, "stop")
        return events

    def _finish(self, sequence: _Sequence, reason: str) -> list[Event]:
        self.usage[sequence.id] = {
            "prompt": len(sequence.rendered.ids),
            "known": sequence.known,
            "new": sequence.tokens,
        }
        return self._done(sequence.id, reason)

    def _done(self, id: str, reason: str) -> list[Event]:
        self.left.pop(id, None)
        return [Event(id, "done", {"finish_reason": reason, **self.usage.pop(id)})]
