"""Published weights of each family: equal to the original classes, every tensor accounted for, wrong ones refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
)

from open_pisces.config import DecoderConfig, ModelConfig
from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.language import load_llm
from open_pisces.model.importers.siglip import load_siglip
from open_pisces.model.importers.unets import CONDITION, load_unet, load_vae
from open_pisces.model.parts import build_decoder
from open_pisces.settings import ConfigError

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
