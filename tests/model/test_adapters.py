"""Adapters on the LLM: attached in each of PEFT's ways, trained, saved, loaded to the bit, merged, or refused whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.data.prompts import Renderer, collate
from open_pisces.generate.generator import Generator
from open_pisces.model.adapters import AdapterError, adapter_layers, base_llm
from open_pisces.model.folder import convert, load_part, read_card, write_folder
from open_pisces.model.pisces import Pisces
from open_pisces.model.summary import describe_folder
from open_pisces.recipe import load_config
from open_pisces.train.objectives import build_training

TARGETS = ["q_proj", "v_proj", "down_proj"]
SAY = (Turn("user", ("How are you?",)), Turn("assistant", ("Fine, thank you.",)))


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **more})


def by_add_adapter(pisces: Pisces, **more: Any) -> None:
    pisces.llm.add_adapter(lora(**more))


def by_wrapping_the_llm(pisces: Pisces, **more: Any) -> None:
    pisces.llm = get_peft_model(pisces.llm, lora(**more))


def by_wrapping_the_model(pisces: Pisces, **more: Any) -> None:
    targets = r"llm\..*\.(q_proj|v_proj|down_proj)"
    get_peft_model(pisces, lora(**{"target_modules": targets, **more}))


WAYS = {"add_adapter": by_add_adapter, "wrapped LLM": by_wrapping_the_llm, "wrapped Pisces": by_wrapping_the_model}
Attach = Callable[..., None]


@pytest.fixture
def pisces(nano_pisces: Pisces) -> Pisces:
    return copy.deepcopy(nano_pisces)


@pytest.fixture
def batch(nano_pisces: Pisces, nano_tokenizer: Any) -> SequenceBatch:
    renderer = Renderer(nano_tokenizer, "tiny", nano_pisces.understanding_encoder.vectors, 4)
    return collate([renderer.render(SAY)], [()], renderer, 32, 32)


@torch.no_grad()
def logits(pisces: Pisces, batch: SequenceBatch) -> Tensor:
    return pisces.llm.get_output_embeddings()(pisces.hidden(pisces.embed(batch)[0]))


def aligned(pisces: Pisces) -> Pisces:
    """Its weights in memory of their own: where they lie in a mapped file decides how a CPU rounds their products."""
    for parameter in pisces.parameters():
        parameter.data = parameter.data.clone()
    return pisces


def train_a_step(pisces: Pisces, batch: SequenceBatch) -> None:
    pisces.train()
    learning = [p for p in pisces.llm.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in learning) < 0.3 * sum(p.numel() for p in pisces.llm.parameters())
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    pisces(batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    pisces.eval()


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("attach", WAYS.values(), ids=WAYS)
def test_an_adapter_is_attached_trained_saved_and_loaded_to_the_bit(
    pisces: Pisces, nano_pisces: Pisces, nano_tokenizer: Any, batch: SequenceBatch, tmp_path: Path, attach: Attach
) -> None:
    plain = logits(pisces, batch)
    attach(pisces)
    train_a_step(pisces, batch)
    trained = logits(pisces, batch)
    assert not torch.allclose(trained, plain)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    loaded = aligned(Pisces.from_pretrained(tmp_path / "model"))
    assert torch.equal(logits(loaded, batch), trained)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "llm")  # whole, and loadable alone
    for name, value in nano_pisces.llm.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    assert not adapter_layers(base)


def test_a_second_round_trip_changes_no_file(pisces: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    by_wrapping_the_llm(pisces)
    pisces.save_pretrained(tmp_path / "one", nano_tokenizer)
    Pisces.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (read_card(tmp_path / name)["parts"] for name in ("one", "two"))
    assert one == two and set(one["adapter"]) == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    text = (tmp_path / "one" / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] is None and str(tmp_path) not in text


def test_an_adapter_loads_in_bfloat16_with_its_model(
    pisces: Pisces, nano_tokenizer: Any, batch: SequenceBatch, tmp_path: Path
) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    narrow = Pisces.from_pretrained(tmp_path / "model", torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(narrow, batch).float(), logits(pisces, batch), rtol=0.1, atol=0.1)


def test_vectors_and_answers_come_through_an_adapter(pisces: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    plain = Generator(copy.deepcopy(pisces), nano_tokenizer, "cpu").vectors(["a red ball"])
    by_wrapping_the_llm(pisces)
    drawn = Generator(pisces, nano_tokenizer, "cpu").vectors(["a red ball"])
    assert not torch.allclose(drawn, plain)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    again = Generator(aligned(Pisces.from_pretrained(tmp_path / "model")), nano_tokenizer, "cpu")
    assert torch.equal(again.vectors(["a red ball"]), drawn)


def test_trained_modules_beside_an_adapter_come_back(
    pisces: Pisces, nano_pisces: Pisces, nano_tokenizer: Any, batch: SequenceBatch, tmp_path: Path
) -> None:
    by_add_adapter(pisces, modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in pisces.llm.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    expected = logits(pisces, batch)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    assert torch.equal(logits(aligned(Pisces.from_pretrained(tmp_path / "model")), batch), expected)
    base = load_file(tmp_path / "model" / "llm" / "model.safetensors")
    assert torch.equal(base["model.norm.weight"], nano_pisces.llm.state_dict()["model.norm.weight"])


# ---------------------------------------------------------------------------------------------------------- folders


def test_an_exported_model_holds_the_adapter_merged(
    pisces: Pisces, nano_tokenizer: Any, batch: SequenceBatch, tmp_path: Path
) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    convert(tmp_path / "model", tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged" / "adapter").exists()
    merged = Pisces.from_pretrained(tmp_path / "merged")
    assert not adapter_layers(merged.llm)
    torch.testing.assert_close(logits(merged, batch), logits(pisces, batch), rtol=1e-4, atol=1e-5)


def test_a_training_that_keeps_the_llm_keeps_its_adapter_and_a_new_llm_drops_it(
    pisces: Pisces, nano_pisces: Pisces, nano_tokenizer: Any, tmp_path: Path
) -> None:
    by_add_adapter(pisces)
    folder = tmp_path / "model"
    pisces.save_pretrained(folder, nano_tokenizer)
    write_folder(tmp_path / "kept", pisces.settings, {"bridge": pisces.bridge}, start=folder)
    assert read_card(tmp_path / "kept")["parts"]["adapter"] == read_card(folder)["parts"]["adapter"]
    write_folder(tmp_path / "new", pisces.settings, {"llm": nano_pisces.llm}, start=folder)
    assert not (tmp_path / "new" / "adapter").exists() and "adapter" not in read_card(tmp_path / "new")["parts"]


def test_a_stage_on_an_adapter_is_refused_with_the_way_on(pisces: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    config = load_config("nano/stage1", [f"model.start={tmp_path / 'model'}"])
    with pytest.raises(AdapterError, match="its base would not learn: merge it first with `pisces export"):
        build_training(config)


def test_a_described_folder_names_its_adapter(pisces: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    adapter = describe_folder(tmp_path / "model")["parts"]["adapter"]
    assert adapter["source"] == "LORA of rank 4" and 0 < adapter["parameters"] < 10_000


# --------------------------------------------------------------------------------------------------------- refusals


def on_the_bridge(pisces: Pisces) -> None:
    get_peft_model(pisces, lora(target_modules=r"bridge\..*\.first"))


def by_prompt_tuning(pisces: Pisces) -> None:
    pisces.llm = get_peft_model(pisces.llm, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def twice(pisces: Pisces) -> None:
    by_wrapping_the_llm(pisces)
    pisces.llm.add_adapter("other", lora())


def with_biases(pisces: Pisces) -> None:
    by_wrapping_the_llm(pisces, bias="lora_only")


def merged(pisces: Pisces) -> None:
    by_wrapping_the_llm(pisces)
    pisces.llm.merge_adapter()


def by_path(pisces: Pisces) -> None:
    by_wrapping_the_model(pisces, rank_pattern={"q_proj": 2})


REFUSED = {
    on_the_bridge: "bridge: .*first carries an adapter, only the LLM's can be saved: restrict target_modules",
    by_prompt_tuning: "changes no layer",
    twice: "one adapter can be saved, found default, other",
    with_biases: "bias = 'lora_only', which changes the base: set bias='none'",
    merged: "holds its adapter merged: unmerge_adapter",
    by_path: "on the whole model has rank_pattern: attach it to pisces.llm",
}


@pytest.mark.parametrize(("attach", "says"), REFUSED.items(), ids=[attach.__name__ for attach in REFUSED])
def test_what_could_not_be_loaded_again_is_refused_before_anything_is_written(
    pisces: Pisces, nano_tokenizer: Any, tmp_path: Path, attach: Attach, says: str
) -> None:
    attach(pisces)
    with pytest.raises(AdapterError, match=says):
        pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_not_fit_is_refused(pisces: Pisces, nano_tokenizer: Any, tmp_path: Path) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    config = tmp_path / "model" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["k_proj", "q_proj"]}))
    with pytest.raises(AdapterError, match="adapter: does not fit llm/, for example"):
        load_part(tmp_path / "model", "llm")


def test_without_peft_a_folder_with_an_adapter_says_what_to_install(
    pisces: Pisces, nano_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_add_adapter(pisces)
    pisces.save_pretrained(tmp_path / "model", nano_tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(AdapterError, match=r"needs PEFT: pip install 'open-pisces\[lora\]'"):
        Pisces.from_pretrained(tmp_path / "model")


def test_a_model_without_an_adapter_has_no_adapter_layers(pisces: Pisces) -> None:
    assert adapter_layers(pisces) == {} and base_llm(pisces.llm) is pisces.llm
