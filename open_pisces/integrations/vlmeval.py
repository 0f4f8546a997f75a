"""Drives a Pisces from VLMEvalKit, without a fork. As ``run_pisces.py`` beside its ``run.py``::

    import runpy
    from open_pisces.integrations.vlmeval import register
    register("MODEL_FOLDER")
    runpy.run_path("run.py", run_name="__main__")

and ``python run_pisces.py --model pisces --data MMBench_DEV_EN``. It is not on the package index: install it yourself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

from open_pisces.generate.generator import Generator
from open_pisces.generate.messages import read_messages
from open_pisces.model.folder import WEIGHTS


class Adapter:
    """The contract of ``vlmeval.vlm.base.BaseModel``; `model_class` joins the two."""

    INTERLEAVE = True
    allowed_types = ["text", "image"]
    is_api = False

    def __init__(self, model_path: str = "", device: str = "auto", max_new_tokens: int = 512) -> None:
        super().__init__()
        self.generator = Generator.from_pretrained(model_path or WEIGHTS, device)
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        """Never: datasets ask in their own words, as of every other model."""
        return False

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one user message ``[{"type": "text" | "image", "value"}]``; pictures are paths."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The likeliest answer in a conversation of such messages, each with its ``role``."""
        found = read_messages(message)
        return self.generator.answer([found.turns], [found.images], self.max_new_tokens)[0]


@cache
def model_class() -> type[Adapter]:
    """`Adapter` on VLMEvalKit's base class; ImportError without VLMEvalKit."""
    base = import_module("vlmeval.vlm.base").BaseModel
    return type("PiscesVLM", (Adapter, base), {"__module__": __name__})


def register(model_path: str = "", name: str = "pisces", **arguments: Any) -> None:
    """Enter the model into VLMEvalKit's table ``supported_VLM`` under a name that ``--model`` takes."""
    import_module("vlmeval.config").supported_VLM[name] = partial(model_class(), model_path=model_path, **arguments)
