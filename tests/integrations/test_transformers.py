"""The classes of transformers give what `Generator` gives, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.pipelines import any_to_any
from transformers.utils import is_torchvision_available

from open_pisces.generate.generator import Generator
from open_pisces.generate.messages import HarnessError
from open_pisces.integrations.transformers import (
    ModeError,
    PiscesConfig,
    PiscesForConditionalGeneration,
    PiscesProcessor,
)
from open_pisces.model.folder import read_card, verify

QUESTIONS = ["What is it?", "How many balls are there in the picture?"]
CAPTIONS = ["a red ball", "two small blue hearts on green"]


@pytest.fixture(scope="module")
def model(nano_folder: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(nano_folder)


@pytest.fixture(scope="module")
def processor(nano_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(nano_folder)


@pytest.fixture(scope="module")
def generator(nano_folder: Path) -> Generator:
    return Generator.from_pretrained(nano_folder, "cpu")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def chat(question: str, image: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_the_auto_classes_find_ours(nano_folder: Path, model: Any, processor: Any) -> None:
    assert isinstance(AutoConfig.from_pretrained(nano_folder), PiscesConfig)
    assert isinstance(model, PiscesForConditionalGeneration) and isinstance(processor, PiscesProcessor)
    assert read_card(nano_folder)["model_type"] == "pisces"
    half = AutoModelForMultimodalLM.from_pretrained(nano_folder, dtype="bfloat16")
    assert {p.dtype for p in half.pisces.llm.parameters()} == {torch.bfloat16} and half.dtype == torch.bfloat16


def test_answers_are_the_generators(model: Any, processor: Any, generator: Generator) -> None:
    images = [picture(1), picture(2)]
    expected = generator.text([[image] for image in images], QUESTIONS, max_new_tokens=9)
    inputs = processor.apply_chat_template([chat(q, i) for q, i in zip(QUESTIONS, images, strict=True)])
    written = model.generate(**inputs, max_new_tokens=9)
    assert torch.equal(written[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    answers = processor.post_process_multimodal_output(written[:, inputs["input_ids"].shape[1] :])
    assert [answer.strip() for answer in answers] == expected
    called = processor(text=QUESTIONS, images=[[image] for image in images])
    assert all(torch.equal(called[name], inputs[name]) for name in ("input_ids", "attention_mask", "pixel_values"))


def test_sampled_answers_depend_on_their_seed_alone(model: Any, processor: Any, generator: Generator) -> None:
    inputs = processor(text=QUESTIONS)
    written = model.generate(
        **inputs, max_new_tokens=5, do_sample=True, temperature=2.0, num_return_sequences=2, seed=7
    )
    rows = processor.post_process_multimodal_output(written[:, inputs["input_ids"].shape[1] :])
    for j in range(2):
        expected = generator.text([[], []], QUESTIONS, max_new_tokens=5, temperature=2.0, seed=7 + j)
        assert [row.strip() for row in rows[j::2]] == expected


def test_pictures_are_the_generators(model: Any, processor: Any, generator: Generator) -> None:
    expected = generator.image(CAPTIONS, n=2, steps=2, guidance_scale=1.5, seed=3)
    inputs = processor(text=CAPTIONS, generation_mode="image")
    pixels = model.generate(
        **inputs,
        generation_mode="image",
        num_return_sequences=2,
        num_inference_steps=2,
        guidance_scale=1.5,
        seed=3,
    )
    drawn = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [one.tobytes() for one in drawn] == [one.tobytes() for row in expected for one in row]


def test_a_picture_is_drawn_from_a_chat_too(model: Any, processor: Any) -> None:
    """Such as after a question about another picture: every row keeps its own."""
    inputs = processor.apply_chat_template([chat("Draw the image again.", picture(n)) for n in (1, 2)])
    both = model.generate(**inputs, generation_mode="image", num_inference_steps=1, guidance_scale=1.0)
    alone = processor.apply_chat_template(chat("Draw the image again.", picture(2)))
    one = model.generate(**alone, generation_mode="image", num_inference_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(both[1], one[0], rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


@torch.no_grad()
def test_logits_are_those_that_answers_are_taken_from(model: Any, processor: Any) -> None:
    inputs = processor.apply_chat_template(chat(QUESTIONS[0], picture(1)))
    first = model.generate(**inputs, max_new_tokens=1)[0, -1]
    logits = model(**inputs).logits[0, -1]
    banned = [t for t in processor.renderer.special_ids if t != processor.renderer.end_of_turn]
    logits[banned] = float("-inf")
    assert logits.argmax() == first


def test_a_folder_saved_by_them_is_a_model_folder(
    model: Any, processor: Any, nano_folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again") > 10
    assert read_card(tmp_path / "again")["parts"] == read_card(nano_folder)["parts"]
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "again")
    inputs = AutoProcessor.from_pretrained(tmp_path / "again")(text=CAPTIONS[:1], generation_mode="image")
    how = {"generation_mode": "image", "num_inference_steps": 1}
    assert torch.equal(again.generate(**inputs, **how), model.generate(**inputs, **how))


def test_what_they_do_not_serve_is_refused(model: Any, processor: Any) -> None:
    inputs = processor(text=QUESTIONS)
    with pytest.raises(ModeError, match="generation_mode='audio': this model knows text and image"):
        model.generate(**inputs, generation_mode="audio")
    with pytest.raises(ModeError, match="without do_sample=True: all answers would be the same"):
        model.generate(**inputs, num_return_sequences=2)
    with pytest.raises(ModeError, match="draws from words alone"):
        processor(text=CAPTIONS[:1], images=[picture(1)], generation_mode="image")
    with pytest.raises(ModeError, match="1 pictures or lists of pictures for 2 prompts"):
        processor(text=QUESTIONS, images=[picture(1)])
    with pytest.raises(ModeError, match="rendered to tokens by its own template"):
        processor.apply_chat_template(chat("?", picture(1)), tokenize=False)
    with pytest.raises(HarnessError, match="holds a video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])
    shown = processor.apply_chat_template(chat("?", picture(1)))
    with pytest.raises(ModeError, match=r"4 places of vectors for 0 pictures|\d+ places of vectors for 0 pictures"):
        model.generate(input_ids=shown["input_ids"])


def test_the_pipeline_draws_and_answers(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for torchvision, which ours does not use: the check is left out here where it is not installed."""
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="Torchvision"):
            pipeline("any-to-any", model=model, processor=processor)
        monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)
    pipe = pipeline("any-to-any", model=model, processor=processor)
    messages = chat(QUESTIONS[0], picture(1))
    [row] = pipe(messages, max_new_tokens=4, return_full_text=False)
    inputs = processor.apply_chat_template(messages)
    written = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert row["generated_text"] == processor.post_process_multimodal_output(written)[0]
    asked = [{"role": "user", "content": [{"type": "text", "text": "Draw: a cat"}]}]
    [row] = pipe(asked, generation_mode="image", generate_kwargs={"num_inference_steps": 1})
    assert row["generated_image"].size == (32, 32)
