"""A vision LLM of transformers as captioner: a LLaVA of random weights, in the format of published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from open_pisces.factory.caption import build_captioner
from open_pisces.factory.caption_checks import CaptioningError
from open_pisces.factory.captioners import Asked, CaptionerSettings

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", ":", *"describe a red cat on the mat".split()]
TEMPLATE = (
    "{% for m in messages %}{{m['role']}} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{c['text']}} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pixels, fast, chat_template=TEMPLATE, **how).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    text = LlamaConfig(**small, vocab_size=len(WORDS), initializer_range=0.5)
    torch.manual_seed(2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=4)
    )
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [0, 1, 3, 4]
    model.save_pretrained(folder)
    return str(folder)


def asked() -> list[Asked]:
    prompts = ("describe a cat", "describe the red cat on the mat", "describe", "a", "mat", "on the cat", "red red red")
    colors = ("red", "blue", "white", "green", "black", "yellow", "pink")
    return [Asked(Image.new("RGB", (20, 16 + i), color), prompts[i]) for i, color in enumerate(colors)]


def test_pictures_in_batches_are_described_as_one_by_one(llava: str) -> None:
    how = {"max_tokens": 6, "device": "cpu"}
    together = list(build_captioner(CaptionerSettings("transformers", llava, batch_size=3, **how)).write(asked()))
    alone = build_captioner(CaptionerSettings("transformers", llava, batch_size=1, **how))
    assert together == [next(iter(alone.write([one]))) for one in asked()]
    assert len({written.text for written in together}) > 2


def test_a_caption_without_an_end_is_known_as_cut_off(llava: str) -> None:
    captioner = build_captioner(CaptionerSettings("transformers", llava, max_tokens=6, device="cpu"))
    longer = build_captioner(CaptionerSettings("transformers", llava, max_tokens=60, device="cpu"))
    for short, long in zip(captioner.write(asked()), longer.write(asked()), strict=True):
        assert short.finished == (len(long.text.split()) < 6)  # the end takes a token too


def test_what_is_no_such_model_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CaptioningError, match="the captioner .*nothing-here cannot be loaded: "):
        build_captioner(CaptionerSettings("transformers", str(tmp_path / "nothing-here")))
