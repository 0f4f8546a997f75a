"""ComfyUI nodes: load a Pisces, draw with it, ask it about a picture.

ComfyUI looks for ``NODE_CLASS_MAPPINGS`` in each Python file of its ``custom_nodes`` folder; one line there is enough::

    from open_pisces.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Its pictures are tensors ``(B, H, W, 3)`` in [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image as Pillow
from torch import Tensor

from open_pisces.generate.generator import Generator
from open_pisces.generate.painter import Progress
from open_pisces.model.folder import WEIGHTS


class PiscesLoader:
    """A model folder, loaded."""

    RETURN_TYPES = ("PISCES",)
    FUNCTION = "load"
    CATEGORY = "open_pisces"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for: a model folder, empty for the one in the package, and a device."""
        devices = ["auto", "cuda", "mps", "cpu"]
        return {"required": {"folder": ("STRING", {"default": ""}), "device": (devices, {"default": "auto"})}}

    def load(self, folder: str, device: str) -> tuple[Generator]:
        """The loaded model."""
        return (Generator.from_pretrained(folder.strip() or WEIGHTS, device),)


class PiscesDraw:
    """Pictures of a prompt."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"
    CATEGORY = "open_pisces"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for; 0 steps and scales of -1 are the model's own."""
        own = {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}
        return {
            "required": {
                "model": ("PISCES",),
                "prompt": ("STRING", {"multiline": True, "default": "a red heart"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": True}),
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 200}),
                "guidance_scale": ("FLOAT", dict(own)),
                "vector_guidance": ("FLOAT", dict(own)),
            }
        }

    def draw(
        self,
        model: Generator,
        prompt: str,
        seed: int,
        count: int,
        steps: int,
        guidance_scale: float,
        vector_guidance: float,
    ) -> tuple[Tensor]:
        """``count`` pictures, ``(count, H, W, 3)``."""
        scale = None if guidance_scale < 0 else guidance_scale
        vector_scale = None if vector_guidance < 0 else vector_guidance
        batch = model.drawing_prompt([prompt])
        pixels_BCHW = model.pixels(batch, count, steps or None, scale, seed, 1.0, vector_scale, _progress())
        return (pixels_BCHW.float().cpu().permute(0, 2, 3, 1).contiguous(),)


def _progress() -> Progress | None:
    """ComfyUI's bar, and its button that interrupts; None outside ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bars: dict[str, Any] = {}

    def show(stage: str, done: int, of: int) -> None:
        throw_exception_if_processing_interrupted()
        if stage not in bars:
            bars[stage] = ProgressBar(of)
        bars[stage].update_absolute(done, of)

    return show


class PiscesAsk:
    """An answer to a question about a picture."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "ask"
    CATEGORY = "open_pisces"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        return {
            "required": {
                "model": ("PISCES",),
                "image": ("IMAGE",),
                "question": ("STRING", {"multiline": True, "default": "What is in the picture?"}),
                "max_new_tokens": ("INT", {"default": 64, "min": 1, "max": 4096}),
            }
        }

    def ask(self, model: Generator, image: Tensor, question: str, max_new_tokens: int) -> dict[str, Any]:
        """The answers about each picture of a batch, a line each."""
        pixels_BHWC = (image.float().cpu().numpy().clip(0, 1) * 255).round().astype(np.uint8)
        pictures = [[Pillow.fromarray(one)] for one in pixels_BHWC]
        said = "\n".join(model.text(pictures, [question] * len(pictures), max_new_tokens))
        return {"ui": {"text": [said]}, "result": (said,)}


NODE_CLASS_MAPPINGS = {"PiscesLoader": PiscesLoader, "PiscesDraw": PiscesDraw, "PiscesAsk": PiscesAsk}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PiscesLoader": "Load Pisces",
    "PiscesDraw": "Pisces: draw",
    "PiscesAsk": "Pisces: ask",
}
