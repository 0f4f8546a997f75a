"""The one model folder of parts: what trains, resumes, evaluates, serves and uploads.

::

    config.json               ours: settings, sha256 of every part's files, the training record, licences
    llm/                      any causal LM, as transformers saves it; whole, also with an adapter beside it
    adapter/                  LoRA on the LLM, as PEFT saves it (if there is one)
    understanding_encoder/    SiglipVisionModel, as transformers saves it
    generation_encoder/       config.json, model.safetensors
    bridge/                   model.safetensors: projections, head, statistics of the targets
    decoder/                  unet/ vae/ scheduler/ as diffusers saves them; condition.safetensors
    tokenizer/                as transformers saves it
    model_index.json          for diffusers, where there is a decoder
    README.md                 the model card

safetensors and JSON only. Trainings write the parts they have; those still to come are simply not there yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from open_pisces.config import ModelConfig
from open_pisces.files import WEIGHTS as WEIGHTS
from open_pisces.files import sha256_of, whole_folder
from open_pisces.model import adapters
from open_pisces.model.encoders import SharedEncoder
from open_pisces.model.heads import HEADS
from open_pisces.model.parts import PARTS, ModelFolderError, build_part, is_shared, llm_config
from open_pisces.settings import validate

FOLDERS = (*PARTS, "adapter", "tokenizer")
FORMAT = 1
NAMES = {"model_type": "pisces", "architectures": ["PiscesForConditionalGeneration"]}
"""What transformers' Auto classes look for (`integrations.transformers`)."""
PIPELINE = {"_class_name": "PiscesPipeline", "_diffusers_version": "0.42.1"}
"""The ``model_index.json`` that diffusers looks for (`integrations.diffusers`)."""


# ------------------------------------------------------------------------------------------------------ reading


def read_card(folder: str | Path) -> dict[str, Any]:
    """Our ``config.json`` of a model folder: ``format``, ``model``, ``parts``, ``record``, ``licences``."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"no model folder at {folder}: {path.name} is missing (train one, or pass --model)")
    try:
        card = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ModelFolderError(f"{path}: not an open_pisces model folder of format {FORMAT}")
    lacking = [key for key in ("model", "parts", "record") if key not in card]
    if lacking:
        raise ModelFolderError(f"{path}: lacks {lacking[0]!r}: fetch the folder again")
    return card


def read_config(folder: str | Path) -> ModelConfig:
    """The settings of the model in a folder."""
    return validate(ModelConfig, read_card(folder)["model"], {"": f"{folder}/config.json"})


def load_part(
    folder: str | Path,
    name: str,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = torch.float32,
    **how: Any,
) -> nn.Module:
    """One part of a model folder; its weights are read in ``dtype`` (None: as stored), without a copy in another one.

    Checksums are not compared here, `verify` does that: it costs a second read of all weights. ``how`` is the part's
    own: ``quantization_config`` of the LLM.

    Raises:
        ModelFolderError: if the part is missing, damaged, or of another shape than the folder's settings.
    """
    folder, config = Path(folder), config or read_config(folder)
    if name == "understanding_encoder" and is_shared(config):
        tower: Any = load_part(folder, "generation_encoder", config, dtype)
        return SharedEncoder(tower)
    part = folder / name
    if not part.is_dir():
        raise ModelFolderError(f"{folder}: the part {name}/ is missing; this folder holds {present(folder)}")
    for file in read_card(folder)["parts"].get(name, {}):
        if not (part / file).is_file():
            raise ModelFolderError(f"{folder}: the part {name}/ lacks its file {file}: fetch the folder again")
    if name == "llm" and (folder / "adapter").is_dir():
        adapters.check_base(folder / "adapter", read_card(folder)["parts"].get("llm", {}))
    try:
        return PARTS[name].load(part, config, dtype, **how)
    except (ModelFolderError, adapters.AdapterError):
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{part}: cannot be loaded: {str(error).splitlines()[0]}") from error


def load_parts(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, dict[str, Any]]:
    """The settings and all parts of a model folder.

    Raises:
        ModelFolderError: as `load_part` does, or if two parts do not belong together.
    """
    config = read_config(folder)
    parts: dict[str, Any] = {name: load_part(folder, name, config, dtype) for name in PARTS}
    check_widths(Path(folder), parts)
    return config, parts


def check_widths(folder: Path, parts: dict[str, Any]) -> None:
    """Refuse parts that cannot be joined, naming both."""
    bridge = parts["bridge"]
    llm_width = parts["llm"].config.hidden_size
    # Parts may come from different folders; a width that differs would fail deep inside a matrix product.
    wants = {
        "llm": (llm_width, bridge.head.llm_width),
        "understanding_encoder": (
            parts["understanding_encoder"].width,
            bridge.understanding_projector.first.in_features,
        ),
        "generation_encoder": (parts["generation_encoder"].width, bridge.head.width),
    }
    if parts.get("decoder") is not None:
        wants["decoder"] = (parts["decoder"].condition_width, bridge.head.width)
    for name, (has, expected) in wants.items():
        if has != expected:
            raise ModelFolderError(
                f"{folder}: {name}/ is {has} wide, bridge/ expects {expected}: they do not belong together"
            )


def verify(folder: str | Path) -> int:
    """Compare the files of all parts with the sha256 recorded when the folder was written; the number compared.

    Raises:
        ModelFolderError: naming the first file that is missing or differs.
    """
    folder = Path(folder)
    compared = 0
    for name, files in read_card(folder)["parts"].items():
        for file, expected in files.items():
            path = folder / name / file
            if not path.is_file():
                raise ModelFolderError(f"{folder}: the part {name}/ lacks its file {file}: fetch the folder again")
            if sha256_of(path) != expected:
                raise ModelFolderError(
                    f"{path}: differs from what config.json recorded: fetch it again, or, if you changed it on "
                    f"purpose, take its line out of config.json"
                )
            compared += 1
    return compared


# ------------------------------------------------------------------------------------------------------ writing


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    parts: dict[str, Any],
    tokenizer: Any = None,
    start: str | Path | None = None,
    record: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder atomically.

    Args:
        folder: replaced as a whole when everything is written.
        config: settings of the model; where its parts came from is not kept, they are here now.
        parts: the modules to write. ``adapter`` is an LLM of which its adapter alone is written.
        tokenizer: saved when given.
        start: a model folder whose other parts, tokenizer, record and licences are taken over.
        record: what this training was, appended to the record.
        dtype: the dtype to store floating-point weights in (bf16 for shipping); None keeps each module's own.

    Raises:
        ModelFolderError: if ``folder`` holds something else.
        AdapterError: for an adapter that could not be loaded again.
    """
    adapters.check_adapters(parts)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"{folder} exists and is no model folder: name a new one, it would be replaced as a whole"
        )
    # Written beside and renamed: a killed process leaves the old folder or the new one, never half of each.
    # One name for all processes: what a killed one left, perhaps gigabytes, goes with the next write.
    with whole_folder(folder, folder.with_name(folder.name + ".new")) as fresh:
        _fill(fresh, config, parts, tokenizer, start, record, dtype)


def _fill(
    fresh: Path,
    config: ModelConfig,
    parts: dict[str, Any],
    tokenizer: Any,
    start: str | Path | None,
    record: dict[str, Any] | None,
    dtype: torch.dtype | None,
) -> None:
    before = read_card(start) if start else {"record": [], "parts": {}}
    taken_over: set[str] = set()
    for name in FOLDERS:
        # Parts that this training did not change are linked, not copied: an 8b folder has tens of GB.
        owner = "llm" if name == "adapter" else name  # an adapter belongs to the LLM it was trained on
        written = owner in parts or name in parts or (name == "tokenizer" and tokenizer is not None)
        if start and not written and (Path(start) / name).is_dir():
            shutil.copytree(Path(start) / name, fresh / name, copy_function=_link)
            taken_over.add(name)
    for name, module in parts.items():
        save = adapters.save_adapter if name == "adapter" else PARTS[name].save
        save(_cast(module, dtype), fresh / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(fresh / "tokenizer"))
    for name in set(FOLDERS) - taken_over:
        for file in (fresh / name).rglob("*config.json"):
            _forget_origin(file)
    settings = without_sources(config).model_dump(mode="json")
    records = before["record"] + ([record] if record else [])
    known = {name: before["parts"].get(name) for name in taken_over}  # what was not touched is not read again
    llm = known.get("llm") or _hashes(fresh / "llm")
    if (fresh / "adapter").is_dir() and "adapter" not in taken_over:
        (fresh / "adapter" / adapters.BASE_FILE).write_text(json.dumps(llm, indent=1) + "\n")
    known["llm"] = llm
    hashes = {n: known.get(n) or _hashes(fresh / n) for n in FOLDERS if (fresh / n).is_dir()}
    card = {**NAMES, "format": FORMAT, "model": settings, "parts": hashes, "record": records}
    (fresh / "config.json").write_text(json.dumps(card, indent=1) + "\n")
    if "decoder" in hashes:
        (fresh / "model_index.json").write_text(json.dumps(PIPELINE, indent=1) + "\n")
    (fresh / "README.md").write_text(_readme(fresh, records))


def keep_parts(source: str | Path, out: str | Path, names: Sequence[str]) -> None:
    """A model folder of some parts of another one, and its tokenizer, as links: what a training starts from that is to
    build the others anew.

    Raises:
        ModelFolderError: if the source lacks one of them.
    """
    source, card = Path(source), read_card(source)
    for name in names:
        if not (source / name).is_dir():
            raise ModelFolderError(f"{source}: the part {name}/ is missing; this folder holds {present(source)}")
    with whole_folder(Path(out)) as fresh:
        for name in (*names, "tokenizer"):
            if (source / name).is_dir():
                shutil.copytree(source / name, fresh / name, copy_function=_link)
        parts = {name: files for name, files in card["parts"].items() if (fresh / name).is_dir()}
        (fresh / "config.json").write_text(json.dumps({**card, "parts": parts}, indent=1) + "\n")


def convert(source: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """Write a whole model folder anew with its weights in ``dtype`` and its adapter merged: what is shipped."""
    verify(source)
    config, parts = load_parts(source)
    parts["llm"] = adapters.merge_adapter(parts["llm"])
    write_folder(out, config, parts, start=source, dtype=dtype)


def _link(source: str, target: str) -> str:
    """A second name for the same file where the disk can do that; parts are written anew, never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _forget_origin(file: Path) -> None:
    """The libraries note where a part was loaded from: a path of this machine, and never the same bytes twice."""
    values = json.loads(file.read_text())
    kept = {k: v for k, v in values.items() if k not in ("_name_or_path", "is_local", "local_files_only")}
    if kept != values:
        file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _cast(module: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return module
    import copy

    return copy.deepcopy(module).to(dtype)


def without_sources(config: ModelConfig) -> ModelConfig:
    """The same shapes with fresh weights: nothing to read or fetch."""
    none = {"source": None}
    return config.model_copy(
        update={
            "start": None,
            "fresh": [],  # what was new is trained now: who starts from here keeps it
            "tokenizer": "folder",
            "llm": config.llm.model_copy(update=none),
            "understanding": config.understanding.model_copy(update=none),
            "generation": config.generation.model_copy(update=none),
            "decoder": config.decoder.model_copy(update=none),
        }
    )


def _readme(folder: Path, records: list[dict[str, Any]]) -> str:
    lines = ["---", "library_name: open_pisces", "pipeline_tag: any-to-any", "license: apache-2.0", "---", ""]
    lines += ["# A Pisces model folder", "", f"Parts: {present(folder)}. Loaded by `open_pisces`; `llm/`"]
    if (folder / "decoder" / "unet").is_dir():
        lines[-1] += ","
        lines += ["`understanding_encoder/` and `decoder/` also by transformers and diffusers alone.", ""]
    else:
        lines += ["and `understanding_encoder/` also by transformers alone.", ""]
    lines += ["| training | steps | samples | minutes | device |", "|---|---|---|---|---|"]
    for r in records:
        lines.append(f"| {r['name']} | {r['steps']} | {r['samples']} | {r['seconds'] / 60:.1f} | {r['device']} |")
    return "\n".join(lines) + "\n"


def _hashes(part: Path) -> dict[str, str]:
    files = sorted(p for p in part.rglob("*") if p.is_file())
    return {str(p.relative_to(part)): sha256_of(p) for p in files}


def present(folder: Path) -> str:
    """The parts that a model folder holds, for messages."""
    return ", ".join(name for name in PARTS if (folder / name).is_dir()) or "no part"


def in_start(model: ModelConfig, name: str) -> bool:
    """Whether a training takes a part from the folder that it starts from."""
    if name == "understanding_encoder" and is_shared(model):
        name = "generation_encoder"
    return bool(model.start) and name not in model.fresh and (Path(model.start or "") / name).is_dir()


def get_part(
    name: str, model: ModelConfig, vocabulary: int | None = None, dtype: torch.dtype | None = torch.float32, **how: Any
) -> Any:
    """The part as the start folder has it (`load_part`), or else a new one in float32."""
    if name == "bridge" and model.start and (Path(model.start) / name).is_dir():
        return _start_bridge(model, dtype)
    if not in_start(model, name):
        return build_part(name, model, vocabulary)
    return load_part(model.start or "", name, model, dtype, **how)


def _start_bridge(model: ModelConfig, dtype: torch.dtype | None) -> Any:
    """The start folder's bridge; what no longer fits is new: the MLPs for another LLM, or a head of another kind."""
    before = read_config(model.start or "")
    bridge = load_part(model.start or "", "bridge", before, dtype)
    if model.fresh:
        fresh = build_part("bridge", model)
        # The targets' scale belongs to gen-CLIP and the decoder, not to the LLM.
        fresh.statistics = bridge.statistics
        return fresh
    head: Any = bridge.head
    width = llm_config(model).hidden_size
    if head.llm_width != width:
        raise ModelFolderError(
            f"{model.start}: its bridge/ is of an LLM {head.llm_width} wide, the LLM is {width} wide: set "
            "model.fresh=[bridge] to train new MLPs around it"
        )
    if before.bridge.same_head(model.bridge):
        return bridge
    bridge.head = HEADS[model.bridge.head](head.llm_width, head.width, model.bridge)
    return bridge


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)  # of numbers without a shape too, such as CLIP's scale
        digest.update(flat.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
