"""What was read before is not read again: the beginnings of prompts, and pictures, kept by their content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from open_pisces.data.images import generation_bytes, understanding_bytes
from open_pisces.data.prompts import Rendered, collate
from open_pisces.generate.generator import Generator
from open_pisces.generate.slots import Prefix, read_after


class PrefixStore:
    """Reads prompts in pieces and keeps what each piece left in the LLM, the longest unused ones are dropped first.

    A piece ends after a picture, and after a turn. Pieces are always read one by one, kept or not, so what a prompt
    leaves does not depend on what was asked before, to the bit.

    Args:
        generator: whose LLM reads.
        max_bytes: memory of all kept keys, values and picture features.
    """

    def __init__(self, generator: Generator, max_bytes: int = 256 << 20) -> None:
        self.generator = generator
        self.max_bytes = max_bytes
        self.kept: OrderedDict[bytes, Any] = OrderedDict()
        self.nbytes = 0

    @torch.inference_mode()
    def read(self, rendered: Rendered, images: tuple[Image, ...]) -> tuple[Prefix, int]:
        """The prefix that a prompt leaves, and how many of its tokens were known.

        Args:
            rendered: the prompt, with its pictures' places.
            images: the pictures that these places refer to.
        """
        whole: Prefix | None = None
        known = 0
        key = b""
        for piece in pieces_of(rendered, self.generator.renderer):
            pixels = self._pixels(piece, images)
            key = hashlib.sha256(key + repr(piece.ids).encode() + b"".join(pixels)).digest()
            found = self._get(key)
            if found is None:
                found = read_after(self.generator.pisces, self._embed(piece, images, pixels), whole)
                self._keep(key, found, found.nbytes)
            else:
                known += len(piece.ids)
            whole = found if whole is None else whole + found
        assert whole is not None  # a prompt has at least the template's tokens
        return whole, known

    def _pixels(self, piece: Rendered, images: tuple[Image, ...]) -> list[bytes]:
        """A digest of what the encoders see of each picture of a piece: first those read, then those drawn."""
        seen, drawn = self.generator.sizes
        cut = [understanding_bytes(images[i], seen) for i in piece.understanding_images]
        cut += [generation_bytes(images[i], drawn) for i in piece.generation_images]
        return [hashlib.sha256(pixels.tobytes()).digest() for pixels in cut]

    def _embed(self, piece: Rendered, images: tuple[Image, ...], digests: list[bytes]) -> Tensor:
        """The LLM's input for a piece, ``(S, D)``; a picture that was seen before is not encoded again."""
        generator = self.generator
        batch = collate([piece], [images], generator.renderer, *generator.sizes, multiple=1).to(generator.device)
        features = []
        for digest, pixels in zip(digests, batch.understanding_pixels_BCHW, strict=False):
            found = self._get(digest)
            if found is None:
                found = generator.pisces.understanding_encoder(pixels[None])
                self._keep(digest, found, found.nbytes)
            features.append(found)
        if features:
            batch = replace(batch, understanding_features_BNE=torch.cat(features))
        return generator.pisces.embed(batch)[0][0]

    def _get(self, key: bytes) -> Any:
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key][0]
        return None

    def _keep(self, key: bytes, value: Any, nbytes: int) -> None:
        self.kept[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.max_bytes and self.kept:
            _, (_, freed) = self.kept.popitem(last=False)
            self.nbytes -= freed


def pieces_of(rendered: Rendered, renderer: Any) -> list[Rendered]:
    """A prompt cut after each picture and after each turn; joined they are the prompt."""
    after = len(renderer.frame_ids(renderer.after)) if renderer.after else 0
    ends = []
    for i, token in enumerate(rendered.ids):
        if token == renderer.end_image:
            ends.append(i + 1)
        elif token == renderer.end_of_turn:
            ends.append(i + 1 + after)
    ends = [end for end in ends if end < len(rendered.ids)] + [len(rendered.ids)]
    found = []
    start = seen = drawn = 0
    for end in ends:
        understanding = rendered.understanding[start:end]
        generation = rendered.generation[start:end]
        pictures = sum(understanding) // renderer.N, sum(generation) // renderer.M
        found.append(
            Rendered(
                rendered.ids[start:end],
                rendered.labels[start:end],
                understanding,
                generation,
                rendered.understanding_images[seen : seen + pictures[0]],
                rendered.generation_images[drawn : drawn + pictures[1]],
            )
        )
        start = end
        seen += pictures[0]
        drawn += pictures[1]
    return found
