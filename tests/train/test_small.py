"""`recipes/small` end to end, cut in width: sources in published forms, all five trainings, and what comes after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from open_pisces.cli.commands import main
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import load_part, verify
from open_pisces.recipe import load_config, trainings
from open_pisces.train.loop import train

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 280, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 512}
SD15: dict[str, Any] = {
    "sample_size": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
SDXL: dict[str, Any] = {
    **SD15,
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 20 + 6 * 4,
}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def smollm(folder: Path) -> str:
    """A Llama of odd head counts with tied embeddings, as SmolLM2; its template."""
    _save(LlamaForCausalLM(LlamaConfig(**WORDS, **HEADS, tie_word_embeddings=True)), folder, "smollm2")
    return "smollm2"


def qwen(folder: Path) -> str:
    """Qwen3: norms on queries and keys, heads of another width than the model's; its template."""
    _save(Qwen3ForCausalLM(Qwen3Config(**WORDS, **HEADS, head_dim=8, tie_word_embeddings=False)), folder, "chatml")
    return "chatml"


def _save(llm: PreTrainedModel, folder: Path, template: str) -> None:
    llm.save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(str(folder))


@pytest.fixture(params=[(smollm, SD15), (qwen, SDXL)], ids=["smollm2 and sd1.5", "qwen3 and sdxl"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder of sources in their published forms, and the overrides that cut `small` to their size."""
    language, shape = request.param
    made: Callable[[Path], str] = language
    template = made(tmp_path / "llm")
    SiglipVisionModel(SiglipVisionConfig(**TOWER, image_size=32, patch_size=8)).save_pretrained(tmp_path / "siglip")
    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=32, patch_size=4)).save_pretrained(tmp_path / "clip")
    UNet2DConditionModel(**shape).save_pretrained(tmp_path / "sd" / "unet")
    AutoencoderKL(**LEVELS, block_out_channels=(8,) * 4, norm_num_groups=4).save_pretrained(tmp_path / "sd" / "vae")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    kept = [*WORDS, *HEADS, "model_type", "tie_word_embeddings", "head_dim"]
    unet = {key: list(v) if isinstance(v, tuple) else v for key, v in shape.items()}
    unet = {
        key: v for key, v in unet.items() if key not in ("cross_attention_dim", "projection_class_embeddings_input_dim")
    }
    unet.setdefault("addition_embed_type", None)
    values = {
        "model.template": template,
        "model.tokenizer": str(tmp_path / "llm"),
        "model.llm": {"source": str(tmp_path / "llm"), "config": {key: config[key] for key in kept if key in config}},
        "model.understanding.source": str(tmp_path / "siglip"),
        "model.understanding.config": {**TOWER, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        "model.generation.source": str(tmp_path / "clip"),
        "model.generation.image_size": 32,
        "model.generation.patch_size": 4,
        "model.generation.width": 32,
        "model.generation.layers": 2,
        "model.generation.heads": 2,
        "model.generation.mlp_width": 48,
        "model.decoder.source": str(tmp_path / "sd"),
        "model.decoder.image_size": 32,
        "model.decoder.steps": 2,
        "model.decoder.unet": unet,
        "model.decoder.vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
        "data.workers": 0,
        "train.steps": 3,
        "train.batch_size": 2,
        "train.accumulate": 1,
        "train.save_every": 2,
        "train.probe_every": 100,
        "train.precision": "fp32",
    }
    # JSON is YAML.
    return tmp_path, [f"{key}={json.dumps(value)}" for key, value in values.items()]


TASKS = {
    "stage1": "{generate_short: 1.0, caption_short: 1.0}",
    "stage2": "{generate_detailed: 1.0, caption_detailed: 1.0}",
    "stage3": "{generate_short: 1.0, question: 1.0}",
}
SMALL_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
}


PACKED = ["data.max_length=512", "data.row_length=512", "data.rows=1"]


def own(name: str) -> list[str]:
    """What one training needs besides, to run on the packaged fixture."""
    if name in TASKS:
        return [f"data.sources=[{{path: fixture/train, tasks: {TASKS[name]}}}]", *PACKED]
    text = [f"contrastive.text={json.dumps(SMALL_TEXT)}", "contrastive.mae_width=16"] if name == "gen_clip" else []
    return ["data.sources=[{path: fixture/train}]", *text]


def test_the_five_trainings_and_what_comes_after(small: tuple[Path, list[str]]) -> None:
    place, cut = small
    start = list[str]()
    for recipe in trainings("small"):
        name = recipe.rpartition("/")[2]
        folder = train(load_config(recipe, [*cut, *own(name), *start, f"out={place / name}"]))
        start = [f"model.start={folder / 'model'}"]
    before = folder / "model"
    assert [name.rpartition("/")[2] for name in trainings("small")] == ["gen_clip", "decoder", *TASKS]
    generator = Generator.from_pretrained(before, "cpu")
    [[picture]] = generator.image(["a red heart"])
    assert picture.size == (32, 32)
    assert isinstance(generator.text([[picture]], ["What is it?"], max_new_tokens=4)[0], str)
    # Frozen encoders are the published ones to the bit, whatever was trained.
    tower: Any = load_part(before, "understanding_encoder")
    theirs = SiglipVisionModel.from_pretrained(place / "siglip", vision_use_head=False)
    assert all(torch.equal(a, b) for a, b in zip(tower.tower.parameters(), theirs.parameters(), strict=True))
    assert main(["export", str(before), str(place / "shipped")]) == 0 and verify(place / "shipped") > 8


def test_a_stage_goes_on_where_it_stopped(small: tuple[Path, list[str]]) -> None:
    place, cut = small
    alone = [*own("stage1"), "model.start=null", "train.schedule=constant"]
    alone += ["train.freeze=[understanding_encoder, generation_encoder]"]
    whole = train(load_config("small/stage1", [*cut, *alone, f"out={place / 'whole'}", "train.steps=4"]))
    parted = [*cut, *alone, f"out={place / 'parted'}"]
    train(load_config("small/stage1", [*parted, "train.steps=2"]))
    again = train(load_config("small/stage1", [*parted, "train.steps=4"]))
    assert json.loads((again / "events.jsonl").read_text().splitlines()[0])["step"] == 2
    for part in ("llm", "bridge"):
        once, twice = (load_file(f / "model" / part / "model.safetensors") for f in (whole, again))
        assert all(torch.equal(once[key], twice[key]) for key in once), part
