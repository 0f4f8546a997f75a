"""The one place where tokens and vectors are produced; command line, training samples and evaluation come here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.data.order import stream
from open_pisces.data.prompts import Renderer, collate, generation_turns, repeated
from open_pisces.data.tokenizer import BEGIN_IMAGE, load_tokenizer
from open_pisces.device import pick_device
from open_pisces.errors import PiscesError
from open_pisces.generate.int8 import to_int8
from open_pisces.generate.offload import WRITES, Parts
from open_pisces.generate.painter import Painter, Progress, pictures
from open_pisces.generate.sampling import TextPieces, draw_token, guided
from open_pisces.generate.slots import Prefix, Slots, read, room
from open_pisces.generate.steps import LlamaStep, step_of
from open_pisces.model.parts import PARTS
from open_pisces.model.pisces import Pisces

NEVER = float("-inf")
"""Logit of a token that is not written."""


class PromptError(PiscesError):
    """A prompt that cannot be used; the message names it and the remedy."""


class Generator:
    """Text and pictures from a Pisces, in batches of different prompts, with a key-value cache."""

    def __init__(self, pisces: Pisces, tokenizer: Any, device: str = "auto", offload: bool = False) -> None:
        self.device = pick_device(device)
        self.pisces = pisces.eval()
        self.tokenizer = tokenizer
        self.parts = Parts({name: getattr(pisces, name) for name in PARTS if name != "bridge"}, self.device, offload)
        if offload:
            pisces.bridge.to(self.device)
        elif next(pisces.parameters()).device != self.device:  # being moved, a sharded model would let go of its parts
            pisces.to(self.device)
        self.renderer = Renderer(
            tokenizer,
            pisces.settings.template,
            pisces.understanding_encoder.vectors,
            pisces.settings.generation.vectors,
        )
        self.sizes = pisces.understanding_encoder.image_size, pisces.settings.generation.image_size

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "auto", offload: bool = False, int8: bool = False
    ) -> Generator:
        """Load a model folder; float32 on a CPU, bfloat16 on an accelerator.

        Args:
            folder: the model folder.
            device: ``auto`` is the best there is.
            offload: LLM and decoder take turns on the accelerator (`Parts`).
            int8: the LLM's matrices in eight bits, on a CPU (`to_int8`).

        Raises:
            PromptError: for ``int8`` on an accelerator.
        """
        where = pick_device(device)
        if int8 and where.type != "cpu":
            raise PromptError(f"int8 is for CPUs, and the device is {where}: leave it out, or pass device cpu")
        pisces = Pisces.from_pretrained(folder, torch.float32 if where.type == "cpu" else torch.bfloat16)
        if int8:
            to_int8(pisces.llm)
        return cls(pisces, load_tokenizer(Path(folder) / "tokenizer", pisces.settings.template), str(where), offload)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens a rendered prompt may take, pictures included, so that a picture still fits behind it."""
        return room(self.pisces.llm.config) - self.renderer.M - 2

    # ------------------------------------------------------------------------------------------------ text

    def text(
        self,
        images: list[list[Image]],
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Answer prompts about pictures.

        Args:
            images: the pictures of each prompt, in the order in which they are shown; a list may be empty.
            prompts: one question or instruction for each.
            max_new_tokens: the longest answer.
            temperature: 0 always takes the likeliest token; above 0 samples, repeatably for a seed.
            seed: each answer has its own stream, so it does not depend on its neighbours.

        Raises:
            PromptError: for an empty or over-long prompt.
        """
        if len(images) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts for {len(images)} lists of pictures: give one list to each")
        turns: list[tuple[Turn, ...]] = [
            (Turn("user", (*range(len(shown)), _said(p))),) for shown, p in zip(images, prompts, strict=True)
        ]
        return self.answer(turns, [tuple(shown) for shown in images], max_new_tokens, temperature, seed)

    def answer(
        self,
        conversations: list[tuple[Turn, ...]],
        images: list[tuple[Image, ...]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        vectors: Tensor | None = None,
    ) -> list[str]:
        """The assistant's next turn in conversations that end with the user's.

        ``vectors`` ``(pictures, M, E)`` are those the model wrote for the pictures it drew, in order; without them
        such pictures are encoded again. ``seed`` is that of every row's own stream, or one for each row.
        """
        columns = self._tokens(conversations, images, max_new_tokens, temperature, seed, vectors)
        rows = self.rows(columns, len(conversations))
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def rows(self, columns: Iterator[list[int]], count: int) -> list[list[int]]:
        """What each of ``count`` rows has written (`tokens`) before it ended its turn."""
        rows: list[list[int]] = [[] for _ in range(count)]
        done = [False] * count
        for column in columns:
            for i, token in enumerate(column):
                done[i] = done[i] or token == self.renderer.end_of_turn
                rows[i] += [] if done[i] else [token]
            if all(done):
                break
        return rows

    def text_stream(self, images: list[Image], prompt: str, max_new_tokens: int = 64) -> Iterator[str]:
        """One answer, piece by piece as it is written; the pieces joined are what `text` returns."""
        pieces = TextPieces(self.tokenizer)
        turns = (Turn("user", (*range(len(images)), _said(prompt))),)
        for (token,) in self._tokens([turns], [tuple(images)], max_new_tokens, 0.0, 0, None):
            if token == self.renderer.end_of_turn:
                break
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.rest():
            yield rest

    def _tokens(
        self,
        conversations: list[tuple[Turn, ...]],
        images: list[tuple[Image, ...]],
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
        vectors: Tensor | None,
    ) -> Iterator[list[int]]:
        """One token of every row at a time."""
        batch = replace(self.prompt(conversations, images), generation_vectors_BME=vectors)
        yield from self.tokens(batch, max_new_tokens, temperature, seed)

    @torch.inference_mode()
    def tokens(
        self, batch: SequenceBatch, max_new_tokens: int, temperature: float, seed: int | Sequence[int]
    ) -> Iterator[list[int]]:
        """What follows a batch of prompts (`prompt`), one token of every row at a time; ``seed`` as in `answer`."""
        hidden_BD, slots = self._begin(batch, max_new_tokens)
        # A stream for each row on the CPU: the same on every device, and independent of the other rows.
        seeds = [seed] * len(hidden_BD) if isinstance(seed, int) else seed
        draws = [torch.Generator().manual_seed(one) for one in seeds]
        token_B: Tensor | None = None
        for _ in range(max_new_tokens):
            if token_B is not None:
                hidden_BD = slots.step(self.pisces.llm.get_input_embeddings()(token_B.to(self.device)))
            logits_BV = self.only_text(self.pisces.llm.get_output_embeddings()(hidden_BD).float().cpu())
            token_B = torch.tensor(
                [draw_token(logits_V, temperature, g) for logits_V, g in zip(logits_BV, draws, strict=True)]
            )
            yield token_B.tolist()

    def only_text(self, logits_BV: Tensor) -> Tensor:
        """Logits, changed in place: text holds none of the template's tokens but the one that ends it."""
        return logits_BV.index_fill_(1, self._banned, NEVER)

    @cached_property
    def _banned(self) -> Tensor:
        return torch.tensor([token for token in self.renderer.special_ids if token != self.renderer.end_of_turn])

    # --------------------------------------------------------------------------------------------- pictures

    def image(
        self,
        prompts: list[str],
        n: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        vector_guidance: float | None = None,
        progress: Progress | None = None,
    ) -> list[list[Image]]:
        """Draw ``n`` pictures of every prompt.

        Squared error makes the LLM's vectors a function of the prompt: it runs once a prompt, and pictures of one
        prompt differ through the decoder's noise only. A head that samples runs once a picture, and they differ in
        content. Picture j starts from noise of (seed, j) in both, whatever else is in the batch.

        Args:
            prompts: what to draw.
            n: pictures of each.
            steps: of the decoder; None takes the model's own.
            guidance_scale: of null-caption guidance; None takes the model's own, 1 turns it off.
            seed: of all noise.
            temperature: variance of the noise that a sampling head starts from; 0: its vectors are a function of the
                prompt too. Without effect on squared error.
            vector_guidance: of the LLM's hidden states (`vectors_after`); None takes the model's own, 1 turns it off.
            progress: called after every vector and every step of the decoder.

        Raises:
            PromptError: for an empty or over-long prompt, or a temperature below 0.
        """
        if temperature < 0:
            raise PromptError(f"temperature {temperature}: give 0 (always the same vectors) or more, 1 as trained")
        batch = self.drawing_prompt(prompts)
        pixels = self.pixels(batch, n, steps, guidance_scale, seed, temperature, vector_guidance, progress)
        flat = pictures(pixels)
        return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]

    def pixels(
        self,
        batch: SequenceBatch,
        n: int,
        steps: int | None,
        guidance_scale: float | None,
        seed: int,
        temperature: float,
        vector_guidance: float | None = None,
        progress: Progress | None = None,
        **more: Any,
    ) -> Tensor:
        """Pixels of ``n`` pictures of every prompt of a batch that ends with ``[IMG]``.

        Arguments are those of `image`; ``more`` those of `Painter.pixels` that other libraries' pipelines have.

        Returns:
            ``(B * n, 3, H, W)`` in [0, 1], the pictures of a prompt one after another.
        """
        numbers = list(range(n)) * len(batch.ids_BS)
        if self.samples and temperature > 0:
            rows = repeated(batch, n, self.renderer.N)
            draws_BMR = self.head_draws(numbers, seed, temperature)
            vectors_BME = self.vectors_after(rows, None, draws_BMR, vector_guidance, progress)
        else:
            vectors_BME = self.vectors_after(batch, None, None, vector_guidance, progress).repeat_interleave(n, 0)
        scale = self.pisces.settings.decoder.guidance_scale if guidance_scale is None else guidance_scale
        null_ME = None if scale == 1.0 else self.null_condition
        return self.painter.pixels(vectors_BME, null_ME, numbers, steps, scale, seed, progress=progress, **more)

    @property
    def samples(self) -> bool:
        """Whether the head samples, so that pictures of one prompt may differ in content."""
        return self.pisces.bridge.head.sample_draws > 0

    def head_draws(self, numbers: list[int], seed: int, temperature: float) -> Tensor:
        """Normal numbers of variance ``temperature`` for each picture's vectors, ``(pictures, M, sample_draws)``.

        Drawn on the CPU from a stream of (seed, number), so the same on every device and in every batch.
        """
        shape = self.renderer.M, self.pisces.bridge.head.sample_draws
        drawn = [stream(seed, "head", number).standard_normal(shape, np.float32) for number in numbers]
        return torch.from_numpy(np.stack(drawn)).to(self.device) * temperature**0.5

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        """Pictures from their true vectors: what the decoder could do if the LLM were perfect."""
        return self.painter.reconstruct(images, steps, guidance_scale, seed)

    def encode(self, images: list[Image]) -> Tensor:
        """The true generation vectors of pictures, ``(B, M, E)``, in the LLM's space."""
        return self.painter.encode(images)

    def vectors(self, captions: list[str], fed_BME: Tensor | None = None, **how: Any) -> Tensor:
        """The M vectors the LLM writes for each caption, ``(B, M, E)``, in its own space; ``""`` is the null one.

        ``fed_BME`` and ``how`` are the arguments of `vectors_after`.
        """
        return self.vectors_after(self._captions(captions), fed_BME, **how)

    def drawing_prompt(self, prompts: list[str]) -> SequenceBatch:
        """The batch (`prompt`) after which pictures are drawn.

        Raises:
            PromptError: for an empty or over-long prompt.
        """
        return self._captions([_said(prompt) for prompt in prompts])

    def _captions(self, captions: list[str]) -> SequenceBatch:
        turns = [generation_turns(caption) for caption in captions]
        return self.prompt(turns, [()] * len(turns), BEGIN_IMAGE)

    @torch.inference_mode()
    def vectors_after(
        self,
        batch: SequenceBatch,
        fed_BME: Tensor | None = None,
        draws_BMR: Tensor | None = None,
        vector_guidance: float | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The M vectors that follow a batch of prompts that end with ``[IMG]``, ``(B, M, E)``.

        Args:
            batch: the prompts.
            fed_BME: each vector is predicted from these, as in training, and not from its own (for diagnosis).
            draws_BMR: numbers for a head that samples (`VectorHead.sample_draws`); None is its temperature 0.
            vector_guidance: scale s of guidance on the hidden state that the head reads, which becomes
                ``empty + s * (hidden - empty)``, ``empty`` being that of the empty caption before the same vectors.
                None takes the model's own (``bridge.vector_guidance``); 1 turns it off, otherwise the LLM has twice the
                rows.
            progress: called after every vector.

        Raises:
            PromptError: for a scale below 0.
        """
        scale = self.pisces.settings.bridge.vector_guidance if vector_guidance is None else vector_guidance
        if scale < 0:
            raise PromptError(f"vector_guidance {scale}: give 1 (none) or more, 0 for what the empty caption draws")
        hidden_RD, slots = self._begin(batch, self.renderer.M, with_empty=scale != 1.0)
        B = len(batch.ids_BS)
        written = []
        for k in range(self.renderer.M):
            draws_BR = None if draws_BMR is None else draws_BMR[:, k]
            vector_BE, embedded_BD = self.pisces.next_vector(guided(hidden_RD, B, scale), draws_BR)
            written.append(vector_BE.float())
            if progress is not None:
                progress("vectors", k + 1, self.renderer.M)
            if fed_BME is not None:
                embedded_BD = self.pisces.bridge.generation_projector(fed_BME[:, k].to(self._dtype))
            if k + 1 < self.renderer.M:
                # The empty caption's rows are fed the same vectors: only the caption differs.
                hidden_RD = slots.step(embedded_BD.repeat(len(hidden_RD) // B, 1))
        return torch.stack(written, 1)

    @cached_property
    def painter(self) -> Painter:
        """What turns vectors into pictures."""
        pisces = self.pisces
        if pisces.decoder is None:
            raise PromptError("this model has no decoder: train or load one with its decoder/ part")
        return Painter(
            pisces.settings, pisces.generation_encoder, pisces.bridge, pisces.decoder, self.device, self.parts
        )

    @cached_property
    def null_vectors(self) -> Tensor:
        """The empty caption's vectors ``(M, E)``: the unconditional context, computed once a model (Emu2)."""
        return self.vectors([""])[0]

    @property
    def null_condition(self) -> Tensor:
        """What guidance turns away from (``decoder.null_condition``), ``(M, E)``."""
        dropped = self.pisces.settings.decoder.null_condition == "dropped"
        return self.pisces.bridge.statistics.null_ME if dropped else self.null_vectors

    def null_distance(self) -> float:
        """How far the empty caption's vectors lie from the decoder's dropped condition.

        Root mean square over vectors and channels, divided by the deviation of the targets: 0 where both agree, as
        guidance assumes; about 1 where the one is noise to the other.
        """
        statistics = self.pisces.bridge.statistics
        apart_ME = statistics.destandardize(self.null_vectors) - statistics.destandardize(statistics.null_ME)
        return float((apart_ME / statistics.std_E).pow(2).mean().sqrt())

    # ------------------------------------------------------------------------------------------- the cache

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.pisces.llm.parameters()).dtype

    def open_user_turn(self, rows: int) -> SequenceBatch:
        """Rows that are all alike and end where a user begins to write: a chat LLM then writes what users ask."""
        rendered = self.renderer.render(())
        rendered.add(self.renderer.frame_ids(self.renderer.frame["open"]["user"]))
        alike = [rendered] * rows
        return collate(alike, [()] * rows, self.renderer, *self.sizes, left=True, multiple=1).to(self.device)

    def prompt(self, turns: list[tuple[Turn, ...]], images: list[tuple[Image, ...]], ending: str = "") -> SequenceBatch:
        """Conversations with an open assistant turn, and their pictures, as a batch padded on the left.

        Args:
            turns: the conversations.
            images: the pictures of each, which its turns refer to.
            ending: what the assistant's turn begins with, such as ``[IMG]``.

        Raises:
            PromptError: for a prompt that leaves no room for an answer.
        """
        rendered = [self.renderer.render(t, answer_next=True) for t in turns]
        for r, t in zip(rendered, turns, strict=True):
            r.add(self.renderer.frame_ids(ending) if ending else [])
            if len(r.ids) > self.max_prompt_tokens:
                words = str(t[-1].content[-1])
                raise PromptError(
                    f"the prompt '{words[:30]} ... {words[-30:]}' takes {len(r.ids)} tokens with its pictures; "
                    f"this model takes {self.max_prompt_tokens}: shorten it"
                )
        # Padded on the left: the last place of every row is where the next token goes.
        return collate(rendered, images, self.renderer, *self.sizes, left=True, multiple=1).to(self.device)

    @torch.inference_mode()
    def read(self, batch: SequenceBatch, lean: LlamaStep | None = None) -> list[Prefix]:
        """What the prompts of a batch leave in the LLM, one prefix a row; ``lean`` reads a single one."""
        self.parts.use(WRITES)
        return read(self.pisces, batch, self.renderer.pad, lean)

    @cached_property
    def empty_prefix(self) -> Prefix:
        """The prefix of the empty caption, after which the null vectors are written: read once a model."""
        return self.read(self._captions([""]))[0]

    def _begin(self, batch: SequenceBatch, more: int, with_empty: bool = False) -> tuple[Tensor, Slots]:
        """Hidden states ``(R, D)`` after prompts, then as many empty ones, and their rows with room for ``more``."""
        empty = [self.empty_prefix] * len(batch.ids_BS) if with_empty else []
        length = max([batch.ids_BS.shape[1], *(prefix.length for prefix in empty)]) + more
        self.parts.use(WRITES)
        lean = step_of(self.pisces.llm, length)
        prefixes = self.read(batch, lean) + empty
        slots = Slots(self.pisces, len(prefixes), length, lean)
        for row, prefix in enumerate(prefixes):
            slots.put(row, prefix)
        return torch.stack([prefix.hidden_D for prefix in prefixes]), slots


def _said(prompt: str) -> str:
    """The prompt without the blanks around it; an empty one is refused."""
    if not prompt.strip():
        raise PromptError("the prompt is empty: say in words what to draw or to answer")
    return prompt.strip()
