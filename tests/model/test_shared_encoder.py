"""gen-CLIP as the encoder of both tasks: the paper's Table 4 against its two encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from open_pisces.config import ModelConfig
from open_pisces.data.shards import open_dataset
from open_pisces.generate.generator import Generator
from open_pisces.model.encoders import SharedEncoder
from open_pisces.model.folder import ModelFolderError, keep_parts, load_part, read_card, read_config, verify
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train.loop import train

DATA = "data.sources=[{path: fixture/train, tasks: {generate_short: 1.0, question: 1.0}}]"
SHARED = "model.understanding.tower=generation"


def recipe(start: Path, out: Path, *over: str) -> Any:
    given = [f"model.start={start}", "model.fresh=[llm]", SHARED, DATA, f"out={out}", "train.steps=2", *over]
    return load_config("nano/stage1", given)


def test_every_patch_of_gen_clip_is_read(nano_folder: Path) -> None:
    config = load_config("nano/stage1", [f"model.start={nano_folder}", SHARED]).model
    shared: Any = load_part(nano_folder, "understanding_encoder", config)
    drawn: Any = load_part(nano_folder, "generation_encoder", config)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(shared, SharedEncoder) and (shared.vectors, shared.width, shared.image_size) == (64, 32, 32)
    assert torch.equal(shared(pixels), drawn.features(pixels)) and shared(pixels).shape == (2, 64, 32)
    assert torch.equal(shared.summary(pixels), drawn.summary(pixels))


@pytest.mark.parametrize("features", ["", "float32"])
def test_it_trains_is_saved_and_loads_as_it_was(
    nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path / "data"))
    config = recipe(nano_folder, tmp_path / "run", f"data.features='{features}'")
    if features:
        from open_pisces.factory.encode import encode

        assert [row["pictures"] for row in encode(config)] == [160, 160]
    model = train(config, probes=()) / "model"
    assert read_config(model).understanding.tower == "generation"
    generator = Generator.from_pretrained(model, "cpu")
    assert generator.renderer.N == 64 and isinstance(generator.pisces.understanding_encoder, SharedEncoder)
    picture = open_dataset("fixture/train")[0].images[0]
    said = generator.text([[picture]], ["What is in the picture?"], 8)
    generator.pisces.save_pretrained(tmp_path / "whole", generator.tokenizer)
    verify(tmp_path / "whole")
    again = Generator.from_pretrained(tmp_path / "whole", "cpu")
    assert again.text([[picture]], ["What is in the picture?"], 8) == said
    weights = list((tmp_path / "whole" / "understanding_encoder").glob("*.safetensors"))
    assert not weights  # they lie in generation_encoder/


def test_one_encoder_of_both_tasks_has_to_stay_frozen(nano_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.freeze has to name both encoders"):
        train(recipe(nano_folder, tmp_path / "run", "train.freeze=[generation_encoder]"), probes=())


def test_a_folder_of_some_parts_is_what_a_training_starts_from(nano_folder: Path, tmp_path: Path) -> None:
    keep_parts(nano_folder, tmp_path / "some", ["generation_encoder"])
    assert sorted(path.name for path in (tmp_path / "some").iterdir() if path.is_dir()) == [
        "generation_encoder", "tokenizer",
    ]  # fmt: skip
    verify(tmp_path / "some")
    assert set(read_card(tmp_path / "some")["parts"]) == {"generation_encoder", "tokenizer"}
    with pytest.raises(ModelFolderError, match="the part decoder/ is missing"):
        keep_parts(tmp_path / "some", tmp_path / "other", ["decoder"])


def test_a_decoder_of_an_encoder_from_elsewhere_keeps_that_encoder(
    nano_folder: Path, nano_config: ModelConfig, nano_pisces: Pisces, tmp_path: Path
) -> None:
    """Here SigLIP's tower as generation encoder, as in the paper's "SigLIP for both"."""
    keep_parts(nano_folder, tmp_path / "start", ["understanding_encoder"])
    over = {"source": f"{tmp_path}/start/understanding_encoder", "patch_size": 8, "pool": 2, "entry_norm": "false"}
    over |= {"class_token": "false", "features": "normalized", "patch_bias": "true", "activation": "gelu_tanh"}
    over |= {"norm_eps": "1.0e-6"}
    given = [f"model.generation.{name}={value}" for name, value in over.items()]
    given += [f"model.start={tmp_path}/start", f"out={tmp_path}/run", "data.sources=[{path: fixture/train}]"]
    model = train(load_config("nano/decoder", [*given, "train.steps=2"]), probes=()) / "model"
    encoder: Any = load_part(model, "generation_encoder", read_config(model))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = nano_pisces.understanding_encoder.tower((pixels - 0.5) / 0.5).last_hidden_state
        assert torch.allclose(encoder.features(pixels), expected, atol=1e-4)
