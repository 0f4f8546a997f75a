"""Host memory of loading: an 8b-shaped model, its widths kept and its depth cut, holds its weights once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from open_pisces.config import ModelConfig
from open_pisces.model.folder import without_sources, write_folder
from open_pisces.model.parts import PARTS, build_part
from open_pisces.recipe import load_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MOST = 1.15
"""Peak of resident memory while loading, of the bytes of the weights."""

MEASURE = """
import json, sys, torch
from open_pisces.model.pisces import Pisces

def resident(line):
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith(line))

small, large = sys.argv[1:]
Pisces.from_pretrained(small, torch.bfloat16)  # what libraries load on first use is not the model's
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
pisces = Pisces.from_pretrained(large, torch.bfloat16)
tensors = [*pisces.parameters(), *(pisces.decoder.vae.parameters())]
size = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
for tensor in tensors:
    tensor.view(torch.int16).max()  # every page is read, should it be mapped only
peak = resident("VmHWM") - before
print(json.dumps({"peak": peak, "size": size, "dtypes": sorted({str(t.dtype) for t in tensors})}))
"""


def shallow(config: ModelConfig) -> ModelConfig:
    """One layer where there are 32, and a quarter of the vocabulary: 2 GB instead of 23."""
    unet = config.decoder.unet | {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]}
    return config.model_copy(
        update={
            "llm": config.llm.model_copy(
                update={"config": config.llm.config | {"num_hidden_layers": 1, "vocab_size": 32768}}
            ),
            "understanding": config.understanding.model_copy(
                update={"config": config.understanding.config | {"num_hidden_layers": 1}}
            ),
            "generation": config.generation.model_copy(update={"layers": 1}),
            "decoder": config.decoder.model_copy(update={"unet": unet}),
        }
    )


def empty_part(name: str, config: ModelConfig) -> Any:
    """A part in bfloat16 whose weights are whatever memory holds."""
    with torch.device("meta"):
        part = build_part(name, config)
    return part.to(torch.bfloat16).to_empty(device="cpu")


@pytest.mark.timeout(300)
def test_loading_in_bfloat16_holds_the_weights_once_in_one_and_in_two_processes(
    nano_folder: Path, tmp_path: Path
) -> None:
    config = shallow(without_sources(load_config("8b/stage1").model))
    large = tmp_path / "large"
    write_folder(large, config, {name: empty_part(name, config) for name in PARTS})
    command = [sys.executable, "-c", MEASURE, str(nano_folder), str(large)]
    try:
        for count in (1, 2):
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            for process in processes:
                told, _ = process.communicate()
                assert process.returncode == 0
                found = json.loads(told.splitlines()[-1])
                assert found["size"] > 1.9e9 and found["dtypes"] == ["torch.bfloat16"]
                assert found["peak"] <= MOST * found["size"], (count, found)
    finally:
        for file in large.rglob("*.safetensors"):
            file.unlink()  # gigabytes, which pytest would keep for three runs
