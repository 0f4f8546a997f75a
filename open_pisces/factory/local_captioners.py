"""Captioners whose model is in the worker's own process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from open_pisces.batch import Turn
from open_pisces.device import pick_device
from open_pisces.factory.caption_checks import CaptioningError
from open_pisces.factory.captioners import Asked, CaptionerSettings, Written, fitted
from open_pisces.generate.generator import Generator, PromptError


class VisionLLM:
    """Any image-text-to-text model of transformers, such as Qwen-VL, LLaVA, SmolVLM or Llama-3.2-Vision."""

    def __init__(self, settings: CaptionerSettings) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.settings = settings
        self.device = pick_device(settings.device)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        try:
            self.processor = AutoProcessor.from_pretrained(settings.model, padding_side="left")
            self.model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError, ImportError, KeyError) as error:
            line = str(error).strip().splitlines()[0]
            raise CaptioningError(f"the captioner {settings.model} cannot be loaded: {line}") from None

    @torch.inference_mode()
    def write(self, asked: Iterable[Asked]) -> Iterator[Written]:
        """A caption for each picture, ``batch_size`` of them at once."""
        limit = self.settings.max_tokens
        warmth = self.settings.temperature
        how: dict[str, Any] = {"do_sample": True, "temperature": warmth} if warmth > 0 else {"do_sample": False}
        for some in _batches(asked, self.settings.batch_size):
            inputs = self.processor.apply_chat_template(
                [self._messages(one) for one in some],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self.device, dtype=self.model.dtype)
            ids_BS = self.model.generate(**inputs, max_new_tokens=limit, **how)[:, inputs["input_ids"].shape[1] :]
            ends = self.model.generation_config.eos_token_id
            ends = {ends} if isinstance(ends, int) else set(ends or ())
            for ids in ids_BS.tolist():
                text = self.processor.decode(ids, skip_special_tokens=True).strip()
                yield Written(text, len(ids) < limit or bool(ends & set(ids)))

    def _messages(self, asked: Asked) -> list[dict[str, Any]]:
        picture = {"type": "image", "image": fitted(asked.picture, self.settings.max_side)}
        return [{"role": "user", "content": [picture, {"type": "text", "text": asked.prompt}]}]


class OwnModel:
    """A Pisces: its understanding writes what its generation is trained on next."""

    def __init__(self, settings: CaptionerSettings) -> None:
        self.settings = settings
        self.generator = Generator.from_pretrained(settings.model, settings.device)

    def write(self, asked: Iterable[Asked]) -> Iterator[Written]:
        """A caption for each picture, ``batch_size`` of them at once."""
        generator, limit = self.generator, self.settings.max_tokens
        for some in _batches(asked, self.settings.batch_size):
            turns: list[tuple[Turn, ...]] = [(Turn("user", (0, one.prompt)),) for one in some]
            try:
                batch = generator.prompt(turns, [(one.picture,) for one in some])
            except PromptError as error:
                raise CaptioningError(f"{self.settings.model}: {error}") from None
            columns = generator.tokens(batch, limit, self.settings.temperature, 0)
            for ids in generator.rows(columns, len(some)):
                text = generator.tokenizer.decode(ids, skip_special_tokens=True).strip()
                yield Written(text, len(ids) < limit)


def _batches(asked: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    waiting = iter(asked)
    while some := list(islice(waiting, size)):
        yield some
