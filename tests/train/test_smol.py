"""`recipes/smol`, cut: a language model that was in no Pisces, tiny's eyes and hands, an adapter between them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from open_pisces.cli.commands import main
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.files import sha256_of
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import read_card
from open_pisces.recipe import load_config
from open_pisces.train.loop import train

CUT = ["train.steps=2", "train.batch_size=2", "train.save_every=2", "train.probe_every=2", "train.lora.rank=4"]
CUT += ["data.max_length=512", "data.row_length=512", "data.rows=1"]


@pytest.fixture(scope="module")
def parts(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Pisces whose LLM `pisces weights import` has replaced by one of SmolLM2's shape, cut in width."""
    place = tmp_path_factory.mktemp("smol")
    shape = {"vocab_size": 280, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True)).save_pretrained(place / "llm")
    byte_tokenizer("smollm2").save_pretrained(str(place / "llm"))
    shutil.copytree(runs / "stage3" / "model", place / "parts")
    arguments = ["weights", "import", "smollm2", str(place / "llm"), "--out", str(place / "parts"), "--accept-licence"]
    assert main(arguments) == 0
    return place / "parts"


def test_both_stages_train_an_adapter_and_leave_the_llm(
    parts: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("transformers.integrations.peft"), "handle", said.append)
    bare = [*CUT, "data.features=''"]
    own = [*bare, f"model.start={parts}", f"out={tmp_path / 'stage1'}"]
    plain = "data.sources=[{path: fixture/train, tasks: {generate_short: 1.0}}]"
    first = train(load_config("smol/stage1", [*own, plain]))
    both = "data.sources=[{path: fixture/train, tasks: {generate_short: 1.0, question: 1.0}}]"
    own = [*bare, f"model.start={first / 'model'}", f"out={tmp_path / 'stage2'}"]
    folder = train(load_config("smol/stage2", [*own, both])) / "model"
    for file, digest in read_card(parts)["parts"]["llm"].items():
        assert sha256_of(folder / "llm" / file) == digest
    assert read_card(folder)["model"]["template"] == "smollm2"
    # Who tunes stage 1 takes its settings from the folder, and keeps the MLPs that are trained there.
    assert load_config("finetune/lora", [f"model.start={first / 'model'}", both]).model.fresh == []
    generator = Generator.from_pretrained(folder, "cpu")
    (picture,) = generator.image(["a red heart"])[0]
    assert picture.size == (32, 32) and isinstance(generator.text([[picture]], ["What is it?"], 4)[0], str)
    # The new MLPs have this LLM's width; the statistics are those that the decoder was trained with.
    bridges = [load_file(place / "bridge" / "model.safetensors") for place in (folder, runs / "stage3" / "model")]
    assert bridges[0]["generation_projector.second.weight"].shape[0] == 48
    assert all(torch.equal(bridges[0][key], bridges[1][key]) for key in bridges[1] if "statistics" in key)
    assert not said  # embeddings that are the output's weights too are not "missing" there
    # The places of pictures are learnt by their own embeddings, from the first stage on.
    deltas = [load_file(place / "adapter" / "adapter_model.safetensors") for place in (first / "model", folder)]
    names = [key for key in deltas[0] if "trainable_tokens" in key]
    assert names and all(not torch.equal(deltas[0][key], deltas[1][key]) for key in names)


def test_the_whole_scale_reads_a_stage_that_starts_from_an_earlier_one_when_its_turn_comes(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [*CUT, "data.sources=[{path: fixture/train, tasks: {generate_short: 1.0}}]"]
    assert main(["train", "smol", *own]) == 2
    assert "runs/smol/parts: no model folder there" in capsys.readouterr().err
    shutil.copytree(parts, tmp_path / "runs/smol/parts")
    assert main(["train", "smol", *own]) == 0
    assert (tmp_path / "runs/smol/stage2/model/adapter").is_dir()
    assert main(["train", "smol", *own]) == 0
    assert capsys.readouterr().out.count("done, in runs/smol/stage") == 2


def test_its_own_text_is_written_before_and_replayed(parts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "replay"
    how = ["--count", "3", "--request", "48", "--answer", "48", "--batch-size", "16"]
    assert main(["data", "replay", str(out), "--model", str(parts), *how, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["conversations"] == 3
    sources = [
        {"path": "fixture/train", "tasks": {"generate_short": 1.0}, "weight": 0.5},
        {"path": str(out), "tasks": {"conversation": 1.0}, "weight": 0.5},
    ]
    own = [*CUT, f"model.start={parts}", f"out={tmp_path / 'run'}", "train.batch_size=8", "train.lora.lr=1e-4"]
    own.append("data.features=''")
    folder = train(load_config("smol/stage1", [*own, f"data.sources={json.dumps(sources)}"]))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["text"] > 0.5 and rows[0]["vectors"] > 0
    # What it has lost is told against the LLM as it came, whose folder holds another LLM's bridge.
    asked = ["eval", "language", "--json", "--model"]
    assert main([*asked, str(parts), "--out", str(tmp_path / "before")]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["score"]
    assert main([*asked, str(folder / "model"), "--out", str(tmp_path / "after")]) == 0
    after = json.loads(capsys.readouterr().out.splitlines()[-1])["score"]
    assert before == pytest.approx(after, rel=0.05) and before != after


def test_an_llm_that_was_in_no_pisces_is_not_tuned_by_mistake(parts: Path, tmp_path: Path, capsys: Any) -> None:
    """Its folder holds the bridge of another LLM."""
    task = json.dumps([{"path": "fixture/train", "tasks": {"question": 1.0, "generate_short": 1.0}}])
    arguments = ["train", "finetune/lora", f"model.start={parts}", f"out={tmp_path}", f"data.sources={task}", *CUT]
    assert main([*arguments, "train.precision=fp32"]) == 2
    assert "model.fresh=[bridge]" in capsys.readouterr().err
