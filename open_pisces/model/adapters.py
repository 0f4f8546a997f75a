"""LoRA and other PEFT adapters on the LLM: saved beside the whole base, loaded again, merged.

An adapter may be attached in any of PEFT's three ways: ``pisces.llm.add_adapter(config)``,
``pisces.llm = get_peft_model(pisces.llm, config)`` or ``get_peft_model(pisces, config)``. In a model folder the base
stays whole in ``llm/`` and the adapter is ``adapter/`` in PEFT's format: vLLM and PEFT can use both as they are.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from open_pisces.config import LoraConfig
from open_pisces.errors import PiscesError

_INSTALL = "pip install 'open-pisces[lora]'"
_INSTALL_4BIT = "pip install 'open-pisces[qlora]'"
_BY_PATH = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "target_parameters")
"""Settings that name modules by their path: those of a whole Pisces do not hold for its LLM alone."""


BASE_FILE = "base.json"
"""In an adapter's folder: sha256 of the files of the LLM that it was trained on."""


class AdapterError(PiscesError):
    """An adapter that cannot be saved, loaded or merged; the message names it and the remedy."""


def adapter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module that PEFT has wrapped, by name; empty without an adapter."""
    if not any("peft." in type(part).__module__ for part in module.modules()):
        return {}  # PEFT need not be installed
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def base_llm(llm: Any) -> Any:
    """The transformers model inside a ``PeftModel``, or the model itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def adopt_adapter(pisces: Any) -> None:
    """Give the LLM the configuration of an adapter that was attached to the whole model, in the LLM's own paths.

    Raises:
        AdapterError: if the configuration names modules in a way that holds for the whole model only.
    """
    configs = getattr(pisces, "peft_config", None)
    llm = base_llm(pisces.llm)
    layers = adapter_layers(llm)
    if not configs or not layers or getattr(llm, "peft_config", None):
        return
    localized = copy.deepcopy(configs)
    for name, config in localized.items():
        by_path = [setting for setting in _BY_PATH if getattr(config, setting, None)]
        if by_path:
            raise AdapterError(f"adapter {name!r} on the whole model has {by_path[0]}: attach it to pisces.llm instead")
        config.target_modules = set(layers)
        config.exclude_modules = None
    llm.peft_config = localized


def check_adapters(parts: dict[str, nn.Module]) -> None:
    """Refuse what could not be loaded again, before anything is written.

    Args:
        parts: the parts of a model that are to be written, by name.

    Raises:
        AdapterError: for an adapter outside the LLM, several adapters, one that is merged, or one that is no layer.
    """
    for name, part in parts.items():
        layers = adapter_layers(part) if isinstance(part, nn.Module) else {}
        if name not in ("llm", "adapter") and layers:
            raise AdapterError(
                f"{name}: {next(iter(layers))} carries an adapter, only the LLM's can be saved: restrict "
                "target_modules to the LLM, or merge_and_unload() first"
            )
        if name in ("llm", "adapter"):
            _check_llm(part)


def _check_llm(llm: nn.Module) -> None:
    base = base_llm(llm)
    layers = adapter_layers(base)
    if not layers and base is llm:
        return
    if not layers:
        raise AdapterError(
            f"llm: {type(llm).__name__} changes no layer (prompt tuning?): only adapters in layers are saved"
        )
    name, config = _only_config(base)
    if getattr(config, "bias", "none") != "none":
        raise AdapterError(f"llm: adapter {name!r} has bias = {config.bias!r}, which changes the base: set bias='none'")
    merged = [key for key, layer in layers.items() if getattr(layer, "merged", False)]
    if merged:
        raise AdapterError(f"llm: {merged[0]} holds its adapter merged: unmerge_adapter() or merge_and_unload() first")


def _only_config(base: Any) -> tuple[str, Any]:
    configs = getattr(base, "peft_config", None) or {}
    if len(configs) != 1:
        names = ", ".join(configs) or "none that is known"
        raise AdapterError(f"llm: one adapter can be saved, found {names}: delete or merge the others")
    return next(iter(configs.items()))


# ---------------------------------------------------------------------------------------------------- attaching


def attach_adapter(llm: Any, config: LoraConfig, new_tokens: Sequence[int] = ()) -> None:
    """Give an LLM a new LoRA adapter that learns, or let the one it has learn on; its own weights are frozen.

    Args:
        llm: a transformers model.
        config: of the adapter.
        new_tokens: tokens that the LLM has never seen, whose embeddings learn beside the adapter.

    Raises:
        AdapterError: if PEFT is not installed, the LLM's adapter is another one, or has no layer of a name.
    """
    try:
        import peft
    except ImportError:
        raise AdapterError(f"train.lora needs PEFT: {_INSTALL}") from None
    if adapter_layers(llm):
        name, before = _only_config(base_llm(llm))
        if getattr(before, "r", None) != config.rank:
            rank = getattr(before, "r", "?")
            raise AdapterError(
                f"train.lora.rank = {config.rank}, and model.start holds an adapter of rank {rank}: set the same, or "
                "merge it first with `pisces export`"
            )
        own = {f"{key}.{name}." for key in ("lora_A", "lora_B")}
        for key, parameter in llm.named_parameters():
            parameter.requires_grad_(any(part in key for part in own) or "trainable_tokens_delta" in key)
        _leave_inputs(llm)
        return
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        trainable_token_indices=list(new_tokens) or None,
        bias="none",
    )
    try:
        llm.add_adapter(settings)
    except ValueError as error:
        raise AdapterError(f"train.lora.targets = {config.targets}: {str(error).splitlines()[0]}") from None
    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # also beside a bfloat16 base: its steps would be rounded away
    _leave_inputs(llm)


def _leave_inputs(llm: nn.Module) -> None:
    """Spare what goes into an adapter beside a half-precision base the way to float32, which autocast takes back."""
    layers: list[Any] = list(adapter_layers(llm).values())
    for layer in layers:
        half = getattr(getattr(layer, "base_layer", None), "weight", None)
        if half is not None and half.dtype in (torch.bfloat16, torch.float16):
            layer.cast_input_dtype_enabled = False


# ------------------------------------------------------------------------------------------------------ writing


def save_base(llm: nn.Module, path: Path) -> None:
    """Write the base of an LLM with adapters, whole and under its own names, as transformers saves it.

    Raises:
        AdapterError: if the base's weights cannot be told from the adapter's, for example in a quantized base.
    """
    base = base_llm(llm)
    _plain(base, {_base_name(name): value for name, value in base.state_dict().items()}).save_pretrained(path)


def _plain(base: Any, weights: dict[str, Tensor]) -> Any:
    """A model of the same class without PEFT's traces, which transformers would write into the files; same memory."""
    with init_empty_weights(include_buffers=False):
        plain = type(base)(copy.deepcopy(base.config))
    expected = plain.state_dict()
    for name, value in expected.items():
        if name not in weights or weights[name].shape != value.shape:
            raise AdapterError(f"llm: the base's {name} is not whole under the adapter: merge it, or save it with PEFT")
    plain.load_state_dict({name: weights[name] for name in expected}, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    return plain


def _base_name(name: str) -> str:
    for wrapper in (".token_adapter.base_layer.", ".base_layer.", ".original_module."):
        name = name.replace(wrapper, ".")
    return name


def save_adapter(llm: nn.Module, path: Path) -> None:
    """Write an LLM's adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict

    base = base_llm(llm)
    name, config = _only_config(base)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.base_model_name_or_path = None
    if hasattr(config, "init_lora_weights"):  # loading fills them; PiSSA's start, for one, would change the base
        config.init_lora_weights = True
    path.mkdir(parents=True)
    config.save_pretrained(str(path))
    _sort_lists(path / "adapter_config.json")
    weights = get_peft_model_state_dict(base, adapter_name=name)
    named = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(named, path / "adapter_model.safetensors", {"format": "pt"})


def _sort_lists(file: Path) -> None:
    """PEFT writes sets in the order of their hashes; the same adapter shall be the same bytes."""
    values = json.loads(file.read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------------ reading


def load_adapter(llm: Any, path: Path) -> None:
    """Attach the adapter of a folder to an LLM, frozen.

    Raises:
        AdapterError: if PEFT is not installed, or the adapter does not fit.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise AdapterError(f"{path}: this model has an adapter, which needs PEFT: {_INSTALL}") from None
    dtype = llm.dtype
    try:
        with _no_report():
            info = llm.load_adapter(str(path))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = [key for key in info.missing_keys if not _is_tied(llm, key)]
    wrong = [*missing, *info.mismatched_keys, *info.unexpected_keys]
    if wrong:
        raise AdapterError(f"{path}: does not fit llm/, for example {wrong[0]}")
    for parameter in llm.parameters():
        if parameter.is_floating_point():  # quantized weights are bytes
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of keys: it lists the second name of tied weights as missing; we check them all."""
    reports = logging.getLogger("transformers.integrations.peft")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reports.setLevel(level)


def check_base(path: Path, files: dict[str, str]) -> None:
    """Refuse an adapter that was trained on another base. One that does not say on which is taken as it is.

    Args:
        path: the adapter's folder.
        files: sha256 of each file of the LLM, as its model folder records them.

    Raises:
        AdapterError: naming the first file of weights that differs.
    """
    note = path / BASE_FILE
    if not note.is_file():
        return
    for file, digest in json.loads(note.read_text()).items():
        # Settings may be edited; weights that differ make another model.
        if file.endswith(".safetensors") and files.get(file) != digest:
            found = f"sha256 {files[file][:12]}" if file in files else "missing"
            raise AdapterError(
                f"{path}: an adapter of another base: its llm/{file} is sha256 {digest[:12]}, here it is {found}: put "
                "the adapter beside the LLM that it was trained on"
            )


def nf4() -> Any:
    """How transformers is to quantize the base of a QLoRA: 4-bit normal floats, their scales quantized too.

    Raises:
        AdapterError: if bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise AdapterError(f"train.lora.bits = 4 needs bitsandbytes: {_INSTALL_4BIT}, or set 16")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def keep_trainable(llm: nn.Module) -> None:
    """Stop quantized layers from laying out their weights anew when they compute without gradients on a CPU.

    bitsandbytes 0.50 leaves them so, and no gradient comes through them afterwards: a probe would end the learning.
    """
    for layer in llm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_tied(llm: nn.Module, key: str) -> bool:
    """Whether a tensor is another's: embeddings of new tokens, in an output layer that is tied to them."""
    name, found, _ = key.partition(".trainable_tokens")
    return bool(found) and getattr(llm.get_submodule(name), "tied_adapter", None) is not None


def merge_adapter(llm: nn.Module) -> Any:
    """The LLM with its adapter merged into its weights, which are changed in place; the same LLM if it has none.

    Raises:
        AdapterError: for an adapter that cannot be merged.
    """
    base = base_llm(llm)
    layers = adapter_layers(base)
    if not layers:
        return llm
    for name, layer in _outermost(layers):
        parent, _, leaf = name.rpartition(".")
        if hasattr(layer, "token_adapter"):
            layer.token_adapter.merge(safe_merge=True)
            plain = layer.token_adapter.get_base_layer()
        elif hasattr(layer, "modules_to_save"):
            plain = layer.modules_to_save[layer.active_adapter]
        else:
            try:
                if not layer.merged:
                    layer.merge(safe_merge=True)
            except (ValueError, NotImplementedError) as error:
                raise AdapterError(f"llm: {name} cannot be merged: {error}") from None
            plain = layer.get_base_layer()
        setattr(base.get_submodule(parent), leaf, plain)
    return _plain(base, base.state_dict())


def _outermost(layers: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Wrapped layers that lie in no other: a wrapper's own modules go with it."""
    for name, layer in layers.items():
        if not any(name.startswith(f"{other}.") for other in layers):
            yield name, layer


def adapter_summary(path: Path) -> str:
    """Kind and rank of an adapter folder, in words."""
    values = json.loads((path / "adapter_config.json").read_text())
    return f"{values.get('peft_type', 'adapter')} of rank {values.get('r', '?')}"
