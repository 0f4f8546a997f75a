"""The ComfyUI nodes, called as ComfyUI calls them: by the names in their tables."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from open_pisces.generate.generator import Generator
from open_pisces.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def call(name: str, **given: Any) -> Any:
    """Run a node with the defaults of its inputs, as an untouched node in ComfyUI has them."""
    node = NODE_CLASS_MAPPINGS[name]
    asked = node.INPUT_TYPES()["required"]
    defaults = {key: kind[1]["default"] for key, kind in asked.items() if len(kind) > 1}
    function = getattr(node(), node.FUNCTION)
    assert set(inspect.signature(function).parameters) == set(asked)
    return function(**{**defaults, **given})


def test_a_graph_loads_draws_and_asks() -> None:
    (model,) = call("PiscesLoader", device="cpu")
    assert isinstance(model, Generator)
    (image,) = call("PiscesDraw", model=model, prompt="a red heart on a blue background", count=2)
    assert image.shape == (2, 64, 64, 3) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    expected = np.stack([np.asarray(one) for one in model.image(["a red heart on a blue background"], 2)[0]])
    assert np.abs((image.numpy() * 255).round() - expected).max() <= 1
    found = call("PiscesAsk", model=model, image=image)
    assert found["result"] == (found["ui"]["text"][0],) and found["result"][0].splitlines()[0] == "red heart"
    (other,) = call("PiscesDraw", model=model, prompt="a red heart on a blue background", steps=2, guidance_scale=1.0)
    assert not torch.equal(other[0], image[0])


def test_inside_comfyui_a_drawing_moves_its_bar_and_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions that ComfyUI's own samplers call, under their names there."""
    moved: list[tuple[int, int]] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None) -> None:
            moved.append((value, self.total))

    class Interrupted(Exception):
        pass

    def throw_exception_if_processing_interrupted() -> None:
        if len(moved) == 18:
            raise Interrupted

    comfy, utils, management = ModuleType("comfy"), ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    name = "throw_exception_if_processing_interrupted"
    setattr(management, name, throw_exception_if_processing_interrupted)
    for module in (comfy, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (model,) = call("PiscesLoader", device="cpu")
    with pytest.raises(Interrupted):
        call("PiscesDraw", model=model, prompt="a red heart", steps=4)
    assert moved == [*((k + 1, 16) for k in range(16)), (1, 4), (2, 4)]


def test_every_node_is_named_and_declares_what_comfyui_reads() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY == "open_pisces" and callable(getattr(node, node.FUNCTION))
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
