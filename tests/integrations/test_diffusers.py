"""The pipeline of diffusers draws what `Generator` draws, to the bit, and does what its users expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchHeunDiscreteScheduler

from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.integrations.diffusers import PipelineError, PiscesPipeline
from open_pisces.model.folder import read_card, verify

CAPTIONS = ["a red ball", "two small blue hearts on green"]


@pytest.fixture
def pipe(nano_folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(nano_folder)


def same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def test_it_draws_what_the_generator_draws(pipe: Any, nano_folder: Path) -> None:
    assert isinstance(pipe, PiscesPipeline)
    expected = Generator.from_pretrained(nano_folder, "cpu").image(CAPTIONS, n=2, steps=2, guidance_scale=1.5, seed=3)
    drawn = pipe(CAPTIONS, num_inference_steps=2, guidance_scale=1.5, num_images_per_prompt=2, seed=3).images
    assert all(same(a, b) for a, b in zip(drawn, [one for row in expected for one in row], strict=True))
    default = Generator.from_pretrained(nano_folder, "cpu").image(CAPTIONS[:1])[0][0]
    assert same(pipe(CAPTIONS[0], return_dict=False)[0][0], default)


def test_generators_give_the_noise_of_each_picture(pipe: Any) -> None:
    how = {"num_inference_steps": 2, "guidance_scale": 1.0}
    # The noise of (seed 1, picture 0), which `Generator` draws from a stream of this number.
    first = pipe(CAPTIONS[0], seed=1, **how).images[0]
    assert same(pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(100_003), **how).images[0], first)
    several = [torch.Generator().manual_seed(n) for n in (100_003, 5)]
    both = pipe(CAPTIONS[0], num_images_per_prompt=2, generator=several, **how).images
    assert np.abs(np.asarray(both[0], int) - np.asarray(first, int)).max() <= 1 and not same(both[0], both[1])
    with pytest.raises(PipelineError, match="2 generators for 1 pictures"):
        pipe(CAPTIONS[0], generator=several)


def test_callbacks_see_each_step_and_may_change_the_latents(pipe: Any) -> None:
    seen: list[int] = []

    def blank(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    drawn = pipe(CAPTIONS[0], num_inference_steps=3, guidance_scale=1.0, callback_on_step_end=blank, output_type="pt")
    assert seen == [0, 1, 2] and torch.equal(drawn.images, torch.full_like(drawn.images, 0.5))


def test_schedulers_of_its_kind_swap(pipe: Any, nano_folder: Path, tmp_path: Path) -> None:
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    euler = pipe(CAPTIONS[0], **how).images
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    heun = pipe(CAPTIONS[0], **how).images
    assert heun.shape == euler.shape == (1, 32, 32, 3) and not np.array_equal(euler, heun)
    pipe.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again") > 10
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(again.scheduler, FlowMatchHeunDiscreteScheduler)
    assert np.array_equal(again(CAPTIONS[0], **how).images, heun)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(PiscesError, match="DDIMScheduler: this decoder was trained as a flow"):
        pipe(CAPTIONS[0], **how)


def test_a_saved_pipeline_is_the_model_folder(pipe: Any, nano_folder: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    assert read_card(tmp_path / "again")["parts"] == read_card(nano_folder)["parts"]
    pipe.to(torch.bfloat16)
    assert {p.dtype for p in pipe.pisces.llm.parameters()} == {torch.bfloat16}


def test_what_it_does_not_serve_is_refused(pipe: Any) -> None:
    with pytest.raises(PipelineError, match="output_type='latent': choose pil, np or pt"):
        pipe(CAPTIONS[0], output_type="latent")
    with pytest.raises(PromptError, match="the prompt is empty"):
        pipe("  ")
    with pytest.raises(PromptError, match="takes"):
        pipe("word " * 2000)
