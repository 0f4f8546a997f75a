"""Published weights of each family: equal to the original classes, every tensor accounted for, wrong ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from open_pisces.cli.commands import main
from open_pisces.config import DecoderConfig, ModelConfig, Template
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.factory.importing import PART, find_family, import_weights
from open_pisces.generate.generator import Generator
from open_pisces.model.bridge import VisualProjector
from open_pisces.model.folder import load_part, read_card, verify
from open_pisces.model.importers.families import families, settings_of
from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.language import load_llm
from open_pisces.model.importers.projector import fill_projector
from open_pisces.model.importers.siglip import load_siglip
from open_pisces.model.importers.unets import CONDITION, load_unet, load_vae
from open_pisces.model.parts import build_decoder
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train.loop import train

SHAPE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SD15: dict[str, Any] = {**SHAPE, "cross_attention_dim": 12, "attention_head_dim": 4}
SDXL: dict[str, Any] = {
    **SHAPE,
    "cross_attention_dim": 20,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.2,
}


def pipeline(folder: Path, shape: dict[str, Any], **how: Any) -> Path:
    """A pipeline's folder as diffusers saves it, with random weights."""
    UNet2DConditionModel(**shape).save_pretrained(folder / "unet", **how)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae", **how)
    return folder


@pytest.mark.parametrize(("name", "shape"), [("sd15", SD15), ("sdxl", SDXL)])
def test_a_u_net_of_another_width_keeps_all_that_does_not_read_the_condition(
    tmp_path: Path, name: str, shape: dict[str, Any]
) -> None:
    theirs = load_file(pipeline(tmp_path, shape) / "unet" / "diffusion_pytorch_model.safetensors")
    ours = load_unet(str(tmp_path), 16)
    assert ours.config.cross_attention_dim == 16
    new = set()
    for key, value in ours.state_dict().items():
        assert value.isfinite().all()
        if key.endswith(CONDITION):
            new.add(key)
            assert value.shape[1] == (16 if "attn2" in key else 16 + 24) and value.std() > 0
        else:
            assert torch.equal(value, theirs[key]), key
    assert len([key for key in new if "attn2" in key]) > 4 and ("add_embedding.linear_1.weight" in new) == (
        name == "sdxl"
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", [SD15, SDXL])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}], ids=["whole", "shards", "fp16"])
def test_at_its_own_width_it_answers_as_the_original_class(
    tmp_path: Path, shape: dict[str, Any], how: dict[str, Any]
) -> None:
    """The pair that fits: Emu2's U-Net and its encoder have one width."""
    width = shape["cross_attention_dim"]
    if shape is SDXL:
        shape = shape | {"projection_class_embeddings_input_dim": width + 6 * 4}
    pipeline(tmp_path, shape, **how)
    variant = how.get("variant")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", variant=variant)
    ours = load_unet(str(tmp_path), width, variant)
    draw = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, width, generator=draw)
    times = torch.tensor([3.0, 700.0])
    ids = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0]).expand(2, 6)
    added = {"text_embeds": context.mean(1), "time_ids": ids}
    expected = theirs(latents, times, context, added_cond_kwargs=added if shape is not SD15 else None).sample
    assert torch.equal(ours(latents, times, context, added_cond_kwargs=added).sample, expected)


@pytest.mark.parametrize("shape", [SD15, SDXL])
def test_a_decoder_is_built_from_a_pipeline_and_trains_a_step(
    tmp_path: Path, nano_config: ModelConfig, shape: dict[str, Any]
) -> None:
    settings = {"source": str(pipeline(tmp_path, shape)), "image_size": 32, "scheduler": {"class": "DDIMScheduler"}}
    config = nano_config.model_copy(update={"decoder": DecoderConfig(**settings)})
    decoder = build_decoder(config)
    assert decoder.condition_width == config.generation.width and decoder.latent_shape == (4, 8, 8)
    vectors = torch.randn(2, config.generation.vectors, config.generation.width)
    latents = decoder.encode(torch.rand(2, 3, 32, 32))
    decoder(latents, vectors, torch.randn_like(latents), torch.tensor([0.2, 0.8])).mean().backward()
    assert decoder.network.conv_in.weight.grad.abs().sum() > 0
    assert decoder.sample(vectors, None, torch.randn_like(latents), 2, 1.0).shape == (2, 3, 32, 32)
    with pytest.raises(ConfigError, match="spatial_condition: a published U-Net has no inputs"):
        build_decoder(config.model_copy(update={"decoder": DecoderConfig(**settings, spatial_condition=True)}))


def test_a_recipe_can_ask_for_a_u_net_without_pooled_condition(nano_config: ModelConfig) -> None:
    """Stable Diffusion 1.5's shape without its weights, for plans."""
    decoder = nano_config.decoder.model_copy(update={"unet": {**nano_config.decoder.unet, "addition_embed_type": None}})
    unet = build_decoder(nano_config.model_copy(update={"decoder": decoder})).network
    assert unet.config.addition_embed_type is None and not hasattr(unet, "add_embedding")


def test_sources_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImportSourceError, match=r"no U-Net to be had .*model\.decoder\.source"):
        load_unet(str(tmp_path / "nowhere"), 16)
    with pytest.raises(ImportSourceError, match="no autoencoder to be had"):
        load_vae(str(tmp_path / "nowhere"))
    pipeline(tmp_path, SD15)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key.replace("conv_in", "entry"): value for key, value in weights.items()}, file)
    with pytest.raises(ImportSourceError, match=r"conv_in\.(weight|bias) is missing, left over or of another shape"):
        load_unet(str(tmp_path), 16)
    save_file({**weights, "conv_in.weight": weights["conv_in.weight"][:, :3].contiguous()}, file)
    with pytest.raises(ImportSourceError, match=r"conv_in\.weight is missing, left over or of another shape"):
        load_unet(str(tmp_path), 16)
    save_file(weights, file)
    with pytest.raises(ImportSourceError, match="its U-Net cannot be read"):
        load_unet(str(tmp_path), 16, "ema")
    UNet2DConditionModel(**SD15, class_embed_type="timestep").save_pretrained(tmp_path / "unet")
    with pytest.raises(ImportSourceError, match="class_embed_type = 'timestep'"):
        load_unet(str(tmp_path), 16)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    pipeline(tmp_path, SD15)
    for part in ("unet", "vae"):
        file = tmp_path / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(ImportSourceError, match="cannot be read"):
        load_unet(str(tmp_path), 16)
    with pytest.raises(ImportSourceError, match="no autoencoder to be had"):
        load_vae(str(tmp_path))


# ------------------------------------------------------------------------------------------------------- the LLM

LLM = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLMS: dict[str, Any] = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=tied)),
    "qwen2": lambda tied: Qwen2ForCausalLM(Qwen2Config(**LLM, tie_word_embeddings=tied)),
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**LLM, head_dim=8, tie_word_embeddings=tied)),
}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "8KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("kind", LLMS)
def test_an_llm_answers_as_the_original_class_also_with_more_tokens(
    tmp_path: Path, kind: str, how: dict[str, Any], tied: bool
) -> None:
    theirs = LLMS[kind](tied)
    theirs.save_pretrained(tmp_path, **how)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(how)
    ids = torch.tensor([[3, 1, 39, 7]])
    expected = theirs(ids).logits
    assert torch.equal(load_llm(str(tmp_path)).eval()(ids).logits, expected)
    grown = load_llm(str(tmp_path), 43).eval()
    assert grown.get_output_embeddings().weight.shape == (43, 16)
    assert (grown.get_output_embeddings().weight is grown.get_input_embeddings().weight) == tied
    torch.testing.assert_close(grown(ids).logits[..., :40], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LLMS)
def test_an_llm_with_a_renamed_tensor_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    LLMS[kind](False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    renamed = {key.replace("1.mlp.up_proj", "1.mlp.rise"): value for key, value in weights.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(ImportSourceError, match=rf"{name} is missing"):
        load_llm(str(tmp_path))
    save_file({**weights, "model.layers.1.mlp.rise.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(ImportSourceError, match=r"mlp\.rise\.weight is left over"):
        load_llm(str(tmp_path))
    with pytest.raises(ImportSourceError, match=r"model\.llm\.source = .*nowhere.*hf auth login"):
        load_llm(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------- SigLIP


def siglip() -> SiglipModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    text = {**shape, "vocab_size": 40, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_siglip_file_with_its_text_tower_gives_the_tower(tmp_path: Path, how: dict[str, Any], head: bool) -> None:
    theirs = siglip()
    theirs.save_pretrained(tmp_path, **how)
    ours = load_siglip(str(tmp_path), head).eval()
    pixels = torch.rand(2, 3, 16, 16)
    expected = theirs.vision_model(pixel_values=pixels)
    found = ours(pixel_values=pixels)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert (found.pooler_output is None) != head


def test_a_siglip_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    siglip().save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    weights = load_file(file)
    (name,) = [key for key in weights if key.startswith("vision_model") and key.endswith("layers.1.mlp.fc1.weight")]
    save_file(
        {key.replace("fc1", "in") if key == name else key: value for key, value in weights.items()},
        file,
        {"format": "pt"},
    )
    with pytest.raises(ImportSourceError, match=r"layers\.1\.mlp\.fc1\.weight is missing"):
        load_siglip(str(tmp_path / "one"), True)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Siglip2VisionModel(Siglip2VisionConfig(**shape, num_patches=4, patch_size=8)).save_pretrained(tmp_path / "naflex")
    with pytest.raises(
        ImportSourceError, match="says siglip2_vision_model, not siglip: take one of a fixed resolution"
    ):
        load_siglip(str(tmp_path / "naflex"), True)
    with pytest.raises(ImportSourceError, match=r"model\.understanding\.source = .*nowhere"):
        load_siglip(str(tmp_path / "nowhere"), True)


# ----------------------------------------------------------------------------------------- into a model folder


def qwen_with_tokenizer(folder: Path) -> Path:
    LLMS["qwen2"](True).save_pretrained(folder)
    byte_tokenizer("qwen2").save_pretrained(str(folder))
    return folder


def eva(folder: Path) -> Path:
    """EVA-CLIP's names at Emu2's layout, cut small; heads of 64 channels are all that a width of 64 can have."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "patch_embed.proj.weight": (64, 3, 4, 4)}
    shapes |= {"patch_embed.proj.bias": (64,), "norm.weight": (64,), "norm.bias": (64,)}
    for layer in range(2):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.attn.qkv.weight": (192, 64), f"{block}.attn.q_bias": (64,), f"{block}.attn.v_bias": (64,)}
        shapes |= {f"{block}.attn.proj.weight": (64, 64), f"{block}.attn.proj.bias": (64,)}
        shapes |= {f"{block}.mlp.fc1.weight": (96, 64), f"{block}.mlp.fc1.bias": (96,)}
        shapes |= {f"{block}.mlp.fc2.weight": (64, 96), f"{block}.mlp.fc2.bias": (64,)}
        shapes |= {f"{block}.norm{n}.{kind}": (64,) for n in (1, 2) for kind in ("weight", "bias")}
    folder.mkdir()
    weights = {f"model.visual.{k}": torch.randn(s, generator=draw) for k, s in shapes.items()}
    weights |= {"model.decoder.lm.lm_head.weight": torch.zeros(2, 2), "model.project_up.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors")
    return folder


def projector(folder: Path, width: int) -> Path:
    """A LLaVA's projector beside a tensor of its LLM, as transformers names them."""
    config = LlavaConfig(
        text_config=LlamaConfig(**{**LLM, "hidden_size": width}), vision_config=SiglipVisionConfig(hidden_size=16)
    )
    module = LlavaMultiModalProjector(config)
    weights = {f"model.multi_modal_projector.{name}": value for name, value in module.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file({**weights, "model.language_model.norm.weight": torch.ones(width)}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_llavas_projector_is_the_understanding_mlp(tmp_path: Path) -> None:
    config = LlavaConfig(text_config=LlamaConfig(**LLM), vision_config=SiglipVisionConfig(hidden_size=16))
    theirs = LlavaMultiModalProjector(config)
    ours = VisualProjector(16, 16)
    for prefix, names in (("multi_modal_projector", ("linear_1", "linear_2")), ("model.mm_projector", ("0", "2"))):
        ours.apply(lambda module: module.reset_parameters() if isinstance(module, torch.nn.Linear) else None)
        weights = {}
        for name, layer in zip(names, (theirs.linear_1, theirs.linear_2), strict=True):
            weights |= {f"{prefix}.{name}.{kind}": value for kind, value in layer.state_dict().items()}
        save_file(weights, tmp_path / "model.safetensors")
        fill_projector(SimpleNamespace(understanding_projector=ours), str(tmp_path))  # type: ignore[arg-type]
        vectors = torch.randn(2, 5, 16)
        assert torch.equal(ours(vectors), theirs(vectors))
    save_file(
        {"multi_modal_projector.linear_1.weight": weights["model.mm_projector.0.weight"]},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ImportSourceError, match=r"first\.bias \(16,\) is missing"):
        fill_projector(SimpleNamespace(understanding_projector=ours), str(tmp_path))  # type: ignore[arg-type]


def test_parts_are_imported_one_by_one_and_a_recipe_trains_on_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine"
    accept = ["--out", "mine", "--accept-licence"]
    pipeline(tmp_path / "sd", SD15)
    DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1).save_pretrained(tmp_path / "sd" / "scheduler")
    siglip().save_pretrained(tmp_path / "siglip")
    qwen_with_tokenizer(tmp_path / "qwen")
    assert main(["weights", "import", "sd", str(tmp_path / "sd"), *accept]) == 2  # gen-CLIP first
    assert not out.exists()
    assert main(["weights", "import", "eva-clip", str(eva(tmp_path / "eva")), "generation.pool=2", *accept]) == 0
    assert main(["weights", "import", "sd", str(tmp_path / "sd"), "decoder.steps=2", *accept]) == 0
    assert main(["weights", "import", "siglip", str(tmp_path / "siglip"), *accept]) == 0
    assert main(["weights", "import", "qwen2", str(tmp_path / "qwen"), *accept]) == 0
    assert main(["weights", "import", "llava", str(projector(tmp_path / "llava", 24)), *accept]) == 2  # another LLM's
    assert "bridge" not in read_card(out)["parts"]
    assert main(["weights", "import", "llava", str(projector(tmp_path / "llava", 16)), *accept]) == 0
    card = read_card(out)
    assert sorted(card["parts"]) == [
        "bridge",
        "decoder",
        "generation_encoder",
        "llm",
        "tokenizer",
        "understanding_encoder",
    ]
    assert [row["licences"][0]["licence"] for row in card["record"]][0].startswith("Apache-2.0 (Emu2)")
    assert verify(out) > 6
    (tmp_path / "own.yaml").write_text(
        "extends: [nano/stage1, mine/model.yaml]\nout: run\ntrain: {steps: 2, batch_size: 2, save_every: 100}\n"
    )
    config = load_config("own.yaml")
    assert config.model.generation.vectors == 4 and config.model.template == "qwen2"
    assert config.model.llm.config["model_type"] == "qwen2"
    # The LLM and the encoders are the published ones, to the bit.
    start = load_file(tmp_path / "qwen" / "model.safetensors")
    held = load_file(out / "llm" / "model.safetensors")
    assert all(torch.equal(held[k], v) for k, v in start.items() if "embed_tokens" not in k)
    folder = train(config)
    generator = Generator.from_pretrained(folder / "model", "cpu")
    [[picture]] = generator.image(["a cat"], steps=2)
    assert picture.size == (32, 32)
    assert isinstance(generator.text([[picture]], ["What is it?"], max_new_tokens=3)[0], str)


def test_nothing_is_imported_without_its_licence(tmp_path: Path, capsys: Any) -> None:
    siglip().save_pretrained(tmp_path / "siglip")
    assert main(["weights", "import", "siglip", str(tmp_path / "siglip"), "--out", str(tmp_path / "mine")]) == 2
    said = capsys.readouterr().err
    assert "Apache-2.0" in said and "--accept-licence" in said and not (tmp_path / "mine").exists()
    how = ["--out", str(tmp_path / "mine"), "--accept-licence"]
    assert main(["weights", "import", "clip", str(tmp_path / "siglip"), *how]) == 2
    assert "says siglip, and clip is clip" in capsys.readouterr().err
    assert main(["weights", "import", "cilp", str(tmp_path / "siglip"), *how]) == 2
    assert "no family 'cilp': choose llama" in capsys.readouterr().err
    assert main(["weights", "import", "siglip", str(tmp_path / "siglip"), "understanding.sauce=1", *how]) == 2
    assert "sauce" in capsys.readouterr().err and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("family", families())
def test_every_family_names_its_part_licence_and_an_example(family: str) -> None:
    row = families()[family]
    assert row.part in PART and row.licence and row.example
    assert (row.template in get_args(Template)) == (row.part == "llm")


@torch.no_grad()
def test_a_clip_and_an_openclip_folder_give_the_settings_of_their_towers(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=12, patch_size=4)).eval()
    tower.save_pretrained(tmp_path / "clip")
    config = import_weights(find_family("clip"), str(tmp_path / "clip"), tmp_path / "mine")
    assert config.generation.vectors == 1 and config.generation.pool == 3  # a grid of 3: pooled by 3
    assert config.generation.activation == "quick_gelu"
    ours: Any = load_part(tmp_path / "mine", "generation_encoder")
    pixels = torch.rand(2, 3, 12, 12)
    theirs = tower(pixel_values=ours.normalize(pixels)).last_hidden_state
    torch.testing.assert_close(ours(pixels), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ImportSourceError, match=r"open_clip_config\.json is missing"):
        settings_of(find_family("openclip"), str(tmp_path / "clip"))
    tower_settings = {"image_size": 12, "patch_size": 4, "width": 64, "layers": 2, "mlp_ratio": 1.5}
    written = {"model_cfg": {"vision_cfg": tower_settings, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.1] * 3}}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(written))
    found = settings_of(find_family("openclip"), str(tmp_path / "clip"))
    same = {"image_size": 12, "patch_size": 4, "width": 64, "layers": 2, "heads": 1, "mlp_width": 96, "pool": 3}
    assert same.items() <= found["generation"].items() and found["generation"]["activation"] == "quick_gelu"
    assert found["generation_mean"] == [0.1] * 3
