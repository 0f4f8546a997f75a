"""The one model folder of parts: what trains, resumes, evaluates, serves and uploads.

::

    config.json               ours: settings, sha256 of every part's files, the training record, licences
    llm/                      any causal LM, as transformers saves it
    understanding_encoder/    SiglipVisionModel, as transformers saves it
    generation_encoder/       config.json, model.safetensors
    bridge/                   model.safetensors: projections, head, statistics of the targets
    decoder/                  unet/ vae/ scheduler/ as diffusers saves them; condition.safetensors
    tokenizer/                as transformers saves it
    README.md                 the model card

safetensors and JSON only. Trainings write the parts they have; those still to come are simply not there yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, SiglipVisionModel

from open_pisces.config import GenerationEncoderConfig, LossConfig, ModelConfig, validate
from open_pisces.errors import PiscesError
from open_pisces.model.build import PARTS, assemble, assemble_decoder, build_part
from open_pisces.model.decoder import PixelUnshuffleVAE
from open_pisces.model.encoders import GenerationEncoder, UnderstandingEncoder
from open_pisces.model.pisces import Pisces

WEIGHTS = Path(__file__).parent.parent / "weights" / "tiny"
FORMAT = 1


class ModelFolderError(PiscesError):
    """A model folder with a missing, damaged or mismatching part."""


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


def load_part(folder: str | Path, name: str, config: ModelConfig | None = None) -> nn.Module:
    """One part of a model folder, in float32.

    Raises:
        ModelFolderError: if the part is missing, altered, damaged, or of another shape than the folder's settings.
    """
    folder, config = Path(folder), config or read_config(folder)
    part = folder / name
    if not part.is_dir():
        raise ModelFolderError(f"{folder}: the part {name}/ is missing; this folder holds {_present(folder)}")
    verify(folder, name)
    try:
        return _LOADERS[name](part, config)
    except ModelFolderError:
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{part}: cannot be loaded: {str(error).splitlines()[0]}") from error


def load_pisces(folder: str | Path, dtype: torch.dtype | None = None, weights: LossConfig | None = None) -> Pisces:
    """A whole model, in evaluation mode; ``dtype`` defaults to float32 (statistics always stay float32)."""
    config = read_config(folder)
    parts = {name: load_part(folder, name, config) for name in PARTS}
    check_widths(Path(folder), parts)
    pisces = assemble(config, parts, weights).eval()
    pisces.folder = Path(folder)
    return pisces if dtype is None else pisces.to(dtype)


def check_widths(folder: Path, parts: dict[str, Any]) -> None:
    """Refuse parts that cannot be joined, naming both."""
    bridge, llm_width = parts["bridge"], parts["llm"].config.hidden_size
    wants = {
        "llm": (llm_width, bridge.head.first.in_features),
        "understanding_encoder": (
            parts["understanding_encoder"].width,
            bridge.understanding_projector.first.in_features,
        ),
        "generation_encoder": (parts["generation_encoder"].width, bridge.head.second.out_features),
    }
    if parts.get("decoder") is not None:
        wants["decoder"] = (parts["decoder"].unet.config.cross_attention_dim, bridge.head.second.out_features)
    for name, (has, expected) in wants.items():
        if has != expected:
            raise ModelFolderError(
                f"{folder}: {name}/ is {has} wide, bridge/ expects {expected}: they do not belong together"
            )


def verify(folder: Path, name: str) -> None:
    """Compare a part's files with the sha256 recorded when the folder was written."""
    for file, expected in read_card(folder)["parts"].get(name, {}).items():
        path = folder / name / file
        if not path.is_file():
            raise ModelFolderError(f"{folder}: the part {name}/ lacks its file {file}")
        if _sha256(path) != expected:
            raise ModelFolderError(
                f"{path}: differs from what config.json recorded: fetch it again, or, if you changed it on purpose, "
                f"take its line out of config.json"
            )


# ------------------------------------------------------------------------------------------------------ writing


def save_pisces(pisces: Pisces, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a whole model; tokenizer, record and licences of the folder it was loaded from go with it."""
    parts = {name: getattr(pisces, name) for name in PARTS if getattr(pisces, name) is not None}
    write_folder(folder, pisces.settings, parts, tokenizer, start=pisces.folder)


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
        parts: the modules to write.
        tokenizer: saved when given.
        start: a model folder whose other parts, tokenizer, record and licences are taken over.
        record: what this training was, appended to the record.
        dtype: the dtype to store floating-point weights in (bf16 for shipping); None keeps each module's own.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"{folder} exists and is no model folder: name a new one, it would be replaced as a whole"
        )
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        _fill(fresh, config, parts, tokenizer, start, record, dtype)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
    for name in [*PARTS, "tokenizer"]:
        written = name in parts or (name == "tokenizer" and tokenizer is not None)
        if start and not written and (Path(start) / name).is_dir():
            shutil.copytree(Path(start) / name, fresh / name, copy_function=_link)
            taken_over.add(name)
    for name, module in parts.items():
        _SAVERS[name](_cast(module, dtype), fresh / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(fresh / "tokenizer"))
    for name in set(parts) | {"tokenizer"} - taken_over:
        for file in (fresh / name).rglob("*config.json"):
            _forget_origin(file)
    settings = without_sources(config).model_dump(mode="json")
    records = before["record"] + ([record] if record else [])
    known = {name: before["parts"].get(name) for name in taken_over}  # what was not touched is not read again
    hashes = {n: known.get(n) or _hashes(fresh / n) for n in [*PARTS, "tokenizer"] if (fresh / n).is_dir()}
    card = {"format": FORMAT, "model": settings, "parts": hashes, "record": records}
    (fresh / "config.json").write_text(json.dumps(card, indent=1) + "\n")
    (fresh / "README.md").write_text(_readme(fresh, records))


def convert(source: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """Write a whole model folder anew with its weights in ``dtype``: what is shipped is bfloat16."""
    config = read_config(source)
    parts = {name: load_part(source, name, config) for name in PARTS}
    check_widths(Path(source), parts)
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
            "tokenizer": "folder",
            "llm": config.llm.model_copy(update=none),
            "understanding": config.understanding.model_copy(update=none),
            "generation": config.generation.model_copy(update=none),
            "decoder": config.decoder.model_copy(update=none),
        }
    )


def _readme(folder: Path, records: list[dict[str, Any]]) -> str:
    lines = ["---", "library_name: open_pisces", "pipeline_tag: any-to-any", "license: apache-2.0", "---", ""]
    lines += ["# A Pisces model folder", "", f"Parts: {_present(folder)}. Loaded by `open_pisces`; `llm/`,"]
    lines += ["`understanding_encoder/` and `decoder/` also by transformers and diffusers alone.", ""]
    lines += ["| training | steps | samples | minutes | device |", "|---|---|---|---|---|"]
    for r in records:
        lines.append(f"| {r['name']} | {r['steps']} | {r['samples']} | {r['seconds'] / 60:.1f} | {r['device']} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------- part by part


def _load_llm(path: Path, config: ModelConfig) -> nn.Module:
    llm, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    _complete(path, info)
    return llm


def _load_understanding(path: Path, config: ModelConfig) -> nn.Module:
    tower, info = SiglipVisionModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    _complete(path, info)
    return UnderstandingEncoder(tower, config.understanding_mean, config.understanding_std)


def _load_generation(path: Path, config: ModelConfig) -> nn.Module:
    settings = validate(GenerationEncoderConfig, json.loads((path / "config.json").read_text()), {"": str(path)})
    encoder = GenerationEncoder(settings, config.generation_mean, config.generation_std)
    encoder.load_state_dict(_floats(path / "model.safetensors"))
    return encoder


def _load_bridge(path: Path, config: ModelConfig) -> nn.Module:
    from open_pisces.model.bridge import Bridge

    weights = _floats(path / "model.safetensors")
    widths = weights["understanding_projector.first.weight"].shape[1], weights["head.first.weight"].shape[1]
    bridge = Bridge(config, *widths)
    bridge.load_state_dict(weights)
    return bridge


def _load_decoder(path: Path, config: ModelConfig) -> nn.Module:
    unet, info = UNet2DConditionModel.from_pretrained(
        path / "unet", torch_dtype=torch.float32, output_loading_info=True
    )
    _complete(path / "unet", info)
    values = json.loads((path / "vae" / "config.json").read_text())
    unshuffled = "unshuffle" in values
    vae: Any = PixelUnshuffleVAE(**values) if unshuffled else AutoencoderKL.from_pretrained(path / "vae")
    if not unshuffled:
        vae.requires_grad_(False)
    kind = json.loads((path / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(path / "scheduler")
    decoder = assemble_decoder(config, unet, vae, scheduler)
    decoder.condition.load_state_dict(_floats(path / "condition.safetensors"))
    return decoder


_LOADERS = {
    "llm": _load_llm,
    "understanding_encoder": _load_understanding,
    "generation_encoder": _load_generation,
    "bridge": _load_bridge,
    "decoder": _load_decoder,
}


def _save_generation(encoder: Any, path: Path) -> None:
    _save_module(encoder, path)
    (path / "config.json").write_text(encoder.config.model_copy(update={"source": None}).model_dump_json(indent=1))


def _save_module(module: nn.Module, path: Path) -> None:
    path.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path / "model.safetensors")


def _save_decoder(decoder: Any, path: Path) -> None:
    decoder.unet.save_pretrained(path / "unet")
    if isinstance(decoder.vae, PixelUnshuffleVAE):
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text(json.dumps({"unshuffle": decoder.vae.factor}))
    else:
        decoder.vae.save_pretrained(path / "vae")
    decoder.scheduler.save_pretrained(path / "scheduler")
    save_file(decoder.condition.state_dict(), path / "condition.safetensors")


_SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    "llm": lambda llm, path: llm.save_pretrained(path),
    "understanding_encoder": lambda encoder, path: encoder.tower.save_pretrained(path),
    "generation_encoder": _save_generation,
    "bridge": _save_module,
    "decoder": _save_decoder,
}


def _complete(path: Path, info: dict[str, Any]) -> None:
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ModelFolderError(f"{path}: weights do not fit its config.json, for example {wrong[0]}")


def _floats(path: Path) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(path).items()}


def _hashes(part: Path) -> dict[str, str]:
    files = sorted(p for p in part.rglob("*") if p.is_file())
    return {str(p.relative_to(part)): _sha256(p) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _present(folder: Path) -> str:
    return ", ".join(name for name in PARTS if (folder / name).is_dir()) or "no part"


# --------------------------------------------------------------------------------------------------- describing


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters and bf16 bytes of every part, built on the meta device: no weights, no memory."""
    parts = {}
    sources = dict(zip(PARTS, _sources(config), strict=True))
    for name in PARTS:
        with torch.device("meta"):
            module = build_part(name, without_sources(config))
        parts[name] = {"parameters": _count(module), "bytes": 2 * _count(module), "source": sources[name]}
        if name == "decoder":
            parts[name]["unet"] = _count(module.unet)  # type: ignore[arg-type]
    return {"parts": parts, "total": sum(p["parameters"] for p in parts.values())}


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """What a model folder holds: parts, parameters, bytes on disk, training record, licences of the data."""
    folder, card = Path(folder), read_card(folder)
    parts: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        if (folder / name).is_dir():
            size = sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
            parts[name] = {"parameters": _count(load_part(folder, name)), "bytes": size, "source": "trained here"}
    licences: dict[str, dict[str, Any]] = {}
    for record in card["record"]:
        licences |= {entry["package"]: entry for entry in record.get("licences", [])}
    total = sum(p["parameters"] for p in parts.values())
    trainings = [{k: v for k, v in record.items() if k != "licences"} for record in card["record"]]
    return {"parts": parts, "total": total, "record": trainings, "licences": list(licences.values())}


def _sources(config: ModelConfig) -> list[str]:
    sources = [config.llm.source, config.understanding.source, config.generation.source, None, config.decoder.source]
    return [source or "random" for source in sources]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
