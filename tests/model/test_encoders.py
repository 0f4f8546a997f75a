"""The visual encoders equal the published ones on the same weights, and drop patches without looking at them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from open_pisces.config import ContrastiveConfig, GenerationEncoderConfig
from open_pisces.model.encoders import GenerationEncoder, UnderstandingEncoder
from open_pisces.model.gen_clip import GenCLIP
from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.towers import fill_tower, read_tower, translate

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SHAPE = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "heads": 3, "mlp_width": 40, "pool": 2}


def pixels(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(image: Tensor) -> Tensor:
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight away from its start, norms and biases too: a forgotten one then shows."""
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return module.eval()


def own(**over: object) -> GenerationEncoder:
    return shaken(GenerationEncoder(GenerationEncoderConfig(**(SHAPE | over)), MEAN, STD))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
    )
    assert config.hidden_act == "quick_gelu"
    return shaken(CLIPVisionModel(config))


# ------------------------------------------------------------------------------------- equal to published towers


@torch.no_grad()
def test_the_generation_encoder_equals_transformers_clip_on_the_same_weights(clip: CLIPVisionModel) -> None:
    ours = own(norm="pre", activation="quick_gelu")
    ours.load_state_dict(translate(dict(clip.state_dict())))
    theirs = clip(pixel_values=normalised(pixels()))
    torch.testing.assert_close(ours(pixels()), theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.summary(pixels()), theirs.pooler_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.features(pixels()), theirs.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_whole_clip_file_gives_its_vision_tower_only(clip: CLIPVisionModel, tmp_path: Path) -> None:
    bare = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items()}
    whole = {f"vision_model.{key}": value for key, value in bare.items()}
    whole |= {"text_model.embeddings.position_embedding.weight": torch.zeros(4, 2), "logit_scale": torch.zeros(())}
    save_file({k: v.contiguous() for k, v in whole.items()}, tmp_path / "model.safetensors")
    expected = translate(bare)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        read = read_tower(str(source))
        assert set(read) == set(expected)
        assert all(torch.equal(read[key], expected[key]) for key in read)


def eva_weights() -> dict[str, Tensor]:
    """A tower with the names of Emu2's EVA-CLIP: fused qkv, biases for q and v only."""
    draw = torch.Generator().manual_seed(3)
    E, H = 24, 40
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_token": (1, 1, E),
        "visual.pos_embed": (1, 17, E),
        "visual.patch_embed.proj.weight": (E, 3, 8, 8),
        "visual.patch_embed.proj.bias": (E,),
        "visual.norm.weight": (E,),
        "visual.norm.bias": (E,),
        "text.token_embedding.weight": (5, 2),
    }
    for i in range(2):
        block = f"visual.blocks.{i}."
        shapes |= {f"{block}norm{n}.{kind}": (E,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.qkv.weight": (3 * E, E), f"{block}attn.q_bias": (E,), f"{block}attn.v_bias": (E,)}
        shapes |= {f"{block}attn.proj.weight": (E, E), f"{block}attn.proj.bias": (E,)}
        shapes |= {f"{block}mlp.fc1.weight": (H, E), f"{block}mlp.fc1.bias": (H,)}
        shapes |= {f"{block}mlp.fc2.weight": (E, H), f"{block}mlp.fc2.bias": (E,)}
    weights = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    # Faint branches: what EVA adds to the variance (1e-6, not CLIP's 1e-5) then shows.
    return {name: w * (1e-3 if "attn.proj" in name or "fc2" in name else 1) for name, w in weights.items()}


def eva_by_hand(w: dict[str, Tensor], image: Tensor, heads: int) -> Tensor:
    """EVA-CLIP-E written out: a linear map of each patch, then blocks that normalise every branch's output."""
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(len(image), 16, -1)
    projection = w["visual.patch_embed.proj.weight"].flatten(1)
    x = patches @ projection.T + w["visual.patch_embed.proj.bias"]
    x = torch.cat([w["visual.cls_token"].expand(len(image), -1, -1), x], 1) + w["visual.pos_embed"]
    E = x.shape[-1]
    for i in range(2):
        b = {k.removeprefix(f"visual.blocks.{i}."): v for k, v in w.items()}
        bias = torch.cat([b["attn.q_bias"], torch.zeros(E), b["attn.v_bias"]])
        q, k, v = (x @ b["attn.qkv.weight"].T + bias).split(E, -1)
        mixed = []
        for h in range(heads):
            at = slice(h * E // heads, (h + 1) * E // heads)
            scores = q[..., at] @ k[..., at].transpose(1, 2) / (E // heads) ** 0.5
            mixed.append(scores.softmax(-1) @ v[..., at])
        branch = torch.cat(mixed, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + F.layer_norm(branch, (E,), b["norm1.weight"], b["norm1.bias"], eps=1e-6)
        branch = F.gelu(x @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        branch = branch @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        x = x + F.layer_norm(branch, (E,), b["norm2.weight"], b["norm2.bias"], eps=1e-6)
    return x


@torch.no_grad()
def test_a_tower_with_eva_names_equals_eva_written_out_by_hand() -> None:
    weights = eva_weights()
    ours = own(norm="post", entry_norm=False, patch_bias=True, layers=2)
    ours.load_state_dict(translate(weights))  # strict: every weight has found its place
    expected = eva_by_hand(weights, normalised(pixels()), heads=3)
    torch.testing.assert_close(ours(pixels()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.features(pixels()), expected[:, 1:], rtol=1e-4, atol=1e-5)


OWN_OF_SIGLIP = {
    "norm_eps": 1e-6,
    "entry_norm": False,
    "class_token": False,
    "features": "normalized",
    "patch_bias": True,
    "activation": "gelu_tanh",
}


def siglip(size: int = 32) -> SiglipVisionModel:
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    return shaken(SiglipVisionModel(SiglipVisionConfig(**shape, image_size=size, patch_size=8)))


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 36])
def test_settings_make_the_generation_encoder_siglip(size: int) -> None:
    """Also at a size of which no patch sees the rest, as SigLIP so400m's 384 pixels of patches of 14."""
    tower = siglip(size)
    ours = own(**OWN_OF_SIGLIP, image_size=size)
    fill_tower(ours, translate(dict(tower.state_dict())), "here")
    theirs = tower(pixel_values=normalised(pixels(size=size))).last_hidden_state
    assert theirs.shape == (2, 16, 24)
    torch.testing.assert_close(ours.features(pixels(size=size)), theirs, rtol=1e-5, atol=1e-5)
    # Each of the settings matters.
    for name in ("norm_eps", "features", "activation"):
        other = own(**{key: value for key, value in OWN_OF_SIGLIP.items() if key != name}, image_size=size)
        fill_tower(other, translate(dict(tower.state_dict())), "here")
        assert not torch.allclose(other.features(pixels(size=size)), theirs, rtol=1e-7, atol=1e-7), name


def test_a_tower_without_class_token_learns_gen_clips_two_terms() -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ContrastiveConfig(width=8, text=text, mae_layers=1, mae_width=16, mae_heads=2, mae_weight=1.0)
    model = GenCLIP(own(**OWN_OF_SIGLIP, image_size=36), config, vocabulary=11)
    keep = torch.tensor([[0, 5, 9], [3, 1, 15]])
    error = model.reconstruct(pixels(size=36), keep)
    assert error.shape == (2,)
    assert model.embed_images(pixels(size=36)).shape == (2, 8)
    error.sum().backward()
    assert model.vision.positions.grad is not None and model.vision.positions.grad.abs().sum() > 0


def openclip_names(clip: CLIPVisionModel) -> dict[str, Tensor]:
    """OpenCLIP's whole file, written by hand from its `VisionTransformer`, on the weights of transformers' tower."""
    given = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items()}
    found = {
        "visual.class_embedding": given["embeddings.class_embedding"],
        "visual.conv1.weight": given["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": given["embeddings.position_embedding.weight"],
        "visual.proj": torch.zeros(24, 8),
        "positional_embedding": torch.zeros(7, 8),
        "token_embedding.weight": torch.zeros(9, 8),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "ln_final.bias": torch.zeros(8),
        "text_projection": torch.zeros(8, 8),
        "logit_scale": torch.zeros(()),
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = given[f"pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = given[f"post_layernorm.{kind}"]
        for layer in range(3):
            theirs = f"visual.transformer.resblocks.{layer}"
            block = f"encoder.layers.{layer}"
            parts = [given[f"{block}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{theirs}.attn.out_proj.{kind}"] = given[f"{block}.self_attn.out_proj.{kind}"]
            found[f"{theirs}.ln_1.{kind}"] = given[f"{block}.layer_norm1.{kind}"]
            found[f"{theirs}.ln_2.{kind}"] = given[f"{block}.layer_norm2.{kind}"]
            found[f"{theirs}.mlp.c_fc.{kind}"] = given[f"{block}.mlp.fc1.{kind}"]
            found[f"{theirs}.mlp.c_proj.{kind}"] = given[f"{block}.mlp.fc2.{kind}"]
    return found


@torch.no_grad()
def test_openclips_names_give_the_same_tower(clip: CLIPVisionModel) -> None:
    ours = own(activation="quick_gelu")
    fill_tower(ours, translate(openclip_names(clip)), "here")
    theirs = clip(pixel_values=normalised(pixels())).last_hidden_state
    torch.testing.assert_close(ours(pixels()), theirs, rtol=1e-5, atol=1e-5)


def test_names_of_no_known_tower_are_refused() -> None:
    with pytest.raises(ImportSourceError, match=r"CLIP, OpenCLIP, EVA-CLIP, SigLIP\), for example conv1\.weight"):
        translate({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("family", ["CLIP", "OpenCLIP", "EVA-CLIP", "SigLIP"])
def test_every_tensor_of_a_tower_is_accounted_for(clip: CLIPVisionModel, family: str) -> None:
    weights = {
        "CLIP": lambda: dict(clip.state_dict()),
        "OpenCLIP": lambda: openclip_names(clip),
        "EVA-CLIP": eva_weights,
        "SigLIP": lambda: dict(siglip().state_dict()),
    }[family]()
    settings: dict[str, object] = {"CLIP": {"activation": "quick_gelu"}, "SigLIP": OWN_OF_SIGLIP}.get(family, {})
    if family == "EVA-CLIP":
        settings = {"norm": "post", "entry_norm": False, "patch_bias": True, "layers": 2}
    ours = own(**settings)
    fill_tower(ours, translate(dict(weights)), "here")
    (name,) = [key for key in weights if re.search(r"(layers|resblocks|blocks)\.1.*(fc2|c_proj)\.weight", key)]
    renamed = {key.replace("mlp", "ffn") if key == name else key: value for key, value in weights.items()}
    with pytest.raises(ImportSourceError, match=re.escape(name.replace("mlp", "ffn"))):
        translate(renamed)
    missing = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(ImportSourceError, match=r"here: lacks blocks\.1\.contract\.weight \(24, 40\)"):
        fill_tower(ours, translate(missing), "here")
    with pytest.raises(
        ImportSourceError, match=r"blocks\.1\.contract\.weight is \(24, 39\), the recipe's is \(24, 40\)"
    ):
        fill_tower(ours, translate(weights | {name: weights[name][:, 1:]}), "here")
    with pytest.raises(ImportSourceError, match=r"holds blocks\.9\.contract\.weight, which the recipe's encoder lacks"):
        fill_tower(ours, translate(weights | {re.sub(r"\.1\.", ".9.", name, count=1): weights[name]}), "here")


def test_one_set_of_files_is_read(clip: CLIPVisionModel, tmp_path: Path) -> None:
    """Sharded and whole give the same; a folder with an fp16 variant beside is not read twice."""
    clip.save_pretrained(tmp_path / "whole")
    clip.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole = read_tower(tmp_path / "whole")
    shards = read_tower(tmp_path / "shards")
    assert whole.keys() == shards.keys() and all(torch.equal(whole[key], shards[key]) for key in whole)
    half = {key: value.half() for key, value in clip.state_dict().items()}
    save_file(half, tmp_path / "whole" / "model.fp16.safetensors")
    assert read_tower(tmp_path / "whole")["positions"].dtype == torch.float32
    assert read_tower(tmp_path / "whole" / "model.fp16.safetensors")["positions"].dtype == torch.float16
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert read_tower(tmp_path / "whole")["positions"].dtype == torch.float16
    save_file(half, tmp_path / "whole" / "model.ema.safetensors")
    with pytest.raises(ImportSourceError, match="holds the variants ema, fp16: name the file of one"):
        read_tower(tmp_path / "whole")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(ImportSourceError, match=f"{gone.name}, which is missing"):
        read_tower(tmp_path / "shards")


def test_a_pickled_tower_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ImportSourceError, match=r"no \.safetensors file"):
            read_tower(str(source))


@torch.no_grad()
def test_the_understanding_encoder_equals_transformers_siglip() -> None:
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    tower = shaken(SiglipVisionModel(config))
    ours = UnderstandingEncoder(tower, MEAN, STD)
    theirs = tower(pixel_values=normalised(pixels()))
    assert ours(pixels()).shape == (2, ours.vectors, ours.width) == (2, 16, 24)  # every patch, none pooled
    assert torch.equal(ours(pixels()), theirs.last_hidden_state)
    assert torch.equal(ours.summary(pixels()), theirs.pooler_output)


def test_a_siglip_tower_without_its_head_says_so_when_asked_for_a_summary() -> None:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    config.vision_use_head = False
    ours = UnderstandingEncoder(SiglipVisionModel(config), MEAN, STD)
    with pytest.raises(ValueError, match="vision_use_head"):
        ours.summary(pixels(1, 16))


# ----------------------------------------------------------------------------------------------- dropping patches


@torch.no_grad()
def test_keeping_every_patch_equals_dropping_none() -> None:
    ours = own()
    keep = torch.arange(16).expand(2, -1)
    assert torch.equal(ours(pixels(), keep), ours(pixels()))


@torch.no_grad()
def test_the_order_of_kept_patches_only_orders_the_output() -> None:
    ours = own()
    keep = torch.tensor([[3, 9, 0, 14], [1, 2, 15, 7]])
    turned = [2, 0, 3, 1]
    straight, shuffled = ours(pixels(), keep), ours(pixels(), keep[:, turned])
    torch.testing.assert_close(shuffled[:, 1:], straight[:, 1:][:, turned], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled[:, 0], straight[:, 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(straight[:, 1:], ours(pixels())[:, 1:5])


@torch.no_grad()
def test_the_mae_pass_is_blind_to_hidden_patches() -> None:
    config = ContrastiveConfig(
        text={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    )
    trained = GenCLIP(own(), config, 20)
    assert trained.mae is not None
    keep = torch.tensor([[3, 9, 0, 14], [1, 2, 15, 7]])
    other = pixels(seed=5)
    changed = pixels().clone()
    for row, kept in enumerate(keep.tolist()):
        for patch in set(range(16)) - set(kept):
            y, x = divmod(patch, 4)
            square = (row, slice(None), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
            changed[square] = other[square]
    assert not torch.equal(trained.vision(changed), trained.vision(pixels()))
    before, after = trained.vision(pixels(), keep), trained.vision(changed, keep)
    assert torch.equal(before, after)
    assert torch.equal(trained.mae(before, keep), trained.mae(after, keep))
    seen = pixels().clone()
    seen[0, :, 6 * 4 : 6 * 4 + 8, 16:24] += 0.5  # patch 14, which is visible
    assert not torch.equal(trained.vision(seen, keep), before)


@pytest.mark.parametrize("size", [(24, 32), (32, 24), (64, 64)])
def test_a_picture_of_another_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]}, {size[1]}.*32 px"):
        own()(torch.zeros(1, 3, *size))
