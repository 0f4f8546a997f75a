"""Fine-tuning with an adapter: what is written, what stays, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_pisces.cli.commands import main
from open_pisces.files import sha256_of
from open_pisces.generate.generator import Generator
from open_pisces.model import adapters
from open_pisces.model.adapters import AdapterError
from open_pisces.model.folder import load_part, load_parts, read_card, write_folder
from open_pisces.plan.layout import Layout
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train.loop import train
from open_pisces.train.objectives import build_training, skeleton
from open_pisces.train.objectives.pisces import _check_adapter

CUT = ["train.precision=fp32", "data.max_length=512", "data.row_length=512", "data.rows=1", "data.workers=0"]
CUT += ["train.batch_size=2", "train.save_every=2", "train.probe_every=100", "train.lora.rank=4", "train.lr=0.01"]
CUT += ["data.sources=[{path: fixture/train, tasks: {question: 1.0, generate_short: 1.0}}]", "train.schedule=constant"]


@pytest.fixture(scope="module")
def start(runs: Path) -> Path:
    """A trained Pisces."""
    return runs / "stage3" / "model"


@pytest.fixture(scope="module")
def tuned(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an adapter of four steps."""
    out = tmp_path_factory.mktemp("tuned")
    return train(load_config("finetune/lora", [*CUT, f"model.start={start}", f"out={out}", "train.steps=4"]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model" / "adapter" / "adapter_model.safetensors")
    return found | load_file(folder / "model" / "bridge" / "model.safetensors")


def test_only_the_adapter_and_the_bridge_are_written(start: Path, tuned: Path) -> None:
    before, after = read_card(start)["parts"], read_card(tuned / "model")["parts"]
    assert {name for name in after if after[name] != before.get(name)} == {"adapter", "bridge"}
    for file, digest in before["llm"].items():  # the base to the bit, and as a link where the disk can do that
        assert sha256_of(tuned / "model" / "llm" / file) == digest
    values = json.loads((tuned / "model" / "adapter" / "adapter_config.json").read_text())
    assert values["r"] == 4 and values["base_model_name_or_path"] is None
    own = {key: value for key, value in weights(tuned).items() if "lora_B" in key}
    assert own and all(value.abs().sum() > 0 for value in own.values())
    assert not any("lm_head" in key or "embed" in key for key in own)
    (checkpoint, *_) = (tuned / "state").glob("step-*/manifest.json")
    kept = checkpoint.read_text()
    assert "lora_A" in kept and "bridge.head" in kept and "base_layer" not in kept and "embed_tokens" not in kept


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_adapter_learns_at_a_rate_of_its_own(start: Path, tmp_path: Path, optimizer: str) -> None:
    own = [*CUT, f"model.start={start}", f"train.optimizer={optimizer}", "train.steps=1", "train.weight_decay=0"]
    moved = {}
    for lr in (0.01, 0.001):
        rated = load_config("finetune/lora", [*own, f"train.lora.lr={lr}", f"out={tmp_path / str(lr)}"])
        moved[lr] = weights(train(rated))
    as_ever = weights(train(load_config("finetune/lora", [*own, f"out={tmp_path / 'none'}"])))
    torch.testing.assert_close(moved[0.01], as_ever)  # train.lr is 0.01
    adapter = {key for key in as_ever if "lora_B" in key}  # it begins at zero
    for key in adapter:
        torch.testing.assert_close(moved[0.001][key], moved[0.01][key] / 10, rtol=1e-3, atol=1e-9)
    assert adapter
    rest = [key for key in as_ever if "lora_" not in key]
    torch.testing.assert_close([moved[0.001][key] for key in rest], [as_ever[key] for key in rest])


def test_an_adapter_goes_on_where_it_stopped_to_the_bit(start: Path, tuned: Path, tmp_path: Path) -> None:
    own = [*CUT, f"model.start={start}", f"out={tmp_path}"]
    train(load_config("finetune/lora", [*own, "train.steps=2"]))
    again = weights(train(load_config("finetune/lora", [*own, "train.steps=4"])))
    once = weights(tuned)
    assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)


def test_merged_it_draws_and_answers_as_before(tuned: Path, tmp_path: Path) -> None:
    assert main(["export", str(tuned / "model"), str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert "adapter" not in read_card(tmp_path / "merged")["parts"]
    one, two = (Generator.from_pretrained(folder, "cpu") for folder in (tuned / "model", tmp_path / "merged"))
    torch.testing.assert_close(one.vectors(["a red heart"]), two.vectors(["a red heart"]), rtol=1e-5, atol=1e-5)


def test_the_adapter_loads_on_its_base_and_changes_it(start: Path, tuned: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain: Any = load_part(start, "llm")
        adapted: Any = load_part(tuned / "model", "llm")
        assert not torch.allclose(plain(ids).logits, adapted(ids).logits)


def test_a_tuned_model_can_be_tuned_on_with_the_same_rank_only(tuned: Path, tmp_path: Path) -> None:
    own = [*CUT, f"model.start={tuned / 'model'}", f"out={tmp_path}", "train.steps=2"]
    again = train(load_config("finetune/lora", own))
    once, twice = weights(tuned), weights(again)
    assert once.keys() == twice.keys() and any(not torch.equal(once[key], twice[key]) for key in once)
    with pytest.raises(AdapterError, match="holds an adapter of rank 4: set the same, or merge it first"):
        train(load_config("finetune/lora", [*own, "train.lora.rank=8", f"out={tmp_path / 'other'}"]))


def test_beside_a_bfloat16_base_the_adapter_is_float32(start: Path, tmp_path: Path) -> None:
    config = load_config("finetune/lora", [*CUT, "train.precision=bf16", f"model.start={start}", f"out={tmp_path}"])
    llm = build_training(config).module.llm
    kinds = {parameter.requires_grad: parameter.dtype for parameter in llm.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    folder = train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}))
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(row["norm"] > 0 for row in rows)


def test_inputs_that_peft_leaves_as_they_are_train_to_the_same_bits(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast float32 inputs of an adapter become bfloat16 again: PEFT's way there costs time only."""
    own = [*CUT, "train.precision=bf16", "train.steps=3", f"model.start={start}"]
    config = load_config("finetune/lora", [*own, f"out={tmp_path / 'left'}"])
    layers = adapters.adapter_layers(build_training(config).module.llm).values()
    assert any(getattr(layer, "cast_input_dtype_enabled", True) is False for layer in layers)
    left = weights(train(config))
    monkeypatch.setattr(adapters, "_leave_inputs", lambda llm: None)
    cast = weights(train(load_config("finetune/lora", [*own, f"out={tmp_path / 'cast'}"])))
    assert left.keys() == cast.keys() and all(torch.equal(left[key], cast[key]) for key in left)


def test_what_lora_cannot_teach_is_refused(start: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "llm", "tokenizer", "understanding_encoder", "generation_encoder", "decoder"):
        (bare / name).symlink_to(start / name)
    own = [*CUT, f"out={tmp_path / 'run'}"]
    with pytest.raises(AdapterError, match="has no bridge: train its stages first"):
        train(load_config("finetune/lora", [*own, f"model.start={bare}"]))
    with pytest.raises(ConfigError, match="no model folder there: set it to the one to tune"):
        load_config("finetune/lora", [*own, "model.start=nowhere"])
    with pytest.raises(AdapterError, match=r"train\.lora\.targets = \['nothing'\]"):
        train(load_config("finetune/lora", [*own, f"model.start={start}", "train.lora.targets=[nothing]"]))
    assert not (tmp_path / "run" / "model").exists()


def test_an_llm_that_was_in_no_pisces_learns_the_places_of_pictures(start: Path, tmp_path: Path) -> None:
    """Its new tokens' embeddings learn beside the adapter, and come back with it; nothing else of the table moves."""
    own = [*CUT, f"model.start={start}", "model.fresh=[llm]", f"out={tmp_path}", "train.steps=3"]
    folder = train(load_config("finetune/lora", own))
    base = load_file(folder / "model" / "llm" / "model.safetensors")
    adapted: Any = load_part(folder / "model", "llm")
    generator = Generator.from_pretrained(folder / "model", "cpu")
    new = set(generator.tokenizer.convert_tokens_to_ids(["[IMG]", "[/IMG]", "<image>"]))
    with torch.no_grad():
        table = adapted.get_input_embeddings()(torch.arange(adapted.config.vocab_size))
    moved = {i for i in range(len(table)) if not torch.equal(table[i], base["model.embed_tokens.weight"][i])}
    assert moved and moved <= new
    assert main(["export", str(folder / "model"), str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    merged = Generator.from_pretrained(tmp_path / "merged", "cpu")
    torch.testing.assert_close(merged.vectors(["a cat"]), generator.vectors(["a cat"]), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def four_bits(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an adapter on a base in four bits: bitsandbytes computes on a CPU too."""
    out = tmp_path_factory.mktemp("four")
    own = [*CUT, "train.lora.bits=4", "train.precision=bf16", f"model.start={start}", f"out={out}", "train.steps=4"]
    return train(load_config("finetune/lora", own))


def test_qlora_quantizes_the_base_and_writes_what_lora_writes(start: Path, tuned: Path, four_bits: Path) -> None:
    own = [*CUT, "train.lora.bits=4", "train.precision=bf16", f"model.start={start}"]
    llm: Any = build_training(load_config("finetune/lora", own)).module.llm
    layer = llm.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8 and layer.lora_A.default.weight.dtype == torch.float32
    assert llm.get_output_embeddings().weight.dtype == torch.bfloat16  # as QLoRA leaves it
    files = {p.relative_to(four_bits) for p in (four_bits / "model").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tuned) for p in (tuned / "model").rglob("*") if p.is_file()}
    for file, digest in read_card(start)["parts"]["llm"].items():
        assert sha256_of(four_bits / "model" / "llm" / file) == digest
    rows = [json.loads(line) for line in (four_bits / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(row["norm"] > 0 for row in rows)
    assert all(value.abs().sum() > 0 for key, value in weights(four_bits).items() if "lora_B" in key)


def test_qlora_goes_on_where_it_stopped_to_the_bit(start: Path, four_bits: Path, tmp_path: Path) -> None:
    own = [*CUT, "train.lora.bits=4", "train.precision=bf16", f"model.start={start}", f"out={tmp_path}"]
    train(load_config("finetune/lora", [*own, "train.steps=2"]))
    again = weights(train(load_config("finetune/lora", [*own, "train.steps=4"])))
    once = weights(four_bits)
    assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)


def test_what_four_bits_do_not_go_with_is_refused(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*CUT, "train.lora.bits=4", f"model.start={start}", f"out={tmp_path}"]
    with pytest.raises(AdapterError, match=r"bits = 4 computes in bfloat16: set train\.precision=bf16"):
        train(load_config("finetune/lora", own))
    own.append("train.precision=bf16")
    with pytest.raises(AdapterError, match=r"and model\.start holds none: set 16"):
        train(load_config("finetune/lora", [*own, "model.fresh=[llm]"]))
    with pytest.raises(AdapterError, match="trains on one GPU, not on 2: start one process, or set 16"):
        _check_adapter(load_config("finetune/lora", own), 2, True)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"needs bitsandbytes: pip install 'open-pisces\[qlora\]', or set 16"):
        train(load_config("finetune/lora", own))
    assert not (tmp_path / "model").exists()


def test_both_tasks_are_looked_at_before_the_first_step(tuned: Path) -> None:
    names = {path.name for path in (tuned / "samples").iterdir()}
    assert {"step-0.png", "step-0.txt", "step-4.png", "step-4.txt"} <= names
    assert (tuned / "samples" / "step-0.txt").read_text() != (tuned / "samples" / "step-4.txt").read_text()


@pytest.mark.parametrize(("task", "lost"), [("question", "draw"), ("generate_short", "answer")])
def test_a_task_that_nothing_replays_is_said(
    start: Path, task: str, lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*CUT, f"model.start={start}", f"out={tmp_path}"]
    build_training(load_config("finetune/lora", own))
    assert "forget" not in capsys.readouterr().err
    build_training(
        load_config("finetune/lora", [*own, f"data.sources=[{{path: fixture/train, tasks: {{{task}: 1}}}}]"])
    )
    assert f"it will forget how to {lost}: add a source that replays" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused_by_its_digest(start: Path, tuned: Path, tmp_path: Path) -> None:
    """As when somebody puts an adapter beside an LLM of the same shape that was trained on."""
    other = tmp_path / "other"
    config, parts = load_parts(start)
    with torch.no_grad():
        parts["llm"].model.norm.weight += 0.01
    write_folder(other, config, {"llm": parts["llm"]}, start=start)
    shutil.copytree(tuned / "model" / "adapter", other / "adapter")
    with pytest.raises(AdapterError, match=r"an adapter of another base: its llm/model\.safetensors is sha256"):
        load_part(other, "llm")
    shutil.copytree(tuned / "model" / "adapter", tmp_path / "same" / "adapter")
    for name in ("llm", "config.json"):
        (tmp_path / "same" / name).symlink_to(start / name)
    ids = torch.tensor([[5, 6, 7]])
    ours: Any = load_part(tuned / "model", "llm")
    theirs: Any = load_part(tmp_path / "same", "llm")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_gradients_reach_all_quantized_layers_after_a_probe(start: Path, tmp_path: Path) -> None:
    """bitsandbytes lays weights out anew for answers on a CPU, and no gradient came through afterwards."""
    own = [*CUT, "train.lora.bits=4", "train.precision=bf16", f"model.start={start}", f"out={tmp_path}"]
    llm: Any = build_training(load_config("finetune/lora", own)).module.llm
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradients() -> list[torch.Tensor]:
        llm.zero_grad()
        llm.train()(ids, labels=ids).loss.backward()
        return [p.grad.clone() for name, p in llm.named_parameters() if "lora_B" in name]

    before = gradients()
    with torch.no_grad():
        llm.eval()(ids)
    assert before and all(torch.equal(one, two) for one, two in zip(before, gradients(), strict=True))


def test_a_plan_counts_the_weights_that_a_training_holds(start: Path, tmp_path: Path) -> None:
    own = [*CUT, f"model.start={start}", f"out={tmp_path}", "train.precision=bf16"]
    planned = []
    for bits in (16, 4):
        config = load_config("finetune/lora", [*own, f"train.lora.bits={bits}"])
        planned.append(Layout(config, 1, skeleton(config)).memory.weights)
        held = list(build_training(config).module.parameters())
        if bits == 16:
            assert planned[0] == sum(p.numel() * p.element_size() for p in held)
    # Two weights a byte in what is quantized; and scales, which are counted as a share.
    quantized = sum(2 * p.numel() for p in held if p.dtype == torch.uint8)
    assert planned[0] - planned[1] == pytest.approx((2 - 0.516) * quantized)
    sharded = load_config("finetune/lora", own)
    whole = Layout(sharded, 2, skeleton(sharded)).memory.weights  # small frozen parts are whole on each rank, float32
    assert whole > planned[0]
