"""Our model as a pipeline of diffusers, over the one model folder.

::

    import open_pisces.integrations.diffusers
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe("a red heart", num_inference_steps=8).images[0]

Importing this file makes the pipeline known to diffusers. No code is fetched from a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from open_pisces.data.tokenizer import load_tokenizer
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.generate.painter import pictures
from open_pisces.integrations.transformers import local_folder
from open_pisces.model.folder import read_config
from open_pisces.model.pisces import Pisces


class PipelineError(PiscesError):
    """A call of the pipeline that it does not serve; the message says what it does."""


class PiscesPipeline(DiffusionPipeline):
    """Text to pictures: the LLM writes the vectors, the decoder draws them.

    Args:
        pisces: the whole model.
        scheduler: of the decoder; another of its kind may take its place (``pipe.scheduler = ...``).
        tokenizer: of the model folder.
    """

    _optional_components = ["pisces", "scheduler", "tokenizer"]

    def __init__(self, pisces: Pisces | None = None, scheduler: Any = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.register_modules(pisces=pisces, scheduler=scheduler, tokenizer=tokenizer)

    def register_to_config(self, **settings: Any) -> None:
        """What diffusers calls last when it loads a pipeline: with the folder's name the parts are read from it.

        diffusers itself reads parts of the libraries that it knows only.
        """
        super().register_to_config(**settings)
        name = settings.get("_name_or_path")
        if name is not None and self.pisces is None:
            folder = local_folder(name, {})
            pisces = Pisces.from_pretrained(folder, torch.float32)
            tokenizer = load_tokenizer(folder / "tokenizer", read_config(folder).template)
            if pisces.decoder is None:
                raise PipelineError(f"{folder}: holds no decoder, so it cannot draw")
            self.register_modules(pisces=pisces.eval(), scheduler=pisces.decoder.scheduler, tokenizer=tokenizer)

    def save_pretrained(self, save_directory: str | Path, **more: Any) -> None:
        """Write the model folder of parts; the scheduler that is set now becomes the decoder's own."""
        self.pisces.decoder.scheduler = self.scheduler
        self.pisces.save_pretrained(save_directory, self.tokenizer)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        vector_guidance: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Draw; what is not said here is what diffusers' pipelines and `Generator.image` take.

        Args:
            prompt: what to draw, one or several.
            generator: of the decoder's first noise: one for all pictures, or one for each.
            seed: of all that ``generator`` does not give; without one the pictures are `Generator.image`'s, to the bit.
            output_type: ``pil``, ``np`` ``(B, H, W, 3)`` or ``pt`` ``(B, 3, H, W)``, in [0, 1].
            callback_on_step_end: diffusers' own: pipeline, step, time and ``{"latents"}``, which it may return changed.

        Raises:
            PipelineError: for another output, or generators that are not as many as the pictures.
            PromptError: for an empty or over-long prompt.
        """
        if output_type not in ("pil", "np", "pt"):
            raise PipelineError(f"output_type={output_type!r}: choose pil, np or pt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != count:
            raise PipelineError(f"{len(generator)} generators for {count} pictures: give one to each, or one for all")
        writer = Generator(self.pisces, self.tokenizer, str(self.pisces.device))
        batch = writer.drawing_prompt(prompts)
        noise = None
        if generator is not None:
            noise = randn_tensor((count, *self.pisces.decoder.latent_shape), generator=generator, device=writer.device)

        def on_step(number: int, time: Tensor, latents: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return latents
            return callback_on_step_end(self, number, time, {"latents": latents}).get("latents", latents)

        pixels = writer.pixels(
            batch,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            seed,
            temperature,
            vector_guidance,
            noise_BCHW=noise,
            scheduler=self.scheduler,
            on_step=on_step,
        )
        images = _as(output_type, pixels)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _as(output_type: str, pixels_BCHW: Tensor) -> Any:
    if output_type == "pt":
        return pixels_BCHW
    return pictures(pixels_BCHW) if output_type == "pil" else pixels_BCHW.permute(0, 2, 3, 1).float().cpu().numpy()


# diffusers looks a pipeline's class up among its own names.
diffusers.PiscesPipeline = PiscesPipeline
