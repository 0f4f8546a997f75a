"""The decoder's side of the engine: pictures at different steps in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.generate.painter import pictures
from open_pisces.serve.requests import Event, Request

SAME_ROWS = 8
"""Rows up to which matrix products on a CPU round alike, two or more of them (oneDNN and MKL on x86)."""


@dataclass
class _Picture:
    """One picture that the decoder works on."""

    id: str
    request: Request
    number: int
    vectors_BME: Tensor
    latents_BCHW: Tensor
    scheduler: Any
    scale: float
    done: int = 0
    """Steps."""

    @property
    def time(self) -> Tensor:
        """Of its next step."""
        return self.scheduler.timesteps[self.done]


class PicturePool:
    """Pictures that the decoder works on, ``at_once`` in a batch, the oldest first.

    Each has a scheduler of its own, so they may have begun at different times and take different numbers of steps.
    """

    def __init__(self, generator: Generator, at_once: int) -> None:
        self.generator = generator
        self.at_once = at_once
        self.pictures: list[_Picture] = []

    def add(self, id: str, request: Request, numbers: list[int], vectors_BME: Tensor) -> None:
        """Start the pictures ``numbers`` of a request, which share their vectors ``(1, M, E)``, in the LLM's space."""
        painter = self.generator.painter
        asked = request.guidance_scale
        scale = painter.settings.guidance_scale if asked is None else asked
        vectors_BME = painter.bridge.statistics.destandardize(vectors_BME)
        for number in numbers:
            scheduler = painter.decoder.start_scheduler(request.steps or painter.settings.steps)
            noise = painter.noise(request.seed, number)[None].to(painter.device)
            latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
            self.pictures.append(_Picture(id, request, number, vectors_BME, latents, scheduler, scale))

    def cancel(self, id: str) -> None:
        """Forget the pictures of a request."""
        self.pictures = [picture for picture in self.pictures if picture.id != id]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step of the pictures that came first."""
        events: list[Event] = []
        working = self.pictures[: self.at_once]
        for guided in (True, False):
            group = [picture for picture in working if (picture.scale != 1.0) == guided]
            most = self._most(guided, len(group))
            for start in range(0, len(group), most):
                together = group[start : start + most]
                predicted_BCHW = self._predict(together, guided)
                for i, picture in enumerate(together):
                    events += self._advance(picture, predicted_BCHW[i : i + 1])
        return events

    def _most(self, guided: bool, count: int) -> int:
        """Pictures in one call of the network.

        On a CPU more rows than `SAME_ROWS` gain nothing, and its matrix kernels for more of them round differently.
        """
        if self.generator.device.type != "cpu":
            return max(count, 1)
        return SAME_ROWS // 2 if guided else SAME_ROWS

    def _predict(self, group: list[_Picture], guided: bool) -> Tensor:
        """What the schedulers of pictures take, ``(B, C, H, W)``."""
        painter = self.generator.painter
        if not guided and len(group) == 1:
            group = group * 2  # one row alone would go through a kernel for vectors, which rounds differently
        scaled = []
        for picture in group:
            scheduler = picture.scheduler
            scales_input = hasattr(scheduler, "scale_model_input")
            latents = picture.latents_BCHW
            scaled.append(scheduler.scale_model_input(latents, picture.time) if scales_input else latents)
        times_B = torch.stack([picture.time for picture in group]).to(painter.device)
        vectors_BME = torch.cat([picture.vectors_BME for picture in group])
        levels_B = vectors_BME.new_full((len(group),), painter.settings.noise_level)
        if not guided:
            return painter.decoder.predict(torch.cat(scaled), times_B, vectors_BME, levels_B)
        null_ME = painter.bridge.statistics.destandardize(self.generator.null_condition)
        scales_B = torch.tensor([picture.scale for picture in group], device=painter.device)
        return painter.decoder.predict(torch.cat(scaled), times_B, vectors_BME, levels_B, null_ME, scales_B)

    def _advance(self, picture: _Picture, predicted_BCHW: Tensor) -> list[Event]:
        """Take a picture's step; at the end it becomes pixels."""
        decoder = self.generator.painter.decoder
        time = picture.time
        before = picture.latents_BCHW
        out = picture.scheduler.step(predicted_BCHW, time, before)
        picture.latents_BCHW = out.prev_sample
        picture.done += 1
        total = len(picture.scheduler.timesteps)
        data = {"index": picture.number, "done": picture.done, "of": total}
        events = [Event(picture.id, "step", data)]
        if picture.done in _preview_steps(total, picture.request.previews):
            clean = before - predicted_BCHW * (time / 1000) if decoder.is_flow else None
            estimate = getattr(out, "pred_original_sample", None) if clean is None else clean
            events += self._show(picture, "preview", out.prev_sample if estimate is None else estimate, data)
        if picture.done < total:
            return events
        self.pictures.remove(picture)
        return events + self._show(picture, "picture", picture.latents_BCHW, data)

    def _show(self, picture: _Picture, kind: Any, latents_BCHW: Tensor, data: dict[str, Any]) -> list[Event]:
        try:
            image = pictures(self.generator.painter.decoder.decode(latents_BCHW))[0]
        except PiscesError as error:  # numbers that are none
            return [Event(picture.id, "error", {"message": str(error)})]
        return [Event(picture.id, kind, data, image)]


def _preview_steps(total: int, previews: int) -> set[int]:
    """After which steps a picture is shown: evenly spread, the last one aside."""
    return {round(total * (i + 1) / (previews + 1)) for i in range(previews)} - {0, total}
