"""The lean step and its cache: what transformers computes, and transformers' own way where it takes that."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from open_pisces.batch import Turn
from open_pisces.config import ModelConfig
from open_pisces.generate import generator as generator_module
from open_pisces.generate import steps
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.slots import MULTIPLE, Slots, read_after, room
from open_pisces.generate.steps import step_of
from open_pisces.model.pisces import Pisces

SIZE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LEAN: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    "llama3 positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "llama gelu": {"hidden_act": "gelu"},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def llm_of(name: str, settings: dict[str, Any]) -> Any:
    """A random LLM in float64, its norms and biases not what they start as."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0].replace("llama3", "llama"), **{**SIZE, **settings})
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm


class Around:
    """What `Slots` needs of a Pisces, around a bare LLM."""

    hidden = Pisces.hidden
    device = torch.device("cpu")

    def __init__(self, llm: Any) -> None:
        self.llm = llm


@torch.inference_mode()
def stepped(llm: Any, prompts: list[Tensor], more: Tensor) -> tuple[Tensor, Slots]:
    """Hidden states of further embeddings ``(R, K, D)``, one after another behind prompts of different lengths."""
    around: Any = Around(llm)
    slots = Slots(around, len(prompts), max(len(prompt) for prompt in prompts) + more.shape[1])
    for row, prompt in enumerate(prompts):
        slots.put(row, read_after(around, prompt, None))
    return torch.stack([slots.step(more[:, k]) for k in range(more.shape[1])], 1), slots


@pytest.mark.parametrize("name", [*LEAN, *OTHERS])
def test_steps_of_rows_at_different_places_are_what_reading_the_whole_gives(name: str) -> None:
    llm = llm_of(name, (LEAN | OTHERS)[name])
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randn(length, 48, generator=draw, dtype=torch.float64) for length in (3, 70, 20)]
    more = torch.randn(3, 5, 48, generator=draw, dtype=torch.float64)
    found, slots = stepped(llm, prompts, more)
    assert (slots.lean is not None) == (name in LEAN)
    assert slots.length % MULTIPLE == 0 and slots.lengths == [8, 75, 25]
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            whole = llm.get_decoder()(inputs_embeds=torch.cat([prompt, more[row]])[None]).last_hidden_state[0]
        # transformers' norms go through float32 even here; the lean ones do not.
        near = 1e-5 if name in LEAN else 1e-9
        torch.testing.assert_close(found[row], whole[len(prompt) :], rtol=near, atol=near)


@pytest.mark.parametrize("name", LEAN)
def test_a_prompt_that_the_step_reads_leaves_what_transformers_leaves(name: str) -> None:
    llm = llm_of(name, LEAN[name])
    prompt = torch.randn(37, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lean = step_of(llm, 64)
    assert lean is not None
    around: Any = Around(llm)
    with torch.inference_mode():
        expected = read_after(around, prompt, None)
        hidden_SD, keys, values = lean.read(prompt)
    torch.testing.assert_close(hidden_SD[-1], expected.hidden_D, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((keys, values), (expected.keys, expected.values), rtol=1e-5, atol=1e-5)


def test_an_adapter_takes_the_lean_step_too() -> None:
    from peft import LoraConfig, get_peft_model

    llm = llm_of("llama", {})
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(llm, config).double().eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randn(4, 48, generator=draw, dtype=torch.float64)]
    more = torch.randn(1, 3, 48, generator=draw, dtype=torch.float64)
    found, slots = stepped(adapted, prompts, more)
    assert slots.lean is not None
    with torch.inference_mode():
        whole = adapted.get_decoder()(inputs_embeds=torch.cat([prompts[0], more[0]])[None]).last_hidden_state[0]
        with adapted.disable_adapter():
            bare = adapted.get_decoder()(inputs_embeds=torch.cat([prompts[0], more[0]])[None]).last_hidden_state[0]
    torch.testing.assert_close(found[0], whole[4:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, bare, atol=1e-2)


def test_a_sliding_window_takes_transformers_way_and_bounds_the_row() -> None:
    windowed = llm_of("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1})
    assert "sliding_attention" in windowed.config.layer_types
    assert step_of(windowed, 64) is None and room(windowed.config) == 32
    assert room(llm_of("llama", {}).config) == 256


def test_eight_bits_answer_nearly_the_same(nano_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Generator.from_pretrained(nano_folder, "cpu")
    small = Generator.from_pretrained(nano_folder, "cpu", int8=True)
    assert "DynamicQuantizedLinear" in type(small.pisces.llm.get_output_embeddings()).__name__ + str(small.pisces.llm)
    one, other = plain.vectors(["a cat"]), small.vectors(["a cat"])
    assert 0 < float((one - other).abs().max()) < 0.2 * float(one.abs().max())
    assert len(small.text([[]], ["a"], 4)) == 1
    monkeypatch.setattr(generator_module, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(PromptError, match="int8 is for CPUs"):
        Generator.from_pretrained(nano_folder, "cuda", int8=True)


def test_a_row_that_is_not_live_stays_where_it_is() -> None:
    llm = llm_of("llama", {})
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randn(4, 48, generator=draw, dtype=torch.float64) for _ in range(2)]
    more = torch.randn(2, 3, 48, generator=draw, dtype=torch.float64)
    expected, _ = stepped(llm, prompts, more)
    around: Any = Around(llm)
    with torch.inference_mode():
        slots = Slots(around, 3, 60)
        for row, prompt in enumerate(prompts):
            slots.put(row, read_after(around, prompt, None))
        empty = torch.zeros(1, 48, dtype=torch.float64)
        slots.step(torch.cat([more[:, 0], empty]), [True, False, False])
        slots.step(torch.cat([more[:1, 1], more[1:, 0], empty]), [True, True, False])
        found = slots.step(torch.cat([more[:1, 2], more[1:, 1], empty]), [True, True, False])
    assert slots.lengths == [7, 6, 0]
    torch.testing.assert_close(found[0], expected[0, 2])
    torch.testing.assert_close(found[1], expected[1, 1])
    slots.free(0)
    assert slots.lengths == [0, 6, 0]


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_weights_that_change_are_seen_by_the_next_drawing(name: str, nano_pisces: Pisces, nano_tokenizer: Any) -> None:
    """In a training the generator stays while its weights move on; a step may hold copies of small layers."""
    pisces = deepcopy(nano_pisces)
    generator = Generator(pisces, nano_tokenizer, "cpu")
    before = generator.vectors(["a cat"])
    weight = getattr(pisces.llm.get_decoder().layers[0].self_attn, name).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    after = generator.vectors(["a cat"])
    with torch.no_grad():
        weight.copy_(kept)
    assert not torch.allclose(before, after)
    assert torch.equal(before, generator.vectors(["a cat"]))


@pytest.mark.parametrize("name", ["llama", "llama biased", "qwen3"])
def test_wide_layers_are_not_copied_and_step_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of(name, LEAN[name]).float()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randn(4, 48, generator=draw), torch.randn(9, 48, generator=draw)]
    more = torch.randn(2, 3, 48, generator=draw)
    copied, _ = stepped(llm, prompts, more)
    monkeypatch.setattr(steps, "FUSED", 0)
    apart, _ = stepped(llm, prompts, more)
    torch.testing.assert_close(copied, apart, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        whole = llm.get_decoder()(inputs_embeds=torch.cat([prompts[1], more[1]])[None]).last_hidden_state[0, 9:]
    torch.testing.assert_close(copied[1], whole, rtol=1e-4, atol=1e-4)


def test_steps_run_under_autocast(nano_pisces: Pisces, nano_tokenizer: Any) -> None:
    generator = Generator(nano_pisces, nano_tokenizer, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generator.vectors(["a cat"])
        said = generator.answer([(Turn("user", ("a",)),)], [()], max_new_tokens=3)
    assert drawn.isfinite().all() and len(said) == 1


def test_a_preset_is_the_models_own_or_a_share_of_its_steps(nano_config: ModelConfig) -> None:
    decoder = nano_config.decoder.model_copy(update={"steps": 50})
    assert [decoder.preset(name).steps for name in ("quality", "balanced", "fast")] == [50, 30, 10]
    assert [decoder.preset(name).guidance_scale for name in ("quality", "balanced", "fast")] == [None, None, 1.75]
    assert type(decoder).model_validate({"guidance_scale": 1.0}).preset("fast").guidance_scale is None
    own = type(decoder).model_validate({"steps": 50, "presets": {"fast": {"steps": 4, "guidance_scale": 1.5}}})
    assert (own.preset("fast").steps, own.preset("fast").guidance_scale) == (4, 1.5)
    assert own.preset("quality").steps == 50 and own.preset("quality").guidance_scale is None


def test_parts_take_turns_on_a_small_device(
    nano_pisces: Pisces, nano_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is "cpu" under another name here: what is recorded is who is sent where, and when."""
    told: list[tuple[str, str]] = []
    where = {name: "cpu" for name in ("llm", "understanding_encoder", "generation_encoder", "decoder")}
    plain = Generator(nano_pisces, nano_tokenizer, "cpu")
    picture = plain.image(["a red ball"], steps=1)[0][0]
    expected = plain.text([[picture]], ["What is it?"], 4)[0]
    generator = Generator(nano_pisces, nano_tokenizer, "cpu", offload=True)
    generator.parts.device = torch.device("cpu:0")
    for name, module in generator.parts.modules.items():

        def moved(target: Any, name: str = name, module: Any = module) -> Any:
            where[name] = "device" if str(target) == "cpu:0" else "cpu"
            told.append((name, where[name]))
            return module

        monkeypatch.setattr(module, "to", moved)

    def on_device() -> set[str]:
        return {name for name, place in where.items() if place == "device"}

    generator.vectors(["a"])
    assert on_device() == {"llm", "understanding_encoder"}
    assert np.array_equal(generator.image(["a red ball"], steps=1)[0][0], picture)
    assert on_device() == {"decoder"}
    assert generator.text([[picture]], ["What is it?"], 4)[0] == expected
    assert on_device() == {"llm", "understanding_encoder"}
    generator.reconstruct([picture], steps=1)
    assert on_device() == {"decoder"} and ("generation_encoder", "device") in told
    before = len(told)
    generator.reconstruct([picture], steps=1)
    generator.painter.pixels(generator.painter.bridge.statistics.null_ME[None], None, [0], 1, 1.0, 0)
    assert len(told) == before + 2 * len(where)  # to the encoder and back; who is there stays
